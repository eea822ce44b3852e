"""What keeps a run from harm: interruptions that wait for a safe moment, and losses that are no numbers."""

from __future__ import annotations

import math
import signal
from types import FrameType, TracebackType
from typing import Any


class TrainingFailedError(RuntimeError):
    """The run cannot go on; the message says why and what may help."""


class InterruptGuard:
    """Turn the first SIGINT or SIGTERM into a flag that the loop reads; a second one ends the process at once.

    Use as a context manager; outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def stop(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention: 128 plus the number of the signal."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> InterruptGuard:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            self._previous.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def require_finite_loss(loss: float, epoch: int, step: int) -> None:
    """Stop a run whose loss is no longer a number.

    Raises:
        TrainingFailedError: `loss` is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise TrainingFailedError(
            f"the loss became {loss} by step {step} of epoch {epoch}; "
            "a smaller --optimizer.lr, a longer --optimizer.warmup_epochs or --precision fp32 may help"
        )
