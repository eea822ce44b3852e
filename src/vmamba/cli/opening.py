"""What several commands need: a model from whatever names it, the device to put it on, files to write to."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmamba.cli.arguments import did_you_mean
from vmamba.data.transforms import Preprocessing
from vmamba.models.checkpoint import CheckpointError, load_model, read_checkpoint
from vmamba.models.checkpoint_files import read_file
from vmamba.models.config import list_models
from vmamba.models.registry import create_model
from vmamba.models.vmamba import VMamba
from vmamba.training.run_folder import RunFolder, newest_checkpoint

IMAGENET_CLASSES = 1000  # of the published weights, whose files do not say how images are prepared, and need not


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to classify.

    Attributes:
        model: In evaluation mode, on its device.
        name: Where its weights came from.
        labels: Names of its classes, or None when nobody stored them.
        preprocessing: What it was trained to see.
        metadata: All that was stored with the weights.
        device: Where it lies.
    """

    model: VMamba
    name: str
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    metadata: dict[str, Any]
    device: torch.device


def open_model(checkpoint: str | None, device: str, img_size: int | None = None) -> OpenedModel:
    """Open a weights file, a run folder, a Hub id or a published variant; None means the newest run.

    Raises:
        ValueError, FileNotFoundError: There is no such thing, or it cannot be read.
    """
    target = pick_device(device)
    if checkpoint is None:
        checkpoint = str(newest_checkpoint())
        print(f"using the newest run: {checkpoint}", file=sys.stderr)
    elif Path(checkpoint).is_dir():
        folder = RunFolder(Path(checkpoint))
        checkpoint = str(folder.best if folder.best.is_file() else folder.last)
    if checkpoint in list_models(published=True) and not Path(checkpoint).exists():
        model, metadata = create_model(checkpoint, pretrained=True), dict[str, Any]()
    else:
        model, metadata = _load(checkpoint)
    classes = model.config.num_classes
    if task := metadata.get("task"):
        raise _other_task(checkpoint, task)
    if not classes:
        if (task := held_task(checkpoint)) != "classification":  # files of mmdetection and mmsegmentation
            raise _other_task(checkpoint, task)
        raise ValueError(f"{checkpoint} holds a backbone without a classifier; train one with `vmamba train --weights`")
    labels = metadata.get("labels")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{checkpoint} stores {len(labels)} labels for {classes} classes")
    preprocessing = Preprocessing.from_metadata(metadata, img_size)
    if "mean" not in metadata and classes != IMAGENET_CLASSES and os.environ.get("RANK", "0") == "0":
        side = preprocessing.img_size
        print(
            f"{checkpoint} does not say how its images were prepared; done here as for the published weights: "
            f"{side}×{side} pixels, ImageNet's mean and deviation",
            file=sys.stderr,
        )
    return OpenedModel(
        model.eval().to(target), checkpoint, tuple(labels) if labels else None, preprocessing, metadata, target
    )


def _load(checkpoint: str) -> tuple[VMamba, dict[str, Any]]:
    """Read weights; where there are none of a classifier, say what there is instead."""
    if re.fullmatch(r"\w+", checkpoint) and not Path(checkpoint).exists():
        hint = did_you_mean(checkpoint, list_models(published=True))
        raise FileNotFoundError(f"there is no file {checkpoint!r}, and no published variant of that name{hint}")
    try:
        return load_model(checkpoint)
    except CheckpointError:
        if (task := held_task(checkpoint)) == "classification":
            raise
        raise _other_task(checkpoint, task) from None


def _other_task(checkpoint: str, task: str) -> ValueError:
    return ValueError(f"{checkpoint} holds a {task} model; `vmamba eval` and `vmamba predict` take --task {task}")


def held_task(place: str) -> str:
    """Tell what a file holds: classification where it is no file, or one that only opening it will tell about."""
    file = Path(place).expanduser()
    if not file.is_file():
        return "classification"
    from vmamba.tasks.segmentation_checkpoint import holds_segmenter

    try:
        if "detector" in (read_file(file)[1] or {}):
            return "detection"
        checkpoint = read_checkpoint(file)
    except CheckpointError:
        return "classification"
    if holds_segmenter(checkpoint):
        return "segmentation"
    return "detection" if "roi_head" in checkpoint.skipped else "classification"


def pick_device(device: str) -> torch.device:
    """Return the device a flag names; "auto" is the GPU where there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable NVIDIA GPU; `vmamba doctor` tells more")
    return torch.device(device)


def to_json(value: Any) -> str:
    """Return JSON a person can read too."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def check_targets(output: str | None, picture: str | None = None) -> None:
    """Make the folders of the files a command will write, so that what is wrong with them is known before the work.

    Raises:
        ValueError: A name is that of a folder, or of a kind of picture that cannot be drawn.
        OSError: A folder cannot be made or written to.
    """
    for option, name in (("output", output), ("picture", picture)):
        if name is None:
            continue
        target = Path(name).expanduser()
        if target.is_dir():
            raise ValueError(f"--{option} {name} is a folder; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None
    if picture is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
        if (kind := Path(picture).suffix.lower().removeprefix(".")) not in kinds:
            raise ValueError(f"--picture {picture} cannot be drawn as {kind or 'a file without ending'}; .png can")


def write_text(path: str, text: str) -> None:
    """Write a text file, making the folders it lies in."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n", encoding="utf-8")
