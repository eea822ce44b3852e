"""The training loop: from a recipe to a run folder with weights, checkpoints, metrics and pictures.

Read it from `train` downwards. accelerate places and wraps the model, handles precision and processes; timm builds
optimiser, schedule and augmentation; a `Task` brings model, data and loss. What is left here is the order of things.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vmamba.data.reading import LoaderError, is_worker_failure, worker_failure
from vmamba.training.checkpointing import seed_update
from vmamba.training.classification import ClassificationTask
from vmamba.training.guards import (
    InterruptGuard,
    TrainingFailedError,
    dump_update,
    requeue_slurm_job,
)
from vmamba.training.pictures import draw_curves
from vmamba.training.processes import finish, lost_process, model_state, optimizer_state, release
from vmamba.training.recipe import RunOptions
from vmamba.training.run import Launched, Measured, Run, memory_advice, prepare
from vmamba.training.run_folder import RunFolder
from vmamba.training.task import Report, Step, Task

_ENOUGH_TO_JUDGE = 200  # images after which the share of damaged ones means something


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
        best: The best figure of any epoch, of the kind the task goes by.
        seconds: Duration, evaluation included.
        damaged: Why images were skipped, one line for each.
        is_main: Whether this is the process that writes and speaks for all.
    """

    folder: RunFolder
    report: Any
    best: float
    seconds: float
    damaged: tuple[str, ...]
    is_main: bool


def train(
    recipe: RunOptions,
    console: Console | None = None,
    run_name: str | None = None,
    make_task: Callable[[Any], Task] = ClassificationTask,
) -> RunResult:
    """Train a model as a recipe says; under torchrun, accelerate or SLURM, together with the other processes.

    Args:
        recipe: What to do; with `recipe.resume` it must be the interrupted run's.
        console: Where to show progress; by default standard output.
        run_name: What a numbered run folder is called; by default as the task says.
        make_task: The kind of task; gets the recipe.

    Raises:
        ValueError, FileNotFoundError: The recipe cannot be carried out; nothing has been written then.
        TrainingInterruptedError: SIGINT, SIGTERM or SIGUSR1; the state has been saved.
        TrainingFailedError: The run cannot go on: the loss is no number, images are lost, memory is short, …
    """
    console = console or Console()
    began = time.perf_counter()
    try:
        with InterruptGuard() as guard:
            run = prepare(recipe, console, guard, run_name, make_task)
            with run.watch, run.progress:
                report = _train_epochs(run)
            finish(run.accelerator)
    except LoaderError as error:
        raise TrainingFailedError(str(error)) from None
    except RuntimeError as error:
        if is_worker_failure(error):
            raise TrainingFailedError(worker_failure(error)) from None
        if lost := lost_process(error):
            raise TrainingFailedError(lost) from error
        raise
    finally:
        release()
    if run.together.is_main:
        draw_curves(list(run.folder.read_metrics()), run.folder.curves, run.task.merit)
    seconds = time.perf_counter() - began
    return RunResult(run.folder, report, run.position.best, seconds, tuple(run.damaged), run.together.is_main)


def _train_epochs(run: Run) -> Report:
    report: Report | None = None
    while run.position.epoch < run.recipe.epochs:
        _train_epoch(run)
        _stop_if_asked(run)
        report = _evaluate(run)
        _stop_if_asked(run)
        _finish_epoch(run, report)
    return report or _evaluate(run)


def _train_epoch(run: Run) -> None:
    """Make the updates of one epoch that are still to be made."""
    position, recipe = run.position, run.recipe
    run.task.prepare_training()
    measured = Measured(run)
    for batches in measured.waiting_for(run.loader.epoch(position.epoch, position.step)):
        seed_update(recipe.seed, position.updates, run.together.rank)
        with memory_advice(run, batches):
            _update(run, [batch.to(run.together.device) for batch in batches], measured)
        position.step += 1
        position.updates += 1
        run.settled += 1
        ended = position.step == run.loader.steps
        every = recipe.checkpoints.every
        due = bool(every) and position.updates % every == 0 and not ended
        if position.step % recipe.log_every == 0 or ended or due or run.guard.stop:
            _finish_update(run, measured)
            measured.settle()
            _log_step(run, measured.norm)
        if run.guard.stop:
            return
        if due:
            _save(run)


