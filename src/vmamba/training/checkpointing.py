"""What a run writes to go on where it stopped: whole folders that appear at once, checked before they are believed.

A checkpoint is a folder `update-0000001234-00` (the second number tells two of the same update apart) with

- `model.safetensors` and, with a moving average, `ema.safetensors`: weights files, ready for `vmamba eval`;
- `state.safetensors`: every other tensor, of optimiser and scaler;
- `manifest.json`: the position, the rest of the state, and the SHA-256 of each file and of the manifest itself.

It is written under another name, flushed, then renamed, so a crash leaves no half of one; nothing in it is a pickle. Of
random generators no state is kept: every update seeds them all from the run's seed, its own number and the process's
rank (`seed_update`), and every image brings the seed of its augmentation, so that the position is all their state.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vmamba.models.checkpoint_files import CheckpointError, flush_folder

_FORMAT = 2
_NAME = re.compile(r"update-\d{10}-\d{2}")
_MANIFEST = "manifest.json"
_TENSOR = "__tensor__"


@dataclass
class Position:
    """How far a run has come, and what it has measured in the epoch it is in, in all processes together.

    Attributes:
        epoch: Complete epochs.
        step: Updates made in the current epoch, skipped ones included.
        updates: Updates made in the whole run, skipped ones included.
        sums: Sums of the loss and of the task's figures over the images seen in this epoch.
        seen: Images seen in this epoch.
        seconds: Time spent training in this epoch.
        waited: Time of it spent waiting for images.
        read: Images read in the whole run.
        damaged: Images of these that could not be read.
        skipped: Updates skipped in a row because loss or gradient were not finite.
        best: Best held-out figure so far; -1 before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seen: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    read: int = 0
    damaged: int = 0
    skipped: int = 0
    best: float = -1.0

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch += 1
        self.step, self.sums, self.seen, self.seconds, self.waited = 0, {}, 0, 0.0, 0.0

    def mean(self, name: str) -> float:
        """Return the mean of a figure over the images seen in this epoch."""
        return self.sums.get(name, 0.0) / max(self.seen, 1)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been checked.

    Attributes:
        path: Its folder.
        position: How far the run had come.
        parts: State dicts by name, as they were given to `write`; tensors on the CPU.
    """

    path: Path
    position: Position
    parts: dict[str, Any]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of `model` or `ema`."""
        return load_file(self.path / f"{name}.safetensors")


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, position: Position, weights: Mapping[str, Callable[[Path], None]], parts: dict[str, Any]) -> Path:
        """Write a checkpoint, or leave nothing when that fails.

        Args:
            position: How far the run has come.
            weights: Writers of weights files by name (without extension).
            parts: Nested dicts, lists, numbers, texts and tensors by name.

        Raises:
            CheckpointError: The disk is full, the folder may not be written to, …; older checkpoints are as they were.
        """
        target = self._new_name(position.updates)
        temporary = self.path / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            self.path.mkdir(exist_ok=True)
            temporary.mkdir()
            for name, writer in weights.items():
                writer(temporary / f"{name}.safetensors")
            tensors: dict[str, torch.Tensor] = {}
            structure = _without_tensors(parts, "", tensors)
            save_file(tensors, temporary / "state.safetensors")
            sums = {path.name: _sum_of(path) for path in sorted(temporary.iterdir())}
            body = {"format": _FORMAT, "position": asdict(position), "parts": structure, "files": sums}
            text = json.dumps(body)
            manifest = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
            (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            for path in temporary.iterdir():
                with path.open("rb+") as stream:
                    os.fsync(stream.fileno())
            flush_folder(temporary)
            os.rename(temporary, target)
            flush_folder(self.path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError, CheckpointError)):
                reason = str(error).partition("\n")[0]
                raise CheckpointError(
                    f"could not write the checkpoint {target} ({reason}); older checkpoints are as they were"
                ) from None
            raise
        return target

    def read_newest(self, say: Callable[[str], None]) -> Checkpoint:
        """Read the newest checkpoint that is whole.

        Args:
            say: Told about damaged ones that are passed over.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: All are damaged.
        """
        paths = self.paths()
        if not paths:
            raise FileNotFoundError(
                f"there is no checkpoint in {self.path}: the run stopped before it had saved anything; start it again"
            )
        problem = ""
        for path in reversed(paths):
            try:
                checkpoint = read_checkpoint_folder(path)
            except CheckpointError as error:
                problem = str(error)
                say(f"{error}; trying an older checkpoint")
                continue
            return checkpoint
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {self.path} is whole; the oldest: {problem}")

    def paths(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())

    def prune(self, keep: int, for_good: Callable[[Position], bool]) -> None:
        """Remove all but the newest checkpoints and those to keep for good, and what a crash has left half-written."""
        for left in self.path.glob(".update-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        for path in self.paths()[:-keep]:
            try:
                kept = for_good(_read_manifest(path)[0])
            except CheckpointError:
                kept = False
            if not kept:
                self._remove(path)

    def _new_name(self, updates: int) -> Path:
        # Nothing is ever replaced: between removing the old and moving in the new there would be neither.
        stem = f"update-{updates:010d}"
        taken = [int(path.name.rpartition("-")[2]) for path in self.paths() if path.name.startswith(stem)]
        return self.path / f"{stem}-{max(taken, default=-1) + 1:02d}"

    def _remove(self, path: Path) -> None:
        # Renamed first: a crash while it is being removed leaves nothing that looks like a checkpoint.
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_checkpoint_folder(path: Path) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        CheckpointError: It is damaged, or not one that this version can go on from.
    """
    position, structure, sums = _read_manifest(path)
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if _sum_of(file) != expected:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written (its checksum differs)")
    try:
        tensors = load_file(path / "state.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return Checkpoint(path, position, _with_tensors(structure, tensors))


def seed_update(seed: int, updates: int, rank: int) -> None:
    """Seed the generators of python, numpy and torch, on every device, for one update of one process."""
    words = np.random.SeedSequence([seed, updates, rank]).generate_state(1)
    number = int(words[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _read_manifest(path: Path) -> tuple[Position, Any, dict[str, str]]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        text = manifest["body"]
        if hashlib.sha256(text.encode()).hexdigest() != manifest["sha256"]:
            raise ValueError("its checksum differs")
        body = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {_MANIFEST} cannot be read ({error})") from None
    known = {item.name for item in fields(Position)}
    if body.get("format") != _FORMAT or set(body["position"]) != known:
        raise CheckpointError(f"{path} was written by another version of vmamba, which this one cannot go on from")
    return Position(**body["position"]), body["parts"], body["files"]


def _sum_of(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace every tensor by its name, and put it into `tensors` under that; JSON keeps the rest exactly."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _without_tensors(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_without_tensors(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the state of a run cannot hold {name} of type {type(value).__name__}")


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == "dict":
        return {key: _with_tensors(item, tensors) for key, item in content}
    items: Iterator[Any] = (_with_tensors(item, tensors) for item in content)
    return list(items) if kind == "list" else tuple(items)
