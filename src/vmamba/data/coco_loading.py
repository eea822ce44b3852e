"""Batches of images with their boxes and masks; what augmentation does is a crop, a scale and a flip, in this order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmamba.data.coco import CocoImage, CocoSet
from vmamba.data.images import DamagedImageError
from vmamba.data.loaders import TrainingLoader
from vmamba.data.reading import (
    ALONE,
    BatchOfImages,
    Draw,
    EpochSampler,
    Share,
    divide_batch,
    guarded,
    reading_options,
    with_stand_ins,
)

_CROP_SIDES = (400, 500, 600)  # what the short side is brought to before a crop, as published
_CROP_RANGE = (384, 600)  # pixels of a crop's sides


@dataclass(frozen=True)
class Augmentation:
    """How a training image is brought to its size.

    Attributes:
        min_sizes: Lengths of the short side to choose from.
        max_size: Length that the long side may have.
        flip: Chance of mirroring it.
        crop: Chance of cutting a piece out first: as large as 384 to 600 pixels a side are where the short side has
            400, 500 or 600.
    """

    min_sizes: tuple[int, ...] = (800,)
    max_size: int = 1333
    flip: float = 0.5
    crop: float = 0.0


class View(NamedTuple):
    """A piece of an image and the size it is brought to: x, y, width, height in pixels, scaled to columns × rows."""

    x: float
    y: float
    width: float
    height: float
    columns: int
    rows: int
    flip: bool


def scale_of(height: float, width: float, short: float, long: float) -> float:
    """Return the factor that brings the short side to `short`, unless the long one would exceed `long`."""
    return min(short / min(height, width), long / max(height, width))


def draw_view(height: int, width: int, how: Augmentation, chance: np.random.Generator) -> View:
    """Choose a view of an image at random."""
    x, y, w, h = 0, 0, width, height
    if chance.random() < how.crop:
        scale = scale_of(height, width, chance.choice(_CROP_SIDES), how.max_size)
        w, h = (
            min(max(round(chance.integers(_CROP_RANGE[0], _CROP_RANGE[1] + 1) / scale), 1), side)
            for side in (width, height)
        )
        x, y = int(chance.integers(width - w + 1)), int(chance.integers(height - h + 1))
    scale = scale_of(h, w, chance.choice(how.min_sizes), how.max_size)
    columns, rows = max(int(w * scale + 0.5), 1), max(int(h * scale + 0.5), 1)
    return View(x, y, w, h, columns, rows, bool(chance.random() < how.flip))


def whole(image: CocoImage) -> View:
    """Return the view that leaves an image as it is."""
    return View(0, 0, image.width, image.height, image.width, image.height, False)


def masks_in(image: CocoImage, objects: Sequence[int], view: View) -> np.ndarray:
    """Draw the masks of some objects as they lie in a view: `(n, rows, columns)` uint8, 1 where the object is."""
    drawn = np.zeros((len(objects), view.rows, view.columns), np.uint8)
    for place, index in enumerate(objects):
        drawn[place] = _mask_in(image, image.shapes[index], view)
    return drawn[:, :, ::-1].copy() if view.flip else drawn


def _mask_in(image: CocoImage, shape: Any, view: View) -> np.ndarray:
    if not isinstance(shape, Mapping):
        factors = np.array([view.columns / view.width, view.rows / view.height])
        moved = [((polygon.reshape(-1, 2) - (view.x, view.y)) * factors).ravel().tolist() for polygon in shape]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, view.rows, view.columns)))
    full = coco_mask.decode(encoding_of(shape))
    x, y = int(view.x), int(view.y)
    piece = torch.from_numpy(np.ascontiguousarray(full[y : y + int(view.height), x : x + int(view.width)]))
    return F.interpolate(piece[None, None], size=(view.rows, view.columns), mode="nearest-exact")[0, 0].numpy()


def encoding_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run-length encoding in the compressed form, whichever form it has."""
    if isinstance(shape["counts"], list):
        return coco_mask.frPyObjects(dict(shape), *shape["size"])
    return {"size": shape["size"], "counts": shape["counts"]}


