"""The configuration of a training run as typed dataclasses: each field is a flag, a YAML key and a line of `--help`.

Light on purpose: nothing here imports torch, so that parsing a command line stays fast.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
AugmentationPolicy = Literal["auto", "none", "light", "photo"]


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule: linear warm-up, then a cosine, both per iteration.

    Args:
        lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the run.
        warmup_lr: Learning rate of the first iteration.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        weight_decay: Decay of the weight matrices; biases, norms, A, D and the bias of delta are never decayed.
        betas: Decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        clip_grad: Largest allowed norm of the gradient; 0 leaves it alone.
        ema_decay: Decay of a moving average of the weights, which is then what is evaluated and kept; 0 turns it off.
    """

    lr: float = 2e-3
    min_lr: float = 1e-5
    warmup_lr: float = 1e-5
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 5.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "eps", "clip_grad"):
            _require(
                _at_least(getattr(self, name), 0), f"optimizer.{name} must be 0 or more, not {getattr(self, name)}"
            )
        _require(0 <= self.ema_decay < 1, f"optimizer.ema_decay must lie in [0, 1), not {self.ema_decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")


@dataclass(frozen=True)
class AugmentationOptions:
    """What is done to the training images and their labels.

    Args:
        policy: 'light' shifts and turns a little (small grey images); 'photo' crops, flips and jitters (timm);
            'none' leaves the images alone; 'auto' picks by the data.
        auto_augment: A policy in timm's notation for 'photo', for example rand-m9-mstd0.5-inc1.
        color_jitter: Strength of the colour jitter of 'photo' when no auto_augment is given.
        random_erasing: Chance that a rectangle of an image is erased.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        label_smoothing: Share of the label spread over all classes.
    """

    policy: AugmentationPolicy = "auto"
    auto_augment: str | None = None
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("color_jitter", "mixup", "cutmix"):
            value = getattr(self, name)
            _require(_at_least(value, 0), f"augmentation.{name} must be 0 or more, not {value}")
        for name in ("random_erasing", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"augmentation.{name} must lie in [0, 1), not {value}")


@dataclass(frozen=True)
class Recipe:
    """Train a model to classify images.

    Args:
        model: Name of a variant; `vmamba models` lists them.
        model_options: Fields of the model's configuration to change, for example drop_path_rate.
        weights: Weights to start from: a file, a Hugging Face Hub id, or 'pretrained' for the published ones.
        data: digits, fashion-mnist, fashion-mnist:FOLDER, or a folder of class folders.
        held_out: Share of the images held out for evaluation where the data brings no split of its own.
        img_size: Side of the images the model sees, in pixels; by default what suits the data.
        epochs: Passes over the training images.
        batch_size: Images an update sees.
        output: Folder of the run; by default a new numbered one, runs/NAME-001 and so on.
        resume: Folder of an interrupted run to go on with; its recipe is read from there.
        seed: Seed of the initial weights, the order of the images and the augmentation.
        precision: Arithmetic of the forward and backward pass; weights stay float32.
        device: cpu, cuda, or auto for the best there is.
        workers: Processes that read images; -1 picks by the data.
        log_every: Updates between two readings of the loss.
        trackers: Experiment trackers by accelerate's names, for example tensorboard or wandb.
        optimizer: Optimiser and schedule.
        augmentation: Augmentation.
    """

    model: str = "vmamba_nano"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str = "digits"
    held_out: float = 0.2
    img_size: int | None = None
    epochs: int = 15
    batch_size: int = 32
    output: str | None = None
    resume: str | None = None
    seed: int = 0
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = -1
    log_every: int = 10
    trackers: tuple[str, ...] = ("tensorboard",)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("workers", -1), ("log_every", 1), ("seed", 0)):
            _require(getattr(self, name) >= lowest, f"{name} must be {lowest} or more, not {getattr(self, name)}")
        smallest = 32
        _require(
            self.img_size is None or self.img_size >= smallest,
            f"img_size must be {smallest} or more, not {self.img_size}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values that YAML and JSON hold, as `--config` reads them back."""
        plain = asdict(self)
        plain["trackers"] = list(self.trackers)
        plain["optimizer"]["betas"] = list(self.optimizer.betas)
        return plain


# What may differ between a run and its continuation: where and how long it runs, not what it computes.
CHANGEABLE_ON_RESUME = ("epochs", "output", "resume", "device", "workers", "log_every", "trackers")


def _at_least(value: float, lowest: float) -> bool:
    return math.isfinite(value) and value >= lowest


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
