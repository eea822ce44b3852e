"""The task of segmenting images, as the engine takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PolyLRScheduler
from torch import Tensor, distributed, nn, optim

from vmamba.data.loaders import TrainingLoader
from vmamba.data.reading import Share, guarded
from vmamba.data.segmentation import open_segmentation_source
from vmamba.data.segmentation_loaders import (
    SegmentationAugmentation,
    SegmentationBatch,
    SegmentationPreprocessing,
    evaluation_pairs,
    training_pairs,
)
from vmamba.models.checkpoint import load_checkpoint, read_checkpoint
from vmamba.models.pretrained import fetch_pretrained
from vmamba.tasks.segmentation import IGNORE, SegmentationReport, UperNet, create_segmenter, evaluate, segmentation_loss
from vmamba.tasks.segmentation_checkpoint import (
    holds_segmenter,
    load_segmentation_checkpoint,
    save_segmentation_checkpoint,
)
from vmamba.tasks.segmentation_inference import InferenceOptions, Segmenter
from vmamba.training.optim import parameter_groups
from vmamba.training.recipe import RunOptions
from vmamba.training.segmentation_recipe import SegmentationRecipe
from vmamba.training.task import Step, Task


class SegmentationTask(Task):
    """UperNet with cross-entropy of decoder and auxiliary head, and a rate that falls by a polynomial.

    Under several processes on GPUs, batch norms of the heads are synchronised, as published.

    Raises:
        ValueError, FileNotFoundError: The recipe cannot be carried out.
    """

    merit = "miou"
    batch_type = SegmentationBatch

    def __init__(self, recipe: SegmentationRecipe) -> None:
        self.recipe = recipe
        self.name = f"{recipe.model}-segmentation"
        self.source = open_segmentation_source(recipe.data, recipe.held_out)
        self.preprocessing = SegmentationPreprocessing(recipe.short_side, recipe.long_side)
        self.augmentation = SegmentationAugmentation(
            self.preprocessing,
            recipe.crop,
            (recipe.scales[0], recipe.scales[1]),
            flip=recipe.flip,
            photometric=recipe.photometric,
        )
        self.inference = InferenceOptions(recipe.evaluation, window=recipe.crop)
        model = self._build_model()
        if recipe.gradient_checkpointing:
            model.set_grad_checkpointing()
        self.model: nn.Module = model
        if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "nccl":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def _build_model(self) -> UperNet:
        recipe = self.recipe
        for name, reason in (("num_classes", "the data decides it"), ("in_chans", "images are read as RGB")):
            if name in recipe.model_options:
                raise ValueError(f"--model_options.{name} cannot be set for training: {reason}")
        model = create_segmenter(
            recipe.model,
            len(self.source.classes),
            hidden=recipe.hidden,
            auxiliary=recipe.auxiliary,
            dropout=recipe.dropout,
            **recipe.model_options,
        )
        if recipe.weights == "pretrained":
            load_checkpoint(model.backbone, fetch_pretrained(recipe.model))
        elif recipe.weights:
            checkpoint = read_checkpoint(recipe.weights)
            if holds_segmenter(checkpoint):
                load_segmentation_checkpoint(model, recipe.weights, adapt_classifier=True)
            else:
                load_checkpoint(model.backbone, checkpoint)
        return model

    def training_loader(self, share: Share, pin_memory: bool) -> TrainingLoader:
        """Return this process's part of the training batches."""
        recipe = self.recipe
        part = recipe.batch_size // (share.processes * recipe.accumulate)
        if part == 1:
            raise ValueError(
                f"batch norms need two pictures at once; --batch_size {recipe.batch_size} over {share.processes}"
                f" processes × --accumulate {recipe.accumulate} leaves one"
            )
        return training_pairs(
            self.source.train,
            self.augmentation,
            recipe.batch_size,
            seed=recipe.seed,
            updates=recipe.updates,
            share=share,
            parts=recipe.accumulate,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )

    def evaluation_batches(self, share: Share, pin_memory: bool) -> Iterable[SegmentationBatch]:
        """Return this process's part of the held-out pairs."""
        recipe = self.recipe
        loader = evaluation_pairs(
            self.source.held_out,
            self.preprocessing,
            share=share,
            workers=recipe.workers,
            pin_memory=pin_memory,
            timeout=recipe.guards.worker_timeout,
        )
        return _Guarded(loader)

    def step(self, model: nn.Module, batch: SegmentationBatch) -> Step:
        """Return the loss, and per image the share of labelled pixels that were right."""
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in statistics]
        output = model(batch.images)
        loss = segmentation_loss(output, batch.masks, self.recipe.auxiliary_weight)
        with torch.no_grad():
            # Batch norms have taken the batch in already: one that the engine leaves out must not stay in them.
            for buffer, old in zip(statistics, before, strict=True):
                buffer.data.copy_(torch.where(torch.isfinite(loss), buffer, old))
            stride = batch.masks.shape[-1] // output.logits.shape[-1]
            masks = batch.masks[:, stride // 2 :: stride, stride // 2 :: stride]
            known = masks != IGNORE
            right = ((output.logits.argmax(1) == masks) & known).flatten(1).sum(1)
            share = (right / known.flatten(1).sum(1).clamp(min=1)).sum()
        return Step(loss, {"pixel_accuracy": share})

    def evaluate(self, model: nn.Module, batches: Iterable[SegmentationBatch]) -> SegmentationReport:
        """Segment the held-out pictures."""
        pairs = ((batch.images, batch.masks) for batch in batches)
        device = next(model.parameters()).device
        segmenter = Segmenter(model, self.inference, stride=self._stride)
        return evaluate(segmenter, pairs, self.source.classes, device)

    @property
    def _stride(self) -> int:
        return int(self.model.stride)  # type: ignore[arg-type]

    def try_out(self, device: torch.device) -> None:
        """Segment an empty picture."""
        side = self.recipe.crop
        with torch.no_grad():
            self.model.eval()(torch.zeros(1, 3, side, side, device=device))

    def save_weights(self, weights: Mapping[str, Tensor], path: Path, figures: Mapping[str, Any]) -> None:
        """Write weights that `vmamba eval` and `vmamba predict` take."""
        preprocessing, source = self.preprocessing, self.source
        metadata = {
            "short_side": preprocessing.short_side,
            "long_side": preprocessing.long_side,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "crop": self.recipe.crop,
            "evaluation": self.recipe.evaluation,
            "labels": list(source.classes),
            "colours": list(source.train.format.colours),
            "data": source.spec,
            "held_out": self.recipe.held_out,
            **figures,
        }
        model: Any = self.model
        save_segmentation_checkpoint(model, path, metadata=metadata, state_dict=weights)

    def identity(self) -> dict[str, Any]:
        """Return classes and numbers of pairs."""
        source = self.source
        return {"classes": list(source.classes), "images": len(source.train), "held_out": len(source.held_out)}

    def introduction(self) -> list[tuple[str, str]]:
        """Tell of model and data."""
        source, crop = self.source, self.recipe.crop
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return [
            ("model", f"UperNet on {self.recipe.model}, {parameters:.2f} M parameters"),
            (
                "data",
                f"{source.spec}: {len(source.classes)} classes, {crop}×{crop} pixels, {len(source.train):,} pictures to"
                f" train on, {len(source.held_out):,} held out ({source.note})",
            ),
        ]

    def epoch_line(self, record: Mapping[str, Any]) -> str:
        """Tell loss and figures; those of training are missing when every update was skipped."""
        loss, right = (record.get(name, float("nan")) for name in ("train_loss", "train_pixel_accuracy"))
        return (
            f"training: loss {loss:.3f}, {right:.2%} of pixels right"
            f" | held out: mIoU {record['miou']:.2%}, {record['pixel_accuracy']:.2%} of pixels right"
        )

    def parameter_groups(self, recipe: RunOptions) -> list[dict[str, Any]]:
        """Return two groups: decayed, and not.

        The published form spares, by name, the backbone's norms and position embedding alone: biases and the heads'
        batch norms are decayed. The clean form is that of classification.
        """
        if recipe.optimizer.decay_form == "clean":
            return parameter_groups(self.model, recipe.optimizer)
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                spared = name.startswith("backbone.") and ("norm" in name or "pos_embed" in name)
                groups[spared].append(parameter)
        return [
            {"params": groups[0], "weight_decay": recipe.optimizer.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ]

    def schedule(self, optimizer: optim.Optimizer, recipe: RunOptions, steps: int) -> Any:
        """Return a linear warm-up, at most half of the run, then a polynomial down to the smallest rate."""
        options = recipe.optimizer
        total = max(recipe.epochs * steps, 1)
        warmup = min(round(options.warmup_epochs * steps), total // 2)
        scale = options.rate_scale(recipe.batch_size)
        return PolyLRScheduler(
            optimizer,
            t_initial=total - warmup,
            power=self.recipe.power,
            lr_min=min(options.min_lr, options.lr) * scale,
            warmup_t=warmup,
            warmup_lr_init=min(options.warmup_lr, options.lr) * scale,
            warmup_prefix=True,
            t_in_epochs=False,
        )


class _Guarded:
    """Batches that name dead workers, as often as they are asked for."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return guarded(self._loader)