def _update(run: Run, batches: list[Any], measured: Measured) -> None:
    """Make one update from the parts of this process's share of a batch, unless a process found it would do harm."""
    run.watch.beat(f"computing update {run.position.updates + 1}")
    run.schedule.step_update(run.position.updates)
    steps = [_forward_backward(run, batch, len(batches), batch is batches[-1]) for batch in batches]
    # The device has work for a while: the time to look at what came of the update before.
    _finish_update(run, measured)
    # Without a limit this only measures: the gradients are then multiplied by 1.
    limit = run.recipe.optimizer.clip_grad or float("inf")
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    losses = torch.stack([step.loss for step in steps])
    good, damaged = (float(sum(counts)) for counts in zip(*((len(b), len(b.damaged)) for b in batches), strict=True))
    bad = [~torch.isfinite(losses).all(), ~torch.isfinite(norm)]
    totals = run.together.adding(bad, [good, damaged, *run.guard.flags()])
    run.launched = Launched(run.position.updates, batches, steps, losses, norm, totals)
    if run.skips_itself:
        assert totals.on_device is not None
        run.optimizer.optimizer.found_inf = (totals.on_device[:2] > 0).any().float()
        run.optimizer.step()
    if not run.reads_later:
        _finish_update(run, measured)
    run.optimizer.zero_grad()


def _finish_update(run: Run, measured: Measured) -> None:
    """Read what came of the update that was launched last, if that is still to be done, and finish it."""
    launched, run.launched = run.launched, None
    if launched is None:
        return
    counts = launched.totals.read()
    run.position.read += int(counts[2] + counts[3])
    run.position.damaged += int(counts[3])
    run.guard.agree(counts[4:])
    if counts[3]:
        _note_damaged(run, [line for batch in launched.batches for line in batch.damaged])
    if counts[0] or counts[1]:
        _skip(run, launched, measured, somewhere=bool(counts[0]))
        return
    if not run.skips_itself:
        run.optimizer.step()
    run.position.skipped = 0
    if run.ema:
        run.ema.update(run.bare_model, step=launched.number + 1)
    measured.add(launched.batches, launched.steps, launched.norm)


def _forward_backward(run: Run, batch: Any, parts: int, last: bool) -> Step:
    with contextlib.nullcontext() if last else run.accelerator.no_sync(run.model):
        step = run.task.step(run.model, batch)
        # A batch of stand-ins takes part in the sums of gradients, which the other processes wait for, with nothing.
        run.accelerator.backward(step.loss / parts if len(batch) else step.loss * 0)
    if last and run.average:
        run.average()
    return Step(step.loss.detach(), step.sums)


def _skip(run: Run, launched: Launched, measured: Measured, *, somewhere: bool) -> None:
    """Leave the weights as they are, in all processes; write down why, and give up after a while.

    Args:
        run: The run.
        launched: The update, which all processes give up.
        measured: What was measured in this epoch.
        somewhere: Whether the loss of any process is not finite.
    """
    position, scaler = run.position, run.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None else 1.0
    if scaler is not None:
        scaler.update(scale / 2)
        if not somewhere and scale > 1:
            return  # half precision finding its scale
    position.skipped += 1
    losses = launched.losses.tolist()
    record = {
        "kind": "skipped",
        "epoch": position.epoch + 1,
        "step": launched.number + 1,
        "losses": [str(loss) for loss in losses],
        "gradient_norm": str(float(launched.norm)),
        "scale": scale,
        "seed": run.recipe.seed,
        "rank": run.together.rank,
        "processes": run.together.processes,
        "images": [name for batch in launched.batches for name in batch.names],
    }
    culprit = not somewhere or not all(map(math.isfinite, losses))
    dumps = _dump(run, record, launched, culprit=culprit)
    _on_main_record(run, {**record, "images": len(record["images"]), "dumps": dumps})
    message = f"the loss or gradient of update {record['step']} is not finite"
    run.progress.note(f"{message}; nothing was changed by it; see {', '.join(dumps) or run.folder.skipped}")
    if position.skipped >= run.recipe.guards.nonfinite:
        measured.settle()
        _save(run)
        raise TrainingFailedError(
            f"{message}, nor were the {position.skipped - 1} before it; a smaller --optimizer.lr, a longer"
            " --optimizer.warmup_epochs or --precision fp32 may help. To compute it again:"
            f" python -m vmamba.training.replay {shlex.quote(dumps[0] if dumps else str(run.folder.skipped))}"
        )


def _dump(run: Run, record: dict[str, Any], launched: Launched, *, culprit: bool) -> list[str]:
    name = f"update-{launched.number:010d}-process-{run.together.rank}"
    weights = model_state(run.model, everywhere=True)

    def write() -> str:
        path = dump_update(run.folder.skipped, name, record, launched.batches, weights) if culprit else None
        return str(path or "")

    return [path for path in run.together.collected([run.together.everywhere(write)]) if path]


def _log_step(run: Run, norm: float) -> None:
    position = run.position
    device = run.together.device
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    figures = {name: position.mean(name) for name in position.sums}
    seconds = max(position.seconds, 1e-9)
    speed = {"images_per_second": position.seen / seconds, "data_wait": position.waited / seconds}
    run.progress.show(position.epoch, position.step, figures, speed, memory)
    record = {"kind": "step", "epoch": position.epoch + 1, "step": position.updates, **figures, "lr": lr}
    record |= {"gradient_norm": norm, "images": position.seen, "seconds": position.seconds, **speed}
    _on_main_record(run, record | ({"gib": memory} if memory else {}))
    logged = {**figures, "lr": lr, "gradient_norm": norm, **speed}
    run.accelerator.log({f"train/{name}": value for name, value in logged.items()}, step=position.updates)


