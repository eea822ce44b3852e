"""A run while it runs: what it is built of, how it is resumed, and what it measures."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from vmamba.data.reading import Share
from vmamba.training.agreement import Agreement, Totals
from vmamba.training.averaging import GradientAverage
from vmamba.training.checkpointing import CheckpointFolder, Position, read_checkpoint_folder, seed_update
from vmamba.training.guards import InterruptGuard, StallWatch, TrainingFailedError, smaller_batch
from vmamba.training.optim import make_ema, make_optimizer
from vmamba.training.processes import check_run, load_state, make_accelerator
from vmamba.training.progress import LiveProgress
from vmamba.training.recipe import RunOptions
from vmamba.training.run_folder import RunFolder, new_run_folder, resumed_folder
from vmamba.training.task import Step, Task, TaskLoader


class Launched(NamedTuple):
    """An update that the device has been given, and whose outcome is still to be read.

    Attributes:
        number: Updates before it.
        batches: What it was made from, in parts.
        steps: What each of them gave, without gradient.
        losses: Loss of each.
        norm: Norm of the gradient.
        totals: Of all processes: bad losses, bad gradients, images that count, damaged ones, signals.
    """

    number: int
    batches: list[Any]
    steps: list[Step]
    losses: Tensor
    norm: Tensor
    totals: Totals


@dataclass
class Run:
    """Everything the loop works with."""

    recipe: RunOptions
    task: Task
    accelerator: Accelerator
    together: Agreement
    folder: RunFolder
    model: nn.Module
    optimizer: Any
    schedule: Any
    ema: Any
    loader: TaskLoader
    held_out: Iterable[Any]
    position: Position
    progress: LiveProgress
    guard: InterruptGuard
    watch: StallWatch
    damaged: dict[str, None] = field(default_factory=dict)
    unreported: list[str] = field(default_factory=list)
    spare: nn.Module | None = None  # to evaluate with, where the trained model is divided among processes
    average: GradientAverage | None = None  # of the gradients, where accelerate does not do it
    launched: Launched | None = None  # what the loop has still to look at
    settled: int = 0  # updates this process has completed, after which memory no longer grows

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Where the run saves itself."""
        return CheckpointFolder(self.folder.checkpoints)

    @property
    def bare_model(self) -> nn.Module:
        """The model without what accelerate and torch.compile have put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @cached_property
    def skips_itself(self) -> bool:
        """Whether the optimiser's kernel leaves everything as it is where its `found_inf`, on the device, is 1."""
        fused = bool(self.optimizer.optimizer.defaults.get("fused"))
        return fused and self.accelerator.scaler is None and self.recipe.parallel != "fsdp"

    @cached_property
    def reads_later(self) -> bool:
        """Whether the outcome of an update is read while the device computes the next, which thus never waits.

        The moving average is then of weights after that update and of buffers after the next forward pass: there must
        be no buffers.
        """
        return self.skips_itself and next(self.bare_model.buffers(), None) is None


class Measured:
    """Time and sums of one epoch: kept on the device, in each process, until they are looked at."""

    def __init__(self, run: Run):
        self._run = run
        self._sums: dict[str, Tensor] = {}
        self._seen = 0
        self._last = time.perf_counter()
        self._waits: list[tuple[Any, Any]] = []
        self.norm = 0.0
        self._norm: Tensor | None = None

    def waiting_for(self, stream: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """Pass batches on, and take the time until they come; on a GPU, only of that in which it has nothing to do."""
        while True:
            self._run.watch.beat("waiting for images")
            before = self._moment()
            batches = next(stream, None)
            if batches is None:
                return
            self._waits.append((before, self._moment()))
            yield batches

    def _moment(self) -> float | torch.cuda.Event:
        """Return now, or when a GPU will be done with what it has been given."""
        if self._run.together.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, batches: list[Any], steps: list[Step], norm: Tensor) -> None:
        """Take in what an update gave, without waiting for the device."""
        for batch, (loss, sums) in zip(batches, steps, strict=True):
            for name, value in {"loss": loss.double() * len(batch), **sums}.items():
                self._sums[name] = self._sums.get(name, 0) + value
            self._seen += len(batch)
        self._norm = norm

    def settle(self) -> None:
        """Add what was measured in all processes to the position; waits for the device."""
        names = self._run.together.collected(sorted(self._sums))
        names = sorted(set(names))
        zero = torch.zeros((), device=self._run.together.device)
        totals = self._run.together.totals([self._sums.get(name, zero) for name in names], [float(self._seen)])
        now, position = time.perf_counter(), self._run.position
        for name, total in zip(names, totals, strict=False):
            position.sums[name] = position.sums.get(name, 0.0) + total
        position.seen += int(totals[-1])
        position.seconds += now - self._last
        position.waited += sum(_seconds(*wait) for wait in self._waits)
        if self._norm is not None:
            self.norm = float(self._norm)
        self._sums, self._seen, self._waits, self._last = {}, 0, [], now


