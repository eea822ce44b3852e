"""Batches of tensors from labelled images; damaged ones are left out and named, never fatal."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vmamba.data.images import DamagedImageError
from vmamba.data.sources import ImageSet
from vmamba.data.transforms import Transform


class Draw(NamedTuple):
    """One image of one epoch: its position, and the seed of its augmentation."""

    position: int
    seed: int


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: `(B, 3, H, W)`, normalised.
        targets: `(B,)` class indices.
        indices: `(B,)` positions in the image set.
        damaged: Why each image that is missing from the batch could not be read.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    damaged: list[str]


class _Sample(NamedTuple):
    image: torch.Tensor | None
    target: int
    position: int
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
        position = key.position if isinstance(key, Draw) else key
        target = int(self.images.targets[position])
        try:
            picture = self.images.read(position)
        except DamagedImageError as error:
            return _Sample(None, target, position, str(error))
        except OSError as error:
            return _Sample(None, target, position, f"{self.images.names[position]}: {error.strerror or error}")
        if isinstance(key, Draw):
            with _Seeded(key.seed):
                return _Sample(self.transform(picture), target, position, "")
        return _Sample(self.transform(picture), target, position, "")


class EpochSampler(Sampler[Draw]):
    """A new random order every epoch, a function of seed and epoch alone, which can start in its middle."""

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch whose order comes next, and how many of its images to pass over."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return max(self.length - self.first, 0)

    def __iter__(self) -> Iterator[Draw]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.length)
        seeds = generator.integers(2**31, size=self.length)
        for position, seed in zip(order[self.first :], seeds[self.first :], strict=True):
            yield Draw(int(position), int(seed))


def training_loader(
    images: ImageSet, transform: Transform, batch_size: int, *, seed: int, workers: int = -1, pin_memory: bool = False
) -> tuple[DataLoader[Batch], EpochSampler]:
    """Return batches in an order that changes every epoch, and the sampler that decides it.

    The last, incomplete batch of an epoch is left out, unless it is the only one.
    """
    sampler = EpochSampler(len(images), seed)
    common = _options(images, workers, pin_memory)
    dataset: Any = ImageDataset(images, transform)
    drop_last = len(images) >= batch_size
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **common), sampler


def evaluation_loader(
    images: ImageSet, transform: Transform, batch_size: int, *, workers: int = -1, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return batches of all images in their order."""
    dataset: Any = ImageDataset(images, transform)
    return DataLoader(dataset, batch_size=batch_size, **_options(images, workers, pin_memory))


def _options(images: ImageSet, workers: int, pin_memory: bool) -> dict[str, Any]:
    if workers < 0:
        # Reading files pays for processes of its own; pixels in memory do not.
        few = images.pixels is not None or len(images) < 256
        workers = 0 if few else min(8, os.cpu_count() or 1)
    return {
        "collate_fn": _collate,
        "num_workers": workers,
        "pin_memory": pin_memory,
        "worker_init_fn": _start_worker,
        # Otherwise starting an iteration draws from the generator that drop path uses, and a resumed run diverges.
        "generator": torch.Generator(),
    }


def _start_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which finishes its step; end on SIGTERM, which the main process sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collate(samples: Sequence[_Sample]) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    return Batch(
        torch.stack([sample.image for sample in good if sample.image is not None]) if good else torch.empty(0),
        torch.tensor([sample.target for sample in good], dtype=torch.long),
        torch.tensor([sample.position for sample in good], dtype=torch.long),
        [sample.problem for sample in samples if sample.image is None],
    )


class _Seeded:
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
