"""Image classification: the loss to train with and the figures to report."""

from __future__ import annotations

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
    gather: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] = lambda pair: pair,
) -> ClassificationReport:
    """Classify labelled images and count.

    Args:
        model: Takes images `(B, 3, H, W)`, gives logits `(B, number of classes)`. Its training mode is restored.
        batches: Pairs of images and targets `(B,)` on the model's device; an empty batch is passed over.
        classes: Class names.
        gather: Collects logits and targets from all processes, where there are several.

    Raises:
        ValueError: There was no image to classify.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    number = len(classes)
    device = next(model.parameters()).device
    confusion = MulticlassConfusionMatrix(number, validate_args=False).to(device)
    top5 = MulticlassAccuracy(number, top_k=min(5, number), average="micro", validate_args=False).to(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for images, targets in batches:
                if not len(targets):
                    continue
                logits, targets = gather((model(images).float(), targets))
                loss += functional.cross_entropy(logits, targets, reduction="sum")
                confusion.update(logits, targets)
                top5.update(logits, targets)
    finally:
        model.train(was_training)
    counts = confusion.confmat.cpu()
    count = int(counts.sum())
    if not count:
        raise ValueError("there is no readable image to evaluate on")
    return ClassificationReport(
        count=count,
        loss=float(loss) / count,
        top1=int(counts.diagonal().sum()) / count,
        top5=float(top5.compute()),
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


def make_mixup(num_classes: int, mixup: float, cutmix: float, label_smoothing: float) -> Callable[..., Any] | None:
    """Return timm's mixup and cutmix, which takes `(images, targets)` of an even batch; None when both are off."""
    if mixup <= 0 and cutmix <= 0:
        return None
    from timm.data import Mixup

    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
