"""What `--task` names: for each kind of task its recipe, and what trains, measures and predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import yaml


@dataclass(frozen=True)
class TaskCommands:
    """Where the parts of a task are, as `module:name`; each is imported when it is needed, so that help is quick.

    Attributes:
        recipe: A dataclass derived from RunOptions whose `task` is the task's name by default.
        make_task: A Task, which the engine builds from the recipe.
        headline: `(report, best) -> str`: the figures of a finished run in a sentence; `best` is that of any epoch.
        evaluate: `(argv) -> int`: `vmamba eval` for this task, from the words after `eval` to the exit status.
        predict: The same for `vmamba predict`.
    """

    recipe: str
    make_task: str
    headline: str
    evaluate: str
    predict: str


TASKS = {
    "classification": TaskCommands(
        recipe="vmamba.training.recipe:Recipe",
        make_task="vmamba.training.classification:ClassificationTask",
        headline="vmamba.cli.train:classification_headline",
        evaluate="vmamba.cli.eval:evaluate_classifier",
        predict="vmamba.cli.predict:predict_classes",
    ),
    "segmentation": TaskCommands(
        recipe="vmamba.training.segmentation_recipe:SegmentationRecipe",
        make_task="vmamba.training.segmentation:SegmentationTask",
        headline="vmamba.cli.segmentation:headline",
        evaluate="vmamba.cli.segmentation:evaluate_segmenter",
        predict="vmamba.cli.segmentation:predict_masks",
    ),
    "detection": TaskCommands(
        recipe="vmamba.training.detection_recipe:DetectionRecipe",
        make_task="vmamba.training.detection:DetectionTask",
        headline="vmamba.cli.detection:headline",
        evaluate="vmamba.cli.detection:evaluate",
        predict="vmamba.cli.detection:predict",
    ),
}


def part(task: str, name: str) -> Any:
    """Import a part of a task; `name` is an attribute of TaskCommands."""
    module, _, attribute = getattr(TASKS[task], name).partition(":")
    return getattr(import_module(module), attribute)


def task_of(argv: Sequence[str]) -> str:
    """Return the task a command line is about: its `--task`, else the key `task` of the last `--config` that has one.

    Raises:
        ValueError: There is no such task.
    """
    asked = configured = ""
    for position, word in enumerate(argv):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        value = value if equals else "".join(argv[position + 1 : position + 2])
        if name == "--task":
            asked = value
        elif name == "--config":
            configured = _task_in(value) or configured
    task = asked or configured or "classification"
    if task not in TASKS:
        close = get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}"
        raise ValueError(f"--task: there is no task {task}; {hint}")
    return task


def _task_in(path: str) -> str:
    """Return the task a YAML file names; what is wrong with the file is for the parser to tell."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return ""
    return str(content.get("task") or "") if isinstance(content, dict) else ""
