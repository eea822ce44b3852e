"""Multiply-accumulates of a model, module by module, counted as the authors count them.

Theirs is fvcore's convention: a multiply-accumulate of a matrix product or convolution is one operation, a LayerNorm
takes five an element (four without weights), pooling one; activations and additions are free. The selective scan takes
9·B·L·E·N + B·L·E over all routes' channels (Mamba's own count).
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba.ops  # noqa: F401  (defines the operators counted below)


@dataclass(frozen=True)
class FlopCount:
    """Operations of one forward pass.

    Attributes:
        total: multiply-accumulates, and what else the convention counts, of the whole model.
        by_module: the same for every module, by its name; a module includes those inside it.
        by_operator: the same by the operator that does the work.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]


def count_flops(model: nn.Module, img_size: tuple[int, int] = (224, 224), *, batch_size: int = 1) -> FlopCount:
    """Count a forward pass over images of a size, in evaluation mode; nothing is computed.

    Works for any model of images, peers from timm included, wherever its weights are: the pass runs on a copy without
    memory (PyTorch's meta device).

    Args:
        model: the model; it is left as it is.
        img_size: (height, width) in pixels.
        batch_size: images in the pass.

    Returns:
        The counts, in multiply-accumulates.
    """
    twin = _without_memory(getattr(model, "_orig_mod", model)).eval()
    channels = getattr(twin, "in_chans", None) or _first_convolution(twin).in_channels
    images = torch.empty(batch_size, channels, *img_size, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), counter:
        twin(images)
    counts = counter.get_flop_counts()
    by_module = {_module_name(name): sum(parts.values()) // 2 for name, parts in counts.items() if name != "Global"}
    by_operator = {str(operator): count // 2 for operator, count in counts["Global"].items()}
    return FlopCount(sum(by_operator.values()), by_module, by_operator)


def _without_memory(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        # deepcopy through a memo of meta tensors, so that a large model is not copied in full first.
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return copy.deepcopy(model, memo)


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ValueError("the model has no convolution from which to tell how many channels its images have")


def _module_name(name: str) -> str:
    """Drop the class name that FlopCounterMode puts first."""
    return re.sub(r"^[^.]+\.?", "", name)


# FlopCounterMode counts a multiply-accumulate as two, so every formula here does too.


def _scan(channels: int, length: int, batch: int, states: int) -> int:
    return 2 * batch * length * channels * (9 * states + 1)


def _ss2d_scan(x: Any, projected: Any, dt_weight: Any, dt_bias: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x
    routes, _, rank = dt_weight
    dt_projection = 2 * batch * length * routes * channels * rank
    return dt_projection + _scan(routes * channels, length, batch, A[2])


def _selective_scan(u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, channels, length = u
    return _scan(channels, length, batch, A[1])


def _layer_norm(x: Any, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * (4 if weight is None else 5)


def _batch_norm(x: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * 2


def _elementwise(x: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.vmamba.ss2d_scan: _ss2d_scan,
    torch.ops.vmamba.selective_scan: _selective_scan,
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm,
    torch.ops.aten.native_batch_norm: _batch_norm,
    torch.ops.aten.mean: _elementwise,
    torch.ops.aten._adaptive_avg_pool2d: _elementwise,
}
