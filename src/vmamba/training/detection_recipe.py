"""The configuration of training a detector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vmamba.training.recipe import OptimizerOptions, RunOptions, TaskName, _require, with_inherited_arguments

ITERATIONS = 7329  # updates in an epoch of COCO's 117,266 training images with objects, at 16 a batch


def detection_optimizer() -> OptimizerOptions:
    """Return the published optimiser: AdamW, 10⁻⁴ for 16 images, a thousand updates of warm-up from a thousandth."""
    return OptimizerOptions(
        lr=1e-4,
        warmup_lr=1e-7,
        lr_batch=16,
        warmup_epochs=round(1000 / ITERATIONS, 6),
        weight_decay=0.05,
        decay_form="published",
        clip_grad=0.0,
    )


@with_inherited_arguments
@dataclass(frozen=True)
class DetectionRecipe(RunOptions):
    """Train a model to find objects: boxes, and with --masks their shapes.

    Args:
        model: Name of the backbone; `vmamba models` lists them.
        model_options: Fields of the backbone's configuration to change, for example drop_path_rate.
        weights: Weights to start from: a classifier's or a detector's file, a Hub id, or 'pretrained' for the
            published ones of the backbone.
        data: COCO's folder, a folder of train.json and val.json with their images, or one annotation file.
        images: Folder of the training images, where it is not beside their annotations.
        held_out_data: Annotation file to evaluate on; by default the folder's own.
        held_out_images: Folder of its images.
        held_out: Share of the images held out for evaluation where there is no annotation file for that.
        masks: Whether to learn masks (Mask R-CNN) or boxes alone (Faster R-CNN).
        channels: Width of the feature pyramid and the heads; 256 as published.
        min_sizes: Lengths in pixels that the short side of a training image is brought to, one drawn each time; the
            last is that of evaluation.
        max_size: Length that the long side may have.
        flip: Chance of mirroring an image.
        crop: Chance of cutting a piece out of an image before it is scaled.
        keep_empty: Train on images without objects too.
        milestones: Epochs after which the learning rate falls; by default after 2/3 and 11/12 of them.
        decay_rate: What it is multiplied by then.
        score_threshold: Confidence below which nothing is reported.
        detections: Most objects reported in an image.
        epochs: Passes over the training images; 12 and 36 are the published schedules.
        batch_size: Images an update sees, all processes together; 16 as published.
        compile: Compile the backbone with torch.compile, for open sizes rather than anew for each.
    """

    compiles_whole: ClassVar[bool] = False  # regions and objects differ in number from image to image

    task: TaskName = "detection"
    model: str = "vmamba_tiny"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str = "coco"
    images: str | None = None
    held_out_data: str | None = None
    held_out_images: str | None = None
    held_out: float = 0.2
    masks: bool = True
    channels: int = 256
    min_sizes: tuple[int, ...] = (800,)
    max_size: int = 1333
    flip: float = 0.5
    crop: float = 0.0
    keep_empty: bool = False
    milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    score_threshold: float = 0.05
    detections: int = 100
    epochs: int = 12
    batch_size: int = 16
    optimizer: OptimizerOptions = field(default_factory=detection_optimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.task == "detection", f"this is the recipe of --task detection, not {self.task}")
        _require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")
        smallest = 32
        _require(bool(self.min_sizes), "min_sizes needs one length or more")
        for size in self.min_sizes:
            _require(size >= smallest, f"min_sizes must be {smallest} or more, not {size}")
            _require(size <= self.max_size, f"min_sizes must not exceed max_size ({self.max_size}), as {size} does")
        for name in ("flip", "crop"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must lie in [0, 1], not {value}")
        _require(0 < self.decay_rate <= 1, f"decay_rate must lie in (0, 1], not {self.decay_rate}")
        ordered = list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) >= 1
        _require(ordered, f"milestones must be rising numbers of epochs, not {list(self.milestones)}")
        _require(
            self.compile_mode == "default",
            f"--compile_mode {self.compile_mode} records CUDA graphs anew for every size of images, and detectors see"
            " many; leave it at default",
        )
        _require(
            not self.compile or self.parallel == "ddp",
            "detectors compile their backbone as a whole, which --parallel fsdp divides; use ddp",
        )
        _require(
            self.optimizer.layer_decay == 1,
            "detectors train all layers at one rate; leave --optimizer.layer_decay at 1",
        )

    @property
    def falls(self) -> tuple[float, ...]:
        """Epochs after which the learning rate falls."""
        return self.milestones or (self.epochs * 2 / 3, self.epochs * 11 / 12)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        plain = super().to_dict()
        for name in ("min_sizes", "milestones"):
            plain[name] = list(plain[name])
        return plain
