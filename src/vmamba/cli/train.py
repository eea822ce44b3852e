"""`vmamba train`: from images to weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vmamba.cli.arguments import parse
from vmamba.training.recipe import Recipe
from vmamba.training.run_folder import RunFolder


def run(argv: Sequence[str]) -> int:
    """Train as the flags say; return the exit status."""
    recipe = parse("train", Recipe, with_resumed_recipe(argv))
    from rich.console import Console

    from vmamba.training.engine import TrainingInterruptedError, train
    from vmamba.training.processes import is_speaker, leave

    console = Console()
    try:
        result = train(recipe, console)
    except TrainingInterruptedError as interrupted:
        if is_speaker():
            print(f"vmamba train: {interrupted}", file=sys.stderr)
        return interrupted.exit_status
    leave()
    if not result.is_main:
        return 0
    report, folder = result.report, result.folder
    lines = [
        f"{report.top1:.2%} of {report.count:,} held-out images right (best epoch {result.best:.2%}),"
        f" in {result.seconds / 60:.1f} minutes",
        f"weights  {folder.best} (best), {folder.last} (last)",
        f"curves   {folder.curves}",
    ]
    if result.damaged:
        lines.append(f"damaged  {len(result.damaged)} images were skipped, named in {folder.damaged}")
    lines.append(f"next     vmamba eval --checkpoint {folder.best}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0


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
