"""How models take to larger images (section 5.3 of the paper): speed, FLOPs, memory and accuracy by resolution.

Accuracy is that of the model as it is, and with its linear head tuned for each resolution on the pooled features of the
training images (the paper's "linear tuning"); the backbone stays as it was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.analysis.flops import Convention, count_flops
from vmamba.analysis.throughput import (
    CompileMode,
    Measurement,
    Mode,
    Precision,
    Workload,
    environment,
    load_model,
    measure,
)
from vmamba.models.vmamba import VMamba

if TYPE_CHECKING:  # counting and timing need no reader of images
    from vmamba.data.shards import ShardSet
    from vmamba.data.sources import ImageSet
    from vmamba.data.transforms import Preprocessing

SIZES = (224, 288, 384, 512, 640, 768, 1024)


@dataclass(frozen=True)
class ScalingRow:
    """One model at one resolution.

    Attributes:
        model: name.
        size: side of the images, pixels.
        params: number of parameters; those of position tables grow with the size.
        gflops: 10⁹ multiply-accumulates of an image.
        speed: what was timed; None where it was only counted.
        top1: share of the held-out images classified right; None without data.
        top1_tuned: the same with the head tuned for this size; None where it was not.
    """

    model: str
    size: int
    params: int
    gflops: float
    speed: Measurement | None = None
    top1: float | None = None
    top1_tuned: float | None = None


def count_scaling(
    models: Sequence[str], sizes: Sequence[int] = SIZES, *, convention: Convention = "authors"
) -> list[ScalingRow]:
    """Give parameters and FLOPs of models at each size, without running one.

    Args:
        models: names that vmamba or timm knows.
        sizes: sides of square images, pixels.
        convention: see `count_flops`.

    Returns:
        Rows by size, then by model.

    Raises:
        ValueError: A model is unknown, or a size does not suit it.
    """
    rows = []
    for size in sizes:
        for name in models:
            with torch.device("meta"), _fitting(name, size):
                model = load_model(name, (size, size))
                count = count_flops(model, (size, size), convention=convention)
            params = sum(p.numel() for p in model.parameters())
            rows.append(ScalingRow(name, size, params, count.total / 1e9))
    return rows


def measure_scaling(
    models: Sequence[str],
    sizes: Sequence[int],
    device: torch.device | str,
    *,
    batch_size: int = 128,
    base_size: int = 224,
    precision: Precision = "bfloat16",
    compiled: CompileMode = "eager",
    mode: Mode = "inference",
    rounds: int = 5,
    seconds_a_round: float = 0.3,
    report: Callable[[str], None] = lambda _: None,
) -> list[ScalingRow]:
    """Count and time models at each size; those of a size take turns.

    Args:
        models: names that vmamba or timm knows.
        sizes: sides of square images, pixels.
        device: where.
        batch_size: images in a batch at `base_size`; at other sizes as many as have about the same number of pixels.
        base_size: see `batch_size`.
        precision: see `Workload`.
        compiled: see `Workload`.
        mode: see `Workload`.
        rounds: turns each model takes; the median counts.
        seconds_a_round: about how long a turn lasts.
        report: called with a line of progress.

    Returns:
        Rows by size, then by model.

    Raises:
        ValueError: A model is unknown, a size does not suit it, or it does not fit the device with a single image.
    """
    rows = []
    for size in sizes:
        counted = count_scaling(models, [size])
        batch = max(1, round(batch_size * (base_size / size) ** 2))
        workloads = [Workload(name, (size, size), batch, precision, compiled, mode) for name in models]
        speeds = measure(workloads, device, rounds=rounds, seconds_a_round=seconds_a_round, report=report)
        rows += [replace(row, speed=speed) for row, speed in zip(counted, speeds, strict=True)]
        if compiled != "eager":
            torch._dynamo.reset()  # each size is compiled for itself, not for all sizes at once
    return rows


@contextmanager
def _fitting(name: str, size: int) -> Iterator[None]:
    """Say in a sentence which model and size do not go together."""
    try:
        yield
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name} cannot take images of {size}×{size} pixels: {reason}") from None


def accuracy_by_size(
    model: VMamba,
    preprocessing: Preprocessing,
    train: ImageSet | ShardSet | None,
    held_out: ImageSet | ShardSet,
    classes: Sequence[str],
    sizes: Sequence[int],
    *,
    batch_size: int = 64,
    epochs: int = 20,
    lr: float = 1e-3,
    workers: int = -1,
    report: Callable[[str], None] = lambda _: None,
) -> dict[int, tuple[float, float | None]]:
    """Measure accuracy at each size, of the model as it is and with its head tuned.

    Args:
        model: a classifier; left as it is.
        preprocessing: what it was trained to see; its `img_size` is replaced.
        train: images to tune the head on, targets numbered as the model's classes; None leaves tuning out.
        held_out: images to measure on.
        classes: names of the model's classes.
        sizes: sides of the images, pixels.
        batch_size: images at once.
        epochs: passes of the tuning over the training images' features.
        lr: its first learning rate, which falls to zero along a cosine.
        workers: processes that read images; -1 picks by the data.
        report: called with a line of progress.

    Returns:
        By size, the shares of held-out images classified right: as it is, and tuned (None without tuning).

    Raises:
        ValueError: No image could be read.
    """
    found: dict[int, tuple[float, float | None]] = {}
    for size in sizes:
        report(f"accuracy at {size} pixels")
        transform = replace(preprocessing, img_size=size).transform()

        def features(images: ImageSet | ShardSet, transform: Any = transform) -> tuple[Tensor, Tensor]:
            return _pooled_features(model, images, transform, batch_size, workers)

        seen, targets = features(held_out)
        head = model.get_classifier()
        plain = _top1(head, seen, targets, classes)
        tuned = None
        if train is not None:
            report(f"tuning the head at {size} pixels")
            tuned = _top1(tune_head(head, *features(train), epochs=epochs, lr=lr), seen, targets, classes)
        found[size] = plain, tuned
    return found


def tune_head(head: nn.Module, features: Tensor, targets: Tensor, *, epochs: int = 20, lr: float = 1e-3) -> nn.Module:
    """Return a copy of a linear head trained on fixed features, starting from its weights.

    Args:
        head: the classifier's last layer; left as it is.
        features: (images, D).
        targets: (images,) class indices.
        epochs: passes over the features, in batches of 256.
        lr: AdamW's first learning rate, falling to zero along a cosine.
    """
    head = copy.deepcopy(head).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    steps = epochs * -(-len(targets) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(targets), generator=order).to(targets.device).split(256):
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    return head.eval()


@torch.no_grad()
def _pooled_features(
    model: VMamba, images: ImageSet | ShardSet, transform: Any, batch_size: int, workers: int
) -> tuple[Tensor, Tensor]:
    """Give the pooled features (images, D) and targets of the images that can be read."""
    from vmamba.data.loaders import evaluation_loader

    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for batch in evaluation_loader(images, transform, batch_size, workers=workers):
            if len(batch.targets):
                pooled = model.forward_head(model.forward_features(batch.images.to(device)), pre_logits=True)
                kept.append((pooled.float(), batch.targets.to(device)))
    finally:
        model.train(was_training)
    if not kept:
        raise ValueError("there is no readable image to evaluate on")
    return torch.cat([pooled for pooled, _ in kept]), torch.cat([targets for _, targets in kept])


def _top1(head: nn.Module, features: Tensor, targets: Tensor, classes: Sequence[str]) -> float:
    from vmamba.tasks.classification import evaluate

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(features.split(4096), targets.split(4096), strict=True)

    return evaluate(copy.deepcopy(head).float(), batches(), classes).top1


def scaling_table(rows: Sequence[ScalingRow], device: torch.device | str) -> list[dict[str, Any]]:
    """Turn rows into flat records for a CSV or JSON file."""
    facts = environment(device)
    return [
        {
            "model": row.model,
            "size": row.size,
            "params": row.params,
            "gflops": round(row.gflops, 6),
            "images_per_second": row.speed and round(row.speed.images_per_second, 1),
            "median_ms": row.speed and round(row.speed.median_ms, 4),
            "batch_size": row.speed and row.speed.workload.batch_size,
            "peak_memory_mib": row.speed and row.speed.peak_memory_mib and round(row.speed.peak_memory_mib),
            "mode": row.speed and row.speed.workload.mode,
            "precision": row.speed and row.speed.workload.precision,
            "compiled": row.speed and row.speed.workload.compiled,
            "top1": row.top1,
            "top1_tuned": row.top1_tuned,
            **facts,
        }
        for row in rows
    ]