class DetectionSample(NamedTuple):
    """One image, or why it could not be read."""

    image: Tensor | None
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    key: int
    name: str
    problem: str


class DetectionDataset(Dataset[DetectionSample]):
    """Images with their objects: in training at a random view, else as they are and without objects.

    The random numbers come with the index, as in `vmamba.data.loaders.ImageDataset`.

    Args:
        images: The set.
        masks: Whether to draw masks.
        augmentation: None for evaluation.
    """

    def __init__(self, images: CocoSet, masks: bool, augmentation: Augmentation | None = None) -> None:
        self.images, self.masks, self.augmentation = images.images, masks, augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Draw) -> DetectionSample:
        position, seed = key if isinstance(key, Draw) else (key, 0)
        record = self.images[position]
        try:
            picture = record.read()
        except DamagedImageError as error:
            return _damaged(record, str(error))
        except OSError as error:
            return _damaged(record, f"{record.path}: {error.strerror or error}")
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.augmentation is None:
            return DetectionSample(pixels, *_NOTHING, record.key, record.path, "")
        view = draw_view(record.height, record.width, self.augmentation, np.random.default_rng(seed))
        return self._seen(record, pixels, view)

    def _seen(self, record: CocoImage, pixels: Tensor, view: View) -> DetectionSample:
        piece = pixels[:, int(view.y) : int(view.y + view.height), int(view.x) : int(view.x + view.width)]
        if piece.shape[1:] != (view.rows, view.columns):
            scaled = F.interpolate(piece[None].float(), size=(view.rows, view.columns), mode="bilinear")
            piece = scaled[0].round().clamp(0, 255).to(torch.uint8)
        factors = np.array([view.columns / view.width, view.rows / view.height] * 2)
        boxes = (record.boxes - np.array([view.x, view.y] * 2)) * factors
        boxes = boxes.clip(0, [view.columns, view.rows] * 2)
        inside = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= 1  # a pixel at least
        kept = np.flatnonzero(inside & ~record.crowd)
        boxes = boxes[kept]
        if view.flip:
            piece = piece.flip(2)
            boxes[:, 0::2] = view.columns - boxes[:, 2::-2]
        masks = torch.from_numpy(masks_in(record, kept.tolist(), view)) if self.masks else _NOTHING[2]
        labels = torch.from_numpy(record.labels[kept] + 1)
        return DetectionSample(
            piece.contiguous(), torch.from_numpy(boxes.astype(np.float32)), labels, masks, record.key, record.path, ""
        )


_NOTHING = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 0, 0, dtype=torch.uint8)


def _damaged(record: CocoImage, problem: str) -> DetectionSample:
    return DetectionSample(None, *_NOTHING, record.key, record.path, problem)


@dataclass
class DetectionBatch(BatchOfImages):
    """Images of several sizes in the corner of one tensor, and their objects one after the other.

    Attributes:
        images: `(B, 3, H, W)` uint8, zero beyond an image's own size.
        sizes: `(B, 2)` height and width of each.
        numbers: `(B,)` objects of each.
        boxes: `(n, 4)` float32, xyxy in pixels.
        labels: `(n,)` from 1.
        masks: `(n, H, W)` uint8; `(0, 0, 0)` where none were asked for.
        keys: `(B,)` ids of the images in the annotation file.
        names: Their paths.
        damaged: Why each image that could not be read could not.
    """

    moved = ("images", "boxes", "labels", "masks")
    listed = ("images", "sizes", "numbers", "keys", "names")

    images: Tensor
    sizes: Tensor
    numbers: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    keys: Tensor
    names: list[str]
    damaged: list[str]

    def first(self, number: int) -> DetectionBatch:
        """Return its first images, and their objects."""
        objects = int(self.numbers[:number].sum())
        return replace(
            super().first(number), **{name: getattr(self, name)[:objects] for name in ("boxes", "labels", "masks")}
        )

    def pictures(self) -> list[Tensor]:
        """Return the images `(3, h, w)` at their own sizes, float32 in [0, 1]."""
        return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(self.images, self.sizes.tolist(), strict=True)]

    def targets(self) -> list[dict[str, Tensor]]:
        """Return boxes, labels and masks (where there are any) by image, as torchvision's detectors take them."""
        numbers = self.numbers.tolist()
        parts = zip(self.boxes.split(numbers), self.labels.split(numbers), strict=True)
        targets = [{"boxes": boxes, "labels": labels} for boxes, labels in parts]
        if self.masks.shape[1]:
            for target, masks, (h, w) in zip(targets, self.masks.split(numbers), self.sizes.tolist(), strict=True):
                target["masks"] = masks[:, :h, :w]
        return targets


