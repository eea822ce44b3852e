"""What several commands need: a model from whatever names it, the device to put it on, files to write to."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmamba.data.transforms import Preprocessing
from vmamba.models.checkpoint import load_model
from vmamba.models.config import list_models
from vmamba.models.registry import create_model
from vmamba.models.vmamba import VMamba
from vmamba.training.run_folder import RunFolder, newest_checkpoint


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
        model, metadata = load_model(checkpoint)
    classes = model.config.num_classes
    if task := metadata.get("task"):
        raise ValueError(f"{checkpoint} holds a {task} model; `vmamba eval` and `vmamba predict` take --task {task}")
    if not classes:
        raise ValueError(f"{checkpoint} holds a backbone without a classifier; train one with `vmamba train --weights`")
    labels = metadata.get("labels")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{checkpoint} stores {len(labels)} labels for {classes} classes")
    preprocessing = Preprocessing.from_metadata(metadata, img_size)
    return OpenedModel(
        model.eval().to(target), checkpoint, tuple(labels) if labels else None, preprocessing, metadata, target
    )


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


def write_text(path: str, text: str) -> None:
    """Write a text file, making the folders it lies in."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n", encoding="utf-8")
