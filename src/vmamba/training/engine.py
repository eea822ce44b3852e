"""The training loop: from a recipe to a run folder with weights, metrics and pictures.

Read it from `train` downwards. accelerate places model and batches on the device and handles precision; timm builds
optimiser, schedule and augmentation; what is left here is the order of things.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vmamba.data.loaders import Batch, EpochSampler, evaluation_loader, training_loader
from vmamba.data.sources import Source, open_source
from vmamba.data.transforms import Preprocessing
from vmamba.models.checkpoint import load_checkpoint, save_checkpoint
from vmamba.models.registry import create_model
from vmamba.tasks.classification import ClassificationReport, classification_loss, evaluate, make_mixup
from vmamba.training.checkpointing import Position, load_state, restore_random_state, save_state
from vmamba.training.guards import InterruptGuard, require_finite_loss
from vmamba.training.optim import make_ema, make_optimizer, make_schedule
from vmamba.training.pictures import draw_curves
from vmamba.training.progress import LiveProgress
from vmamba.training.recipe import CHANGEABLE_ON_RESUME, Recipe
from vmamba.training.run_folder import RunFolder, new_run_folder


class TrainingInterruptedError(Exception):
    """The run was asked to stop and has saved itself; the message says how to go on."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: Where everything was written.
        report: Evaluation of the final weights on the held-out images.
        best_top1: The best evaluation of any epoch.
        seconds: Duration, evaluation included.
        damaged: Why images were skipped, one line for each.
    """

    folder: RunFolder
    report: ClassificationReport
    best_top1: float
    seconds: float
    damaged: tuple[str, ...]


@dataclass
class _Run:
    """Everything the loop works with."""

    recipe: Recipe
    source: Source
    preprocessing: Preprocessing
    folder: RunFolder
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    schedule: Any
    ema: Any
    mixup: Any
    loader: DataLoader[Batch]
    held_out: DataLoader[Batch]
    sampler: EpochSampler
    steps: int
    position: Position
    progress: LiveProgress
    guard: InterruptGuard
    damaged: dict[str, None] = field(default_factory=dict)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that count: the moving average where there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)


def train(recipe: Recipe, console: Console | None = None, run_name: str | None = None) -> RunResult:
    """Train a model as a recipe says.

    Args:
        recipe: What to do; with `recipe.resume` it must be the interrupted run's.
        console: Where to show progress; by default standard output.
        run_name: What a numbered run folder is called; by default as the model.

    Raises:
        ValueError, FileNotFoundError: The recipe cannot be carried out; nothing has been written then.
        TrainingInterruptedError: SIGINT or SIGTERM; the state has been saved.
        TrainingFailedError: The loss is no longer a number.
    """
    console = console or Console()
    began = time.perf_counter()
    try:
        with InterruptGuard() as guard:
            run = _prepare(recipe, console, guard, run_name or recipe.model)
            with run.progress:
                report = _train_epochs(run)
            run.accelerator.end_training()
    finally:
        # accelerate keeps one state for the process; the next run in it may want another device or precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    draw_curves(list(run.folder.read_metrics()), run.folder.curves)
    return RunResult(run.folder, report, run.position.best_top1, time.perf_counter() - began, tuple(run.damaged))


def _train_epochs(run: _Run) -> ClassificationReport:
    report: ClassificationReport | None = None
    while run.position.epoch < run.recipe.epochs:
        _train_epoch(run)
        _stop_if_asked(run)
        report = _evaluate(run)
        _stop_if_asked(run)
        _finish_epoch(run, report)
    return report or _evaluate(run)


def _train_epoch(run: _Run) -> None:
    """Make the updates of one epoch that are still to be made."""
    position, recipe = run.position, run.recipe
    run.sampler.start(position.epoch, position.step * recipe.batch_size)
    run.model.train()
    device = run.accelerator.device
    loss_sum = torch.tensor(position.loss, dtype=torch.float64, device=device)
    correct = torch.tensor(position.correct, device=device)
    elapsed, began = position.seconds, time.perf_counter()
    for batch in run.loader:
        if run.guard.stop:
            break
        _note_damaged(run, batch)
        if len(batch.targets):
            loss, hits = _update(run, batch)
            loss_sum += loss * len(batch.targets)
            correct += hits
            position.seen += len(batch.targets)
        position.step += 1
        position.updates += 1
        if position.step % recipe.log_every == 0 or position.step == run.steps:
            # Reading the sums waits for the device, so it happens only now and then.
            position.loss, position.correct = float(loss_sum), int(correct)
            position.seconds = elapsed + time.perf_counter() - began
            _log_step(run)
    position.loss, position.correct = float(loss_sum), int(correct)
    position.seconds = elapsed + time.perf_counter() - began
    require_finite_loss(position.loss, position.epoch + 1, position.step)
    if not position.seen and position.step == run.steps:
        raise ValueError(f"none of the {len(run.source.train)} training images can be read")


def _update(run: _Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Make one update; return the mean loss and the number of images recognised, both on the device."""
    images, targets = batch.images, batch.targets
    labels = targets
    if run.mixup:
        even = len(targets) - len(targets) % 2
        if not even:
            return torch.zeros((), device=images.device), torch.zeros((), dtype=torch.long, device=images.device)
        labels = targets[:even]
        images, targets = run.mixup(images[:even], labels)
    run.schedule.step_update(run.position.updates)
    logits = run.model(images)
    loss = classification_loss(logits, targets, run.recipe.augmentation.label_smoothing)
    run.accelerator.backward(loss)
    if run.recipe.optimizer.clip_grad:
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.optimizer.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(run.accelerator.unwrap_model(run.model), step=run.position.updates + 1)
    return loss.detach().double(), (logits.detach().argmax(1) == labels).sum()


