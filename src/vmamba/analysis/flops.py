"""Multiply-accumulates of a model, module by module, counted as the authors count them.

Theirs is fvcore's convention: a multiply-accumulate of a matrix product or convolution is one operation, a LayerNorm
takes five an element (four without weights), pooling one; activations and additions are free. The selective scan takes
9·B·L·E·N + B·L·E over all routes' channels (Mamba's own count). Their older "naive" count, which the tables give struck
through, differs in the scan alone: the multiplications of its einsum form, 3.5·B·L·E·N + B·L·E.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vmamba.ops
import vmamba.ops.convolution.api
import vmamba.ops.linear.api  # noqa: F401
from vmamba.models.fused_cpu import PackedLinear

Convention = Literal["authors", "naive"]


@dataclass(frozen=True)
class StageCount:
    """One row of the table by stage: a part of the model, its parameters and its multiply-accumulates."""

    part: str
    params: int
    flops: int


@dataclass(frozen=True)
class FlopCount:
    """Operations of one forward pass.

    Attributes:
        total: multiply-accumulates, and what else the convention counts, of the whole model.
        by_module: the same for every module, by its name; a module includes those inside it.
        by_operator: the same by the operator that does the work.
        stages: the same from stem to head, with the parameters of each part; the rows add up to the total.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    stages: tuple[StageCount, ...] = ()


