"""What an exported model costs in accuracy and brings in speed, on labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vmamba.deployment.files import ExportedModel

if TYPE_CHECKING:
    from vmamba.data.sources import ImageSet

_BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """An exported model beside the one it was made from.

    Attributes:
        count: Images that both classified.
        model: Share the model in PyTorch got right.
        exported: Share the exported one got right.
        agreement: Share on which both say the same.
        speedup: Time of the model in PyTorch over that of the exported one.
    """

    count: int
    model: float
    exported: float
    agreement: float
    speedup: float


def compare_on(
    images: ImageSet,
    model: nn.Module,
    exported: ExportedModel,
    transform: Callable[[Image.Image], Tensor],
) -> Comparison:
    """Classify labelled images with a model and with its exported file, batch by batch in turns.

    Raises:
        ValueError: There are no images.
    """
    if not len(images):
        raise ValueError("there are no images to compare on")
    spent = np.zeros(2)
    answers: list[np.ndarray] = []
    for first in range(0, len(images), _BATCH):
        batch = torch.stack([transform(images.read(i)) for i in range(first, min(first + _BATCH, len(images)))])
        start = time.perf_counter()
        with torch.inference_mode():
            ours = model(batch).argmax(1).numpy()
        between = time.perf_counter()
        theirs = exported(batch.numpy())[0].argmax(1)
        if first:  # the first batch warms both up
            spent += between - start, time.perf_counter() - between
        answers.append(np.stack([ours, theirs]))
    ours, theirs = np.concatenate(answers, axis=1)
    return Comparison(
        count=len(images),
        model=float((ours == images.targets).mean()),
        exported=float((theirs == images.targets).mean()),
        agreement=float((ours == theirs).mean()),
        speedup=float(spent[0] / spent[1]) if spent[1] else 1.0,
    )
