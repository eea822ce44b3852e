"""How a forward in CUDA is cut into blocks: one of three ways, with its compile-time parameters and its memory."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from vmamba.ops import nvrtc
from vmamba.ops.ss2d.cuda_problem import SLOT_BYTES, Device, Launch, Problem, round_up
from vmamba.ops.ss2d.cuda_tiles import TilePlan, plan_tiles


class Slots(NamedTuple):
    """Where the float32 sums of a map lie in shared memory: distances of rows and columns, and the number of slots."""

    row: int
    column: int
    total: int


def find_slots(height: int, width: int) -> Slots:
    """Lay out the sums for `forward.cu`."""
    # The kernel swaps neighbours to avoid bank conflicts, so lines of slots have an even length.
    if width % 2 == 0 or (height % 2 == 1 and height <= width):
        pitch = width + width % 2
        return Slots(pitch, 1, height * pitch)
    pitch = height + height % 2
    return Slots(1, pitch, width * pitch)


class TablePlan(NamedTuple):
    """A forward by `forward.cu`, for any map that one block holds; positions are tabulated.

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
    def kernel(self) -> str:
        """Name in the source."""
        return "ss2d_forward"

    @property
    def files(self) -> tuple[str, ...]:
        """Files that make the source, in order."""
        return "common.cuh", "forward_parts.cuh", "forward.cu"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.teams * (1 if self.apart else 2)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 4 if self.apart else 1

    def defines(self) -> tuple[nvrtc.Define, ...]:
        """Give the compile-time parameters."""
        return (
            ("SPAN", self.span),
            ("WARPS", self.warps),
            ("IMAGES", self.images),
            ("APART", int(self.apart)),
            ("TEAMS", self.teams),
            ("STAGED", int(self.staged)),
            ("BLOCKS", self.blocks),
        )

    def grid(self, problem: Problem) -> int:
        """Count the blocks."""
        return -(-problem.batch // self.images) * -(-problem.groups // self.teams) * self.cluster

    def geometry(self, problem: Problem) -> tuple[int, ...]:
        """Give the kernel's last arguments."""
        return find_slots(problem.height, problem.width)

    def fixed_bytes(self) -> int:
        """Shared memory for `struct Shared`."""
        warps = self.threads // 32
        fixed = 64 + warps * 2 * 2 * (4 * self.span) * 4 + warps * (64 + 8) + self.teams * (8 * self.warps + 8)
        return round_up(fixed, 128)

    def shared_bytes(self, problem: Problem) -> int:
        """Dynamic shared memory of a block: what `struct Shared` holds, the float32 maps, staged projections."""
        maps = self.teams * self.images * find_slots(problem.height, problem.width).total * SLOT_BYTES
        pitch = (8 * (problem.rank + 2) + 15) // 32 * 32 + 16
        rows = problem.length + 7 + (problem.length + 7) // 8 * 2
        return self.fixed_bytes() + maps + (self.images * rows * pitch if self.staged else 0)


class LinePlan(NamedTuple):
    """A forward by `forward_lines.cu`, for maps that one block holds and whose sides are multiples of the span.

    Attributes:
        span: Positions that a lane owns in a chunk, all on one line.
        warps: Warps that share one route.
        quad: Images that share a warp: 1, 2 or 4.
        teams: Groups of 16 channels that a block takes side by side.
        blocks: Blocks that a multiprocessor should hold; what it holds at most bounds the registers of a thread.
        ahead: What is loaded one chunk ahead: 0 nothing, 1 projections, 2 the map too.
        piped: Whether the first pass keeps products and states, and sums are loaded a batch ahead; not with quad 4.
    """

    span: int
    warps: int
    quad: int = 1
    teams: int = 1
    blocks: int = 1
    ahead: int = 1
    piped: bool = False

    @property
    def kernel(self) -> str:
        """Name in the source."""
        return "ss2d_forward_lines"

    @property
    def files(self) -> tuple[str, ...]:
        """Files that make the source, in order."""
        return "common.cuh", "forward_parts.cuh", "forward_lines.cu"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 64 * self.warps * self.teams

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1

    def defines(self) -> tuple[nvrtc.Define, ...]:
        """Give the compile-time parameters."""
        return (
            ("SPAN", self.span),
            ("WARPS", self.warps),
            ("QUAD", self.quad),
            ("TEAMS", self.teams),
            ("BLOCKS", self.blocks),
            ("AHEAD", self.ahead),
            ("PIPED", int(self.piped)),
        )

    def grid(self, problem: Problem) -> int:
        """Count the blocks."""
        return -(-problem.batch // self.quad) * -(-problem.groups // self.teams)

    def geometry(self, problem: Problem) -> tuple[int, ...]:
        """Give the kernel's last arguments: slots from row to row, an odd number, and bytes from map to map."""
        pitch = problem.width | 1
        # Maps that share a warp start in different quarters of the banks, and in others than its spans of one map.
        shift = 64 if self.quad == 2 and self.span % 2 == 0 and problem.width > self.span else 32
        return pitch, round_up(problem.height * pitch * SLOT_BYTES, 128) + shift

    def fixed_bytes(self) -> int:
        """Shared memory for `struct Shared`."""
        return round_up(self.teams * (2 * self.warps * (64 + 8 + 4) + 8), 128)

    def shared_bytes(self, problem: Problem) -> int:
        """Dynamic shared memory of a block."""
        return self.fixed_bytes() + self.teams * self.quad * self.geometry(problem)[1]


Plan = TablePlan | LinePlan | TilePlan


def find_launches(plan: Plan, problem: Problem) -> tuple[Launch, ...]:
    """Give the kernels that make a forward, in order."""
    if isinstance(plan, TilePlan):
        return plan.launches(problem)
    return (Launch(plan.kernel, plan.grid(problem), plan.threads, plan.shared_bytes(problem), plan.cluster),)


def _table_plan(problem: Problem, device: Device) -> TablePlan:
    chunks = -(-problem.length // 32)
    if device.clusters and 2 * problem.batch * problem.groups <= device.multiprocessors:
        return TablePlan(8, min(16, 1 << (chunks - 1).bit_length()), apart=True)
    if chunks <= 12:
        images = 2 if chunks <= 2 else 1
        for teams in (8, 4, 2):  # teams that do not divide the groups would leave warps idle
            staged = TablePlan(8, 1, images, teams=teams, staged=True, blocks=8 // teams)
            shared = staged.shared_bytes(problem)
            # A block of shared memory costs 1 KiB more than it asks for.
            fits = shared <= device.block_shared and staged.blocks * (shared + 1024) <= device.multiprocessor_shared
            if problem.groups % teams == 0 and fits:
                return staged
        return TablePlan(8, 1, images, blocks=8)
    warps = 2 if chunks <= 20 else 4 if chunks <= 53 else 8
    return TablePlan(8, warps, blocks=8 // warps)


def _line_plan(problem: Problem) -> LinePlan | None:
    """Give the plan for maps whose sides have a common span of a length that was measured to beat the tables."""
    common = math.gcd(problem.height, problem.width)
    for smallest, largest, highest, plan in _LINE_PLANS:
        if smallest <= problem.length <= largest and problem.rank <= highest and common % plan.span == 0:
            return plan
    return None


# Fewest and most positions, highest rank, plan. Spans of 10 lost to the tables at 20x20, of 14 at 56x56.
_LINE_PLANS = (
    (1, 64, 64, LinePlan(7, 1, quad=4, teams=2, blocks=3)),
    (65, 200, 6, LinePlan(7, 1, quad=2, teams=2, blocks=4, piped=True)),
    (65, 400, 24, LinePlan(14, 1, quad=2, teams=2, blocks=3, ahead=0)),
    (65, 400, 64, LinePlan(7, 1, quad=2, teams=2, blocks=4, ahead=0)),
    (401, 1600, 16, LinePlan(14, 2, blocks=3, piped=True)),
    (401, 1600, 64, LinePlan(14, 2, blocks=3)),
    (1601, 10**9, 64, LinePlan(8, 8)),
)


@functools.cache
def plan_forward(problem: Problem, device: Device) -> Plan | None:
    """Choose how to cut up a forward; None if no kernel takes the map."""
    table = _table_plan(problem, device)
    if table.shared_bytes(problem) > device.block_shared:
        return plan_tiles(problem, device)
    line = None if table.apart else _line_plan(problem)
    return line if line is not None and line.shared_bytes(problem) <= device.block_shared else table
