"""Launches the scan kernels: what `ops/s6/triton_kernels.py` and `ops/ss2d/triton_kernels.py` have in common."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from vmamba.ops import scan_parts_triton_kernels as parts
from vmamba.ops import scan_triton_kernels as kernels
from vmamba.ops.launch_table import Launch, find_launch

# Under TRITON_INTERPRET=1 kernels run in Python on the CPU: float32 operands for `dot`, and no inline assembly.
INTERPRETED = not isinstance(kernels.scan_fwd_kernel, triton.JITFunction)
_PATTERNS = {"cross2d": 0, "unidi": 1, "bidi": 2, "rows": 3, "columns": 4}
_FORWARD_WARPS = 12  # a multiprocessor, as registers allow
_JOINED, _JOIN_CHANNELS = 32, 32


def why_not_here(tensors: dict[str, Tensor]) -> str | None:
    """Say why these kernels cannot run on tensors with these dtypes and devices; None if they can."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes float32, float16 and bfloat16, and {name} is {tensor.dtype}."
    device = next(iter(tensors.values())).device
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and the tensors are on {device}."
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, and this PyTorch is built for AMD ones."
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 or newer, and this {name} has {major}.{minor}."
    return None


@dataclass(frozen=True)
class Problem:
    """What is scanned: sizes, strides and where operands are found.

    Attributes:
        on_map: Whether operands come from a map with low-rank Δ, rather than sequences with Δ given.
        images: How many images (or batch entries) there are.
        K: Routes, or groups of channels.
        E: Channels of a group.
        N: States of a channel.
        R: Rank of Δ on a map.
        height: H; 1 for sequences.
        width: W; L for sequences.
        routes: The pattern of routes.
        flip_back: Whether reversed lines are turned round again.
        softplus: Whether Δ goes through softplus.
        x_strides: Of images, and of positions (map) or channels (sequences).
        d_strides: The same for the projections (map) or Δ (sequences).
        exact: Whether inputs are float32, so that products must be too.
        native: Whether the product that gives Δ may run on 16-bit operands as they are.
        direct: Whether results have a single contributor per element and are written in their final dtype.
    """

    on_map: bool
    images: int
    K: int
    E: int
    N: int
    R: int
    height: int
    width: int
    routes: str
    flip_back: bool
    softplus: bool
    x_strides: tuple[int, int]
    d_strides: tuple[int, int]
    exact: bool
    native: bool

    @property
    def sequences(self) -> int:
        """How many sequences an image is read as along a route."""
        return {"rows": self.height, "columns": self.width}.get(self.routes, 1)

    @property
    def length(self) -> int:
        """How many positions a sequence has."""
        return self.height * self.width // self.sequences


@dataclass(frozen=True)
class Plan:
    """A problem cut into programs.

    Attributes:
        problem: The problem.
        launch: The tile.
        NB: States a program takes.
        tiles: Tiles a program sweeps.
        chunks: Programs a sequence is cut into.
    """

    problem: Problem
    launch: Launch
    NB: int
    tiles: int
    chunks: int

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return triton.cdiv(self.problem.E, self.launch.channels)

    @property
    def state_blocks(self) -> int:
        """Blocks of states."""
        return triton.cdiv(self.problem.N, self.NB)

    @property
    def lanes(self) -> int:
        """Programs that share a chunk, one a group, block of channels and block of states."""
        return self.problem.K * self.blocks * self.state_blocks

    @property
    def turns(self) -> int:
        """Launches of the ordered mode."""
        return max(self.blocks, self.problem.K) * self.state_blocks

    def items(self, images: int) -> int:
        """Chunks of that many images, one a work item."""
        return images * self.problem.sequences * self.chunks


def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> int:
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _backward_warps(launch: Launch) -> int:
    return 65536 // (32 * (launch.registers or 255))


