"""From images of any size to class indices: whole, by a sliding window, at several scales and mirrored.

Memory is bounded by keeping logits at the model's own stride, a quarter of the image, and bringing them to full size a
band of rows at a time. For `C` classes and an image of H × W pixels, beside the model itself:

- the logits of each view (a scale, mirrored or not): `C·H·W·r²/16` floats for scale r; a sliding window adds nothing
  that grows with the image but their count, `H·W·r²/16` floats;
- one band, at most `BAND_BYTES` and never less than a row: up to four times as much at the worst moment;
- the result: one byte a pixel up to 255 classes.

A sliding window therefore segments 4096×4096 pixels in 150 classes in 0.6 GiB of logits and 0.5 GiB of bands, beside
the picture and what one window takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

BAND_BYTES = 128 * 2**20


@dataclass(frozen=True)
class InferenceOptions:
    """How images are segmented.

    Args:
        mode: 'whole' passes the image through the model at once, as published; 'slide' a window at a time.
        window: Side of the window in pixels; a multiple of 4.
        step: Pixels from one window to the next, a multiple of 4; 0 takes two thirds of the window.
        scales: Factors the image is resized by; the probabilities at all of them are averaged.
        flip: Whether the mirrored image is segmented too.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: int = 512
    step: int = 0
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window < 32 or self.window % 4:
            raise ValueError(f"window must be a multiple of 4 and 32 or more, not {self.window}")
        if self.step % 4 or not 0 <= self.step <= self.window:
            raise ValueError(f"step must be a multiple of 4 from 0 to the window's {self.window}, not {self.step}")
        if not self.scales or any(not 0.05 <= scale <= 8 for scale in self.scales):
            raise ValueError(f"scales must lie between 0.05 and 8, and be one or more, not {list(self.scales)}")


class Segmenter:
    """A model with a way to segment images; call it with images and the size that the result shall have.

    Args:
        model: A UperNet, or anything that gives `.logits` at `stride`.
        options: How.
        stride: Pixels of the image for each pixel of the logits; by default the model's own.
    """

    def __init__(self, model: nn.Module, options: InferenceOptions | None = None, stride: int | None = None) -> None:
        self.model, self.options = model, options or InferenceOptions()
        self.stride = stride or int(getattr(model, "stride", 4))

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Segment images; the model's training mode is restored.

        Args:
            images: `(B, 3, h, w)`, normalised, on the model's device.
            size: (H, W) of the result, for example that of the picture before it was resized.

        Returns:
            Class indices `(B, H, W)`: uint8 up to 255 classes, else int32.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                return torch.stack([self._segment(image[None], size) for image in images])
        finally:
            self.model.train(was_training)

    def _segment(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        views = list(self._views(image))
        classes, (height, width) = views[0].shape[1], size
        labels = torch.empty(height, width, dtype=torch.uint8 if classes <= 255 else torch.int32, device=image.device)
        rows = max(BAND_BYTES // (4 * classes * width), 1)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            band = _rows(views[0], size, first, last)
            if len(views) > 1:
                band = band.softmax(1)
                for view in views[1:]:
                    band += _rows(view, size, first, last).softmax(1)
            labels[first:last] = band.argmax(1)[0]
        return labels

    def _views(self, image: Tensor) -> Iterator[Tensor]:
        """Yield logits `(1, classes, h', w')` of the image at each scale, and of its mirror image turned back."""
        height, width = image.shape[2:]
        for scale in self.options.scales:
            target = max(round(height * scale), 1), max(round(width * scale), 1)
            scaled = image
            if target != (height, width):
                scaled = functional.interpolate(image, size=target, mode="bilinear", align_corners=False)
            yield self._logits(scaled)
            if self.options.flip:
                yield self._logits(scaled.flip(3)).flip(3)

    def _logits(self, image: Tensor) -> Tensor:
        window, stride = self.options.window, self.stride
        height, width = image.shape[2:]
        if self.options.mode == "whole" or (height <= window and width <= window):
            whole: Tensor = self.model(image).logits
            return whole.float()
        # Windows lie on the grid of the logits, so that what they say of a place can be added up there.
        padded = functional.pad(image, (0, -width % stride, 0, -height % stride))
        sides = [min(window, side) for side in padded.shape[2:]]
        step = self.options.step or max(window * 2 // 3 // stride * stride, stride)
        total = counts = None
        for top in _offsets(padded.shape[2], sides[0], step):
            for left in _offsets(padded.shape[3], sides[1], step):
                part = self.model(padded[:, :, top : top + sides[0], left : left + sides[1]]).logits
                if total is None or counts is None:
                    rows, columns = padded.shape[2] // stride, padded.shape[3] // stride
                    total = image.new_zeros(1, part.shape[1], rows, columns, dtype=torch.float32)
                    counts = image.new_zeros(rows, columns, dtype=torch.float32)
                y, x = top // stride, left // stride
                here = slice(y, y + part.shape[2]), slice(x, x + part.shape[3])
                total[:, :, here[0], here[1]] += part
                counts[here] += 1
        assert total is not None  # at least one window covers the image
        return total.div_(counts)  # type: ignore[arg-type]


def _offsets(length: int, window: int, step: int) -> list[int]:
    """Return where windows begin: every step, the last one flush with the end."""
    number = -(-(length - window) // step) + 1
    return [min(i * step, length - window) for i in range(number)]


def _rows(logits: Tensor, size: tuple[int, int], first: int, last: int) -> Tensor:
    """Return the rows from `first` to `last` of logits `(1, C, h, w)` resized to `size`, bilinear."""
    height = logits.shape[2]
    places = (torch.arange(first, last, device=logits.device) + 0.5) * (height / size[0]) - 0.5
    places = places.clamp(min=0)
    above = places.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    share = (places - above)[:, None]
    rows = torch.lerp(logits[:, :, above], logits[:, :, below], share)
    return functional.interpolate(rows, size=(last - first, size[1]), mode="bilinear", align_corners=False)
