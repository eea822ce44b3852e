"""Pictures of what a detector has found."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from vmamba.tasks.detection import paste_masks

_GOLDEN = 0.618034  # turn of the colour wheel from class to class, so that neighbours differ
_TOGETHER = 16  # masks pasted at once


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class: bright, and unlike that of the classes before and after it."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(picture: Image.Image, found: Mapping[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw boxes, masks, labels and confidence over a picture.

    Args:
        picture: The picture.
        found: Boxes xyxy, labels from 1, scores, and perhaps small masks, as a detector returns them for it.
        classes: Names of the classes.
    """
    from matplotlib.font_manager import findfont

    if not len(found["labels"]):
        return picture.copy()
    labels = found["labels"].tolist()
    colours = [colour_of(label) for label in labels]
    drawn = pil_to_tensor(picture)
    if "masks" in found:
        for first in range(0, len(labels), _TOGETHER):
            masks = paste_masks(found, (picture.height, picture.width), first, _TOGETHER).cpu()
            drawn = draw_segmentation_masks(drawn, masks, alpha=0.45, colors=colours[first : first + _TOGETHER])
    side = max(picture.size)
    captions = [
        f" {classes[label - 1]} {score:.0%} " for label, score in zip(labels, found["scores"].tolist(), strict=True)
    ]
    # Boxes as they fit on the picture, with room for their line; a box is drawn where it is, captions stay readable.
    boxes = found["boxes"].detach().cpu().round()
    boxes = torch.stack(
        [
            boxes[:, 0].clamp(0, picture.width - 2),
            boxes[:, 1].clamp(0, picture.height - 2),
            boxes[:, 2].clamp(1, picture.width - 1),
            boxes[:, 3].clamp(1, picture.height - 1),
        ],
        1,
    )
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    drawn = draw_bounding_boxes(
        drawn,
        boxes,
        captions,
        colors=colours,
        width=max(round(side / 400), 1),
        font=findfont("DejaVu Sans"),
        font_size=max(round(side / 50), 9),
        label_colors=["black"] * len(labels),
        label_background_colors=colours,
    )
    return to_pil_image(drawn)
