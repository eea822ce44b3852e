"""The configuration of a training run as typed dataclasses: each field is a flag, a YAML key and a line of `--help`.

`RunOptions` is what the engine reads, whatever the task; `Recipe` adds what classifying images needs, and recipes of
other tasks do the same. Light on purpose: nothing here imports torch, so that parsing a command line stays fast.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

Precision = Literal["fp32", "bf16", "fp16"]
AugmentationPolicy = Literal["auto", "none", "light", "photo"]
TaskName = Literal["classification", "detection", "segmentation"]
Options = TypeVar("Options", bound=type)


def with_inherited_arguments(options: Options) -> Options:
    """Add the Args of the parent's docstring to a dataclass's own, so that `--help` explains every flag."""
    inherited = (options.__mro__[1].__doc__ or "").partition("Args:\n")[2].rstrip()
    options.__doc__ = f"{(options.__doc__ or '').rstrip()}\n{inherited}\n"
    return options


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule: linear warm-up, then a cosine, both per iteration.

    Args:
        lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the run.
        warmup_lr: Learning rate of the first iteration.
        lr_batch: Batch size that the three rates are meant for: with another, they are scaled in proportion. 0 takes
            them as they are.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        weight_decay: Decay of the weight matrices.
        decay_form: What is spared: 'clean' biases, norms, A, D and the bias of delta; 'published' as the authors' code
            did, which decays A and the bias of delta, because it never read their flags.
        layer_decay: Factor of the learning rate from each layer to the one below it; 1 gives all layers the same.
        betas: Decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        clip_grad: Largest allowed norm of the gradient; 0 leaves it alone.
        ema_decay: Decay of a moving average of the weights, which is then what is evaluated and kept; 0 turns it off.
        ema_warmup: Whether the average starts fast and slows down to ema_decay.
    """

    lr: float = 2e-3
    min_lr: float = 1e-5
    warmup_lr: float = 1e-5
    lr_batch: int = 0
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    decay_form: Literal["clean", "published"] = "clean"
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 5.0
    ema_decay: float = 0.0
    ema_warmup: bool = True

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_lr", "lr_batch", "warmup_epochs", "weight_decay", "eps", "clip_grad"):
            _require(
                _at_least(getattr(self, name), 0), f"optimizer.{name} must be 0 or more, not {getattr(self, name)}"
            )
        _require(0 < self.layer_decay <= 1, f"optimizer.layer_decay must lie in (0, 1], not {self.layer_decay}")
        _require(0 <= self.ema_decay < 1, f"optimizer.ema_decay must lie in [0, 1), not {self.ema_decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")

    def rate_scale(self, batch_size: int) -> float:
        """Return what the rates are multiplied by for a batch of this size."""
        return batch_size / self.lr_batch if self.lr_batch else 1.0


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
        mix_probability: Chance that a batch is mixed at all.
        mix_switch: Chance of cutmix rather than mixup where both are on.
        label_smoothing: Share of the label spread over all classes.
    """

    policy: AugmentationPolicy = "auto"
    auto_augment: str | None = None
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("color_jitter", "mixup", "cutmix"):
            value = getattr(self, name)
            _require(_at_least(value, 0), f"augmentation.{name} must be 0 or more, not {value}")
        for name in ("random_erasing", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"augmentation.{name} must lie in [0, 1), not {value}")
        for name in ("mix_probability", "mix_switch"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augmentation.{name} must lie in [0, 1], not {value}")


@dataclass(frozen=True)
class CheckpointOptions:
    """What a run keeps to go on from; a checkpoint is written after every epoch and when the run is asked to stop.

    Args:
        every: Updates between two checkpoints within an epoch; 0 writes them between epochs alone.
        keep: Newest checkpoints kept, so that a damaged one has an older one behind it.
        keep_epochs: Every so many epochs a checkpoint is kept for good; 0 keeps none.
    """

    every: int = 0
    keep: int = 2
    keep_epochs: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("every", 0), ("keep", 1), ("keep_epochs", 0)):
            value = getattr(self, name)
            _require(value >= lowest, f"checkpoints.{name} must be {lowest} or more, not {value}")


@dataclass(frozen=True)
class GuardOptions:
    """When a run that goes wrong is ended.

    Args:
        nonfinite: Updates in a row that may be skipped because the loss or gradient is not finite.
        damaged: Share of the images that may be unreadable.
        stall: Seconds without progress after which a process prints where it stands and ends; 0 waits for ever.
        worker_timeout: Seconds to wait for a process that reads images; 0 waits for ever.
        requeue: Ask SLURM to queue the job again after SIGUSR1, which it sends ahead of the time limit.
    """

    nonfinite: int = 5
    damaged: float = 0.25
    stall: float = 1800.0
    worker_timeout: float = 300.0
    requeue: bool = False

    def __post_init__(self) -> None:
        _require(self.nonfinite >= 1, f"guards.nonfinite must be 1 or more, not {self.nonfinite}")
        _require(0 <= self.damaged <= 1, f"guards.damaged must lie in [0, 1], not {self.damaged}")
        for name in ("stall", "worker_timeout"):
            _require(_at_least(getattr(self, name), 0), f"guards.{name} must be 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class RunOptions:
    """What the engine needs to know, whatever is trained.

    Args:
        task: What is trained; each task has flags of its own, which `--task NAME --help` lists.
        epochs: Passes over the training images.
        batch_size: Images an update sees, all processes together.
        accumulate: Parts a process computes its share of a batch in, one after the other, to save memory.
        output: Folder of the run; by default a new numbered one, runs/NAME-001 and so on.
        resume: Folder of an interrupted run to go on with, whose recipe is read from there; 'auto' goes on with
            --output if there is a run in it, and else starts one.
        seed: Seed of the initial weights, the order of the images and the augmentation.
        precision: Arithmetic of the forward and backward pass; weights stay float32.
        device: cpu, cuda, or auto for the best there is.
        parallel: How several processes share the work: ddp copies the model to each, fsdp divides it among them.
        compile: Compile the model with torch.compile.
        compile_mode: What --compile aims at. reduce-overhead records an update's kernels as CUDA graphs: a GPU then
            no longer waits for the processor, which can take half of an update; ddp and one part a batch only, and
            gradients travel in one piece.
        gradient_checkpointing: Recompute the insides of blocks in the backward pass, to save memory.
        workers: Processes that read images, for each process that trains; -1 picks by the data.
        log_every: Updates between two readings of the loss.
        trackers: Experiment trackers by accelerate's names, for example tensorboard or wandb.
        optimizer: Optimiser and schedule.
        checkpoints: Checkpoints.
        guards: Guards.
    """

    compiles_whole: ClassVar[bool] = True  # False: the task compiles the part of its model that gains

    task: TaskName = "classification"
    epochs: int = 15
    batch_size: int = 32
    accumulate: int = 1
    output: str | None = None
    resume: str | None = None
    seed: int = 0
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    gradient_checkpointing: bool = False
    workers: int = -1
    log_every: int = 10
    trackers: tuple[str, ...] = ("tensorboard",)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    guards: GuardOptions = field(default_factory=GuardOptions)

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("workers", -1), ("log_every", 1), ("seed", 0),
        ):  # fmt: skip
            _require(getattr(self, name) >= lowest, f"{name} must be {lowest} or more, not {getattr(self, name)}")
        if self.compile_mode != "default":
            _require(self.compile, f"--compile_mode {self.compile_mode} says how to compile: add --compile true")
            _require(
                self.accumulate == 1 and self.parallel == "ddp",
                f"--compile_mode {self.compile_mode} uses the memory of gradients again in the next part of a batch;"
                " take --compile_mode default with --accumulate above 1 or --parallel fsdp",
            )
        if self.parallel == "fsdp":
            _require(
                not self.optimizer.ema_decay,
                "--parallel fsdp keeps no moving average; use ddp, or --optimizer.ema_decay 0",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values that YAML and JSON hold, as `--config` reads them back."""
        plain = asdict(self)
        plain["trackers"] = list(self.trackers)
        plain["optimizer"]["betas"] = list(self.optimizer.betas)
        return plain