def _seconds(before: Any, after: Any) -> float:
    if not isinstance(before, torch.cuda.Event):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def prepare(
    recipe: RunOptions,
    console: Console,
    guard: InterruptGuard,
    run_name: str | None,
    make_task: Callable[[Any], Task],
) -> Run:
    """Check the whole recipe and build what it asks for; the run folder comes last, when nothing can go wrong."""
    accelerator = make_accelerator(recipe, check_run(recipe), ("VSSBlock",))
    together = Agreement(accelerator)
    device, pin = accelerator.device, accelerator.device.type == "cuda"
    share = Share(together.rank, together.processes)
    earlier = together.on_main(lambda: resumed_folder(recipe))

    def build() -> tuple[Task, TaskLoader, Iterable[Any]]:
        seed_update(recipe.seed, 0, 0)
        task = make_task(recipe)
        task.model.to(device)
        task.try_out(device)
        return task, task.training_loader(share, pin), task.evaluation_batches(share, pin)

    # The main process first: it may download what the others then find.
    task, loader, held_out = together.everywhere(build, main_first=True)
    path = together.on_main(lambda: (earlier or new_run_folder(recipe.output, run_name or task.name)).path)
    folder = RunFolder(path)
    optimizer = make_optimizer(task.parameter_groups(recipe), recipe.optimizer, recipe.batch_size, fused=pin)
    schedule = task.schedule(optimizer, recipe, loader.steps)
    # Before accelerate wraps the model: a copy of the wrapper would still call the original.
    ema = make_ema(task.model, recipe.optimizer)
    spare = copy.deepcopy(task.model) if recipe.parallel == "fsdp" else None
    average = None
    if together.processes > 1 and recipe.compile_mode != "default":  # CUDA graphs
        average = GradientAverage(task.model)
        # Not to evaluate: this is how accelerate is told to leave out DistributedDataParallel.
        model, optimizer = accelerator.prepare_model(task.model, evaluation_mode=True), accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(task.model, optimizer)
    run = Run(
        recipe=recipe,
        task=task,
        accelerator=accelerator,
        together=together,
        folder=folder,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        loader=loader,
        held_out=held_out,
        position=Position(),
        progress=LiveProgress(console if together.is_main else Console(quiet=True), recipe.epochs, loader.steps),
        guard=guard,
        watch=StallWatch(recipe.guards.stall, together.rank),
        spare=spare,
        average=average,
    )
    if earlier:
        _restore(run)
    # Without its own place, so that the file serves as a recipe for other runs, and a run may be moved.
    together.on_main(lambda: folder.write_config({**recipe.to_dict(), "output": None, "resume": None}))
    accelerator.project_configuration.logging_dir = str(folder.path)
    accelerator.init_trackers("tensorboard")
    _introduce(run)
    return run


def _restore(run: Run) -> None:
    if run.recipe.resume == "auto" and not run.together.on_main(run.checkpoints.paths):
        # Killed in its first epoch: what starts jobs again by itself must not need a person for that.
        run.progress.note(f"{run.folder.path} holds no checkpoint yet; its run starts from the beginning")
        run.together.on_main(lambda: run.folder.forget_metrics_after(0))
        return
    path = run.together.on_main(lambda: run.checkpoints.read_newest(run.progress.note).path)
    checkpoint = run.together.everywhere(lambda: read_checkpoint_folder(path))
    position, parts = checkpoint.position, checkpoint.parts
    if parts["task"] != run.task.identity():
        raise ValueError(f"the data has other images than when {run.folder.path} was interrupted; start anew")
    if position.step and parts["layout"] != run.loader.layout:
        raise ValueError(
            f"{run.folder.path} was interrupted in the middle of an epoch of a stream read by {parts['layout']};"
            f" here are {run.loader.layout}; go on with the same numbers"
        )
    weights = checkpoint.weights("model")
    here = {name: tuple(value.shape) for name, value in run.bare_model.state_dict().items()}
    if differing := here.items() ^ {(name, tuple(value.shape)) for name, value in weights.items()}:
        raise ValueError(f"{path} is of another model than the recipe's: {min(differing)[0]} differs; start anew")
    load_state(run.model, run.optimizer, weights, parts["optimizer"])
    if run.ema:
        run.ema.module.load_state_dict(checkpoint.weights("ema"))
    if run.accelerator.scaler is not None and parts["scaler"]:
        run.accelerator.scaler.load_state_dict(parts["scaler"])
    run.position = position
    run.damaged = dict.fromkeys(run.folder.read_damaged())
    run.together.on_main(lambda: run.folder.forget_metrics_after(position.updates))


def _introduce(run: Run) -> None:
    recipe, processes = run.recipe, run.together.processes
    shared = f", {processes} processes ({recipe.parallel})" if processes > 1 else ""
    compiled = f", compiled ({recipe.compile_mode})" if recipe.compile else ""
    lines = [
        *run.task.introduction(),
        ("device", f"{run.together.device}, {recipe.precision}{compiled}{shared}"),
        ("folder", str(run.folder.path)),
    ]
    for word, sentence in lines:
        run.progress.note(f"{word:<7} {sentence}")
    if run.position.epoch >= recipe.epochs:
        run.progress.note(f"all {recipe.epochs} epochs were made already; a larger --epochs goes on")
    elif run.position.updates:
        run.progress.note(f"going on in epoch {run.position.epoch + 1} after {run.position.updates} updates")


@contextlib.contextmanager
def memory_advice(run: Run, batches: list[Any]) -> Iterator[None]:
    """Turn lack of memory in the first updates into advice that has been tried."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if run.settled > 1:  # memory was enough before: this is no matter of the batch size alone
            raise
        reason = str(error).partition("\n")[0]
        error.__traceback__ = None  # its frames hold the tensors that fill the memory
    else:
        return
    images = len(batches[0])

    def fits(number: int) -> bool:
        run.optimizer.zero_grad()
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError), run.accelerator.no_sync(run.model):
            part = batches[0].first(number).to(run.together.device)
            run.accelerator.backward(run.task.step(run.bare_model, part).loss)
            return True
        return False

    number = smaller_batch(images, fits)
    factor = run.recipe.accumulate * -(-images // number) if number else 0
    advice = (
        f"{number} at once do: --accumulate {factor} keeps the batch of {run.recipe.batch_size} and computes it so"
        if number
        else "not even one fits; use a smaller model or --img_size, --precision bf16, or --gradient_checkpointing true"
    )
    raise TrainingFailedError(f"{images} images at once are too many for the memory ({reason}); {advice}")
