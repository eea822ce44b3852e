"""SS2D's core as hand-laid CUDA, compiled at run time: 16-bit maps, one state per channel, capability 8.0 and newer."""

from __future__ import annotations

import functools
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc

MAX_RANK = 64
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUTES = {"cross2d": 1, "bidi": 0}  # whether the second and fourth routes read columns
_SLOT_BYTES = 64  # 16 float32 sums of a position
_CHANNELS = 16  # of a block


@functools.cache
def read_source(*names: str) -> str:
    """Concatenate files of the folder `cuda`; there are no includes."""
    folder = resources.files(__package__).joinpath("cuda")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def why_not(x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str) -> str | None:
    """Say why these kernels cannot take the inputs, or return None when they can."""
    unavailable = nvrtc.compiler_unavailable()
    if unavailable is not None:
        return unavailable
    if not x.is_cuda:
        return f"the CUDA kernels need CUDA tensors, and x is on {x.device}."
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels take bfloat16 or float16 maps, and x is {x.dtype}."
    if A.shape[-1] != 1:
        return f"the CUDA kernels are for one state per channel (N = 1), and A has N = {A.shape[-1]}."
    if routes not in _ROUTES:
        return f"the CUDA kernels read the routes {' and '.join(map(repr, _ROUTES))}, not {routes!r}."
    if dt_weight.shape[-1] > MAX_RANK:
        return f"the CUDA kernels take a rank of at most {MAX_RANK}, and dt_weight has {dt_weight.shape[-1]}."
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}."
    return None


class Plan(NamedTuple):
    """How a forward is cut up: positions a lane owns, warps a route, bytes of shared memory a block."""

    span: int
    warps: int
    shared_bytes: int


def _shared_bytes(height: int, width: int, span: int, warps: int) -> int:
    tables = 64 + 2 * (2 * warps) * 2 * (4 * span) * 4
    signals = 2 * warps * 64 + 2 * warps * 8 + 5 * 8
    fixed = -(-(tables + signals) // 128) * 128
    return fixed + height * (-(-width // 2) * 2) * _SLOT_BYTES


def plan_forward(height: int, width: int) -> Plan:
    """Choose the cut of a forward from the size of the map."""
    length = height * width
    if length <= 56:
        span, warps = 14, 1
    elif length <= 420:
        span, warps = 10, 1
    elif length <= 850:
        span, warps = 10, 2
    elif length <= 1700:
        span, warps = 8, 4
    else:
        span, warps = 8, 8
    return Plan(span, warps, _shared_bytes(height, width, span, warps))


def forward_defines(
    rank: int, dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype, even: bool, plan: Plan
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of `forward.cu`."""
    return (
        ("RANK", rank),
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", int(weight_dtype != torch.float32)),
        ("OUT", _TYPES[out_dtype]),
        ("SPAN", plan.span),
        ("WARPS", plan.warps),
        ("EVEN_E", int(even)),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Make contiguous and, where a view starts between two 32-bit words, copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute the merged map (B, L, E) in `out_dtype`; see `vmamba.ops.ss2d_scan` for the arguments."""
    batch, _, channels = x.shape
    y = x.new_empty(x.shape, dtype=out_dtype)
    if y.numel() == 0:
        return y
    plan = plan_forward(height, width)
    defines = forward_defines(dt_weight.shape[-1], x.dtype, dt_weight.dtype, out_dtype, channels % 2 == 0, plan)
    kernel = nvrtc.get_kernel(read_source("common.cuh", "forward.cu"), "ss2d_forward", defines, x.device)
    tensors = [_aligned(t) for t in (x, projected, dt_weight, dt_bias, A, D)]
    blocks = batch * -(-channels // _CHANNELS)
    kernel.launch(
        (blocks, 1, 1),
        64 * plan.warps,
        [*tensors, y, height, width, channels, _ROUTES[routes]],
        shared_bytes=plan.shared_bytes,
    )
    return y
