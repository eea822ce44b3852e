"""How images of any task are read: in which order, by which process, with which random numbers; and what goes wrong."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

T = TypeVar("T")
B = TypeVar("B", bound="BatchOfImages")


class LoaderError(RuntimeError):
    """The processes that read images have died or hang; the message says which and what may help."""


class Draw(NamedTuple):
    """One image of one epoch: its position, and the seed of its augmentation."""

    position: int
    seed: int


class Share(NamedTuple):
    """Which part of every batch this process computes: part `rank` of `processes` equal ones."""

    rank: int = 0
    processes: int = 1


ALONE = Share()


@dataclass
class BatchOfImages:
    """What the batches of every task can do.

    Attributes:
        good: Images in the batch that are no stand-ins for damaged ones: its length.
        moved: Names of the tensors that a device works on.
        listed: Names of what has one entry for each image.
    """

    moved: ClassVar[tuple[str, ...]]
    listed: ClassVar[tuple[str, ...]]
    good: int = field(kw_only=True)

    def __len__(self) -> int:
        return self.good

    def first(self: B, number: int) -> B:
        """Return the first images of the batch."""
        parts = {name: getattr(self, name)[:number] for name in self.listed}
        return replace(self, **parts, good=min(len(self), number))

    def pin_memory(self: B) -> B:
        """Return the batch in page-locked memory, as DataLoader asks for."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self: B, device: torch.device) -> B:
        """Return the batch with what a device works on there."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self: B, change: Callable[[Tensor], Tensor]) -> B:
        parts: dict[str, Any] = {name: change(getattr(self, name)) for name in self.moved}
        return replace(self, **parts)


class EpochSampler(Sampler[list[Draw]]):
    """A new random order every epoch, a function of seed and epoch alone, cut into the parts one process computes.

    Args:
        length: Images in the set; where they are fewer than an epoch takes, they come again in another order.
        batch_size: Images in a batch of all processes.
        seed: Seed of the order.
        share: The part of each batch to yield.
        parts: Pieces this process's share of a batch is cut into.
        steps: Batches in an epoch; 0 makes it one pass, the last, incomplete batch left out.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, share: Share = ALONE, parts: int = 1, steps: int = 0
    ) -> None:
        self.length, self.batch_size, self.seed, self.share, self.parts = length, batch_size, seed, share, parts
        self.steps = steps or max(length // batch_size, 1)
        self.epoch = self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch whose order comes next, and how many of its batches to pass over."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return max(self.steps - self.first, 0) * self.parts

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        needed = self.steps * self.batch_size
        order = np.concatenate([generator.permutation(self.length) for _ in range(-(-needed // self.length))])
        seeds = generator.integers(2**31, size=needed)
        share = self.batch_size // self.share.processes
        piece = share // self.parts
        for step in range(self.first, self.steps):
            mine = step * self.batch_size + self.share.rank * share
            for start in range(mine, mine + share, piece):
                chosen = slice(start, start + piece)
                yield [Draw(int(p), int(s)) for p, s in zip(order[chosen], seeds[chosen], strict=True)]


def divide_batch(batch_size: int, share: Share, parts: int) -> int:
    """Return how many images of a batch are computed at once: by one process, in one of its parts.

    Raises:
        ValueError: The batch cannot be divided so.
    """
    pieces = share.processes * parts
    if batch_size % pieces:
        raise ValueError(
            f"--batch_size {batch_size} cannot be divided among {share.processes} processes × {parts} parts;"
            f" {batch_size // pieces * pieces or pieces} can"
        )
    return batch_size // pieces


def with_stand_ins(samples: Sequence[T], is_damaged: Callable[[T], bool], empty: T) -> list[T]:
    """Put another sample of the batch in the place of each damaged one, or an empty one where all are damaged."""
    others = cycle([sample for sample in samples if not is_damaged(sample)] or [empty])
    return [next(others) if is_damaged(sample) else sample for sample in samples]


def guarded(loader: DataLoader[T]) -> Iterator[T]:
    """Yield batches; turn the ways in which DataLoader reports dead and hanging workers into one error.

    Raises:
        LoaderError: A process that reads images has died or hangs.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if not is_worker_failure(error):
            raise
        raise LoaderError(worker_failure(error)) from None


def is_worker_failure(error: RuntimeError) -> bool:
    """Whether DataLoader raised this about a worker; it does so wherever the main process happens to be."""
    return str(error).startswith("DataLoader ")


def worker_failure(error: RuntimeError) -> str:
    """Say in a sentence what became of a worker."""
    reason = str(error).partition("\n")[0].rstrip(". ")
    return (
        f"a process that reads images failed: {reason}; it may have run out of memory (use fewer --workers), or wait "
        "for a disk or network that no longer answers (--guards.worker_timeout sets the patience)"
    )


def reading_options(
    items: int, workers: int, pin_memory: bool, timeout: float, *, in_memory: bool = False, most: int | None = None
) -> dict[str, Any]:
    """Return what every DataLoader here is given.

    Args:
        items: Images in the set.
        workers: Processes that read; -1 picks by the data. More than there are cores are cut to that, and told;
            not of streams, whose order of images is that of so many readers.
        pin_memory: Whether the batches go to a GPU.
        timeout: Seconds to wait for a worker; 0 for ever.
        in_memory: Whether the pixels are in memory, where reading does not pay for processes of its own.
        most: Processes that are of use at most, which is known of streams of shards alone.
    """
    if workers < 0:
        workers = 0 if items < 256 or in_memory else min(8, _cores(), most or 8)
    elif workers > _cores():
        _tell_of_cores(workers, _cores(), stream=most is not None)
        workers = workers if most is not None else _cores()
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "worker_init_fn": _start_worker,
        "timeout": timeout if workers else 0,
        # Otherwise starting an iteration draws from the generator that drop path uses, and a resumed run diverges.
        "generator": torch.Generator(),
    }


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _tell_of_cores(workers: int, cores: int, *, stream: bool) -> None:
    """Say once, where PyTorch warns with every loader, that there are fewer cores than workers."""
    if os.environ.get("RANK", "0") == "0":
        outcome = (
            "reading may be slow, and fewer --workers may do" if stream else f"as many processes read images, {cores}"
        )
        print(f"workers: {workers} were asked for, cores of this machine: {cores}; {outcome}", file=sys.stderr)


def _start_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which finishes its step; end on SIGTERM, which the main process sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGUSR1"):  # SLURM sends it to every process of a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Seeded:
    """Give augmentation a generator state of its own and put the old one back."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.random.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        python, numpy, pytorch = self.saved
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
