"""Pictures of what a detector has found."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vmamba.tasks.detection import paste_masks

_GOLDEN = 0.618034  # turn of the colour wheel from class to class, so that neighbours differ
_OPACITY = 0.45  # of a mask
_READABLE = 640  # pixels of the long side below which a picture is enlarged, or no caption fits


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class: bright, and unlike that of the classes before and after it."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(picture: Image.Image, found: Mapping[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw boxes, masks, labels and confidence over a picture, the most confident on top.

    Args:
        picture: The picture; a small one is enlarged by a whole factor.
        found: Boxes xyxy, labels from 1, scores, and perhaps small masks, as a detector returns them for it.
        classes: Names of the classes.
    """
    pixels = np.asarray(picture, np.float32).copy()
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    order = sorted(range(len(labels)), key=lambda index: scores[index])
    if "masks" in found:
        for index in order:
            (mask,) = paste_masks(found, (picture.height, picture.width), index, 1).cpu().numpy()
            pixels[mask] += _OPACITY * (np.asarray(colour_of(labels[index]), np.float32) - pixels[mask])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    factor = max(_READABLE // max(picture.size), 1)
    drawn = drawn.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    boxes = (found["boxes"].float().cpu() * factor).tolist()
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(max(max(drawn.size) / 55, 11))
    for index in order:
        caption = f"{classes[labels[index] - 1]} {scores[index]:.0%}"
        _draw_box(pen, boxes[index], caption, colour_of(labels[index]), font, drawn.size)
    return drawn


def _draw_box(
    pen: ImageDraw.ImageDraw,
    box: Sequence[float],
    caption: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Draw a box, its caption above it on its colour, or inside where the picture ends."""
    x, y, right, bottom = box
    pen.rectangle((x, y, max(right - 1, x), max(bottom - 1, y)), outline=colour, width=max(round(max(size) / 400), 2))
    _, _, width, height = pen.textbbox((0, 0), caption, font=font)
    width, height = width + 6, height + 4
    left = min(max(x, 0), max(size[0] - width, 0))
    top = y - height if y >= height else max(y, 0)
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    pen.text((left + 3, top + 1), caption, fill="black", font=font)
