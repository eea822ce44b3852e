"""Launch configurations of the Triton kernels: which tile a kernel takes, by kind of problem and GPU generation.

`benchmarks/autotune.py` measures the candidates on the GPU at hand and rewrites `launch_table.json`. A GPU that is not
in the table takes the entries of the nearest older one, so a first call never waits for a search.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE_PATH = Path(__file__).with_name("launch_table.json")


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        positions: T, the positions of a tile: a power of two, at least 8.
        channels: CB, the channels of a tile: 32 a warp times 1, 2 or 4.
        states: NB, the states a program takes at most.
        chunk: The positions a program of the backward pass sweeps at most, where a sequence is longer.
        registers: The most a thread may take, 0 for as many as the compiler likes.
    """

    positions: int
    channels: int
    states: int
    chunk: int
    registers: int


def shape_class(op: str, direction: str, N: int, channels: int) -> str:
    """Name the class of problems that share an entry.

    Args:
        op: "ss2d" or "s6".
        direction: "forward" or "backward".
        N: The states of a channel.
        channels: E, the channels of a group.
    """
    states = "1" if N == 1 else "few" if N <= 4 else "many"
    return f"{op}-{direction}-{states}-{64 if channels % 64 == 0 else 32}"


@cache
def _table() -> dict[int, dict[str, Launch]]:
    rows = json.loads(TABLE_PATH.read_text())
    return {int(sm): {key: Launch(**entry) for key, entry in entries.items()} for sm, entries in rows.items()}


@cache
def find_launch(op: str, direction: str, N: int, channels: int, capability: int) -> Launch:
    """Look a configuration up.

    Args:
        op: "ss2d" or "s6".
        direction: "forward" or "backward".
        N: The states of a channel.
        channels: E, the channels of a group.
        capability: Of the GPU, as in 90 for 9.0.
    """
    table = _table()
    older = [sm for sm in table if sm <= capability]
    return table[max(older) if older else min(table)][shape_class(op, direction, N, channels)]