def _log_step(run: _Run) -> None:
    position = run.position
    seen = max(position.seen, 1)
    loss, top1 = position.loss / seen, position.correct / seen
    require_finite_loss(loss, position.epoch + 1, position.step)
    rate = position.seen / max(position.seconds, 1e-9)
    lr = run.optimizer.param_groups[0]["lr"]
    run.progress.show(position.epoch, position.step, loss, top1, rate)
    record = {"kind": "step", "epoch": position.epoch + 1, "step": position.updates, "loss": loss, "lr": lr}
    run.folder.append_metrics(record)
    run.accelerator.log({"train/loss": loss, "train/top1": top1, "train/lr": lr}, step=position.updates)


def _evaluate(run: _Run) -> ClassificationReport:
    batches = _until_stopped(run, run.held_out)
    # accelerate has put autocast around the trained model, but not around the moving average.
    with run.accelerator.autocast():
        return evaluate(run.evaluated_model, batches, run.source.classes, gather=run.accelerator.gather_for_metrics)


def _until_stopped(run: _Run, loader: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    for number, batch in enumerate(loader):
        # The first batch is always counted, so that there is something to report on.
        if run.guard.stop and number:
            return
        _note_damaged(run, batch)
        yield batch.images, batch.targets


def _finish_epoch(run: _Run, report: ClassificationReport) -> None:
    """Record the figures of an epoch, and keep its weights and state."""
    position = run.position
    record = {
        "kind": "epoch",
        "epoch": position.epoch + 1,
        "step": position.updates,
        "train_loss": position.loss / max(position.seen, 1),
        "train_top1": position.correct / max(position.seen, 1),
        "loss": report.loss,
        "top1": report.top1,
        "top5": report.top5,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": position.seen / max(position.seconds, 1e-9),
    }
    run.folder.append_metrics(record)
    figures = {name: value for name, value in record.items() if name in ("loss", "top1", "top5")}
    run.accelerator.log({f"held_out/{name}": value for name, value in figures.items()}, step=position.updates)
    is_best = report.top1 > position.best_top1
    position.best_top1 = max(report.top1, position.best_top1)
    position.next_epoch()
    metadata = {
        **run.preprocessing.to_dict(),
        "labels": list(run.source.classes),
        "data": run.source.spec,
        "held_out": run.recipe.held_out,
        "epoch": position.epoch,
        "top1": report.top1,
    }
    for path in [run.folder.last, *([run.folder.best] if is_best else [])]:
        save_checkpoint(run.evaluated_model, path, metadata=metadata)
    _save(run)
    run.progress.epoch_done(record)


def _save(run: _Run) -> None:
    scaler = run.accelerator.scaler
    save_state(
        run.folder.state,
        run.position,
        {
            "model": run.accelerator.unwrap_model(run.model).state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "ema": run.ema.state_dict() if run.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "data": _describe(run.source),
        },
    )


def _stop_if_asked(run: _Run) -> None:
    """Save and leave when a signal came; a run that is complete but for its evaluation goes on with that."""
    if not run.guard.stop:
        return
    _save(run)
    run.accelerator.end_training()
    where = f"epoch {run.position.epoch + 1} of {run.recipe.epochs}, update {run.position.step} of {run.steps}"
    raise TrainingInterruptedError(
        f"stopped and saved in {where}; go on with: vmamba train --resume {shlex.quote(str(run.folder.path))}",
        run.guard.exit_status,
    )


def _note_damaged(run: _Run, batch: Batch) -> None:
    for problem in batch.damaged:
        if problem not in run.damaged:
            run.damaged[problem] = None
            run.folder.append_damaged(problem)


def _prepare(recipe: Recipe, console: Console, guard: InterruptGuard, run_name: str) -> _Run:
    """Check the whole recipe and build what it asks for; the run folder comes last, when nothing can go wrong."""
    device = _checked_device(recipe)
    earlier = _open_resumed(recipe) if recipe.resume else None
    set_seed(recipe.seed)
    source = open_source(recipe.data, recipe.held_out)
    preprocessing = Preprocessing.for_style(source.style, recipe.img_size or source.img_size)
    augmentation = recipe.augmentation
    transform = preprocessing.training_transform(
        source.style,
        augmentation.policy,
        auto_augment=augmentation.auto_augment,
        color_jitter=augmentation.color_jitter,
        random_erasing=augmentation.random_erasing,
    )
    model = _build_model(recipe, source, preprocessing)
    _try_out(model, preprocessing.img_size, device)
    folder = earlier or new_run_folder(recipe.output, run_name)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=list(recipe.trackers) or None,
        project_dir=str(folder.path),
    )
    options = {"workers": recipe.workers, "pin_memory": accelerator.device.type == "cuda"}
    loader, sampler = training_loader(source.train, transform, recipe.batch_size, seed=recipe.seed, **options)
    held_out = evaluation_loader(source.held_out, preprocessing.transform(), recipe.batch_size, **options)
    steps = len(loader)
    optimizer = make_optimizer(model, recipe.optimizer)
    schedule = make_schedule(optimizer, recipe.optimizer, recipe.epochs, steps)
    # Before accelerate wraps the model: a copy of the wrapper would still call the original.
    ema = make_ema(model.to(accelerator.device), recipe.optimizer.ema_decay)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    run = _Run(
        recipe=recipe,
        source=source,
        preprocessing=preprocessing,
        folder=folder,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        mixup=make_mixup(len(source.classes), augmentation.mixup, augmentation.cutmix, augmentation.label_smoothing),
        loader=loader,
        held_out=held_out,
        sampler=sampler,
        steps=steps,
        position=Position(),
        progress=LiveProgress(console, recipe.epochs, steps),
        guard=guard,
    )
    if earlier:
        _restore(run)
    # Without its own place, so that the file serves as a recipe for other runs, and a run may be moved.
    folder.write_config({**recipe.to_dict(), "output": None, "resume": None})
    accelerator.init_trackers("tensorboard")
    _introduce(run, console)
    return run