def collate(samples: Sequence[DetectionSample], masks: bool = False, filled: bool = False) -> DetectionBatch:
    """Put samples into a batch.

    Args:
        samples: The samples.
        masks: Whether they have masks.
        filled: Whether another image of the batch takes the place of a damaged one; else it is left out.
    """
    good = [sample for sample in samples if sample.image is not None]
    used = good
    if filled:
        stand_in = DetectionSample(torch.zeros(3, 64, 64, dtype=torch.uint8), *_NOTHING, -1, "", "")
        used = with_stand_ins(samples, lambda sample: sample.image is None, stand_in)
    pictures = [sample.image for sample in used if sample.image is not None]
    height = max((picture.shape[1] for picture in pictures), default=1)
    width = max((picture.shape[2] for picture in pictures), default=1)

    def padded(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        return (F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in parts)

    drawn = torch.cat([*padded(sample.masks for sample in used)]) if masks and used else _NOTHING[2]
    return DetectionBatch(
        torch.stack([*padded(pictures)]) if pictures else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        torch.tensor([picture.shape[1:] for picture in pictures], dtype=torch.long).reshape(-1, 2),
        torch.tensor([len(sample.labels) for sample in used], dtype=torch.long),
        torch.cat([_NOTHING[0], *(sample.boxes for sample in used)]),
        torch.cat([_NOTHING[1], *(sample.labels for sample in used)]),
        drawn,
        torch.tensor([sample.key for sample in used], dtype=torch.long),
        [sample.name for sample in used],
        [sample.problem for sample in samples if sample.image is None],
        good=len(good),
    )


@dataclass(frozen=True)
class _Collate:
    masks: bool
    filled: bool

    def __call__(self, samples: Sequence[DetectionSample]) -> DetectionBatch:
        return collate(samples, self.masks, self.filled)


class EvaluationBatches:
    """A process's share of a set, as often as it is asked for; dead workers are named."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[DetectionBatch]:
        return guarded(self._loader)


def detection_training_loader(
    images: CocoSet,
    augmentation: Augmentation,
    batch_size: int,
    *,
    masks: bool,
    seed: int,
    share: Share = ALONE,
    parts: int = 1,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> TrainingLoader:
    """Return training batches; the arguments are those of `vmamba.data.loaders.training_loader`.

    Raises:
        ValueError: The batch cannot be divided so.
    """
    divide_batch(batch_size, share, parts)
    sampler = EpochSampler(len(images), batch_size, seed, share, parts)
    options = reading_options(len(images), workers, pin_memory, timeout)
    dataset = DetectionDataset(images, masks, augmentation)
    loader: Any = DataLoader(dataset, batch_sampler=sampler, collate_fn=_Collate(masks, True), **options)
    return TrainingLoader(loader, sampler, sampler.steps, parts)


def detection_evaluation_loader(
    images: CocoSet,
    batch_size: int,
    *,
    share: Share = ALONE,
    workers: int = -1,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> EvaluationBatches:
    """Return this process's share of the images, none twice, as they are; damaged ones are left out."""
    mine = range(share.rank, len(images), share.processes)
    options = reading_options(len(images), workers, pin_memory, timeout)
    dataset = DetectionDataset(images, masks=False)
    return EvaluationBatches(
        DataLoader(dataset, batch_size=batch_size, sampler=mine, collate_fn=_Collate(False, False), **options)
    )