def count_flops(
    model: nn.Module,
    img_size: tuple[int, int] = (224, 224),
    *,
    batch_size: int = 1,
    convention: Convention = "authors",
) -> FlopCount:
    """Count a forward pass over images of a size, in evaluation mode; nothing is computed.

    Works for any model of images, peers from timm included, compiled or not, wherever its weights are: the pass runs on
    a copy without memory (PyTorch's meta device), where fused attention is counted by its matrix products.

    Args:
        model: the model; it is left as it is.
        img_size: (height, width) in pixels.
        batch_size: images in the pass.
        convention: how the scan is counted: as in the paper's tables, or in their struck-through figures.

    Returns:
        The counts, in multiply-accumulates.

    Raises:
        ValueError: the model runs an operator of this package for which there is no formula.
    """
    twin = _without_memory(model).eval()
    channels = getattr(twin, "in_chans", None) or _first_convolution(twin).in_channels
    images = torch.empty(batch_size, channels, *img_size, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping=_formulas(convention))
    with torch.no_grad(), counter, _RefuseUncounted():
        twin(images)
    counts = counter.get_flop_counts()
    by_module = {_module_name(name): sum(parts.values()) // 2 for name, parts in counts.items() if name != "Global"}
    by_operator = {str(operator): count // 2 for operator, count in counts["Global"].items()}
    total = sum(by_operator.values())
    return FlopCount(total, by_module, by_operator, tuple(_stages(twin, by_module, total)))


def _stages(model: nn.Module, by_module: dict[str, int], total: int) -> Iterator[StageCount]:
    """Yield the parts of a model, its list of stages or blocks taken apart, and what runs outside of them."""
    counted = held = 0
    for name, child in model.named_children():
        inside = name in ("layers", "stages", "blocks") and isinstance(child, nn.ModuleList | nn.Sequential)
        parts = [(f"{name}.{i}", part) for i, part in child.named_children()] if inside else [(name, child)]
        for part, module in parts:
            flops = by_module.get(part) or sum(
                by_module.get(f"{part}.{inner}", 0) for inner, _ in module.named_children()
            )
            params = sum(p.numel() for p in module.parameters())
            counted, held = counted + flops, held + params
            if flops or params:
                yield StageCount(part, params, flops)
    held = sum(p.numel() for p in model.parameters()) - held
    if total > counted or held:
        yield StageCount("outside of these", held, total - counted)


class _RefuseUncounted(TorchDispatchMode):
    """Raise where an operator of this package would be passed over in silence."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vmamba" and func.overloadpacket not in _FORMULAS:
            raise ValueError(f"there is no formula for the multiply-accumulates of the operator {func}")
        return func(*args, **(kwargs or {}))


def _without_memory(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device; compiled modules become the plain ones they were made from."""
    with torch.no_grad():
        # deepcopy through a memo of meta tensors, so that a large model is not copied in full first.
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        for module in reversed(list(model.modules())):  # the innermost first
            if isinstance(plain := getattr(module, "_orig_mod", None), nn.Module):
                memo[id(module)] = copy.deepcopy(plain, memo)
            elif isinstance(module, PackedLinear):  # its weights have an order of the processor's own
                sizes = module.in_features, module.out_features
                memo[id(module)] = nn.Linear(*sizes, bias=module.bias is not None, device="meta")
            else:
                for tensor in _plain_tensors(module):
                    memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        return copy.deepcopy(model, memo)


def _plain_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a module keeps as mere attributes, which is neither as parameters nor as buffers."""
    for value in vars(module).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, torch.Tensor):
                yield item


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ValueError("the model has no convolution from which to tell how many channels its images have")


def _module_name(name: str) -> str:
    """Drop the class name that FlopCounterMode puts first."""
    return re.sub(r"^[^.]+\.?", "", name)


# FlopCounterMode counts a multiply-accumulate as two, so every formula here does too.


def _scan(naive: bool, channels: int, length: int, batch: int, states: int) -> int:
    each = 7 * states + 2 if naive else 2 * (9 * states + 1)
    return batch * length * channels * each


def _ss2d_scan(naive: bool, x: Any, projected: Any, dt_weight: Any, dt_bias: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x
    routes, _, rank = dt_weight
    dt_projection = 2 * batch * length * routes * channels * rank
    return dt_projection + _scan(naive, routes * channels, length, batch, A[2])


def _selective_scan(naive: bool, u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, channels, length = u
    return _scan(naive, channels, length, batch, A[1])


def _layer_norm(x: Any, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * (4 if weight is None else 5)


def _norm_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * (prod(x) * weight[0] + 4 * prod(x))  # the norm's own weights are folded into the product's


def _add_norm(x: Any, branch: Any, bias: Any, source: Any = None, *_: Any, **__: Any) -> int:
    return 2 * 4 * (prod(x) + (prod(source) if source else 0))  # the source's norm is one without weights too


def _linear_gelu(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _norm_mlp(x: Any, w1: Any, *_: Any, **__: Any) -> int:
    return 2 * (2 * prod(x) * w1[0] + 4 * prod(x))


def _depthwise_silu(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[1] * weight[2]


def _conv_norm(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    batch, _channels, height, width = x
    taps, filters = weight
    return 2 * batch * -(-height // 2) * -(-width // 2) * filters * (taps + 5)


def _batch_norm(x: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * 2


def _elementwise(x: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.vmamba.ss2d_scan: partial(_ss2d_scan, False),
    torch.ops.vmamba.selective_scan: partial(_selective_scan, False),
    torch.ops.vmamba.norm_linear: _norm_linear,
    torch.ops.vmamba.add_norm: _add_norm,
    torch.ops.vmamba.linear_gelu: _linear_gelu,
    torch.ops.vmamba.norm_mlp: _norm_mlp,
    torch.ops.vmamba.depthwise_silu: _depthwise_silu,
    torch.ops.vmamba.conv_norm: _conv_norm,
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm,
    torch.ops.aten.native_batch_norm: _batch_norm,
    torch.ops.aten.mean: _elementwise,
    torch.ops.aten._adaptive_avg_pool2d: _elementwise,
}


def _formulas(convention: Convention) -> dict[Any, Callable[..., int]]:
    if convention not in ("authors", "naive"):
        raise ValueError(f"convention must be 'authors' or 'naive', not {convention!r}")
    if convention == "authors":
        return _FORMULAS
    return _FORMULAS | {
        torch.ops.vmamba.ss2d_scan: partial(_ss2d_scan, True),
        torch.ops.vmamba.selective_scan: partial(_selective_scan, True),
    }
