"""SS2D's core as hand-laid CUDA, compiled at run time: 16-bit maps, one state per channel, capability 8.0 and newer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source
from vmamba.ops.ss2d.cuda_plans import Plan, find_launches, plan_forward
from vmamba.ops.ss2d.cuda_problem import CHANNELS, Launch, Problem, find_device
from vmamba.ops.ss2d.cuda_tiles import TilePlan

MAX_RANK = 64
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUTES = {"cross2d": 1, "bidi": 0}  # whether the second and fourth routes read columns


def why_not(
    x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str, height: int, width: int
) -> str | None:
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
    if (unfit := nvrtc.device_unfit(x.device)) is not None:
        return unfit
    problem = _problem(x, dt_weight.shape[-1], height, width, routes, x.dtype)
    if plan_forward(problem, find_device(x.get_device())) is None:
        return _too_large(height, width)
    return None


def _too_large(height: int, width: int) -> str:
    return f"the CUDA kernels step over rows by less than 2 GiB, and those of a map of {height} by {width} are longer."


def _problem(x: Tensor, rank: int, height: int, width: int, routes: str, out_dtype: torch.dtype) -> Problem:
    columns = bool(_ROUTES[routes]) and min(height, width) > 1  # a single line has the same order either way
    if width == 1:
        height, width = 1, height
    groups = -(-x.shape[2] // CHANNELS)
    return Problem(height, width, rank, groups, x.shape[0], columns, out_dtype == torch.float32)


def forward_source(plan: Plan) -> str:
    """Give the text of a plan's kernels."""
    return read_source("vmamba.ops.ss2d", *plan.files)


def forward_defines(
    rank: int, channels: int, dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype, plan: Plan
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of a plan's kernels."""
    return (
        ("RANK", rank),
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", int(weight_dtype != torch.float32)),
        ("OUT", _TYPES[out_dtype]),
        ("EVEN_E", int(channels % 2 == 0)),
        *plan.defines(),
    )


class _Prepared(NamedTuple):
    """What a forward takes beside tensors.

    Attributes:
        images: That are taken at a time.
        floats: Of a workspace for them; 0 for none.
        launches: For so many images, and for the fewer that may be left.
    """

    images: int
    floats: int
    launches: dict[int, list[tuple[nvrtc.Kernel, Launch, nvrtc.Numbers]]]


@functools.lru_cache(maxsize=1024, typed=True)  # plans of two kinds may be equal as tuples
def _prepare(
    plan: Plan,
    problem: Problem,
    channels: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    index: int,
) -> _Prepared:
    defines = forward_defines(problem.rank, channels, dtype, weight_dtype, out_dtype, plan)
    images, floats = problem.batch, 0
    if isinstance(plan, TilePlan):
        images = plan.images_at_once(problem, find_device(index))
        floats = plan.workspace_floats(problem._replace(batch=images))
    launches = {}
    for batch in {images, problem.batch % images or images}:
        part = problem._replace(batch=batch)
        sizes = nvrtc.Numbers(batch, part.height, part.width, channels, int(part.columns), *plan.geometry(part))
        launches[batch] = [
            (nvrtc.get_kernel(forward_source(plan), launch.kernel, defines, torch.device("cuda", index)), launch, sizes)
            for launch in find_launches(plan, part)
        ]
    return _Prepared(images, floats, launches)


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
    channels = x.shape[2]
    y = x.new_empty(x.shape, dtype=out_dtype)
    if y.numel() == 0:
        return y
    problem = _problem(x, dt_weight.shape[-1], height, width, routes, out_dtype)
    plan = plan_forward(problem, find_device(x.get_device()))
    if plan is None:
        raise ValueError(_too_large(height, width))
    prepared = _prepare(plan, problem, channels, x.dtype, dt_weight.dtype, out_dtype, x.get_device())
    x, projected, *weights = (nvrtc.aligned(t) for t in (x, projected, dt_weight, dt_bias, A, D))
    workspace = [x.new_empty(prepared.floats, dtype=torch.float32)] if prepared.floats else []
    parts: Iterable[tuple[Tensor, ...]] = ((x, projected, y),)
    if prepared.images < len(x):
        parts = zip(*(t.split(prepared.images) for t in (x, projected, y)), strict=True)
    for some_x, some_projected, some_y in parts:
        for kernel, launch, sizes in prepared.launches[len(some_x)]:
            kernel.launch(
                (launch.blocks, 1, 1),
                launch.threads,
                [some_x, some_projected, *weights, some_y, *workspace, sizes],
                shared_bytes=launch.shared_bytes,
                cluster=launch.cluster,
            )
    return y


def backward(
    dy: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, projected, dt_weight, dt_bias, A and D, each in the dtype of its input."""
    from vmamba.ops.ss2d import cuda_backward  # inference does without it

    return cuda_backward.backward(dy, x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back)
