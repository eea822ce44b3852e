"""Image classification: the loss to train with and the figures to report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ClassificationReport:
    """How well a model classifies a set of images.

    Attributes:
        count: Images that were classified.
        loss: Mean cross-entropy, in nats.
        top1: Share of images whose most probable class is the true one.
        top5: Share of images whose true class is among the five most probable (of fewer classes: among all).
        classes: Class names.
        per_class: Share of each class's images that were recognised; None for a class without images.
        confusion: Number of images by true class (row) and predicted class (column).
    """

    count: int
    loss: float
    top1: float
    top5: float
    classes: tuple[str, ...]
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def figures(self) -> dict[str, float]:
        """Return loss, top1 and top5."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def most_confused(self, number: int) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes: true class, predicted class, how often."""
        mistakes = [
            (self.classes[row], self.classes[column], count)
            for row, counts in enumerate(self.confusion)
            for column, count in enumerate(counts)
            if row != column and count
        ]
        return sorted(mistakes, key=lambda mistake: -mistake[2])[:number]


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
) -> ClassificationReport:
    """Classify labelled images and count.

    Under torch.distributed, every process brings its own share of the images, of whatever length; the counts are summed
    over all, so no image is counted that was not there, and the report is the same in each.

    Args:
        model: Takes images `(B, 3, H, W)`, gives logits `(B, number of classes)`. Its training mode is restored.
        batches: Pairs of images and targets `(B,)` on the model's device; an empty batch is passed over.
        classes: Class names.

    Raises:
        ValueError: There was no image to classify.
    """
    from torchmetrics import SumMetric
    from torchmetrics.classification import MulticlassConfusionMatrix

    number = len(classes)
    device = next(model.parameters()).device
    confusion = MulticlassConfusionMatrix(number, validate_args=False).to(device)
    among_five, total_loss = (
        SumMetric().to(device).set_dtype(torch.float64),
        SumMetric().to(device).set_dtype(torch.float64),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for images, targets in batches:
                if not len(targets):
                    continue
                logits = model(images).float()
                total_loss.update(functional.cross_entropy(logits, targets, reduction="sum").double())
                confusion.update(logits, targets)
                best = logits.topk(min(5, number)).indices
                among_five.update((best == targets[:, None]).any(1).sum().double())
    finally:
        model.train(was_training)
    with warnings.catch_warnings():
        # A process whose share held no readable image takes part in the sums with nothing.
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        counts, loss, hits = confusion.compute().cpu(), float(total_loss.compute()), float(among_five.compute())
    count = int(counts.sum())
    if not count:
        raise ValueError("there is no readable image to evaluate on")
    return ClassificationReport(
        count=count,
        loss=loss / count,
        top1=int(counts.diagonal().sum()) / count,
        top5=hits / count,
        classes=tuple(classes),
        per_class=tuple(int(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(counts)),
        confusion=tuple(tuple(int(value) for value in row) for row in counts),
    )


def classification_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy.

    Args:
        logits: `(B, classes)`.
        targets: Class indices `(B,)`, or class probabilities `(B, classes)` as mixup makes them, smoothed already.
        label_smoothing: Share of the label spread over all classes, for indices.
    """
    smoothing = label_smoothing if targets.ndim == 1 else 0.0
    return functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def make_mixup(
    num_classes: int,
    mixup: float,
    cutmix: float,
    label_smoothing: float,
    probability: float = 1.0,
    switch: float = 0.5,
) -> Callable[..., Any] | None:
    """Return timm's mixup and cutmix, which takes `(images, targets)` of an even batch; None when both are off.

    Args:
        num_classes: Number of classes.
        mixup: Alpha of mixup.
        cutmix: Alpha of cutmix.
        label_smoothing: Share of the label spread over all classes.
        probability: Chance that a batch is mixed.
        switch: Chance of cutmix where both are on.
    """
    if mixup <= 0 and cutmix <= 0:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=probability,
        switch_prob=switch,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
