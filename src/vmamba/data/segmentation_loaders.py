"""Batches of pictures with masks: resized, cut, mirrored, recoloured as published; damaged pairs named, not fatal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vmamba.data.images import DamagedImageError
from vmamba.data.loaders import TrainingLoader
from vmamba.data.reading import (
    ALONE,
    BatchOfImages,
    Draw,
    EpochSampler,
    Seeded,
    Share,
    divide_batch,
    reading_options,
    with_stand_ins,
)
from vmamba.data.segmentation import NO_CLASS, PairSet

_TRIES = 10  # cuts drawn in search of one that no class fills


@dataclass(frozen=True)
class SegmentationPreprocessing:
    """What is done to every picture before the model sees it; stored with the weights.

    Attributes:
        short_side: Pixels that the shorter side is brought to; 0 leaves pictures as they are.
        long_side: Pixels that the longer side must not exceed, which wins.
        mean: Mean of each channel, for values in 0–1.
        std: Standard deviation of each channel.
    """

    short_side: int = 512
    long_side: int = 2048
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def size(self, height: int, width: int, factor: float = 1.0) -> tuple[int, int]:
        """Return the size a picture is brought to; `factor` scales both limits, as training draws it."""
        if not self.short_side:
            return max(round(height * factor), 1), max(round(width * factor), 1)
        scale = factor * min(self.short_side / min(height, width), self.long_side / max(height, width))
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def normalised(self, image: torch.Tensor) -> torch.Tensor:
        """Return `(3, H, W)` unsigned bytes as floats of mean 0."""
        return functional.normalize(functional.to_dtype(image, torch.float32, scale=True), self.mean, self.std)

    def __call__(self, picture: Any) -> torch.Tensor:
        """Return a picture as the model shall see it, `(3, h, w)`."""
        image = functional.pil_to_tensor(picture)
        size = self.size(image.shape[1], image.shape[2])
        return self.normalised(_resized(image, size))


def _resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize bilinearly without smoothing first, as the published training and evaluation did."""
    return functional.resize(image, list(size), interpolation=v2.InterpolationMode.BILINEAR, antialias=False)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """What training does to a picture and its mask: resize, cut, mirror, recolour.

    Attributes:
        preprocessing: What is done in any case.
        crop: Side of the square that is cut out; what is missing is filled with the mean colour and no class.
        scales: Range of the factor the picture is resized by.
        most: Largest share of the labelled pixels one class may fill; after ten tries it may fill more.
        flip: Chance of mirroring.
        photometric: Whether brightness, contrast, saturation and hue are changed, each with a chance of one half.
    """

    preprocessing: SegmentationPreprocessing
    crop: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75
    flip: float = 0.5
    photometric: bool = True

    def __call__(self, picture: Any, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(3, crop, crop)`, normalised, and `(crop, crop)` of unsigned bytes."""
        image, target = tv_tensors.Image(functional.pil_to_tensor(picture)), tv_tensors.Mask(torch.from_numpy(mask))
        low, high = self.scales
        factor = low + (high - low) * float(torch.rand(()))
        size = self.preprocessing.size(image.shape[1], image.shape[2], factor)
        image = tv_tensors.Image(_resized(image, size))
        # The exact form: the other is off by half a pixel against the picture.
        target = functional.resize(target[None], list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
        top, left = self._place(target)
        image, target = (part[..., top : top + self.crop, left : left + self.crop] for part in (image, target))
        if float(torch.rand(())) < self.flip:
            image, target = image.flip(-1), target.flip(-1)
        if self.photometric:
            image = _RECOLOUR(tv_tensors.Image(image))
        missing = [0, self.crop - target.shape[1], 0, self.crop - target.shape[0]]
        padded = torch.nn.functional.pad(self.preprocessing.normalised(image).as_subclass(torch.Tensor), missing)
        return padded, torch.nn.functional.pad(target.as_subclass(torch.Tensor), missing, value=NO_CLASS)

    def _place(self, target: torch.Tensor) -> tuple[int, int]:
        """Draw where to cut, again while one class fills too much of what would be cut out."""
        place = (0, 0)
        for _ in range(_TRIES):
            place = (_below(target.shape[0] - self.crop), _below(target.shape[1] - self.crop))
            part = target[place[0] : place[0] + self.crop, place[1] : place[1] + self.crop]
            counts = torch.bincount(part[part != NO_CLASS].flatten().long(), minlength=1)
            if len(counts[counts > 0]) > 1 and float(counts.max()) < self.most * float(counts.sum()):
                break
        return place


def _below(spare: int) -> int:
    return int(torch.randint(max(spare, 0) + 1, ()))


def _jitter(**strength: Any) -> v2.Transform:
    return v2.RandomApply([v2.ColorJitter(**strength)], p=0.5)


_CONTRAST, _HUES = _jitter(contrast=(0.5, 1.5)), [_jitter(saturation=(0.5, 1.5)), _jitter(hue=0.1)]
# Contrast comes before or after the colours. The published training adds ±32 to the brightness; here it is a factor.
_RECOLOUR = v2.Compose(
    [_jitter(brightness=0.125), v2.RandomChoice([v2.Compose([_CONTRAST, *_HUES]), v2.Compose([*_HUES, _CONTRAST])])]
)


@dataclass
class SegmentationBatch(BatchOfImages):
    """What a loader yields.

    Attributes:
        images: `(B, 3, H, W)`, normalised.
        masks: `(B, H', W')` class indices, NO_CLASS where there is none; in evaluation of the picture's own size.
        indices: `(B,)` positions in the set.
        seeds: `(B,)` seeds of the augmentation.
        names: What the pictures are called.
        damaged: Why each pair that could not be read could not.
    """

    moved = ("images", "masks")
    listed = ("images", "masks", "indices", "seeds", "names")

    images: torch.Tensor
    masks: torch.Tensor
    indices: torch.Tensor
    seeds: torch.Tensor
    names: list[str]
    damaged: list[str]


class _Sample(NamedTuple):
    image: torch.Tensor | None
    mask: torch.Tensor | None
    position: int
    seed: int
    name: str
    problem: str


class PairDataset(Dataset[_Sample]):
    """Pairs through preprocessing, or with a seed through the augmentation."""

    def __init__(self, pairs: PairSet, transform: SegmentationPreprocessing | SegmentationAugmentation) -> None:
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | Draw) -> _Sample:
        position, seed = key if isinstance(key, Draw) else (key, -1)
        name = self.pairs.name(position)
        try:
            picture, mask = self.pairs.read(position)
        except DamagedImageError as error:
            return _Sample(None, None, position, seed, name, str(error))
        except OSError as error:
            return _Sample(None, None, position, seed, name, f"{error.filename or name}: {error.strerror or error}")
        if isinstance(self.transform, SegmentationPreprocessing):
            return _Sample(self.transform(picture), torch.from_numpy(mask), position, seed, name, "")
        with Seeded(seed):
            return _Sample(*self.transform(picture, mask), position, seed, name, "")


def training_pairs(
    pairs: PairSet,
    augmentation: SegmentationAugmentation,
    batch_size: int,
    *,
    seed: int,
    updates: int = 0,
    share: Share = ALONE,
    parts: int = 1,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> TrainingLoader:
    """Return batches in an order that changes every epoch.

    Args:
        pairs: What to read.
        augmentation: From pictures and masks to tensors.
        batch_size: Pairs in a batch of all processes.
        seed: Seed of order and augmentation.
        updates: Batches in an epoch; 0 makes it one pass over the pairs.
        share: The part of each batch this process computes.
        parts: Pieces it is computed in.
        workers: Processes that read; -1 picks by the data.
        pin_memory: Whether the batches go to a GPU.
        timeout: Seconds to wait for a worker; 0 for ever.

    Raises:
        ValueError: The batch cannot be divided so.
    """
    divide_batch(batch_size, share, parts)
    sampler = EpochSampler(len(pairs), batch_size, seed, share, parts, updates)
    options = reading_options(len(pairs), workers, pin_memory, timeout) | {"collate_fn": _Filling(augmentation.crop)}
    loader: Any = DataLoader(PairDataset(pairs, augmentation), batch_sampler=sampler, **options)
    return TrainingLoader(loader, sampler, sampler.steps, parts)


def evaluation_pairs(
    pairs: PairSet,
    preprocessing: SegmentationPreprocessing,
    *,
    share: Share = ALONE,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> DataLoader[SegmentationBatch]:
    """Return this process's share of the pairs, one at a time for they differ in size; damaged ones come empty."""
    options = reading_options(len(pairs), workers, pin_memory, timeout) | {"collate_fn": _collate}
    mine = range(share.rank, len(pairs), share.processes)
    dataset: Any = PairDataset(pairs, preprocessing)
    return DataLoader(dataset, batch_size=1, sampler=mine, **options)


def _collate(samples: Sequence[_Sample], filled: Sequence[_Sample] | None = None) -> SegmentationBatch:
    good = [sample for sample in samples if sample.image is not None]
    used = good if filled is None else filled
    images = [sample.image for sample in used if sample.image is not None]
    masks = [sample.mask for sample in used if sample.mask is not None]
    return SegmentationBatch(
        torch.stack(images) if images else torch.empty(0),
        torch.stack(masks) if masks else torch.empty(0, 0, 0, dtype=torch.uint8),
        torch.tensor([sample.position for sample in used], dtype=torch.long),
        torch.tensor([sample.seed for sample in used], dtype=torch.long),
        [sample.name for sample in used],
        [sample.problem for sample in samples if sample.image is None],
        good=len(good),
    )


@dataclass(frozen=True)
class _Filling:
    """Collate with a stand-in for every damaged pair."""

    crop: int

    def __call__(self, samples: Sequence[_Sample]) -> SegmentationBatch:
        image, mask = torch.zeros(3, self.crop, self.crop), torch.full((self.crop, self.crop), NO_CLASS)
        empty = _Sample(image, mask.to(torch.uint8), -1, -1, "", "")
        return _collate(samples, with_stand_ins(samples, lambda sample: sample.image is None, empty))
