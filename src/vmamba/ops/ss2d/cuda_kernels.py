"""SS2D's core as hand-laid CUDA, compiled at run time: 16-bit maps, one state per channel, capability 8.0 and newer."""

from __future__ import annotations

import functools
import math
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
    longest = _longest_map(_device(x.get_device()))
    if x.shape[1] > longest:
        return f"the CUDA kernels merge on chip, which on this GPU holds maps of {longest} positions, not {x.shape[1]}."
    return None


class Slots(NamedTuple):
    """Where the float32 sums of a map lie in shared memory: distances of rows and columns, and the number of slots."""

    row: int
    column: int
    total: int


def _slots(height: int, width: int) -> Slots:
    # The kernel swaps neighbours to avoid bank conflicts, so lines of slots have an even length.
    if width % 2 == 0 or (height % 2 == 1 and height <= width):
        pitch = width + width % 2
        return Slots(pitch, 1, height * pitch)
    pitch = height + height % 2
    return Slots(1, pitch, width * pitch)


class Plan(NamedTuple):
    """How a forward is cut up.

    Attributes:
        span: Positions that a lane owns in a chunk; a chunk is four spans.
        warps: Warps that share one route.
        images: Images that a block takes one after another.
        teams: Groups of 16 channels that a block takes side by side.
        staged: Whether a block copies the projections of its images into shared memory first.
        apart: Whether the four routes are four blocks of a cluster rather than one block.
        blocks: Blocks that a multiprocessor should hold; what it holds at most bounds the registers of a thread.
    """

    span: int
    warps: int
    images: int = 1
    teams: int = 1
    staged: bool = False
    apart: bool = False
    blocks: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.teams * (1 if self.apart else 2)

    def shared_bytes(self, length: int, slots: int, rank: int) -> int:
        """Dynamic shared memory of a block: what `struct Shared` holds, the float32 maps, staged projections."""
        warps = self.threads // 32
        fixed = 64 + warps * 2 * 2 * (4 * self.span) * 4 + warps * (64 + 8) + self.teams * (8 * self.warps + 8)
        maps = self.teams * self.images * slots * _SLOT_BYTES
        pitch = (8 * (rank + 2) + 15) // 32 * 32 + 16
        rows = length + 7 + (length + 7) // 8 * 2
        return -(-fixed // 128) * 128 + maps + (self.images * rows * pitch if self.staged else 0)


class Device(NamedTuple):
    """What a plan depends on: multiprocessors, shared memory of a block and of a multiprocessor, clusters or not."""

    multiprocessors: int
    block_shared: int
    multiprocessor_shared: int
    clusters: bool


@functools.cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.shared_memory_per_multiprocessor,
        found.major >= 9,
    )


def plan_forward(length: int, slots: int, rank: int, groups: int, batch: int, device: Device) -> Plan:
    """Choose how to cut up a forward.

    Args:
        length: L.
        slots: Of the float32 map.
        rank: R.
        groups: Groups of 16 channels.
        batch: B.
        device: What it runs on.
    """
    chunks = -(-length // 32)
    if device.clusters and 2 * batch * groups <= device.multiprocessors:
        return Plan(8, min(16, 1 << (chunks - 1).bit_length()), apart=True)
    if chunks <= 13:
        images = 2 if chunks <= 2 else 1
        for teams in (8, 4, 2):  # teams that do not divide the groups would leave warps idle
            staged = Plan(8, 1, images, teams=teams, staged=True, blocks=8 // teams)
            shared = staged.shared_bytes(length, slots, rank)
            # A block of shared memory costs 1 KiB more than it asks for.
            fits = shared <= device.block_shared and staged.blocks * (shared + 1024) <= device.multiprocessor_shared
            if groups % teams == 0 and fits:
                return staged
        return Plan(8, 1, images, blocks=8)
    warps = 2 if chunks <= 20 else 4 if chunks <= 53 else 8
    return Plan(8, warps, blocks=8 // warps)


def _longest_map(device: Device) -> int:
    free = (device.block_shared - Plan(8, 8).shared_bytes(0, 0, 0)) // _SLOT_BYTES
    return free - math.isqrt(free) - 1  # a map of odd height and width has a slot more on each shorter line


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
        ("TEAMS", plan.teams),
        ("STAGED", int(plan.staged)),
        ("BLOCKS", plan.blocks),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Make contiguous and, where a view starts off the 16 bytes that wide loads need, copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


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
    batch, length, channels = x.shape
    y = x.new_empty(x.shape, dtype=out_dtype)
    if y.numel() == 0:
        return y
    rank, slots = dt_weight.shape[-1], _slots(height, width)
    groups = -(-channels // _CHANNELS)
    plan = plan_forward(length, slots.total, rank, groups, batch, _device(x.get_device()))
    defines = forward_defines(rank, channels, x.dtype, dt_weight.dtype, out_dtype, plan)
    kernel = nvrtc.get_kernel(read_source("common.cuh", "forward.cu"), "ss2d_forward", defines, x.device)
    tensors = [_aligned(t) for t in (x, projected, dt_weight, dt_bias, A, D)]
    blocks = -(-batch // plan.images) * -(-groups // plan.teams) * (4 if plan.apart else 1)
    kernel.launch(
        (blocks, 1, 1),
        plan.threads,
        [*tensors, y, batch, height, width, channels, _ROUTES[routes], *slots],
        shared_bytes=plan.shared_bytes(length, slots.total, rank),
        cluster=4 if plan.apart else 1,
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
