"""`vmamba train`: from images to weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmamba.cli.arguments import parse
from vmamba.cli.ending import heed_interrupts
from vmamba.cli.tasks import part, task_of
from vmamba.training.run_folder import RunFolder

if TYPE_CHECKING:
    from vmamba.tasks.classification import ClassificationReport


def run(argv: Sequence[str]) -> int:
    """Train as the flags say; return the exit status."""
    words = with_resumed_recipe(argv)
    task = task_of(words)
    recipe = parse("train", part(task, "recipe"), words)
    from rich.console import Console

    from vmamba.training.engine import TrainingInterruptedError, train
    from vmamba.training.processes import is_speaker, leave

    heed_interrupts()
    console = Console()
    try:
        result = train(recipe, console, make_task=part(task, "make_task"))
    except TrainingInterruptedError as interrupted:
        if is_speaker():
            print(f"vmamba train: {interrupted}", file=sys.stderr)
        return interrupted.exit_status
    leave()
    if not result.is_main:
        return 0
    folder = result.folder
    lines = [
        f"{part(task, 'headline')(result.report, result.best)}, in {result.seconds / 60:.1f} minutes",
        f"weights  {folder.best} (best), {folder.last} (last)",
        f"curves   {folder.curves}",
    ]
    if result.damaged:
        lines.append(f"damaged  {len(result.damaged)} images were skipped, named in {folder.damaged}")
    option = "" if task == "classification" else f"--task {task} "
    lines.append(f"next     vmamba eval {option}--checkpoint {folder.best}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0


def classification_headline(report: ClassificationReport, best: float) -> str:
    """Say how many images were recognised."""
    return f"{report.top1:.2%} of {report.count:,} held-out images right (best epoch {best:.2%})"


def with_resumed_recipe(argv: Sequence[str]) -> list[str]:
    """Put the recipe of the run that `--resume` names before the flags, which may change some of it.

    `--resume auto` names the run in `--output`, if there is one.
    """
    place = _value_of("--resume", argv)
    automatic = place == "auto"
    if automatic:
        place = _value_of("--output", argv)
    if not place:
        return list(argv)
    folder = RunFolder(Path(place).expanduser())
    if automatic and not folder.config.is_file():
        return list(argv)
    folder.read_config()
    return ["--config", str(folder.config), *argv]


def _value_of(flag: str, argv: Sequence[str]) -> str:
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else "".join(argv[position + 1 : position + 2])
    return ""
