"""VMamba for inference on a GPU: weights folded once, norms, activations and residuals inside the matrix products.

`fuse_for_gpu` makes a new module; the model it came from stays as it is. What is done, and only where it was measured
to pay (docs/performance.md): the affine part of each norm goes into the linear layer after it; on narrow maps, where
products are bound by memory, norm, product and residual are one kernel and so is the whole MLP; on wide maps a branch
is added to the residual by the norm that follows, which also does what is left of the norm after the scan; the first
layers of the stem are one kernel each; the scan gives its result in 16 bits.
"""

import copy
from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.models.layers import LayerNorm, have_hooks
from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VMamba, VSSBlock
from vmamba.ops import ss2d_scan
from vmamba.ops.convolution.api import conv_norm, depthwise_silu
from vmamba.ops.layer_norm.api import add_norm
from vmamba.ops.linear.api import HIDDEN_STEP, can_split, linear_gelu, norm_linear, norm_mlp, why_not

if TYPE_CHECKING:
    from vmamba.models.config import VMambaConfig

_ROW = 256  # the most channels whose rows fit in a tile beside the weights
_NARROW = 192  # the most channels of the map for products to be bound by memory


def fuse_for_gpu(model: VMamba, dtype: torch.dtype = torch.bfloat16) -> "FusedVMamba":
    """Make the inference form of a model on its GPU. One way: weights cannot be read back out of it.

    Args:
        model: on a CUDA device; left as it is.
        dtype: bfloat16 or float16, of weights and maps. States, sums and norms are float32 all the same.

    Returns:
        A module with `forward`, `forward_features` and `forward_head` of the model, in evaluation mode, without
        gradients; logits as far from float32 as those of `model.to(dtype)`. Compile it with `torch.compile`.

    Raises:
        ValueError: the model is of a kind that has no fused form, or is not where the kernels run; says which.
    """
    probe = next(model.parameters()).new_empty(0, dtype=dtype)
    if reason := why_not(probe) or _unsupported(model.config) or changed_layer(model):
        raise ValueError(f"this model cannot be fused for a GPU: {reason}")
    return FusedVMamba(model, dtype)


def _unsupported(config: "VMambaConfig") -> str | None:
    """Name the first field of a configuration that the fused form does not know."""
    known = {
        "norm_layer": ("ln", "ln2d"),
        "post_norm": (False,),
        "gated": (False,),
        "gated_mlp": (False,),
        "out_norm": ("norm",),
        "out_act": (False,),
        "ssm_act": ("silu",),
        "mlp_act": ("gelu",),
        "d_conv": (3,),
        "routes": ("cross2d", "bidi", "unidi"),
        "sequential_routes": (False,),
        "force_fp32": (False,),
        "stem": ("overlap",),
        "patch_size": (4,),
        "patch_norm": (True,),
        "pos_embed": (False,),
    }
    for field, values in known.items():
        if (value := getattr(config, field)) not in values:
            return f"it has {field}={value!r}, and the fused form knows {' and '.join(map(repr, values))}."
    if config.ssm_ratio <= 0 or config.mlp_ratio <= 0:
        return "its blocks lack one of the two branches."
    if any(dim % 32 for dim in config.stage_dims) or config.stage_dims[0] not in (64, 96, 128, 192, 256):
        return f"its widths {config.stage_dims} are not those of the stem's kernels (64, 96, 128, 192 or 256, doubled)."
    return None


def changed_layer(model: VMamba) -> str | None:
    """Name the first layer that is not as the configuration makes it, whose change the fused form would leave out."""
    with torch.device("meta"):
        made = VMamba(model.config)
    expected = {name: (type(module), module.extra_repr()) for name, module in made.named_modules()}
    for name, module in model.named_modules():
        if not name.startswith(("patch_embed", "layers")) or ".downsample" in name:  # the others are kept as they are
            continue
        if have_hooks((module,)):
            return f"{name} has a hook, which the fused form would not call; remove it, or register it on the result."
        if expected.get(name) != (type(module), module.extra_repr()):
            return f"{name} is not the layer that its configuration makes, and the fused form knows no other."
    return None


