"""Pictures of a run: curves, confusion matrix, images with what the model says about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _HELD_OUT, _WRONG = "#7a8ba3", "#1f6fb2", "#c0392b"
_TITLES = {"top1": "Accuracy"}
_MOST_NUMBERS = 20  # classes beyond which numbers in the cells of a confusion matrix can no longer be read


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path, merit: str = "top1") -> None:
    """Draw loss, the figure a task goes by, and learning rate over the epochs.

    Args:
        metrics: The lines of metrics.jsonl.
        path: PNG to write; nothing is written before the first epoch is complete.
        merit: Key of that figure, a share; `train_` and the key is the one on training images, where there is one.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [record for record in metrics if record["kind"] == "epoch"]
    steps = [record for record in metrics if record["kind"] == "step"]
    if not epochs:
        return
    figure, (loss, accuracy, rate) = _figure(12, 3.6, 3)
    for key, color, label in (("train_{}", _TRAIN, "training"), ("{}", _HELD_OUT, "held out")):
        for axes, name, factor in ((loss, "loss", 1), (accuracy, merit, 100)):
            known = [
                (record["epoch"], factor * record[key.format(name)]) for record in epochs if key.format(name) in record
            ]
            if known:
                axes.plot(*zip(*known, strict=True), color=color, marker=".", label=label)
    loss.set(title="Loss", xlabel="epoch", ylabel="mean over the images", ylim=(0, None))
    title = f"{_TITLES.get(merit, merit)} (held out: {epochs[-1][merit]:.2%})"
    accuracy.set(title=title, xlabel="epoch", ylabel="%", ylim=(None, 101))
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    rate.plot([record["step"] / per_epoch for record in steps], [record["lr"] for record in steps], color=_HELD_OUT)
    rate.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=110)


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, each row coloured by shares of the true class.

    Args:
        confusion: Numbers of images by true class (row) and predicted class (column).
        classes: Class names.
        path: PNG to write.
    """
    counts = np.asarray(confusion)
    number = len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.5, 0.55 * number + 2), 16)
    figure, (axes,) = _figure(side + 1, side, 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, fraction=0.045, label="share of the true class")
    total = counts.sum()
    axes.set(title=f"{counts.trace()} of {total} right ({counts.trace() / max(total, 1):.2%})")
    axes.set(xlabel="predicted", ylabel="true")
    step = math.ceil(number / 60)
    ticks = range(0, number, step)
    labels = [classes[i] for i in ticks]
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(ticks, labels)
    if number <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black" if row == column else _WRONG
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_predictions(
    pictures: Sequence[Image.Image],
    true: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float],
    path: Path,
    title: str = "",
) -> None:
    """Draw pictures in a grid, each with its predicted and true label; mistakes are red.

    Args:
        pictures: What to show.
        true: Their true labels.
        predicted: Their predicted labels.
        confidence: Probability of each predicted label.
        path: PNG to write.
        title: Line above the grid.
    """
    columns = min(8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure, grid = _figure(1.45 * columns, 1.75 * rows + 0.5, rows * columns, columns)
    for axes in grid:
        axes.axis("off")
    for axes, picture, right, said, share in zip(grid, pictures, true, predicted, confidence, strict=False):
        axes.imshow(picture, interpolation="nearest")
        wrong = right != said
        caption = f"predicted {said} ({share:.0%})\ntrue {right}"
        axes.set_title(
            caption, fontsize=8, color=_WRONG if wrong else "black", fontweight="bold" if wrong else "normal"
        )
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float, number: int, columns: int | None = None) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    columns = columns or number
    axes = figure.subplots(number // columns, columns, squeeze=False)
    return figure, list(axes.flat)
