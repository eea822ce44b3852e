"""Batches of tensors from labelled images; damaged ones are left out and named, never fatal.

Several processes share every batch: each reads its `Share`. What is in a batch is a function of the seed, the epoch and
the number of the batch, so a run can go on in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vmamba.data.images import DamagedImageError, decode_image
from vmamba.data.reading import (
    ALONE,
    BatchOfImages,
    Draw,
    EpochSampler,
    LoaderError,
    Seeded,
    Share,
    divide_batch,
    guarded,
    reading_options,
    with_stand_ins,
)
from vmamba.data.shards import RawSample, ShardSet, read_samples
from vmamba.data.sources import ImageSet
from vmamba.data.transforms import Transform

_SHUFFLED = 2000  # encoded samples a stream holds to draw from


@dataclass
class Batch(BatchOfImages):
    """What a loader yields.

    Attributes:
        images: `(B, 3, H, W)`, normalised.
        targets: `(B,)` class indices.
        indices: `(B,)` positions in the image set; in a stream, -1.
        seeds: `(B,)` seeds of the augmentation.
        names: What the images are called.
        damaged: Why each image that could not be read could not.
    """

    moved = ("images", "targets")
    listed = ("images", "targets", "indices", "seeds", "names")

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    seeds: torch.Tensor
    names: list[str]
    damaged: list[str]


class _Sample(NamedTuple):
    image: torch.Tensor | None
    target: int
    position: int
    seed: int
    name: str
    problem: str


class ImageDataset(Dataset[_Sample]):
    """Labelled images through a transform, each with random numbers of its own.

    The seed of an image comes with its index, so what augmentation does to it depends on neither the process that
    reads it nor the images read before it: an interrupted run goes on exactly where it was.
    """

    def __init__(self, images: ImageSet, transform: Transform):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Draw) -> _Sample:
        position, seed = key if isinstance(key, Draw) else (key, -1)
        target, name = int(self.images.targets[position]), self.images.names[position]
        try:
            picture = self.images.read(position)
        except DamagedImageError as error:
            return _Sample(None, target, position, seed, name, str(error))
        except OSError as error:
            return _Sample(None, target, position, seed, name, f"{name}: {error.strerror or error}")
        return _Sample(_transformed(picture, self.transform, seed), target, position, seed, name, "")


class ShardStream(IterableDataset[_Sample]):
    """Samples of shards as a stream, divided among processes and their readers by whole shards.

    Training streams have no end: a reader that has come to the end of its shards starts over, so that all give as many
    samples. Evaluation streams give every sample once.

    Args:
        images: The shards.
        transform: From pictures to tensors.
        share: Which process this is.
        seed: Seed of the order; None gives every sample once, in order.
        piece: Samples in a batch the reader makes, for going on in the middle.
    """

    def __init__(
        self, images: ShardSet, transform: Transform, share: Share, seed: int | None = None, piece: int = 1
    ) -> None:
        self.images, self.transform, self.share, self.seed, self.piece = images, transform, share, seed, piece
        self.epoch = self.done = 0

    def start(self, epoch: int, done: int) -> None:
        """Choose the epoch, and how many batches of this process to pass over."""
        self.epoch, self.done = epoch, done

    def __iter__(self) -> Iterator[_Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.seed is None:
            reader = self.share.rank * workers + worker
            mine = self.images.shards[reader :: self.share.processes * workers]
            for raw in read_samples(self.images, mine):
                yield self._decoded(raw, -1)
            return
        # DataLoader asks its first worker first; the one whose turn it is takes that one's place.
        worker = (worker + self.done) % workers
        reader = self.share.rank * workers + worker
        skipped = len(range(worker, self.done, workers)) * self.piece
        seeds = np.random.default_rng([self.seed, self.epoch, reader])
        for number, raw in enumerate(self._endless(reader, self.share.processes * workers)):
            seed = int(seeds.integers(2**31))
            if number >= skipped:
                yield self._decoded(raw, seed)

    def _endless(self, reader: int, readers: int) -> Iterator[RawSample]:
        from webdataset import shuffle

        for turn in range(2**31):
            order = np.random.default_rng([self.seed or 0, self.epoch, turn]).permutation(len(self.images.shards))
            mine = [self.images.shards[i] for i in order[reader::readers]]
            chance = random.Random(f"{self.seed} {self.epoch} {turn} {reader}")
            good = 0
            for raw in shuffle(_SHUFFLED, initial=_SHUFFLED, rng=chance)(iter(read_samples(self.images, mine))):
                good += not raw.problem
                yield raw
            if not good:
                raise LoaderError(f"none of the samples in {', '.join(mine[:3])} can be read")

    def _decoded(self, raw: RawSample, seed: int) -> _Sample:
        problem = raw.problem
        if not problem:
            try:
                picture = decode_image(raw.content, raw.name)
                return _Sample(_transformed(picture, self.transform, seed), raw.target, -1, seed, raw.name, "")
            except DamagedImageError as error:
                problem = str(error)
        return _Sample(None, raw.target, -1, seed, raw.name, problem)


class TrainingLoader:
    """The training batches of one process, epoch by epoch; every batch is complete.

    A damaged image is replaced by another of its batch, so that shapes stay the same for compiled models and all
    processes; a batch of which no image can be read is black and counts none.

    Attributes:
        steps: Batches in an epoch.
        layout: What must be the same for a run to go on in the middle of an epoch.
    """

    def __init__(self, loader: DataLoader[Batch], sampler: EpochSampler | ShardStream, steps: int, parts: int):
        self._loader, self._sampler, self._parts = loader, sampler, parts
        self.steps = steps
        self.layout: dict[str, int] = {}
        if isinstance(sampler, ShardStream):
            self.layout = {"processes": sampler.share.processes, "workers": loader.num_workers, "accumulate": parts}

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """Yield the batches of an epoch from number `first` on, each in the parts it is computed in.

        Raises:
            LoaderError: A process that reads images has died or hangs.
        """
        # A stream counts in the parts it yields, an order in whole batches.
        self._sampler.start(epoch, first * (self._parts if isinstance(self._sampler, ShardStream) else 1))
        stream = guarded(self._loader)
        for _ in range(first, self.steps):
            yield list(islice(stream, self._parts))


def training_loader(
    images: ImageSet | ShardSet,
    transform: Transform,
    batch_size: int,
    *,
    img_size: int,
    seed: int,
    share: Share = ALONE,
    parts: int = 1,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> TrainingLoader:
    """Return batches in an order that changes every epoch.

    Args:
        images: What to read.
        transform: From pictures to tensors `(3, img_size, img_size)`.
        batch_size: Images in a batch of all processes; the last, incomplete batch of an epoch is left out.
        img_size: Side of the images, for stand-ins of damaged ones.
        seed: Seed of order and augmentation.
        share: The part of each batch this process computes.
        parts: Pieces it is computed in.
        workers: Processes that read; -1 picks by the data.
        pin_memory: Whether the batches go to a GPU.
        timeout: Seconds to wait for a worker; 0 for ever.

    Raises:
        ValueError: The batch cannot be divided so, or there are more readers than shards.
    """
    piece = divide_batch(batch_size, share, parts)
    options = _options(images, workers, pin_memory, timeout) | {"collate_fn": _Filling((3, img_size, img_size))}
    if isinstance(images, ImageSet):
        sampler = EpochSampler(len(images), batch_size, seed, share, parts)
        dataset: Any = ImageDataset(images, transform)
        return TrainingLoader(DataLoader(dataset, batch_sampler=sampler, **options), sampler, sampler.steps, parts)
    readers = share.processes * max(options["num_workers"], 1)
    if readers > len(images.shards):
        raise ValueError(
            f"{len(images.shards)} shards cannot be divided among {readers} readers ({share.processes} processes ×"
            f" {options['num_workers']} workers); use fewer --workers or smaller shards"
        )
    stream: Any = ShardStream(images, transform, share, seed, piece)
    steps = max(len(images) // batch_size, 1)
    return TrainingLoader(DataLoader(stream, batch_size=piece, **options), stream, steps, parts)


def evaluation_loader(
    images: ImageSet | ShardSet,
    transform: Transform,
    batch_size: int,
    *,
    share: Share = ALONE,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> DataLoader[Batch]:
    """Return batches of this process's share of the images in their order, none twice; damaged ones are left out."""
    options = _options(images, workers, pin_memory, timeout) | {"collate_fn": _collate}
    dataset: Any
    if isinstance(images, ShardSet):
        dataset = ShardStream(images, transform, share)
        return DataLoader(dataset, batch_size=batch_size, **options)
    dataset = ImageDataset(images, transform)
    mine = range(share.rank, len(images), share.processes)
    return DataLoader(dataset, batch_size=batch_size, sampler=mine, **options)


