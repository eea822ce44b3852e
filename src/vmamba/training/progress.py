"""What a person sees of a run: a live bar in a terminal, a line an epoch everywhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class LiveProgress:
    """One bar for the whole run, with loss, accuracy, images per second and the time left."""

    def __init__(self, console: Console, epochs: int, steps: int):
        self.console = console
        self.epochs = epochs
        self.steps = steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("epoch", total=epochs * steps, figures="")

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, epoch: int, step: int, loss: float, top1: float, rate: float) -> None:
        """Bring the bar up to date.

        Args:
            epoch: Complete epochs.
            step: Updates in the current one.
            loss: Mean loss of the epoch so far.
            top1: Share of training images recognised in the epoch so far.
            rate: Images per second.
        """
        self._bar.update(
            self._task,
            description=f"epoch {epoch + 1}/{self.epochs}",
            completed=epoch * self.steps + step,
            figures=f"loss {loss:.3f}  acc {top1:6.1%}  {rate:,.0f} img/s",
        )

    def epoch_done(self, record: dict[str, Any]) -> None:
        """Print the figures of an epoch."""
        self.console.print(
            f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
            f" | training: loss {record['train_loss']:.3f}, {record['train_top1']:.2%} right"
            f" | held out: loss {record['loss']:.3f}, {record['top1']:.2%} right"
            f" | {record['images_per_second']:,.0f} img/s",
            highlight=False,
            soft_wrap=True,
        )
