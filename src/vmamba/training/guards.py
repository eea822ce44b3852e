"""What keeps a run from harm: interruptions that wait for a safe moment, failed updates, stalls, lack of memory."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from vmamba.models.checkpoint_files import replacing

# In the order in which they win when several have come; Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
STALLED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
_MOST_DUMPS = 8


class TrainingFailedError(RuntimeError):
    """The run cannot go on; the message says why and what may help."""


class InterruptGuard:
    """Turn the first SIGINT, SIGTERM or SIGUSR1 into a flag that the loop reads; a second one ends the process at once.

    A signal may come to one process of several, and to each at another moment: `noted` is what came here, and only what
    was `agreed` on may decide anything in which the others take part. Use as a context manager; outside the main
    thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.agreed: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def stop(self) -> bool:
        """Whether all processes know that one of them was asked to stop."""
        return self.agreed is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention: 128 plus the number of the signal."""
        return 128 + (self.agreed or 0)

    def flags(self) -> list[float]:
        """Return one number for each of SIGNALS: 1 for the one that came to this process."""
        return [float(self.noted == number) for number in SIGNALS]

    def agree(self, counts: list[float]) -> None:
        """Take over what came to any process: the sums of their flags."""
        for number, count in zip(SIGNALS, counts, strict=True):
            if count:
                self.agreed = number
                return

    def __enter__(self) -> InterruptGuard:
        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            self._previous.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class StallWatch:
    """A thread that ends the process, with the stack of every thread on stderr, when nothing has moved for long.

    It is the last resort against collectives that wait for a process that is gone, and file systems that hang: exit
    status 75, so that whoever started the run can start it again with --resume.

    Args:
        seconds: Patience; 0 turns the watch off.
        rank: Number of this process, for the message.
    """

    def __init__(self, seconds: float, rank: int):
        self._seconds, self._rank = seconds, rank
        self._last, self._doing = time.monotonic(), "starting"
        self._ended = threading.Event()

    def beat(self, doing: str) -> None:
        """Note that the process is alive, and what it is about to do."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> StallWatch:
        if self._seconds:
            self.beat("starting")
            threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 10.0)):
            waited = time.monotonic() - self._last
            if waited > self._seconds:
                print(
                    f"vmamba train: process {self._rank} has been {self._doing} for {waited:.0f} s without progress"
                    " (--guards.stall); ending it. Where its threads are:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(STALLED_STATUS)


def dump_update(
    folder: Path, name: str, record: dict[str, Any], batches: list[Any], weights: dict[str, torch.Tensor]
) -> Path | None:
    """Write what is needed to compute an update again: safetensors with weights and batches, the rest in its header.

    Args:
        folder: Where to; made where it does not exist. It takes no more than 8 dumps.
        name: Name of the file.
        record: JSON-able facts.
        batches: Dataclasses whose fields are tensors or JSON-able.
        weights: Weights before the update.

    Returns:
        The file; None when there are enough already.
    """
    import json

    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.safetensors"))) >= _MOST_DUMPS:
        return None
    tensors = {f"weights/{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    plain: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        items = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
        tensors |= {f"batch/{index}/{k}": v.cpu().contiguous() for k, v in items.items() if torch.is_tensor(v)}
        plain.append({key: value for key, value in items.items() if not torch.is_tensor(value)})
    header = {"record": json.dumps(record), "batches": json.dumps(plain)}
    path = folder / f"{name}.safetensors"
    with replacing(path) as temporary:
        save_file(tensors, temporary, header)
    return path


def smaller_batch(images: int, fits: Callable[[int], bool]) -> int:
    """Return the largest of images/2, images/4, … that fits; 0 when not even one image does."""
    tried = images // 2
    while tried:
        if fits(tried):
            return tried
        tried //= 2
    return 0


def requeue_slurm_job() -> str:
    """Ask SLURM to queue this job again; return what became of that."""
    job, program = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if not job or not program:
        return "not queued again: this is no SLURM job, or there is no scontrol"
    done = subprocess.run([program, "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"SLURM did not queue job {job} again: {done.stderr.strip()}"
    return f"SLURM queues job {job} again"