def _options(images: ImageSet | ShardSet, workers: int, pin_memory: bool, timeout: float) -> dict[str, Any]:
    if isinstance(images, ShardSet):
        return reading_options(len(images), workers, pin_memory, timeout, most=len(images.shards))
    return reading_options(len(images), workers, pin_memory, timeout, in_memory=images.pixels is not None)


def _transformed(picture: Any, transform: Transform, seed: int) -> torch.Tensor:
    if seed < 0:
        return transform(picture)
    with Seeded(seed):
        return transform(picture)


def _collate(samples: Sequence[_Sample], filled: Sequence[_Sample] | None = None) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    used = good if filled is None else filled
    images = [sample.image for sample in used if sample.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([sample.target for sample in used], dtype=torch.long),
        torch.tensor([sample.position for sample in used], dtype=torch.long),
        torch.tensor([sample.seed for sample in used], dtype=torch.long),
        [sample.name for sample in used],
        [sample.problem for sample in samples if sample.image is None],
        good=len(good),
    )


@dataclass(frozen=True)
class _Filling:
    """Collate with a stand-in for every damaged image."""

    shape: tuple[int, int, int]

    def __call__(self, samples: Sequence[_Sample]) -> Batch:
        empty = _Sample(torch.zeros(self.shape), 0, -1, -1, "", "")
        return _collate(samples, with_stand_ins(samples, _is_damaged, empty))


def _is_damaged(sample: _Sample) -> bool:
    return sample.image is None
