"""A VMamba for inference on the CPU: weights in the order that oneDNN computes in, GELU inside its products.

In eager mode torch hands the weights of a layer to its library as they are stored, and they are rearranged at every
call. Here that is done once. All else is the model as it was, so its methods stay, and every configuration is taken.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.models.layers import LayerNorm, Mlp, have_hooks
from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VMamba
from vmamba.ops import ss2d_scan

_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


class PackedLinear(nn.Module):
    """A linear layer, optionally followed by GELU, in an order of this processor: nothing to save, move or cast."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.epilogue: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = None if bias is None else bias.detach().clone()

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("a model fused for the CPU has no weights to save; save the model it was made from")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if kept.dtype != self.dtype or kept.device.type != "cpu":
            raise ValueError(
                f"a model fused for the CPU stays {str(self.dtype)[6:]} there; take the one it was made from to"
                f" {kept.dtype} on {kept.device}"
            )
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Any:
        raise ValueError("a model fused for the CPU cannot be copied or pickled; copy the model it was made from")

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a model fused for the CPU has no gradients; call it under torch.no_grad(), or take the model it was"
                " made from"
            )
        if x.dtype != self.dtype:
            raise ValueError(
                f"a model fused for the CPU computes in {str(self.dtype)[6:]}, and met a map in {str(x.dtype)[6:]};"
                " call it without autocast"
            )
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.epilogue)
        return y

    def extra_repr(self) -> str:
        """Tell the sizes and what follows."""
        return f"{self.in_features}, {self.out_features}, followed by {self.epilogue[0]}"


class FusedMlp(nn.Module):
    """The feed-forward branch fc1 → GELU → fc2."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1 = PackedLinear(mlp.fc1.weight, mlp.fc1.bias, gelu=True)
        self.fc2 = PackedLinear(mlp.fc2.weight, mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y: Tensor = self.fc2(self.fc1(x))
        return y


class FusedSS2D(nn.Module):
    """SS2D over whole-map routes, with what depends on weights alone computed beforehand."""

    def __init__(self, op: SS2D) -> None:
        super().__init__()
        self.gated, self.routes, self.backend = op.gated, op.routes, op.backend
        self.in_proj = PackedLinear(op.in_proj.weight)
        self.conv2d, self.act, self.gate_act = op.conv2d, op.act, op.gate_act
        self.x_proj = PackedLinear(op.x_proj_weight.flatten(0, 1))
        A, D, dt_bias = (t.detach().clone() for t in op._scan_parameters())
        self.parameters_of_scan = (op.dt_projs_weight.detach().clone(), dt_bias, A, D)
        self.out_norm, self.out_act = op.out_norm, op.out_act
        self.out_proj = PackedLinear(op.out_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        B, H, W, _ = x.shape
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            z = self.gate_act(z)
        if self.conv2d is not None:
            x = self.conv2d(x)
        x = self.act(x).flatten(1, 2)
        y = ss2d_scan(
            x,
            self.x_proj(x),
            *self.parameters_of_scan,
            height=H,
            width=W,
            routes=self.routes,
            out_dtype=x.dtype,
            backend=self.backend,
        )
        y = self.out_act(self.out_norm(y.view(B, H, W, y.shape[-1])).to(x.dtype))
        if z is not None:
            y = y * z
        result: Tensor = self.out_proj(y)
        return result


def unavailable() -> str | None:
    """Say why `fuse_for_cpu` cannot work here; None if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch comes without oneDNN"
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    return f"torch {torch.__version__} has no operator mkldnn::{missing[0]}" if missing else None


def fuse_for_cpu(model: VMamba, dtype: torch.dtype = torch.float32) -> VMamba:
    """Make a copy of a model that infers faster on the CPU; the way back is the model itself, which is left alone.

    The copy gives what the model gives in evaluation mode, within rounding of its dtype, for images of any size and
    dtype. It cannot be trained, saved, copied, cast or moved. In bfloat16 norms and the scan keep their float32
    weights, and compute in float32.

    Args:
        model: in float32 or `dtype`, on the CPU; of any configuration.
        dtype: float32, or bfloat16 where the processor computes in it.

    Raises:
        TypeError: for what is not a VMamba.
        ValueError: for a model elsewhere, in another dtype or already fused, for a dtype that the processor does not
            compute in, and where torch comes without oneDNN.
    """
    if not isinstance(model, VMamba):
        raise TypeError(f"fuse_for_cpu takes a VMamba, got {type(model).__name__}")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("fuse_for_cpu: this model is already fused")
    if (reason := unavailable()) is not None:
        raise ValueError(f"fuse_for_cpu needs oneDNN's packed weights: {reason}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"fuse_for_cpu: the forms on the CPU are float32 and bfloat16, not {dtype}")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("fuse_for_cpu: this processor does not compute in bfloat16; take float32")
    dtypes = list(dict.fromkeys((torch.float32, dtype)))
    for name, weight in model.named_parameters():
        if weight.dtype not in dtypes or weight.device.type != "cpu":
            known = " or ".join(str(known)[6:] for known in dtypes)
            raise ValueError(
                f"fuse_for_cpu takes a model in {known} on the CPU; {name} is {weight.dtype} on {weight.device}"
            )
    # Convolutions take weights in channels-last order as they are, or nearly so.
    fused = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    _cast(fused, dtype)
    for part in (fused.patch_embed, fused.layers):
        _replace(part)
    fused.patch_embed.register_forward_pre_hook(partial(_cast_images, dtype))
    return fused


def _cast_images(dtype: torch.dtype, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].to(dtype),)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights to a dtype, but for those of norms and of the scan, which compute in float32."""
    for module in model.modules():
        if isinstance(module, (LayerNorm, nn.BatchNorm2d)):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if not isinstance(module, SS2D) or name == "x_proj_weight":
                weight.data = weight.to(dtype)


def _replace(module: nn.Module) -> None:
    """Put the packed form in the place of every layer below that has one."""
    for name, child in module.named_children():
        packed = _packed_form(child)
        if packed is None:
            _replace(child)
        else:
            setattr(module, name, packed)


def _packed_form(module: nn.Module) -> nn.Module | None:
    """Return the packed form of a layer that is what it was made as; None for others, whose layers are looked at."""
    if have_hooks((module,)):
        return None
    if _computes_as(module, SS2D) and isinstance(module, SS2D) and module.routes != "cascade2d":
        plain = all(_is_plain_linear(layer) and layer.bias is None for layer in (module.in_proj, module.out_proj))
        return FusedSS2D(module) if plain else None
    if _computes_as(module, Mlp) and isinstance(module, Mlp) and not module.gated and _is_plain_gelu(module.act):
        return FusedMlp(module) if _is_plain_linear(module.fc1) and _is_plain_linear(module.fc2) else None
    return PackedLinear(module.weight, module.bias) if _is_plain_linear(module) else None  # type: ignore[arg-type]


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module, perhaps with parametrised weights, has the methods of a kind: no subclass changed them."""
    return all(getattr(type(module), name, None) is value for name, value in vars(kind).items() if callable(value))


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and not have_hooks((module,))


def _is_plain_gelu(module: nn.Module) -> bool:
    return type(module) is nn.GELU and module.approximate == "none" and not have_hooks((module,))
