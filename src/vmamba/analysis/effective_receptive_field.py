"""Effective receptive fields, as the authors compute them (section 5.4 of the paper; measure: arXiv 1701.04128).

How much every pixel matters to the centre of a feature map: the gradient of the central feature, rectified and summed
over its channels, with respect to the image; what is positive of it summed over the image's channels, averaged over
images.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

SHARES = (0.2, 0.3, 0.5, 0.99)
Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        contribution: (H, W), float64: the mean gradient at every pixel of the image.
        images: how many images it is the mean of.
        skipped: images left out because their gradient was not finite.
    """

    contribution: Tensor
    images: int
    skipped: int = 0


@dataclass(frozen=True)
class CentralSquare:
    """The smallest central square that holds more than a share of the contributions.

    Attributes:
        share: the share asked for.
        side: of the square, pixels; odd. Where it would reach beyond the image it is cut off there.
        area: of it, as a share of the image's.
    """

    share: float
    side: int
    area: float


def effective_receptive_field(
    model: nn.Module, images: Iterable[Tensor], stage: int = -1, *, device: torch.device | str | None = None
) -> ReceptiveField:
    """Compute the effective receptive field of the centre of a stage's map.

    Args:
        model: a VMamba, or any model with timm's `forward_intermediates`; left as it is.
        images: batches (B, C, H, W), all of one size.
        stage: which of the model's maps, from 0, or negative from the end.
        device: where to move the images; by default where the model is.

    Raises:
        ValueError: the model gives no maps, has no such stage, the images differ in size, or there are none with a
            finite gradient.
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, by which its maps could be had")
    like = next(model.parameters())
    total: Tensor | None = None
    count = skipped = 0
    was_training = model.training
    model.eval()
    try:
        for batch in images:
            batch = batch.to(device=device or like.device, dtype=like.dtype)
            if total is not None and batch.shape[2:] != total.shape:
                raise ValueError(
                    f"all images must have one size; {tuple(total.shape)} and then {tuple(batch.shape[2:])} came"
                )
            gradient = _gradient(model, batch, stage)
            finite = gradient.flatten(1).isfinite().all(1)
            skipped += int((~finite).sum())
            count += int(finite.sum())
            positive = gradient[finite].clamp_min(0).double().sum((0, 1)).cpu()
            total = positive if total is None else total + positive
    finally:
        model.train(was_training)
    if total is None or not count:
        raise ValueError("there was no image with a finite gradient to take a receptive field from")
    return ReceptiveField(total / count, count, skipped)


def _gradient(model: Any, images: Tensor, stage: int) -> Tensor:
    """Return the gradient (B, C, H, W) of the rectified central feature; images of a batch do not mix in evaluation."""
    images = images.detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            (features,) = model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    except (AssertionError, IndexError, ValueError):
        maps = len(getattr(model, "feature_info", ()) or ())
        raise ValueError(f"there is no map {stage}; {_range(maps)}") from None
    height, width = features.shape[2:]
    centre = features[:, :, height // 2, width // 2].relu().sum()
    (gradient,) = torch.autograd.grad(centre, images)
    return gradient


def _range(maps: int) -> str:
    return f"the model has maps 0 to {maps - 1}" if maps else "the model does not tell how many it has"


def central_squares(
    contribution: Tensor, shares: Sequence[float] = SHARES, scale: Scale = "log"
) -> list[CentralSquare]:
    """Find the smallest central squares that hold shares of the contributions.

    Args:
        contribution: (H, W).
        shares: between 0 and 1.
        scale: "log" takes log10(contribution + 1), as the published tables do; "linear" the contributions themselves.

    Raises:
        ValueError: a share is not between 0 and 1, or the contributions are all zero.
    """
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"a share lies between 0 and 1; got {share:g}")
    if scale not in ("log", "linear"):
        raise ValueError(f"scale must be 'log' or 'linear', not {scale!r}")
    values = torch.log10(contribution.double() + 1) if scale == "log" else contribution.double()
    if not values.sum() > 0:
        raise ValueError("no pixel contributes to the centre of this map: the gradient is zero everywhere")
    height, width = values.shape
    # A square's sum from four corners of the running sums.
    sums = torch.zeros(height + 1, width + 1, dtype=torch.float64)
    sums[1:, 1:] = values.cumsum(0).cumsum(1)
    held: list[tuple[int, float, float]] = []
    for reach in range(max(height, width) // 2 + 1):
        top, bottom = max(height // 2 - reach, 0), min(height // 2 + reach + 1, height)
        left, right = max(width // 2 - reach, 0), min(width // 2 + reach + 1, width)
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        area = (bottom - top) * (right - left) / (height * width)
        held.append((2 * reach + 1, area, float(inside / sums[-1, -1])))
    squares = []
    for share in shares:
        side, area = next(((side, area) for side, area, inside in held if inside > share), held[-1][:2])
        squares.append(CentralSquare(share, side, area))
    return squares


def noise_images(count: int, img_size: tuple[int, int], channels: int = 3, batch_size: int = 4) -> Iterable[Tensor]:
    """Yield batches of normally distributed images, the same ones every time: for models without a data set.

    Args:
        count: how many images.
        img_size: (height, width) in pixels.
        channels: of each.
        batch_size: images in a batch.
    """
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, batch_size):
        yield torch.randn(min(batch_size, count - first), channels, *img_size, generator=generator)


def field_table(name: str, field: ReceptiveField, shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """Turn a receptive field into flat records: sides and areas by share, on both scales."""
    height, width = field.contribution.shape
    log, linear = (central_squares(field.contribution, shares, scale) for scale in ("log", "linear"))
    return [
        {
            "field": name,
            "share": a.share,
            "side_px": a.side,
            "area": round(a.area, 6),
            "linear_side_px": b.side,
            "linear_area": round(b.area, 6),
            "height": height,
            "width": width,
            "images": field.images,
        }
        for a, b in zip(log, linear, strict=True)
    ]


def spread(field: ReceptiveField) -> float:
    """Return the root mean square distance from the centre of what contributes, in pixels."""
    weights = field.contribution / field.contribution.sum()
    height, width = weights.shape
    rows = torch.arange(height, dtype=torch.float64)[:, None] - height // 2
    columns = torch.arange(width, dtype=torch.float64)[None] - width // 2
    return math.sqrt(float((weights * (rows**2 + columns**2)).sum()))
