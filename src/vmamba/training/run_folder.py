"""The folder of a run: where it lies, and the configuration, metrics and pictures in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vmamba.training.recipe import CHANGEABLE_ON_RESUME, RunOptions

RUNS = Path("runs")


class RunFolder:
    """Names of the files of a run, and the writing of those that are text.

    config.yaml (the whole recipe, which `--config` reads), metrics.jsonl (a line a reading), last.safetensors and
    best.safetensors (weights), checkpoints (what `--resume` needs), curves.png, damaged.txt (images that could not be
    read, if any), skipped (what is needed to compute updates again that were skipped, if any), and the trackers'
    folders.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.safetensors"
        self.best = path / "best.safetensors"
        self.checkpoints = path / "checkpoints"
        self.skipped = path / "skipped"
        self.curves = path / "curves.png"
        self.damaged = path / "damaged.txt"

    def write_config(self, recipe: dict[str, Any]) -> None:
        """Write the recipe as YAML; whole or not at all, for without it the run cannot be resumed."""
        from vmamba.models.checkpoint_files import replacing  # here, so that `vmamba train --help` stays quick

        with replacing(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def read_config(self) -> dict[str, Any]:
        """Read the recipe of an earlier run.

        Raises:
            FileNotFoundError: This is not the folder of a run.
            ValueError: Its recipe has been damaged.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is not the folder of a run: it holds no {self.config.name}")
        try:
            recipe = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            recipe = None
        if not isinstance(recipe, dict):
            raise ValueError(f"{self.config} is damaged: it holds no recipe; write the run's again to go on with it")
        return recipe

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the metrics in their order; a line cut short by a crash is passed over."""
        if not self.metrics.is_file():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def forget_metrics_after(self, step: int) -> None:
        """Drop what was measured after the update a run is resumed from: it will be measured again."""
        from vmamba.models.checkpoint_files import replacing  # here, so that `vmamba train --help` stays quick

        kept = [record for record in self.read_metrics() if record["step"] <= step]
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def append_damaged(self, problem: str) -> None:
        """Name an image that cannot be read."""
        with self.damaged.open("a", encoding="utf-8") as stream:
            stream.write(problem + "\n")

    def read_damaged(self) -> list[str]:
        """Return the images that could not be read so far."""
        return self.damaged.read_text(encoding="utf-8").splitlines() if self.damaged.is_file() else []


def resumed_folder(recipe: RunOptions) -> RunFolder | None:
    """Find the run to go on with; None for a new one.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: The recipe asks for something else than the run was started with.
    """
    if not recipe.resume:
        return None
    place = recipe.resume
    if place == "auto":
        if not recipe.output:
            raise ValueError("--resume auto goes on with the run in --output, if there is one; name that folder")
        place = recipe.output
        if not RunFolder(Path(place).expanduser()).config.is_file():
            return None
    folder = RunFolder(Path(place).expanduser())
    before, now = folder.read_config(), recipe.to_dict()
    for name, value in now.items():
        if name not in CHANGEABLE_ON_RESUME and name in before and before[name] != value:
            field, old, new = _difference(name, before[name], value)
            asked = f"it was {old}, {new} was asked for"
            raise ValueError(f"a resumed run keeps its {field}: {asked}; start a new run for that")
    if recipe.output and Path(recipe.output).expanduser().resolve() != folder.path.resolve():
        raise ValueError(f"--output {recipe.output} and --resume {recipe.resume} differ; a run stays in its folder")
    return folder


def new_run_folder(output: str | None, name: str, root: Path = RUNS) -> RunFolder:
    """Create the folder of a new run.

    Args:
        output: The folder asked for, or None for the next free number below `root`.
        name: What numbered folders are called.
        root: Where numbered folders lie.

    Raises:
        ValueError: The folder asked for holds something, or is a file.
    """
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {output} is a file; name a folder")
        if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise ValueError(f"--output {output} is not empty; name another folder, or go on with --resume {output}")
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path)
    root.mkdir(parents=True, exist_ok=True)
    taken = [
        int(match[1]) for entry in root.iterdir() if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        path = root / f"{name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another run took the number in this moment
            number += 1
        else:
            return RunFolder(path)


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the dotted name of the first option that differs, what it was and what it is to be."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now


def newest_checkpoint(root: Path = RUNS) -> Path:
    """Return the best weights of the run that was written to last.

    Raises:
        FileNotFoundError: There is no run with weights.
    """
    found = [path for pattern in ("best.safetensors", "last.safetensors") for path in root.glob(f"*/{pattern}")]
    if not found:
        raise FileNotFoundError(f"no weights in {root}/: train a model with `vmamba train`, or name a file")
    newest = max(found, key=lambda path: path.stat().st_mtime).parent
    return newest / ("best.safetensors" if (newest / "best.safetensors").is_file() else "last.safetensors")
