"""The gradients of SS2D's core as hand-laid CUDA, for the inputs that `cuda_kernels` takes."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source
from vmamba.ops.ss2d.cuda_problem import find_device, round_up

MAX_RANK = 64
_SOURCES = ("common.cuh", "backward_tools.cuh", "backward_chunk.cuh", "backward.cu")
_ROUTES = {"cross2d": (1, 1), "bidi": (0, 1), "unidi": (0, 0)}  # the second layout is by columns; a pair runs both ways
_CHANNELS = 16  # of a warp's tile
_SMALL = 256  # maps of so many positions are one warp's work
_LARGEST = 2**26  # positions
_Cut = tuple[int, int, int, bool, int]
# Span, warps a block, blocks a multiprocessor; whether the merged map lies in the workspace; chunks staged at once.
# Twelve warps have 168 registers a thread, eight or fewer 255. A cut of most warps that fits is taken.
_LARGE_MAPS = ((4, 4, 3, False, 1), (7, 4, 2, False, 2), (8, 4, 2, False, 2), (8, 4, 1, False, 2))
_EIGHT_WARPS = ((4, 8, 1, False, 1), (8, 8, 1, False, 1))  # measured to win up to 32x32 where there are fewer otherwise
_EIGHT_WARPS_LARGEST = 1600  # positions
_LARGER_MAPS = ((8, 8, 1, True, 2), (8, 4, 1, True, 2), (4, 2, 1, True, 2))
_SMALL_MAPS = tuple((span, *cut, False, 1) for cut in ((4, 2), (2, 2), (2, 1), (1, 1)) for span in (7, 8, 4))
_CLUSTERS = (1, 2, 4, 8, 16)
_MAP_PIECES = 3.3  # pieces that take as long as what is done once a map, as measured from 64x64 to 200x320
# What maps under way may note, over the bytes of x, or in bytes where that is more: below it is time that counts.
_NOTED, _NOTED_BYTES = 0.65, 48 * 2**20
_KEPT = 16  # ranks whose sums over positions a lane has registers for
_THREADS = 256  # of the blocks that prepare and finish
_PREPARE_BLOCKS = 1056  # a full wave on the largest GPUs; they stride over what there is to do


class Plan(NamedTuple):
    """How a backward is cut up; a map is the work of a team: a block, a cluster of them or, for small maps, a warp."""

    span: int  # positions a lane takes at once
    warps: int  # of a block
    team: bool  # whether they share one map
    blocks: int  # a multiprocessor
    spill: bool  # whether the merged map lies in the workspace
    stages: int  # chunks that a warp has staged
    cluster: int  # blocks that share a map
    stash: bool  # whether sums of the gradient of dt_weight lie in shared memory
    held: int  # layouts whose operands lie in shared memory at once
    pieces: int  # spans of a segment; a warp has four segments
    shared_bytes: int
    workspace: int  # float32 values of a team

    @property
    def chunks(self) -> int:
        """What warps take at once, over a map."""
        return self.pieces * (self.warps * self.cluster if self.team else 1)


class _Problem(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "dy", "projected", "packed", "skip", "dx", "dprojected", "dweight")
        ),
        *((name, ctypes.c_void_p) for name in ("sums", "workspace", "turns")),
        *(
            (name, ctypes.c_int)
            for name in ("length", "channels", "channel_blocks", "chunks", "images", "maps", "pieces")
        ),
        *((name, ctypes.c_int) for name in ("height", "width", "columns")),
        ("magic", ctypes.c_uint),
    ]


class _Finish(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("sums", "weights", "exact", "dprojected", "dweight", "dbias", "dA", "dD")
        ),
        *((name, ctypes.c_int) for name in ("length", "chunks", "pieces", "height", "width", "columns")),
        *((name, ctypes.c_int) for name in ("channels", "channel_blocks")),
    ]


class _Preparation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "A", "D", "packed", "skip")),
        ("zero", ctypes.c_void_p * 4),
        ("count", ctypes.c_ulonglong * 4),
        ("channels", ctypes.c_int),
        ("channel_blocks", ctypes.c_int),
    ]


def source() -> str:
    """Give the translation unit of the backward."""
    return read_source("vmamba.ops.ss2d", *_SOURCES)


def why_not(x: Tensor, dt_weight: Tensor, routes: str) -> str | None:
    """Say why the backward cannot take inputs that the forward takes, or return None when it can."""
    if routes not in _ROUTES:
        return f"the CUDA backward reads the routes {', '.join(map(repr, _ROUTES))}, not {routes!r}."
    if dt_weight.shape[-1] > MAX_RANK:
        return f"the CUDA backward takes a rank of at most {MAX_RANK}, and dt_weight has {dt_weight.shape[-1]}."
    if x.shape[1] > _LARGEST:
        return f"the CUDA backward takes at most {_LARGEST} positions, and x has {x.shape[1]}."
    return None


def operand_items(rank: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Count the 16-byte operands a lane has for 16 channels of one route; as in backward_chunk.cuh."""
    tiles, bf16, weight16 = -(-rank // 16), dtype == torch.bfloat16, weight_dtype == dtype
    terms = 1 if weight16 else 3 if bf16 else 2
    back = 1 if bf16 else 2
    return tiles * (terms + back) + (rank + 1) // 16 - rank // 16 + 3


def stage_bytes(rank: int, span: int, spill: bool, dy_dtype: torch.dtype) -> int:
    """Count the bytes of a staged chunk; as in backward_chunk.cuh."""
    row, slots = 2 * (rank + 2), 4 * (-(-span // 4) * 4)
    # A route's share of `projected` starts at any multiple of 4 bytes; what is copied are units of 16 that cover it.
    units = max(-(-(route * row % 16 * (rank % 2 == 0) + row) // 16) for route in range(4))
    return slots * (32 + 16 * dy_dtype.itemsize + 2 * 16 * (units | 1) + 64 * spill) + 1024


def _fill_in(
    length: int,
    rank: int,
    items: int,
    dy_dtype: torch.dtype,
    cut: _Cut,
    cluster: int = 1,
    held: int = 1,
) -> Plan:
    """Complete a row of the tables above."""
    span, warps, blocks, spill, stages = cut
    team = length > _SMALL
    merged, operands = length * _CHANNELS * 4, held * 2 * 16 * (32 * (items - 2) + 16)
    stashed = -(-rank // 8) * 1024 if rank > _KEPT else 0
    sharing = warps * cluster if team else 1
    pieces = -(-length // (4 * sharing * span))
    shared = 16 + operands + warps * (stashed + 384 * team) + 384 * (cluster > 1)
    shared += warps * stages * stage_bytes(rank, span, spill, dy_dtype)
    shared += 0 if spill else merged * (1 if team else warps)
    workspace = (pieces * 1024 * sharing + spill * merged) // 4
    return Plan(span, warps, team, blocks, spill, stages, cluster, stashed > 0, held, pieces, shared, workspace)


def _fitting(
    cuts: Sequence[_Cut],
    length: int,
    rank: int,
    items: int,
    shared_limit: int,
    dy_dtype: torch.dtype,
    maps: int = 2**31,
    places: int = 0,
    cluster: int = 1,
) -> Plan | None:
    """Choose the cut of most warps at work on a multiprocessor that fits, then of most blocks, then of fewest slots."""
    held = (2, 1) if length <= _SMALL else (1,)  # the first that fits is taken
    plans = [_fill_in(length, rank, items, dy_dtype, cut, cluster, n) for cut in cuts for n in held]
    # Twelve warps were measured to win only where the sums of dt_weight lie in registers.
    plans = [plan for plan in plans if not (plan.team and plan.stash and plan.warps * plan.blocks > 8)]
    plans = [plan for plan in plans if plan.blocks * (plan.shared_bytes + 1024) <= shared_limit + 1024]
    together = -(-maps // places) if places else maps

    def order(plan: Plan) -> tuple[int, int, int]:
        at_work = min(plan.blocks, together)
        return -plan.warps * at_work, -at_work, plan.span * plan.pieces

    return min(plans, key=order, default=None)


def _clustered(
    length: int, rank: int, items: int, shared_limit: int, dy_dtype: torch.dtype, maps: int, places: int
) -> Plan | None:
    """Choose how many blocks share a map: what takes least time by count, of what keeps to the memory."""
    found = []
    for cluster in _CLUSTERS if places else (1,):
        plan = _fitting(_LARGER_MAPS, length, rank, items, shared_limit, dy_dtype, cluster=cluster)
        if plan is None:
            continue
        # Clusters of 16 have a group of multiprocessors each to themselves.
        at_once = max(int(places / (16.5 if cluster == 16 else cluster)), 1) if places else maps
        noted = 4 * plan.workspace * min(at_once, maps)
        fits = noted <= max(_NOTED * maps * length * _CHANNELS * 2, _NOTED_BYTES)
        found.append((not fits, noted if not fits else 0, -(-maps // at_once) * (plan.pieces + _MAP_PIECES), plan))
    return min(found, key=lambda entry: entry[:3])[3] if found else None


@functools.cache
def plan_backward(
    length: int,
    rank: int,
    items: int,
    shared_limit: int,
    dy_dtype: torch.dtype = torch.bfloat16,
    maps: int = 2**31,
    places: int = 0,
) -> Plan:
    """Choose the cut of a backward.

    Args:
        length: positions of the map.
        rank: R.
        items: 16-byte operands of a lane, see `operand_items`.
        shared_limit: bytes of shared memory a block can have.
        dy_dtype: of the gradient of the merged map, as the kernel reads it.
        maps: blocks of 16 channels over all images.
        places: multiprocessors that can run clusters of blocks, none before capability 9.0.
    """
    if length > _SMALL:
        cuts = _LARGE_MAPS + _EIGHT_WARPS * (length <= _EIGHT_WARPS_LARGEST)
        plan = _fitting(cuts, length, rank, items, shared_limit, dy_dtype, maps, places)
        plan = plan or _clustered(length, rank, items, shared_limit, dy_dtype, maps, places)
    else:
        plan = _fitting(_SMALL_MAPS, length, rank, items, shared_limit, dy_dtype)
    if plan is not None:
        return plan
    cuts = _LARGER_MAPS if length > _SMALL else _SMALL_MAPS
    needed = min(_fill_in(length, rank, items, dy_dtype, cut).shared_bytes for cut in cuts)
    raise ValueError(
        f"the CUDA backward needs {needed} bytes of shared memory a block, and this GPU has {shared_limit}."
    )


def backward_defines(
    rank: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dy_dtype: torch.dtype,
    channels: int,
    routes: str,
    plan: Plan,
    ordered: bool = False,
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of `backward.cu`; `ordered` for results that are equal from run to run."""
    return (
        ("RANK", rank),
        ("SPAN", plan.span),
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", int(weight_dtype != torch.float32)),
        ("DY32", int(dy_dtype == torch.float32)),
        ("EVEN_E", int(channels % 2 == 0)),
        ("FULL_E", int(channels % _CHANNELS == 0)),
        ("TEAM", int(plan.team)),
        ("SPILL", int(plan.spill)),
        ("ORDERED", int(ordered)),
        ("STASH", int(plan.stash)),
        ("REVERSED", _ROUTES[routes][1]),
        ("THREADS", 32 * plan.warps),
        ("BLOCKS", plan.blocks),
        ("OPERAND_ITEMS", operand_items(rank, dtype, weight_dtype)),
        ("HELD", plan.held),
        ("STAGES", plan.stages),
        ("STAGE_BYTES", stage_bytes(rank, plan.span, plan.spill, dy_dtype)),
        ("CLUSTER", plan.cluster),
    )


class _Prepared(NamedTuple):
    """What a backward takes beside the caller's tensors.

    Attributes:
        kernels: That prepare, compute and finish.
        grid: Blocks of each.
        threads: Of a block of the second.
        shared_bytes: Of the same.
        cluster: Of the same.
        offsets: Bytes before each part of the scratch memory: `merged`, `packed`, `weights`, `skip`, `exact`,
            `workspace`, `turns`.
        floats: Of all of it.
        cleared: Words of 32 bits of `merged`, `weights`, `exact` and `turns`.
        blocks: Groups of 16 channels.
        problem: The last arguments of the second kernel.
        ending: The last arguments of the third.
    """

    kernels: tuple[nvrtc.Kernel, nvrtc.Kernel, nvrtc.Kernel]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cluster: int
    offsets: tuple[int, ...]
    floats: int
    cleared: tuple[int, ...]
    blocks: int
    problem: tuple[int, ...]
    ending: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _prepare(
    batch: int,
    height: int,
    width: int,
    channels: int,
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    routes: str,
    ordered: bool,
    index: int,
) -> _Prepared:
    dtype, weight_dtype, dy_dtype = dtypes
    length, device = height * width, find_device(index)
    items = operand_items(rank, dtype, weight_dtype)
    blocks = -(-channels // _CHANNELS)
    places = device.multiprocessors if device.clusters else 0
    plan = plan_backward(length, rank, items, device.block_shared, dy_dtype, batch * blocks, places)
    defines = backward_defines(rank, dtype, weight_dtype, dy_dtype, channels, routes, plan, ordered)
    prepare, main, finish = (
        nvrtc.get_kernel(source(), f"ss2d_backward{name}", defines, torch.device("cuda", index))
        for name in ("_prepare", "", "_finish")
    )
    chunks = plan.chunks
    maps = blocks * (batch if plan.team else -(-batch // plan.warps))
    teams = min(max(device.multiprocessors * plan.blocks // plan.cluster, 1), maps)
    slots = 4 * (-(-plan.span // 4) * 4)  # of a chunk
    together = max(2048 // ((rank + 2) * slots), 1)  # chunks of a block
    columns = _ROUTES[routes][0] if height > 1 else 0
    merged, packed = batch * 4 * (rank + 2) * chunks * slots, 4 * blocks * items * 32 * 4
    weights, skip = 4 * blocks * -(-rank // 8) * 32 * 4, blocks * _CHANNELS
    exact = 2 * blocks * (4 * 32 + _CHANNELS)  # of 64 bits
    workspace = (teams if plan.team else teams * plan.warps) * plan.workspace
    turns = 1 + ordered * (2 * blocks + batch * 2 * chunks)
    *starts, floats = itertools.accumulate(
        (round_up(words, 64) for words in (merged, packed, weights, skip, exact, workspace, turns)), initial=0
    )
    return _Prepared(
        kernels=(prepare, main, finish),
        grid=(_PREPARE_BLOCKS, teams * plan.cluster, batch * 4 * -(-chunks // together)),
        threads=32 * plan.warps,
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster,
        offsets=tuple(4 * start for start in starts),
        floats=floats,
        cleared=(merged, weights, exact, turns),
        blocks=blocks,
        problem=(
            *(length, channels, blocks, chunks, batch, maps, plan.pieces, height, width, columns),
            (2**32 - 1) // height,
        ),
        ending=(length, chunks, plan.pieces, height, width, columns, channels, blocks),
    )


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
    """Compute the gradients of `vmamba.ops.ss2d_scan`; states are recomputed (section 4.2 of the paper for the routes).

    Args:
        dy: (B, L, E), the gradient of the merged map.
        x: (B, L, E), bfloat16 or float16.
        projected: (B, L, 4·(R+2)), as x.
        dt_weight: (4, E, R), as x or float32.
        dt_bias: (4, E), float32.
        A: (4, E, 1), float32.
        D: (4, E), float32.
        height: H.
        width: W.
        routes: A key of `vmamba.ops.routes.ROUTES` for which `why_not` is None.
        flip_back: Without meaning for these routes.

    Returns:
        The gradients of x, projected, dt_weight, dt_bias, A and D, each in the dtype of its input. Under
        `torch.use_deterministic_algorithms(True)` they are bit-equal from run to run.
    """
    (batch, _, channels), rank = x.shape, dt_weight.shape[-1]
    if dy.dtype != x.dtype:
        dy = dy.float()
    dx, dprojected = torch.empty_like(x, memory_format=torch.contiguous_format), projected.new_empty(projected.shape)
    rounded = [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (dt_weight, dt_bias, A, D)]
    if x.numel() == 0:
        for tensor in (dprojected, *rounded):
            tensor.zero_()
        return dx, dprojected, rounded[0], rounded[1], rounded[2], rounded[3]

    ordered, dtypes = torch.are_deterministic_algorithms_enabled(), (x.dtype, dt_weight.dtype, dy.dtype)
    prepared = _prepare(batch, height, width, channels, rank, dtypes, routes, ordered, x.get_device())
    scratch = torch.empty(prepared.floats, dtype=torch.float32, device=x.device)
    start = scratch.data_ptr()
    merged, packed, weights, skip, exact, workspace, turns = (start + offset for offset in prepared.offsets)
    dy, x, projected, dt_weight, dt_bias, A, D = (
        nvrtc.aligned(t) for t in (dy, x, projected, dt_weight, dt_bias, A, D)
    )

    preparation = _Preparation(
        *(t.data_ptr() for t in (dt_weight, dt_bias, A, D)),
        packed,
        skip,
        (ctypes.c_void_p * 4)(merged, weights, exact, turns),
        (ctypes.c_ulonglong * 4)(*prepared.cleared),
        channels,
        prepared.blocks,
    )
    read, results = (x.data_ptr(), dy.data_ptr(), projected.data_ptr()), (t.data_ptr() for t in (dprojected, *rounded))
    problem = _Problem(*read, packed, skip, dx.data_ptr(), merged, weights, exact, workspace, turns, *prepared.problem)
    ending = _Finish(merged, weights, exact, *results, *prepared.ending)

    prepare, main, finish = prepared.kernels
    grid = prepared.grid
    prepare.launch((grid[0], 1, 1), _THREADS, [preparation])
    main.launch(
        (grid[1], 1, 1), prepared.threads, [problem], shared_bytes=prepared.shared_bytes, cluster=prepared.cluster
    )
    finish.launch((grid[2], 1, 1), _THREADS, [ending])
    return dx, dprojected, rounded[0], rounded[1], rounded[2], rounded[3]
