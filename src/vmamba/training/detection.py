"""The task of finding objects, as the engine takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor, nn, optim
from torchvision.models.detection import FasterRCNN

from vmamba.data.coco import CocoSet, find_sets, read_coco
from vmamba.data.coco_loading import (
    Augmentation,
    DetectionBatch,
    EvaluationBatches,
    detection_evaluation_loader,
    detection_training_loader,
)
from vmamba.data.loaders import TrainingLoader
from vmamba.data.reading import Share
from vmamba.models.pretrained import fetch_pretrained
from vmamba.tasks.detection import DetectorConfig, make_vmamba_detector
from vmamba.tasks.detection_checkpoint import save_detector, start_from
from vmamba.training.detection_evaluation import DetectionReport, evaluate_detector
from vmamba.training.detection_recipe import DetectionRecipe
from vmamba.training.recipe import RunOptions
from vmamba.training.task import Step, Task

_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


class DetectionTask(Task):
    """Mask R-CNN or Faster R-CNN on a VMamba, its five (or four) losses added up.

    Raises:
        ValueError, FileNotFoundError: The recipe cannot be carried out.
    """

    merit = "box_AP"
    batch_type = DetectionBatch
    model: FasterRCNN

    def __init__(self, recipe: DetectionRecipe) -> None:
        self.recipe = recipe
        self.name = f"{recipe.model}-detection"
        found, self.held_out, self.note = open_sets(recipe)
        self.train = found if recipe.keep_empty else found.with_objects()
        if not len(self.train):
            raise ValueError(f"{found.file} has no image with an object that is no crowd")
        for images in (found, self.held_out):
            refuse_damaged(images, recipe.guards.damaged)
        self.augmentation = Augmentation(recipe.min_sizes, recipe.max_size, recipe.flip, recipe.crop)
        self.model = self._build_model()
        if recipe.gradient_checkpointing:
            self.model.backbone.body.set_grad_checkpointing()
        if recipe.compile:
            self.model.backbone.body.compile(dynamic=True)

    def _build_model(self) -> FasterRCNN:
        recipe = self.recipe
        if "in_chans" in recipe.model_options:
            raise ValueError("--model_options.in_chans cannot be set for training: images are read as RGB")
        config = DetectorConfig(
            len(self.train.classes),
            masks=recipe.masks,
            min_size=recipe.min_sizes[-1],
            max_size=recipe.max_size,
            channels=recipe.channels,
            score_threshold=recipe.score_threshold,
            detections=recipe.detections,
        )
        model = make_vmamba_detector(recipe.model, config, {"num_classes": 0, **recipe.model_options})
        if recipe.weights:
            pretrained = recipe.weights == "pretrained"
            start_from(model, fetch_pretrained(recipe.model) if pretrained else recipe.weights)
        return model

    def training_loader(self, share: Share, pin_memory: bool) -> TrainingLoader:
        """Return this process's part of the training batches."""
        recipe = self.recipe
        return detection_training_loader(
            self.train,
            self.augmentation,
            recipe.batch_size,
            masks=recipe.masks,
            seed=recipe.seed,
            share=share,
            parts=recipe.accumulate,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )

    def evaluation_batches(self, share: Share, pin_memory: bool) -> EvaluationBatches:
        """Return this process's part of the held-out images."""
        recipe = self.recipe
        return detection_evaluation_loader(
            self.held_out,
            max(recipe.batch_size // (share.processes * recipe.accumulate), 1),
            share=share,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )

    def step(self, model: nn.Module, batch: DetectionBatch) -> Step:
        """Return the sum of the losses, and each of them times the number of images."""
        losses: dict[str, Tensor] = model(batch.pictures(), batch.targets())
        total = torch.stack([losses[name] for name in _LOSSES if name in losses]).sum()
        sums = {name: losses[name].detach() * len(batch) for name in _LOSSES if name in losses}
        return Step(total, sums)

    def evaluate(self, model: nn.Module, batches: Iterable[DetectionBatch]) -> DetectionReport:
        """Find the objects of the held-out images."""
        return evaluate_detector(model, batches, self.held_out)

    def try_out(self, device: torch.device) -> None:
        """Run the backbone, which is what depends on the device, on an empty image."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self.model.eval().backbone(torch.zeros(1, 3, 64, 64, device=device))

    def save_weights(self, weights: Mapping[str, Tensor], path: Path, figures: Mapping[str, Any]) -> None:
        """Write weights that `vmamba eval` and `vmamba predict` take."""
        recipe = self.recipe
        names = ("data", "images", "held_out_data", "held_out_images", "held_out")
        where = {name: getattr(recipe, name) for name in names}
        save_detector(
            self.model, path, {"task": "detection", "labels": list(self.train.classes), **where, **figures}, weights
        )

    def identity(self) -> dict[str, Any]:
        """Return classes and numbers of images and objects."""
        return {
            "classes": list(self.train.classes),
            "images": len(self.train),
            "objects": self.train.objects,
            "held_out": len(self.held_out),
        }

    def introduction(self) -> list[tuple[str, str]]:
        """Tell of model and data, and of what was skipped on reading."""
        recipe, sizes = self.recipe, self.recipe.min_sizes
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        kind = "Mask R-CNN" if recipe.masks else "Faster R-CNN"
        short = f"{sizes[0]}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        lines = [
            ("model", f"{kind} on {recipe.model}, {parameters:.2f} M parameters"),
            (
                "data",
                f"{self.train.file}: {len(self.train.classes)} classes, short side {short} pixels (long at most"
                f" {recipe.max_size}), {len(self.train):,} images with {self.train.objects:,} objects to train on,"
                f" {len(self.held_out):,} held out ({self.note})",
            ),
        ]
        for images in (self.train, self.held_out):
            problems = images.problems
            if problems.counts:
                word, first = ("skipped", problems.lines) if problems.lines else ("mended", problems.mended)
                lines.append((word, f"{problems.summary()}; the first: {first[0]}"))
        return lines

    def epoch_line(self, record: Mapping[str, Any]) -> str:
        """Tell loss and average precision."""
        masks = f", masks AP {record['mask_AP']:.1%}" if "mask_AP" in record else ""
        return (
            f"training: loss {record.get('train_loss', float('nan')):.3f}"
            f" | held out: boxes AP {record['box_AP']:.1%} (AP50 {record.get('box_AP50', 0.0):.1%}){masks}"
        )

    def parameter_groups(self, recipe: RunOptions) -> list[dict[str, Any]]:
        """Return the optimiser's groups: decayed weights and spared ones.

        As published, what has "norm" in its name and position embeddings are spared and all else decays, biases and A
        included: mmdetection reads names alone. The clean form spares biases, norms, A, D and the bias of Δ.
        """
        options = recipe.optimizer
        if options.decay_form == "clean":
            spared = {f"backbone.body.{name}" for name in self.model.backbone.body.no_weight_decay()}
            return param_groups_weight_decay(self.model, options.weight_decay, no_weight_decay_list=spared)
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        decayed = [weight for name, weight in named if not _spared(name)]
        rest = [weight for name, weight in named if _spared(name)]
        return [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def schedule(self, optimizer: optim.Optimizer, recipe: RunOptions, steps: int) -> MultiStepLRScheduler:
        """Return the rate by update: a linear warm-up, then steps down after the milestones."""
        options, total = recipe.optimizer, max(recipe.epochs * steps, 1)
        scale = options.rate_scale(recipe.batch_size)
        return MultiStepLRScheduler(
            optimizer,
            # timm lets a milestone take effect an update early.
            decay_t=[round(epoch * steps) + 1 for epoch in self.recipe.falls],
            decay_rate=self.recipe.decay_rate,
            warmup_t=min(round(options.warmup_epochs * steps), total // 2),
            warmup_lr_init=min(options.warmup_lr, options.lr) * scale,
            warmup_prefix=False,
            t_in_epochs=False,
        )


def open_sets(recipe: DetectionRecipe) -> tuple[CocoSet, CocoSet, str]:
    """Return the images to train on, those held out, and how these came about.

    Raises:
        ValueError, FileNotFoundError: They cannot be read.
    """
    found = find_sets(recipe.data)
    file, images = found[0]
    train = read_coco(file, recipe.images or images, masks=recipe.masks)
    if recipe.held_out_data:
        other = Path(recipe.held_out_data)
        place = Path(recipe.held_out_images) if recipe.held_out_images else find_sets(other)[0][1]
        held_out = read_coco(other, place, masks=recipe.masks, classes=train.classes)
    elif len(found) > 1:
        file, images = found[1]
        held_out = read_coco(file, recipe.held_out_images or images, masks=recipe.masks, classes=train.classes)
    else:
        return *train.split(recipe.held_out), f"{recipe.held_out:.0%} at random"
    return train, held_out, held_out.file


def refuse_damaged(images: CocoSet, allowed: float) -> None:
    """Raise ValueError when too large a share of the records of an annotation file was skipped."""
    problems = images.problems
    if problems.skipped > allowed * max(problems.records, 1):
        raise ValueError(
            f"{problems.skipped:,} of the {problems.records:,} annotations of {images.file} are unusable, more than the"
            f" {allowed:.0%} of --guards.damaged: {problems.summary()}; the first: {problems.lines[0]}"
        )


def _spared(name: str) -> bool:
    return "norm" in name or name.endswith("pos_embed")