def _checked_device(recipe: Recipe) -> str:
    has_cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: this machine has no usable NVIDIA GPU; `vmamba doctor` tells more")
    device = "cuda" if recipe.device == "auto" and has_cuda else recipe.device
    if recipe.precision == "fp16" and device != "cuda":
        raise ValueError("--precision fp16 needs a GPU; bf16 or fp32 would do here")
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for tracker in recipe.trackers:
        if tracker not in available:
            raise ValueError(
                f"--trackers {tracker}: not installed or unknown; here are {', '.join(available) or 'none'}"
            )
    return device


def _build_model(recipe: Recipe, source: Source, preprocessing: Preprocessing) -> nn.Module:
    for name, reason in (("num_classes", "the data decides it"), ("in_chans", "images are read as RGB")):
        if name in recipe.model_options:
            raise ValueError(f"--model_options.{name} cannot be set for training: {reason}")
    overrides = {"img_size": preprocessing.img_size, **recipe.model_options, "num_classes": len(source.classes)}
    model = create_model(recipe.model, pretrained=recipe.weights == "pretrained", **overrides)
    if recipe.weights and recipe.weights != "pretrained":
        load_checkpoint(model, recipe.weights, adapt_classifier=True)
    return model


def _try_out(model: nn.Module, img_size: int, device: str) -> None:
    """Classify an empty image, so that a model or backend that cannot run here says so before a folder is made."""
    place = torch.device("cpu" if device == "auto" else device)
    with torch.no_grad():
        model.to(place).eval()(torch.zeros(1, 3, img_size, img_size, device=place))


