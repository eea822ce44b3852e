"""The small layers of VMamba, all on channels-last maps (B, H, W, C)."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.ops.convolution.api import depthwise_silu, takes_depthwise
from vmamba.ops.layer_norm.api import layer_norm, skip_norm
from vmamba.ops.mlp.api import mlp, takes_mlp
from vmamba.ops.stem.api import first_layer, takes_first_layer

ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, in float32 inside, also of a float32 map under 16-bit weights.

    Under bfloat16 autocast the result is bfloat16, so that what follows stays in 16 bits: above all the residual
    stream, which starts at a norm. Under float16 autocast, whose range a sum of residuals could leave, it is float32.

    Attributes:
        keep_float32: give float32 under bfloat16 autocast too.
    """

    keep_float32 = False

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise (..., C), rounded once to `dtype` if one is asked for."""
        if dtype is None and (dtype := autocast_dtype(x)) is not None:
            dtype = torch.bfloat16 if dtype == torch.bfloat16 and not self.keep_float32 else torch.float32
        return layer_norm(x, self.weight, self.bias, self.eps, dtype or x.dtype)

    def with_skip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x for the residual and its norm in the dtype that products run in; see `skip_norm`."""
        return skip_norm(x, self.weight, self.bias, self.eps, autocast_dtype(x) or x.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Give the dtype that autocast brings products of x to, or None where it leaves them alone."""
    kind = x.device.type
    # Meta tensors have no autocast, and asking torch.amp which devices have breaks the graph in torch 2.11.
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d of a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, H, W, C) over B, H and W."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def make_norm(kind: Literal["ln", "ln2d", "bn"], channels: int) -> nn.Module:
    """Return the norm that a configuration names; "ln" and "ln2d" differ in the published code's memory layout only."""
    return BatchNorm(channels) if kind == "bn" else LayerNorm(channels)


class ToChannelsLast(nn.Module):
    """View (B, C, H, W) as (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute; no copy."""
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """View (B, H, W, C) as (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute; no copy."""
        return x.permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map, size kept."""

    def __init__(self, channels: int, kernel_size: int, *, bias: bool) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def convolve_activate(x: Tensor, conv: nn.Module | None, act: nn.Module) -> Tensor:
    """Convolve (B, H, W, C), if there is a convolution, and activate; on a GPU in 16 bits in one kernel."""
    if conv is None:
        return act(x)
    known = isinstance(conv, DepthwiseConv2d) and conv.kernel_size == (3, 3) and type(act) is nn.SiLU
    if known and takes_depthwise(x) and not have_hooks((conv, act)):
        weight: Any = conv.weight
        return depthwise_silu(x, weight.squeeze(1), conv.bias)  # type: ignore[arg-type]
    y: Tensor = act(conv(x))
    return y


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return x.flatten(1, 2).softmax(dim=1).view(x.shape)


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch of an image with probability `rate`, scale what is kept."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ...) with some images' branches zeroed, in training only."""
        factors = self.draw(x)
        return x if factors is None else x * factors

    def draw(self, x: Tensor) -> Tensor | None:
        """Draw what (B, ...) is multiplied by, (B, 1, ...) of its dtype; None where that is one."""
        if self.rate == 0.0 or not self.training:
            return None
        # Dropout of ones: compilers draw the numbers of all branches in one kernel, where each `bernoulli_` is its own.
        return F.dropout(x.new_ones((x.shape[0],) + (1,) * (x.ndim - 1)), self.rate)

    def extra_repr(self) -> str:
        """Tell the rate."""
        return f"{self.rate:g}"


class Mlp(nn.Module):
    """The feed-forward branch: fc1 → activation → fc2, or gated: fc2(x · act(z)) with x, z = fc1(input)."""

    def __init__(self, dim: int, hidden: int, act: str, drop: float = 0.0, *, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(dim, 2 * hidden if gated else hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        fc1, fc2 = self.fc1, self.fc2
        if self.is_plain() and takes_mlp(x, fc1.out_features):
            return mlp(x, fc1.weight.to(x.dtype), fc1.bias, fc2.weight.to(x.dtype), fc2.bias)
        x = self.fc1(x)
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            return self.drop(self.fc2(x * self.act(z)))
        return self.drop(self.fc2(self.drop(self.act(x))))

    def is_plain(self) -> bool:
        """Whether this is fc1, GELU, fc2 and nothing else: no replaced layer, and no hook that would not be called."""
        parts = (self.fc1, self.act, self.fc2)
        return (
            not self.gated
            and tuple(type(part) for part in parts) == (nn.Linear, nn.GELU, nn.Linear)
            and isinstance(self.drop, nn.Identity)
            and not have_hooks(parts)
        )


class PatchMerging(nn.Module):
    """Swin's downsampling: the four pixels of a 2×2 cell, concatenated, normalised, projected; odd sizes padded."""

    def __init__(self, dim: int, out_dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        _, H, W, _ = x.shape
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))


class OverlapStem(nn.Sequential):
    """Two overlapping convolutions with their norms; on a GPU in 16 bits the first of them is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, H / 4, W / 4, D)."""
        first: Any = list(self)[:5]
        dtype = autocast_dtype(x) or x.dtype
        if not _is_first_layer(first) or not takes_first_layer(x, dtype, first[0].out_channels):
            y: Tensor = super().forward(x)
            return y
        conv, _, norm, *_ = first
        y = first_layer(x.to(dtype), conv.weight, conv.bias, norm.weight, norm.bias, eps=norm.eps).permute(0, 3, 1, 2)
        for layer in list(self)[5:]:
            y = layer(y)
        return y


def _is_first_layer(layers: Sequence[Any]) -> bool:
    """Whether these are the layers that `first_layer` does, and nobody listens in between."""
    kinds = (nn.Conv2d, ToChannelsLast, LayerNorm, ToChannelsFirst, nn.GELU)
    if tuple(type(layer) for layer in layers) != kinds:
        return False
    conv = layers[0]
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    known = ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros")
    return geometry == known and conv.bias is not None and not have_hooks(layers)


def have_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody listens to modules, who would hear nothing where one kernel does their work."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def make_stem(
    kind: Literal["overlap", "patch"], in_chans: int, dim: int, patch_size: int, norm: str, patch_norm: bool
) -> nn.Sequential:
    """Return the stem, image (B, C, H, W) to map (B, H/p, W/p, D); indices are those of the published checkpoints."""

    def normed(channels: int) -> nn.Module:
        return make_norm(norm, channels) if patch_norm else nn.Identity()  # type: ignore[arg-type]

    if kind == "patch":
        return nn.Sequential(nn.Conv2d(in_chans, dim, patch_size, patch_size), ToChannelsLast(), normed(dim))
    stride = patch_size // 2
    return OverlapStem(
        nn.Conv2d(in_chans, dim // 2, stride + 1, stride, padding=1),
        ToChannelsLast(),
        normed(dim // 2),
        ToChannelsFirst(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, stride + 1, stride, padding=1),
        ToChannelsLast(),
        normed(dim),
    )


def make_downsample(kind: str, dim: int, out_dim: int, norm: Literal["ln", "ln2d", "bn"]) -> nn.Module:
    """Return the layer between two stages; indices are those of the published checkpoints."""
    if kind == "none":
        if dim != out_dim:
            raise ValueError(f"downsample='none' keeps the channels, but dims change from {dim} to {out_dim}")
        return nn.Identity()
    if kind == "patch_merging":
        return PatchMerging(dim, out_dim, make_norm(norm, 4 * dim))
    kernel_size, padding = (3, 1) if kind == "conv3x3" else (2, 0)
    conv = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=padding)
    return nn.Sequential(ToChannelsFirst(), conv, ToChannelsLast(), make_norm(norm, out_dim))
