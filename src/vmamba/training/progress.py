"""What a person sees of a run: a live bar in a terminal, a line an epoch everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class LiveProgress:
    """One bar for the whole run, with loss, figures, images per second, share of waiting, memory and the time left."""

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

    def show(
        self, epoch: int, step: int, figures: Mapping[str, float], speed: Mapping[str, float], memory: float | None
    ) -> None:
        """Bring the bar up to date.

        Args:
            epoch: Complete epochs.
            step: Updates in the current one.
            figures: Means over the epoch so far: the loss, and shares of the images.
            speed: `images_per_second`, and `data_wait`, the share of the time spent waiting for images.
            memory: GiB of the GPU used at most; None without one.
        """
        shares = [f"{name} {value:6.1%}" for name, value in figures.items() if name != "loss"]
        parts = [
            f"loss {figures.get('loss', float('nan')):.3f}",
            *shares,
            f"{speed['images_per_second']:,.0f} img/s",
            f"wait {speed['data_wait']:.0%}",
            *([f"{memory:.1f} GiB"] if memory else []),
        ]
        self._bar.update(
            self._task,
            description=f"epoch {epoch + 1}/{self.epochs}",
            completed=epoch * self.steps + step,
            figures="  ".join(parts),
        )

    def note(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def epoch_done(self, record: Mapping[str, Any], line: str) -> None:
        """Print the figures of an epoch, which the task has put into a line."""
        number = f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        self.note(f"{number} | {line} | {record['images_per_second']:,.0f} img/s")
