"""The configuration of a run that trains segmentation. Light on purpose, as `recipe.py`: nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vmamba.training.recipe import OptimizerOptions, RunOptions, TaskName, with_inherited_arguments


def _optimizer() -> OptimizerOptions:
    return OptimizerOptions(lr=1e-3, min_lr=0.0, warmup_lr=1e-6, weight_decay=0.01)


@with_inherited_arguments
@dataclass(frozen=True)
class SegmentationRecipe(RunOptions):
    """Train a model to give every pixel a class: UperNet on a VMamba.

    Args:
        model: Name of the backbone's variant; `vmamba models` lists them.
        model_options: Fields of the backbone's configuration to change, for example drop_path_rate.
        weights: Weights to start from: a classifier's or a segmentation model's file, or 'pretrained' for the published
            classifier.
        data: ade20k:FOLDER, or a folder of images and masks; see docs/segmentation.md.
        held_out: Share of the pairs held out for evaluation where the data brings no split of its own.
        updates: Updates in an epoch, after each of which comes an evaluation; 0 makes it one pass over the pairs.
        crop: Side of the square the model sees in training, in pixels.
        short_side: Pixels that the shorter side of a picture is brought to; 0 leaves pictures as they are.
        long_side: Pixels that the longer side is not to exceed.
        scales: Range of the factor by which training resizes a picture beyond that.
        flip: Chance that a picture is mirrored.
        photometric: Whether training changes brightness, contrast, saturation and hue.
        evaluation: 'whole' evaluates on whole pictures, 'slide' by windows of the size of the crop.
        hidden: Channels inside the decoder.
        auxiliary: Channels inside the auxiliary head; 0 leaves it out.
        auxiliary_weight: Weight of the auxiliary head's loss.
        dropout: Share of channels dropped before the classifiers.
        power: Power of the polynomial by which the learning rate falls; 1 is a straight line.
    """

    task: TaskName = "segmentation"
    model: str = "vmamba_tiny"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str = "data"
    held_out: float = 0.2
    updates: int = 0
    crop: int = 512
    short_side: int = 512
    long_side: int = 2048
    scales: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: float = 0.5
    photometric: bool = True
    evaluation: Literal["whole", "slide"] = "whole"
    hidden: int = 512
    auxiliary: int = 256
    auxiliary_weight: float = 0.4
    dropout: float = 0.1
    power: float = 1.0
    optimizer: OptimizerOptions = field(default_factory=_optimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("updates", 0), ("short_side", 0), ("long_side", 32), ("hidden", 1), ("auxiliary", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be {lowest} or more, not {getattr(self, name)}")
        if self.crop < 32 or self.crop % 4:
            raise ValueError(f"crop must be a multiple of 4 and 32 or more, not {self.crop}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")
        if len(self.scales) != 2 or not 0.05 <= self.scales[0] <= self.scales[1] <= 8:
            raise ValueError(f"scales must be two factors from 0.05 to 8, the smaller one first, not {self.scales}")
        for name in ("flip", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not (math.isfinite(self.auxiliary_weight) and self.auxiliary_weight >= 0):
            raise ValueError(f"auxiliary_weight must be 0 or more, not {self.auxiliary_weight}")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be more than 0, not {self.power}")
        if self.optimizer.layer_decay != 1:
            raise ValueError("optimizer.layer_decay must be 1: the layers of a UperNet have no one order")
