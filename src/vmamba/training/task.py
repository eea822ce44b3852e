"""The seam between the engine and what is trained: a task brings model, data, loss and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn, optim

from vmamba.data.reading import Share
from vmamba.training.optim import make_schedule, parameter_groups
from vmamba.training.recipe import RunOptions


class TaskBatch(Protocol):
    """What loaders yield: a dataclass, whose tensors and plain values the guards write down when an update fails.

    Attributes:
        names: What the images are called, for the dump of a failed update.
        damaged: One line for each image that could not be read.
    """

    names: list[str]
    damaged: list[str]

    def __len__(self) -> int:
        """Return the number of images that count; 0 gives the batch no say in the update."""

    def to(self, device: torch.device) -> TaskBatch:
        """Return the batch on a device."""

    def first(self, number: int) -> TaskBatch:
        """Return its first images, to find out how many fit into the memory."""


class TaskLoader(Protocol):
    """Training batches of one process.

    Attributes:
        steps: Updates in an epoch; the same in all processes.
        layout: What must not change for a run to go on in the middle of an epoch, such as the number of processes for
            a stream; empty for an order that is a function of seed and epoch.
    """

    steps: int
    layout: dict[str, int]

    def epoch(self, epoch: int, first: int) -> Iterator[list[Any]]:
        """Yield each update's batches (one for each part it is computed in), from update `first` of the epoch on."""


class Step(NamedTuple):
    """What a batch gives: the loss to descend, and sums over its images of what to show beside it.

    Attributes:
        loss: Mean over the images of the batch, with a gradient.
        sums: Scalars on the device, without gradient; for example the number of images recognised as "top1".
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Report(Protocol):
    """What an evaluation found."""

    def figures(self) -> dict[str, float]:
        """Return what goes into metrics.jsonl and to the trackers; `Task.merit` is one of the keys."""


class Task(ABC):
    """All that the engine does not know. A new task is a subclass; `engine.train(recipe, make_task=NewTask)` runs it.

    The engine owns the order of things, devices, processes, precision, accumulation, the optimiser and its schedule,
    the moving average, checkpoints, guards and records. A task is built in every process from the recipe alone, writes
    nothing then, and raises ValueError or FileNotFoundError for a recipe it cannot carry out. It draws random numbers
    from the global generators only: the engine seeds them before it is built, and before every update.

    Attributes:
        name: What numbered run folders are called.
        merit: Key of `Report.figures` whose largest value makes the best weights.
        batch_type: The dataclass that the loaders yield, made anew from its fields when an update is replayed.
        model: Built and filled with its first weights, on the CPU; the engine moves, wraps and trains it. Parameters
            without `requires_grad` stay as they are. Its `forward` must serve training and evaluation, for that is
            what is copied to other processes, compiled and run in mixed precision. A recipe whose `compiles_whole` is
            False leaves compiling to the task, which then compiles parts of the model in place.
    """

    name: str
    merit: ClassVar[str]
    batch_type: ClassVar[type]
    model: nn.Module

    @abstractmethod
    def __init__(self, recipe: Any) -> None:
        """Check the recipe, open the data and build the model."""

    @abstractmethod
    def training_loader(self, share: Share, pin_memory: bool) -> TaskLoader:
        """Return this process's part of the training batches, `recipe.accumulate` parts to an update."""

    @abstractmethod
    def evaluation_batches(self, share: Share, pin_memory: bool) -> Iterable[Any]:
        """Return this process's part of the held-out batches; no image may come twice, shares may differ in length."""

    @abstractmethod
    def step(self, model: nn.Module, batch: Any) -> Step:
        """Compute the loss of a batch that lies on the device, calling `model` once.

        The model is the wrapped one, which applies mixed precision to its own forward alone.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Report:
        """Measure the model on this process's share; the report is that of all processes and the same in each.

        Under torch.distributed, metrics of torchmetrics add up over the processes when they are computed; nothing else
        may communicate, for shares differ in length. The batches lie on the device already.
        """

    @abstractmethod
    def try_out(self, device: torch.device) -> None:
        """Run `self.model`, on the device by now, once: what cannot run there says so before a folder exists."""

    @abstractmethod
    def save_weights(self, weights: Mapping[str, Tensor], path: Path, figures: Mapping[str, Any]) -> None:
        """Write a weights file that stands for itself: with configuration, labels, normalisation and these figures."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values that must be the same for a run to be resumed, such as classes and numbers of images."""

    @abstractmethod
    def introduction(self) -> list[tuple[str, str]]:
        """Return what to tell at the start: pairs of a word and a sentence."""

    @abstractmethod
    def epoch_line(self, record: Mapping[str, Any]) -> str:
        """Put the record of an epoch (`train_` figures and the report's) into a line."""

    def prepare_training(self) -> None:
        """Put the model into training mode; the place to keep frozen parts in evaluation mode."""
        self.model.train()

    def parameter_groups(self, recipe: RunOptions) -> list[dict[str, Any]]:
        """Return the optimiser's groups: weight decay and layer decay as the recipe has them."""
        return parameter_groups(self.model, recipe.optimizer)

    def schedule(self, optimizer: optim.Optimizer, recipe: RunOptions, steps: int) -> Any:
        """Return a timm scheduler counted in updates, whose rate is a function of their number alone.

        Args:
            optimizer: Whose rate is set.
            recipe: Epochs, batch size and rates.
            steps: Updates in an epoch.
        """
        return make_schedule(optimizer, recipe.optimizer, recipe.epochs, steps, recipe.batch_size)