def make_plan(problem: Problem, direction: str, device: torch.device, launch: Launch | None = None) -> Plan:
    """Choose a tile from the table and cut the sequences so that the GPU is filled.

    Args:
        problem: The problem.
        direction: "forward" or "backward".
        device: Where it runs.
        launch: The tile, where it is not to come from the table.
    """
    if launch is None:
        op = "ss2d" if problem.on_map else "s6"
        launch = find_launch(op, direction, problem.N, problem.E, _capability(device))
    per_lane = launch.channels // 32
    while per_lane > 1 and (problem.E % per_lane or problem.x_strides[1] % per_lane):
        per_lane //= 2
    launch = replace(launch, channels=32 * per_lane)
    plan = Plan(problem, launch, min(launch.states, triton.next_power_of_2(problem.N)), 0, 1)
    tiles = triton.cdiv(problem.length, launch.positions)
    warps = _FORWARD_WARPS if direction == "forward" else _backward_warps(launch)
    wanted = warps * _multiprocessors(device)
    programs = plan.lanes * problem.images * problem.sequences
    if direction == "forward":
        # Cutting costs a second reading of the inputs, so it must at least double the warps at work.
        chunks = 1 if 2 * programs > wanted else min(triton.cdiv(wanted, programs), triton.cdiv(tiles, 2))
        per_chunk = triton.cdiv(tiles, chunks)
    else:
        per_chunk = min(tiles, max(1, launch.chunk // launch.positions))
        while per_chunk > 2 and programs * triton.cdiv(tiles, per_chunk) < wanted:
            per_chunk = triton.cdiv(per_chunk, 2)
    return replace(plan, tiles=per_chunk, chunks=triton.cdiv(tiles, per_chunk))


def _precision(problem: Problem) -> str:
    if problem.native and not INTERPRETED:
        return "native"
    return "ieee" if problem.exact or INTERPRETED else "tf32x3"


def _sizes(plan: Plan) -> dict[str, int]:
    p, per_lane = plan.problem, plan.launch.channels // 32
    return {
        "K": p.K,
        "EV": p.E // per_lane,
        "H": p.height,
        "W": p.width,
        "n_seq": p.sequences,
        "length": p.length,
        "chunks": plan.chunks,
        "chunk_tiles": plan.tiles,
        "xs_b": p.x_strides[0],
        "xs_s": p.x_strides[1] // per_lane if p.on_map else p.x_strides[1],
        "ds_b": p.d_strides[0],
        "ds_s": p.d_strides[1],
    }


def _constants(plan: Plan) -> dict[str, Any]:
    p, launch = plan.problem, plan.launch
    shortest = {"rows": p.width, "columns": p.height}.get(p.routes, p.height if p.routes == "cross2d" else p.length)
    span = p.length * p.sequences if p.on_map else p.K * p.E
    return {
        "MAP": p.on_map,
        "PATTERN": _PATTERNS[p.routes],
        "FLIP_BACK": p.flip_back,
        "SOFTPLUS": p.softplus,
        "N": p.N,
        "R": p.R,
        "RP": max(16, triton.next_power_of_2(p.R)),
        "T": launch.positions,
        "CB": launch.channels,
        "NB": plan.NB,
        "V": launch.channels // 32,
        "SHORT": shortest < launch.positions,
        # In the ordered mode a launch may reach past the last block of channels.
        "EVEN": p.E % launch.channels == 0 and (plan.blocks >= p.K or not torch.are_deterministic_algorithms_enabled()),
        "WIDE": span * max(p.x_strides[1], p.d_strides[1], p.E if p.on_map else p.length) >= 2**31,
        "DOT": _precision(p),
        "ASM": not INTERPRETED,
        "num_warps": 1,
        "num_stages": 1,
        "maxnreg": launch.registers or None,
        "enable_fp_fusion": True,
    }


@dataclass(frozen=True)
class Operands:
    """The inputs of a scan. On a map `d` is the projections; `B` and `C` are not used there, and `w` only there."""

    x: Tensor
    d: Tensor
    w: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor

    def part(self, images: slice) -> "Operands":
        """Return the operands of some of the images."""
        return replace(self, x=self.x[images], d=self.d[images], B=self.B[images], C=self.C[images])

    def scanned(self) -> tuple[Tensor, ...]:
        """Return the operands of the recurrence, in the kernels' order."""
        return self.x, self.d, self.w, self.bias, self.A, self.B, self.C


def _find_carries(plan: Plan, operands: Operands, dy: Tensor | None, images: int, fast: bool) -> tuple[Tensor, Tensor]:
    """Find the state that each chunk starts from and, given dy, the adjoint state that it ends with."""
    p = plan.problem
    rows = images * p.K * p.sequences * plan.chunks
    empty = operands.A.new_empty
    state, total = empty(rows, p.N, p.E), empty(rows, p.E)
    adjoint = state if dy is None else empty(rows, p.N, p.E)
    constants = _constants(plan) | {"FAST": fast, "ADJOINT": dy is not None}
    constants |= _sizes(plan) | {"lanes": plan.lanes}
    kernels.scan_carry_kernel[(plan.lanes * plan.items(images),)](
        *operands.scanned(), adjoint if dy is None else dy, state, adjoint, total, **constants
    )
    grid = (images * p.K * p.sequences, p.N, triton.cdiv(p.E, _JOIN_CHANNELS))
    shared = {"CC": _JOINED, "CB": _JOIN_CHANNELS, "num_warps": 2, "enable_fp_fusion": True}
    sizes = (p.K, p.E, p.N, p.sequences, plan.chunks)
    kernels.scan_join_kernel[grid](state, total, operands.A, *sizes, REVERSE=False, **shared)
    if dy is not None:
        kernels.scan_join_kernel[grid](adjoint, total, operands.A, *sizes, REVERSE=True, **shared)
    return state, adjoint


def _launches(plan: Plan, shared: bool) -> list[dict[str, Any]]:
    """List the launches of a pass: one, or a series in a fixed order if elements are shared and order is asked for."""
    if shared and torch.are_deterministic_algorithms_enabled():
        return [{"turn": turn, "lanes": plan.problem.K, "ORDERED": True} for turn in range(plan.turns)]
    return [{"turn": 0, "lanes": plan.lanes, "ORDERED": False}]


def _mode(shared: bool) -> int:
    if not shared:
        return parts.STORE.value
    return parts.ADD.value if torch.are_deterministic_algorithms_enabled() else parts.ATOMIC.value


def scan_forward(plan: Plan, operands: Operands, y: Tensor, fast: bool = False) -> None:
    """Add the outputs of every group to y, zeroed; overwrite it where each element has one contributor.

    Args:
        plan: How to go about it.
        operands: The inputs.
        y: Contiguous; float32 where an element has several contributors.
        fast: Whether a softplus with an absolute error of 1e-7 will do.
    """
    with torch.cuda.device_of(y):  # Triton launches on the current device
        p = plan.problem
        chunked = plan.chunks > 1
        state = _find_carries(plan, operands, None, p.images, fast)[0] if chunked else y
        shared = p.on_map or plan.state_blocks > 1
        for launch in _launches(plan, shared):
            kernels.scan_fwd_kernel[(launch["lanes"] * plan.items(p.images),)](
                *operands.scanned(), operands.skip, state, y, **_sizes(plan), **_constants(plan), **launch,
                CHUNKED=chunked, MODE=_mode(shared), FAST=fast and not INTERPRETED,
            )  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of x, Δ (or the projections), B and C go: contiguous, zeroed where elements are shared."""

    x: Tensor
    d: Tensor
    B: Tensor
    C: Tensor


def shares_x(plan: Plan) -> bool:
    """Say whether an element of the gradient of x has several contributors."""
    return plan.problem.on_map or plan.state_blocks > 1


def shares_projections(plan: Plan) -> bool:
    """Say whether an element of the gradients of the projections has several contributors."""
    return plan.blocks * plan.state_blocks > 1


def scan_backward(plan: Plan, operands: Operands, dy: Tensor, into: Gradients) -> tuple[Tensor, ...]:
    """Take the gradients for the images of `operands`.

    Returns:
        The gradients of w (K, E, R), bias (K, E), A (K, E, N) and skip (K, E), summed over these images.
    """
    with torch.cuda.device_of(dy):
        return _scan_backward(plan, operands, dy, into)


def _scan_backward(plan: Plan, operands: Operands, dy: Tensor, into: Gradients) -> tuple[Tensor, ...]:
    p = plan.problem
    images = operands.x.shape[0]
    chunked = plan.chunks > 1
    state, adjoint = _find_carries(plan, operands, dy, images, False) if chunked else (dy, dy)
    busy = triton.cdiv(_backward_warps(plan.launch) * _multiprocessors(dy.device), plan.lanes)
    workers = min(plan.items(images), busy)
    empty = operands.A.new_empty
    tiles = empty(workers * plan.lanes * plan.tiles * plan.NB * plan.launch.channels)
    dw = empty(workers, plan.state_blocks, p.K, p.E, p.R)
    dbias, dskip = (empty(workers, plan.state_blocks, p.K, p.E) for _ in range(2))
    dA = empty(workers, p.K, p.E, p.N)
    shared_x, shared_p = shares_x(plan), shares_projections(plan)
    for launch in _launches(plan, shared_x or shared_p):
        kernels.scan_bwd_kernel[(workers * launch["lanes"],)](
            *operands.scanned(), operands.skip, dy, state, adjoint, tiles, into.x, into.d, into.B, into.C,
            dw, dbias, dA, dskip, images=images, workers=workers, **_sizes(plan), **_constants(plan), **launch,
            CHUNKED=chunked, MODE_X=_mode(shared_x), MODE_P=_mode(shared_p),
            DOT_GRAD="ieee" if p.exact or INTERPRETED else "tf32x3",
        )  # fmt: skip
    return dw.sum((0, 1)), dbias.sum((0, 1)), dA.sum(0), dskip[:, 0].sum(0)
