"""The task of classifying images, as the engine takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmamba.data.loaders import Batch, TrainingLoader, evaluation_loader, training_loader
from vmamba.data.reading import Share, guarded
from vmamba.data.sources import ImageSet, open_source
from vmamba.data.transforms import Preprocessing
from vmamba.models.checkpoint import load_checkpoint, save_checkpoint
from vmamba.models.registry import create_model
from vmamba.models.vmamba import VMamba
from vmamba.tasks.classification import ClassificationReport, classification_loss, evaluate, make_mixup
from vmamba.training.recipe import Recipe
from vmamba.training.task import Step, Task


class ClassificationTask(Task):
    """A classifier with cross-entropy, mixup and cutmix.

    Raises:
        ValueError, FileNotFoundError: The recipe cannot be carried out.
    """

    merit = "top1"
    batch_type = Batch

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.model
        self.source = open_source(recipe.data, recipe.held_out)
        if len(self.source.classes) < 2:
            raise ValueError(f"{recipe.data} has the one class {self.source.classes[0]!r}; to classify takes two")
        self.preprocessing = Preprocessing.for_style(self.source.style, recipe.img_size or self.source.img_size)
        augmentation = recipe.augmentation
        self.transform = self.preprocessing.training_transform(
            self.source.style,
            augmentation.policy,
            auto_augment=augmentation.auto_augment,
            color_jitter=augmentation.color_jitter,
            random_erasing=augmentation.random_erasing,
        )
        self.mixup = make_mixup(
            len(self.source.classes),
            augmentation.mixup,
            augmentation.cutmix,
            augmentation.label_smoothing,
            probability=augmentation.mix_probability,
            switch=augmentation.mix_switch,
        )
        self.model: nn.Module = self._build_model()
        if recipe.tune == "head":
            self.model.requires_grad_(False)
            _head_of(self.model).requires_grad_(True)
        if recipe.gradient_checkpointing:
            self.model.set_grad_checkpointing()  # type: ignore[operator]

    def _build_model(self) -> nn.Module:
        recipe = self.recipe
        for name, reason in (("num_classes", "the data decides it"), ("in_chans", "images are read as RGB")):
            if name in recipe.model_options:
                raise ValueError(f"--model_options.{name} cannot be set for training: {reason}")
        size = {"img_size": self.preprocessing.img_size}
        overrides = {**size, **recipe.model_options, "num_classes": len(self.source.classes)}
        model = create_model(recipe.model, pretrained=recipe.weights == "pretrained", **overrides)
        if recipe.weights and recipe.weights != "pretrained":
            load_checkpoint(model, recipe.weights, adapt_classifier=True)
        return model

    def training_loader(self, share: Share, pin_memory: bool) -> TrainingLoader:
        """Return this process's part of the training batches."""
        recipe = self.recipe
        loader = training_loader(
            self.source.train,
            self.transform,
            recipe.batch_size,
            img_size=self.preprocessing.img_size,
            seed=recipe.seed,
            share=share,
            parts=recipe.accumulate,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )
        part = recipe.batch_size // (share.processes * recipe.accumulate)
        if self.mixup and part % 2:
            raise ValueError(
                f"mixup pairs the images a process computes at once, here {part}: --batch_size {recipe.batch_size} over"
                f" {share.processes} processes × --accumulate {recipe.accumulate} must be even"
            )
        return loader

    def evaluation_batches(self, share: Share, pin_memory: bool) -> Iterable[Batch]:
        """Return this process's part of the held-out images."""
        recipe = self.recipe
        part = max(recipe.batch_size // (share.processes * recipe.accumulate), 1)
        loader = evaluation_loader(
            self.source.held_out,
            self.preprocessing.transform(),
            part,
            share=share,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )
        return _Guarded(loader)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Return cross-entropy and the number of images recognised."""
        images, targets = batch.images, batch.targets
        if self.mixup:
            # timm mixes in place; a skipped update is written down with the images as they were.
            images, targets = self.mixup(images.clone(), targets)
        logits = model(images)
        loss = classification_loss(logits, targets, self.recipe.augmentation.label_smoothing)
        return Step(loss, {"top1": (logits.detach().argmax(1) == batch.targets).sum()})

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> ClassificationReport:
        """Classify the held-out images."""
        return evaluate(model, ((batch.images, batch.targets) for batch in batches), self.source.classes)

    def try_out(self, device: torch.device) -> None:
        """Classify an empty image."""
        side = self.preprocessing.img_size
        with torch.no_grad():
            self.model.eval()(torch.zeros(1, 3, side, side, device=device))

    def save_weights(self, weights: Mapping[str, Tensor], path: Path, figures: Mapping[str, Any]) -> None:
        """Write weights that `vmamba eval` and `vmamba predict` take."""
        metadata = {
            **self.preprocessing.to_dict(),
            "labels": list(self.source.classes),
            "data": self.source.spec,
            "held_out": self.recipe.held_out,
            **figures,
        }
        save_checkpoint(self.model, path, metadata=metadata, state_dict=weights)

    def identity(self) -> dict[str, Any]:
        """Return classes and numbers of images."""
        source = self.source
        return {"classes": list(source.classes), "images": len(source.train), "held_out": len(source.held_out)}

    def introduction(self) -> list[tuple[str, str]]:
        """Tell of model and data."""
        source, side = self.source, self.preprocessing.img_size
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        frozen = ", of which the last layer is trained" if self.recipe.tune == "head" else ""
        lines = [
            ("model", f"{self.recipe.model}, {parameters:.2f} M parameters{frozen}"),
            (
                "data",
                f"{source.spec}: {len(source.classes)} classes, {side}×{side} pixels, {len(source.train):,} images to"
                f" train on, {len(source.held_out):,} held out ({source.note})",
            ),
        ]
        if isinstance(source.train, ImageSet):
            numbers = np.bincount(source.train.targets, minlength=len(source.classes))
            if empty := [name for name, number in zip(source.classes, numbers, strict=True) if not number]:
                shown = ", ".join(map(repr, empty[:5])) + (", …" if len(empty) > 5 else "")
                lines.append(("classes", f"{len(empty)} without an image to train on: {shown}"))
        return lines

    def epoch_line(self, record: Mapping[str, Any]) -> str:
        """Tell loss and accuracy; those of training are missing when every update was skipped."""
        loss, top1 = (record.get(name, float("nan")) for name in ("train_loss", "train_top1"))
        return (
            f"training: loss {loss:.3f}, {top1:.2%} right"
            f" | held out: loss {record['loss']:.3f}, {record['top1']:.2%} right"
        )

    def prepare_training(self) -> None:
        """Put the model into training mode, but for a backbone that is not trained."""
        self.model.train()
        if self.recipe.tune == "head":
            self.model.eval()


class _Guarded:
    """Batches that name dead workers, as often as they are asked for."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Any:
        return guarded(self._loader)


def _head_of(model: nn.Module) -> nn.Module:
    if not isinstance(model, VMamba):
        raise ValueError("--tune head needs one of this package's models")
    return model.get_classifier()
