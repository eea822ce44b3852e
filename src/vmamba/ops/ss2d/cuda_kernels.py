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
    """How a forward is cut up.

    Attributes:
        span: Positions that a lane owns in a chunk; a chunk is four spans.
        warps: Warps that share one route.
        images: Images that a block takes one after another.
        apart: Whether the four routes are four blocks of a cluster rather than one block.
        blocks: Blocks that a multiprocessor should hold; what it holds at most bounds the registers of a thread.
    """

    span: int
    warps: int
    images: int
    apart: bool
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * (1 if self.apart else 2)

    def shared_bytes(self, height: int, width: int) -> int:
        """Dynamic shared memory of a block: what `struct Shared` holds, then the float32 maps."""
        warps = self.threads // 32
        fixed = 64 + warps * 2 * 2 * (4 * self.span) * 4 + warps * (64 + 8) + 8 * self.warps + 8
        return -(-fixed // 128) * 128 + self.images * height * (-(-width // 2) * 2) * _SLOT_BYTES


def plan_forward(height: int, width: int, units: int, multiprocessors: int, clusters: bool) -> Plan:
    """Choose how to cut up a forward.

    Args:
        height: H.
        width: W.
        units: Groups of 16 channels in the whole batch.
        multiprocessors: Of the GPU.
        clusters: Whether it has thread-block clusters.
    """
    chunks = -(-height * width // 32)
    if clusters and 2 * units <= multiprocessors:
        return Plan(8, min(16, 1 << (chunks - 1).bit_length()), 1, True, 1)
    if chunks <= 2:
        images = 4
    elif chunks <= 7:
        images = 2
    else:
        images = 1
    warps = 1 if chunks <= 13 else 2 if chunks <= 27 else 4 if chunks <= 53 else 8
    return Plan(8, warps, images, False, 8 // warps)


def forward_defines(
    rank: int, channels: int, dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype, plan: Plan
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of `forward.cu`."""
    return (
        ("RANK", rank),
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", int(weight_dtype != torch.float32)),
        ("OUT", _TYPES[out_dtype]),
        ("SPAN", plan.span),
        ("WARPS", plan.warps),
        ("EVEN_E", int(channels % 2 == 0)),
        ("IMAGES", plan.images),
        ("APART", int(plan.apart)),
        ("BLOCKS", plan.blocks),
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
    rank = dt_weight.shape[-1]
    groups = -(-channels // _CHANNELS)
    properties = torch.cuda.get_device_properties(x.device)
    plan = plan_forward(height, width, batch * groups, properties.multi_processor_count, clusters=properties.major >= 9)
    defines = forward_defines(rank, channels, x.dtype, dt_weight.dtype, out_dtype, plan)
    kernel = nvrtc.get_kernel(read_source("common.cuh", "forward.cu"), "ss2d_forward", defines, x.device)
    tensors = [_aligned(t) for t in (x, projected, dt_weight, dt_bias, A, D)]
    blocks = -(-batch // plan.images) * groups * (4 if plan.apart else 1)
    kernel.launch(
        (blocks, 1, 1),
        plan.threads,
        [*tensors, y, batch, height, width, channels, _ROUTES[routes]],
        shared_bytes=plan.shared_bytes(height, width),
        cluster=4 if plan.apart else 1,
    )
    return y
