"""The forward in CUDA over tiles, for maps of any size: its compile-time parameters, blocks and memory."""

from __future__ import annotations

from typing import NamedTuple

from vmamba.ops import nvrtc
from vmamba.ops.ss2d.cuda_problem import CHANNELS, SLOT_BYTES, Device, Launch, Problem, round_up

_HELD = 18  # runs that a thread of the second kernel keeps in registers
_WAVES = 2  # of blocks: so many images are taken at once, which bounds the memory that passes between the kernels


class TilePlan(NamedTuple):
    """A forward by `forward_tiles.cu`, for maps of any size: three kernels, in which nothing waits for a state.

    A run is a line of a tile. The first kernel finds every run's product of decays and its state from zero, the second
    turns these into the states before the runs, the third scans again and merges a tile in shared memory. What passes
    between them takes 8 bytes a run, channel and route in device memory: with tiles of 32 x 32 half as much as x of the
    images taken at once.

    Attributes:
        span: Positions that a lane takes at once; even, and a divisor of both sides of a tile.
        high: Rows of a tile.
        wide: Columns of a tile.
        warps: Warps of a block of the third kernel; each takes four rows or columns of its tile at a time.
        blocks: Blocks of the third kernel that a multiprocessor should hold, which bounds the registers of a thread.
        summary_blocks: Blocks of the first kernel, likewise.
        ahead: What is loaded one chunk ahead: 1 projections, 2 the map too.
        columns: Whether routes read columns; otherwise the map is folded into rows of `wide` positions.
        ragged: Whether a run may end within a span.
        segments: Parts into which the second kernel cuts a route.
    """

    span: int
    high: int
    wide: int
    warps: int
    blocks: int = 3
    summary_blocks: int = 3
    ahead: int = 1
    columns: bool = True
    ragged: bool = False
    segments: int = 128

    @property
    def files(self) -> tuple[str, ...]:
        """Files that make the source, in order."""
        return "common.cuh", "forward_parts.cuh", "forward_tiles.cu"

    def defines(self) -> tuple[nvrtc.Define, ...]:
        """Give the compile-time parameters."""
        return (
            ("SPAN", self.span),
            ("HIGH", self.high),
            ("WIDE", self.wide),
            ("WARPS", self.warps),
            ("BLOCKS", self.blocks),
            ("SUMMARY_BLOCKS", self.summary_blocks),
            ("AHEAD", self.ahead),
            ("COLUMNS", int(self.columns)),
            ("RAGGED", int(self.ragged)),
            ("SEGMENTS", self.segments),
        )

    def fold(self, problem: Problem) -> tuple[int, int]:
        """Give the sides of the map as it is cut up."""
        if self.columns:
            return problem.height, problem.width
        return -(-problem.length // self.wide), self.wide

    def tiles(self, problem: Problem) -> int:
        """Count the tiles of a map."""
        height, width = self.fold(problem)
        return -(-height // self.high) * -(-width // self.wide)

    def runs(self, problem: Problem) -> tuple[int, int]:
        """Count the runs of a route along rows, and of one of the others."""
        height, width = self.fold(problem)
        rows = height * -(-width // self.wide)
        return rows, width * -(-height // self.high) if self.columns else rows

    def images_at_once(self, problem: Problem, device: Device) -> int:
        """Count the images that fill a device for `_WAVES` waves of the third kernel."""
        wanted = -(-_WAVES * device.multiprocessors * self.blocks // (problem.groups * self.tiles(problem)))
        rounds = -(-problem.batch // max(wanted, 1))
        return -(-problem.batch // rounds)  # the rounds are even

    def workspace_floats(self, problem: Problem) -> int:
        """Count the float32 values that pass between the kernels: a state and a product a run, channel and route."""
        return problem.batch * problem.groups * CHANNELS * 2 * 2 * sum(self.runs(problem))

    def geometry(self, problem: Problem) -> tuple[int, ...]:
        """Give the kernels' last arguments: none."""
        return ()

    def fixed_bytes(self, problem: Problem) -> int:
        """Shared memory for `struct Shared`, at most: what a lane needs of each route."""
        words = 2 * (3 if problem.float32_result else 2) * -(-problem.rank // 8) + 4
        return 4 * words * 128

    def shared_bytes(self, problem: Problem) -> int:
        """Dynamic shared memory of a block of the third kernel."""
        return self.fixed_bytes(problem) + self.high * (self.wide | 1) * SLOT_BYTES

    def launches(self, problem: Problem) -> tuple[Launch, ...]:
        """Give the three kernels, in order."""
        maps = problem.batch * problem.groups
        blocks, name = maps * self.tiles(problem), "ss2d_forward_tiles"
        return (
            Launch(f"{name}_summary", blocks, 256, 0),
            Launch(f"{name}_carry", 8 * maps, 8 * self.segments, 64 * self.segments),
            Launch(f"{name}_merge", blocks, 32 * self.warps, self.shared_bytes(problem)),
        )


def plan_tiles(problem: Problem, device: Device) -> TilePlan | None:
    """Give the tiles that leave the fewest lanes idle; None where a column's steps pass 31 bits."""
    if problem.width * max(4 * CHANNELS * problem.groups, 8 * (problem.rank + 2)) >= 2**31:
        return None
    low = problem.rank <= 8 and not problem.float32_result
    few = 1 if problem.float32_result and problem.rank > 16 else 2  # blocks where a lane needs many registers
    plans = []
    for span, high, wide, warps, blocks in ((8, 32, 32, 8, 3), (10, 20, 40, 5, 4)):
        plan = TilePlan(span, high, wide, warps, blocks)
        if not low:
            # Where registers allow fewer blocks, a lane of the larger tiles has some for a chunk of x ahead.
            plan = plan._replace(blocks=max(blocks + few - 3, few), summary_blocks=few, ahead=2 if span == 8 else 1)
        if plan.shared_bytes(problem) <= device.block_shared:
            plans.append(fit_tiles(plan, problem))

    def cost(plan: TilePlan) -> float:
        height, width = plan.fold(problem)

        def lines(length: int, side: int) -> int:  # that lanes take, four at a time
            return length // side * side + round_up(length % side, 4)

        def along(length: int) -> int:
            return round_up(length, plan.span)

        rows = lines(height, plan.high) * along(width)
        columns = lines(width, plan.wide) * along(height) if plan.columns else rows
        return (rows + columns) * (1.25 if plan.ragged else 1)

    return min(plans, key=cost, default=None)


def fit_tiles(plan: TilePlan, problem: Problem) -> TilePlan:
    """Complete a plan by what depends on the map."""
    if problem.columns:
        ragged = problem.height % plan.span > 0 or problem.width % plan.span > 0
    else:
        ragged = problem.length % plan.wide > 0
    plan = plan._replace(columns=problem.columns, ragged=ragged)
    shares = -(-max(plan.runs(problem)) // _HELD)
    return plan._replace(segments=min(max(16, 1 << (shares - 1).bit_length()), 128))
