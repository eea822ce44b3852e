"""Pictures of segmentations: classes laid over the image, and a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.61803398875  # hues this far apart, times any number, never come close


def class_colours(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return colours that can be told apart, a function of the class's number; grey for one named background."""
    colours = []
    for index, name in enumerate(classes):
        if name.lower() == "background":
            colours.append((128, 128, 128))
            continue
        lightness, saturation = ((0.45, 0.85), (0.62, 0.7), (0.32, 0.8))[index // 8 % 3]
        red, green, blue = colorsys.hls_to_rgb(index * _GOLDEN % 1, lightness, saturation)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def draw_overlay(
    picture: Image.Image,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]] = (),
    strength: float = 0.55,
) -> Image.Image:
    """Lay classes over a picture, with a legend of those that occur at its right, the largest first.

    Args:
        picture: RGB.
        labels: `(H, W)` class indices, of the picture's size; others than a class stay as they are.
        classes: Class names.
        colours: Their colours; by default those of `class_colours`.
        strength: Share of the colour in the mixture.
    """
    palette = np.array(colours or class_colours(classes), dtype=np.uint8)
    known = labels < len(classes)
    painted = np.asarray(picture).copy()
    painted[known] = palette[labels[known]]
    mixed = Image.blend(picture, Image.fromarray(painted), strength)
    counts = np.bincount(labels[known].ravel(), minlength=len(classes))
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    return _with_legend(mixed, [(classes[i], tuple(palette[i].tolist()), counts[i] / labels.size) for i in present])


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, tuple[int, ...], float]]) -> Image.Image:
    size = min(max(picture.height // 28, 11), 40)
    font = ImageFont.load_default(size)
    shown = entries[: max((picture.height - size) // (size * 3 // 2), 1)]
    lines = [f"{name}  {share:.1%}" for name, _, share in shown]
    width = max((int(font.getlength(line)) for line in lines), default=0) + size * 4
    canvas = Image.new("RGB", (picture.width + width, picture.height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (line, (_, colour, _)) in enumerate(zip(lines, shown, strict=True)):
        left, top = picture.width + size, size // 2 + row * size * 3 // 2
        draw.rectangle((left, top, left + size, top + size), fill=colour, outline="black")
        draw.text((left + size * 3 // 2, top + size // 2), line, fill="black", font=font, anchor="lm")
    return canvas


def index_picture(
    labels: np.ndarray, classes: Sequence[str], colours: Sequence[tuple[int, int, int]] = ()
) -> Image.Image:
    """Return class indices as a picture whose pixel values are the indices, seen in the classes' colours."""
    if len(classes) > 255:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8)).convert("L")
    indexed = Image.frombytes("P", picture.size, picture.tobytes())
    indexed.putpalette([part for colour in (colours or class_colours(classes)) for part in colour])
    return indexed