@with_inherited_arguments
@dataclass(frozen=True)
class Recipe(RunOptions):
    """Train a model to classify images.

    Args:
        model: Name of a variant; `vmamba models` lists them.
        model_options: Fields of the model's configuration to change, for example drop_path_rate.
        weights: Weights to start from: a file, a Hugging Face Hub id, or 'pretrained' for the published ones.
        data: digits, fashion-mnist[:FOLDER], wds:SHARDS, hf:FOLDER, or a folder of class folders; see docs/training.md.
        held_out: Share of the images held out for evaluation where the data brings no split of its own.
        img_size: Side of the images the model sees, in pixels; by default what suits the data.
        tune: 'all' trains every weight; 'head' the last linear layer alone, on the features of the others.
        augmentation: Augmentation.
    """

    model: str = "vmamba_nano"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str = "digits"
    held_out: float = 0.2
    img_size: int | None = None
    tune: Literal["all", "head"] = "all"
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")
        smallest = 32
        _require(
            self.img_size is None or self.img_size >= smallest,
            f"img_size must be {smallest} or more, not {self.img_size}",
        )


# What may differ between a run and its continuation: where and how long it runs, not what it computes.
CHANGEABLE_ON_RESUME = (
    "epochs", "output", "resume", "device", "workers", "log_every", "trackers", "checkpoints", "guards",
    "accumulate", "compile", "compile_mode", "gradient_checkpointing", "parallel",
)  # fmt: skip


def _at_least(value: float, lowest: float) -> bool:
    return math.isfinite(value) and value >= lowest


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