def _open_resumed(recipe: Recipe) -> RunFolder:
    """Find the run to go on with.

    Raises:
        ValueError: The recipe asks for something else than the run was started with.
    """
    folder = RunFolder(Path(recipe.resume or "").expanduser())
    before, now = folder.read_config(), recipe.to_dict()
    for name, value in now.items():
        if name not in CHANGEABLE_ON_RESUME and before.get(name) != value:
            asked = f"it was {before.get(name)}, {value} was asked for"
            raise ValueError(f"a resumed run keeps its {name}: {asked}; start a new run for that")
    if recipe.output and Path(recipe.output).resolve() != folder.path.resolve():
        raise ValueError(f"--output {recipe.output} and --resume {recipe.resume} differ; a run stays in its folder")
    return folder


def _restore(run: _Run) -> None:
    position, parts, random_state = load_state(run.folder.state)
    if parts["data"] != _describe(run.source):
        raise ValueError(f"{run.source.spec} has other images than when {run.folder.path} was interrupted; start anew")
    run.accelerator.unwrap_model(run.model).load_state_dict(parts["model"])
    run.optimizer.load_state_dict(parts["optimizer"])
    if run.ema and parts["ema"]:
        run.ema.load_state_dict(parts["ema"])
    if run.accelerator.scaler and parts["scaler"]:
        run.accelerator.scaler.load_state_dict(parts["scaler"])
    run.position = position
    run.folder.forget_metrics_after(position.updates)
    run.damaged = dict.fromkeys(run.folder.read_damaged())
    restore_random_state(random_state)


def _describe(source: Source) -> dict[str, Any]:
    return {"classes": list(source.classes), "images": len(source.train), "held_out": len(source.held_out)}


def _introduce(run: _Run, console: Console) -> None:
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    source, side = run.source, run.preprocessing.img_size
    console.print(
        f"model   {run.recipe.model}, {parameters:.2f} M parameters\n"
        f"data    {source.spec}: {len(source.classes)} classes, {side}×{side} pixels, {len(source.train):,} images to"
        f" train on, {len(source.held_out):,} held out ({source.note})\n"
        f"device  {run.accelerator.device}, {run.recipe.precision}\n"
        f"folder  {run.folder.path}",
        highlight=False,
        soft_wrap=True,
    )
    if run.position.updates:
        console.print(f"going on in epoch {run.position.epoch + 1} after {run.position.updates} updates")