class _Folded(nn.Module):
    """W·diag(γ), its rows less their mean, and b + W β of a norm and the linear layer after it.

    With such rows what is left of the norm is one number a row of the map, 1/σ: the product takes the mean out itself.
    """

    def __init__(self, norm: LayerNorm, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        wide = weight.detach().float()
        shift = wide @ norm.bias.detach().float()
        self.eps = norm.eps
        self.narrow = min(wide.shape) <= _NARROW and wide.shape[1] <= _ROW and can_split(wide.shape[1])
        scaled = wide * norm.weight.detach().float()
        self.register_buffer("weight", (scaled - scaled.mean(1, keepdim=True)).to(dtype).contiguous())
        shift = shift if bias is None else shift + bias.detach().float()
        self.register_buffer("bias", shift if self.narrow else shift.to(dtype))  # as cuBLAS takes it

    weight: Tensor
    bias: Tensor

    def normed(self, x: Tensor) -> Tensor:
        """Apply what is left of the norm."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Norm, product, residual."""
        if self.narrow:
            return norm_linear(x, self.weight, self.bias, residual, eps=self.eps)
        y = F.linear(self.normed(x), self.weight, self.bias)
        return y if residual is None else residual + y


class FusedBlock(nn.Module):
    """A VSS block: (B, H, W, D) to (B, H, W, D)."""

    def __init__(self, block: VSSBlock, dtype: torch.dtype) -> None:
        super().__init__()
        op, mlp = block.op, block.mlp
        assert isinstance(op, SS2D)
        assert mlp is not None
        assert op.conv2d is not None
        assert isinstance(block.norm, LayerNorm)
        assert isinstance(block.norm2, LayerNorm)
        assert isinstance(op.out_norm, LayerNorm)
        self.routes, self.backend = op.routes, op.backend
        self.in_proj = _Folded(block.norm, op.in_proj.weight, None, dtype)
        self.out_proj = _Folded(op.out_norm, op.out_proj.weight, None, dtype)
        self.fc1 = _Folded(block.norm2, mlp.fc1.weight, mlp.fc1.bias, dtype)
        conv_bias = op.conv2d.bias
        A, D, dt_bias = op._scan_parameters()
        buffers = {
            "conv_weight": op.conv2d.weight[:, 0].float(),  # (E, 3, 3)
            "conv_bias": None if conv_bias is None else conv_bias.float(),
            "x_proj_weight": op.x_proj_weight.flatten(0, 1).to(dtype),
            "dt_weight": op.dt_projs_weight.to(dtype),
            "dt_bias": dt_bias.float(),
            "A": A.float(),
            "D": D.float(),
            "fc2_weight": mlp.fc2.weight.to(dtype),
            "fc2_bias": mlp.fc2.bias.float() if self.fc1.narrow else mlp.fc2.bias.to(dtype),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone().contiguous())

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    @property
    def wide(self) -> bool:
        """Whether products stay on their own, so that residuals are best added by the norm that comes next."""
        return not (self.in_proj.narrow or self.out_proj.narrow or self.fc1.narrow)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        x = self.out_proj(self._scan(self.in_proj(x)), x)
        fc1 = self.fc1
        if fc1.narrow and fc1.weight.shape[0] % HIDDEN_STEP == 0:
            return norm_mlp(x, fc1.weight, fc1.bias, self.fc2_weight, self.fc2_bias, eps=fc1.eps)
        return x + (self._mlp(fc1.normed(x)) + self.fc2_bias.to(x.dtype))

    def forward_wide(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Map x and its norm to x after the first branch, and the second branch without `fc2_bias`."""
        scanned = self._scan(F.linear(normed, self.in_proj.weight, self.in_proj.bias))
        out_proj = self.out_proj
        branch = F.linear(scanned, out_proj.weight)
        x, normed = add_norm(x, branch, out_proj.bias, scanned, eps=self.fc1.eps, source_eps=out_proj.eps)
        return x, self._mlp(normed)

    def _scan(self, u: Tensor) -> Tensor:
        """Convolve, activate and scan (B, H, W, E)."""
        B, H, W, _ = u.shape
        u = depthwise_silu(u, self.conv_weight, self.conv_bias).flatten(1, 2)
        y = ss2d_scan(
            u,
            F.linear(u, self.x_proj_weight),
            self.dt_weight,
            self.dt_bias,
            self.A,
            self.D,
            height=H,
            width=W,
            routes=self.routes,
            out_dtype=u.dtype,
            backend=self.backend,
        )
        return y.view(B, H, W, -1)

    def _mlp(self, normed: Tensor) -> Tensor:
        """Compute the MLP without its last bias."""
        return F.linear(linear_gelu(normed, self.fc1.weight, self.fc1.bias), self.fc2_weight)


class FusedStage(nn.Module):
    """The blocks of one resolution: (B, H, W, D) to (B, H, W, D)."""

    def __init__(self, blocks: Iterable[FusedBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks; on wide maps each branch is added in the norm that follows it."""
        blocks: Any = list(self.blocks)
        if not all(block.wide for block in blocks):
            for block in blocks:
                x = block(x)
            return x
        normed = blocks[0].in_proj.normed(x) if blocks else x
        for block, following in zip_longest(blocks, blocks[1:]):
            x, branch = block.forward_wide(x, normed)
            if following is None:
                return x + (branch + block.fc2_bias.to(x.dtype))
            x, normed = add_norm(x, branch, block.fc2_bias, eps=following.in_proj.eps)
        return x


class _StemLayer(nn.Module):
    """A convolution of stride 2, its norm, perhaps GELU: (B, C, H, W) to (B, H / 2, W / 2, N)."""

    def __init__(self, conv: nn.Conv2d, norm: LayerNorm, gelu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.gelu = norm.eps, gelu
        filters = conv.weight.detach().permute(2, 3, 1, 0).reshape(-1, conv.out_channels)
        self.register_buffer("weight", filters.to(dtype).contiguous())
        assert conv.bias is not None
        for name, tensor in (("bias", conv.bias), ("gamma", norm.weight), ("beta", norm.bias)):
            self.register_buffer(name, tensor.detach().float().clone())

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        return conv_norm(x, self.weight, self.bias, self.gamma, self.beta, eps=self.eps, gelu=self.gelu)


class FusedVMamba(nn.Module):
    """The inference form of a VMamba; see `fuse_for_gpu`."""

    def __init__(self, model: VMamba, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.num_classes, self.dtype = model.config, model.num_classes, dtype
        self.global_pool, self.in_chans = model.global_pool, model.in_chans
        layers: Any = model.patch_embed
        first, norm1, second, norm2 = (layers[i] for i in (0, 2, 5, 7))
        self.stem = nn.Sequential(_StemLayer(first, norm1, True, dtype), _StemLayer(second, norm2, False, dtype))
        self.stages, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for stage in model.stages():
            blocks: Any = stage.blocks
            self.stages.append(FusedStage(FusedBlock(block, dtype) for block in blocks))
            self.downsamples.append(copy.deepcopy(stage.downsample).to(dtype))
        self.norm = copy.deepcopy(model.classifier.norm).to(dtype)
        self.head = copy.deepcopy(model.classifier.head).to(dtype)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the normalised last map (B, C, H/32, W/32)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W); got shape {tuple(x.shape)}")
        x = self.stem[1](self.stem[0](x.to(self.dtype)).permute(0, 3, 1, 2))
        for blocks, downsample in zip(self.stages, self.downsamples, strict=True):
            x = downsample(blocks(x))
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `forward_features`'s (B, C, h, w) to logits; to the pooled features (B, C) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)