def _evaluate(run: Run) -> Report:
    model = _evaluated_model(run)
    # accelerate has put autocast around the trained model, but not around the moving average.
    with run.accelerator.autocast():
        report = run.task.evaluate(model, _until_stopped(run))
    run.guard.agree(run.together.totals([], run.guard.flags()))
    _note_damaged(run, list(run.unreported))
    run.unreported.clear()
    return report


def _until_stopped(run: Run) -> Iterator[Any]:
    for number, batch in enumerate(run.held_out):
        run.watch.beat("evaluating")
        # The first batch is always counted, so that there is something to report on.
        if run.guard.noted and number:
            return
        run.unreported.extend(batch.damaged)
        yield batch.to(run.together.device)


def _evaluated_model(run: Run) -> nn.Module:
    """Return the weights that count, in a module that needs no other process: shares differ in length."""
    if run.spare is not None:
        run.spare.load_state_dict(model_state(run.model, everywhere=True))
        return run.spare
    return run.ema.module if run.ema else run.bare_model


def _finish_epoch(run: Run, report: Report) -> None:
    """Record the figures of an epoch, and keep its weights and state."""
    position, merit = run.position, run.task.merit
    figures = report.figures()
    record = {
        "kind": "epoch",
        "epoch": position.epoch + 1,
        "step": position.updates,
        **{f"train_{name}": position.mean(name) for name in position.sums},
        **figures,
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        "images_per_second": position.seen / max(position.seconds, 1e-9),
    }
    _on_main_record(run, record)
    run.accelerator.log({f"held_out/{name}": value for name, value in figures.items()}, step=position.updates)
    is_best = figures[merit] > position.best
    position.best = max(figures[merit], position.best)
    position.next_epoch()
    _save(run, {merit: figures[merit]}, [run.folder.last, *([run.folder.best] if is_best else [])])
    run.progress.epoch_done(record, run.task.epoch_line(record))


def _save(run: Run, figures: dict[str, float] | None = None, weights_files: Iterable[Path] = ()) -> None:
    """Write a checkpoint, and the weights that count to other files too."""
    run.watch.beat("saving")
    weights = {"model": model_state(run.model)}
    if run.ema:
        weights["ema"] = run.ema.module.state_dict()
    scaler = run.accelerator.scaler
    parts = {
        "optimizer": optimizer_state(run.model, run.optimizer),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "task": run.task.identity(),
        "layout": run.loader.layout,
        "seed": run.recipe.seed,
    }
    metadata = {"epoch": run.position.epoch, **(figures or {})}

    def writer(name: str) -> Callable[[Path], None]:
        return lambda path: run.task.save_weights(weights[name], path, metadata)

    def write() -> None:
        run.checkpoints.write(run.position, {name: writer(name) for name in weights}, parts)
        for path in weights_files:
            writer("ema" if run.ema else "model")(path)
        every = run.recipe.checkpoints.keep_epochs
        run.checkpoints.prune(
            run.recipe.checkpoints.keep, lambda p: bool(every) and p.step == 0 and p.epoch % every == 0
        )

    run.together.on_main(write)


def _stop_if_asked(run: Run) -> None:
    """Save and leave when a signal came; a run that is complete but for its evaluation goes on with that."""
    if not run.guard.stop:
        return
    _save(run)
    queued = ""
    if run.recipe.guards.requeue and run.guard.agreed == getattr(signal, "SIGUSR1", None):
        queued = f"; {run.together.on_main(requeue_slurm_job)}"
    finish(run.accelerator)
    where = f"epoch {run.position.epoch + 1} of {run.recipe.epochs}, update {run.position.step} of {run.loader.steps}"
    raise TrainingInterruptedError(
        f"stopped and saved in {where}; go on with: vmamba train --resume {shlex.quote(str(run.folder.path))}{queued}",
        run.guard.exit_status,
    )


def _note_damaged(run: Run, here: list[str]) -> None:
    """Name images that cannot be read, and end a run that has too many of them; all processes must call it."""
    for problem in run.together.collected(here):
        if problem not in run.damaged:
            run.damaged[problem] = None
            if run.together.is_main:
                run.folder.append_damaged(problem)
    position, allowed = run.position, run.recipe.guards.damaged
    enough = min(_ENOUGH_TO_JUDGE, run.loader.steps * run.recipe.batch_size)
    if position.read >= enough and position.damaged > allowed * position.read:
        raise TrainingFailedError(
            f"{position.damaged} of the {position.read} training images read so far are damaged, more than the"
            f" {allowed:.0%} of --guards.damaged; the first: {next(iter(run.damaged))}; all are in {run.folder.damaged}"
        )


def _on_main_record(run: Run, record: dict[str, Any]) -> None:
    if run.together.is_main:
        run.folder.append_metrics(record)
