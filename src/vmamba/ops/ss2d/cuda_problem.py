"""What a forward in CUDA is planned for: the map, the GPU, and what is launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

CHANNELS = 16  # of a block
SLOT_BYTES = 64  # 16 float32 sums of a position


class Device(NamedTuple):
    """What a plan depends on: multiprocessors, shared memory of a block and of a multiprocessor, clusters or not."""

    multiprocessors: int
    block_shared: int
    multiprocessor_shared: int
    clusters: bool


@functools.cache
def find_device(index: int) -> Device:
    """Read a device's properties."""
    found = torch.cuda.get_device_properties(index)
    return Device(
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.shared_memory_per_multiprocessor,
        found.major >= 9,
    )


class Problem(NamedTuple):
    """What a plan is for: the map, R, groups of 16 channels, B, whether routes read columns, whether y is float32."""

    height: int
    width: int
    rank: int
    groups: int
    batch: int
    columns: bool = True
    float32_result: bool = False

    @property
    def length(self) -> int:
        """Positions of the map."""
        return self.height * self.width


class Launch(NamedTuple):
    """One kernel of a plan: its name, blocks, threads of a block, dynamic shared memory, blocks of a cluster."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int = 1


def round_up(size: int, unit: int) -> int:
    """Give the next multiple of `unit`."""
    return -(-size // unit) * unit
