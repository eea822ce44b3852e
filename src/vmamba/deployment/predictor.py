"""A classifier behind one call, be it weights in PyTorch or an exported file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vmamba.data.transforms import Preprocessing
from vmamba.deployment.export import sha256_of
from vmamba.deployment.files import load_exported


@dataclass(frozen=True)
class Predictor:
    """What a server or a page needs of a classifier.

    Attributes:
        name: Of the model.
        version: What tells its weights from others: the start of a checksum.
        labels: Class names.
        preprocessing: What it was trained to see.
        logits: Maps a batch (B, C, H, W) of float32 to logits (B, classes).
    """

    name: str
    version: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    logits: Callable[[np.ndarray], np.ndarray]

    def image_to_array(self, image: Image.Image) -> np.ndarray:
        """Bring a picture into the shape the model was trained on: (C, H, W) of float32."""
        array: np.ndarray = self.preprocessing.transform()(image).numpy()
        return array

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """Map a batch (B, C, H, W) to probabilities (B, classes)."""
        logits = self.logits(batch).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def top(self, probabilities: np.ndarray, count: int) -> list[dict[str, Any]]:
        """Return the most probable classes of one image, most probable first."""
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [
            {"label": self.labels[i], "index": int(i), "confidence": round(float(probabilities[i]), 6)} for i in order
        ]


def predictor_of_model(
    model: nn.Module,
    labels: Sequence[str],
    preprocessing: Preprocessing,
    *,
    name: str,
    version: str,
    device: torch.device,
) -> Predictor:
    """Put a model in PyTorch behind a Predictor."""
    model = model.eval().to(device)

    def logits(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs: np.ndarray = model(torch.from_numpy(batch).to(device)).float().cpu().numpy()
        return outputs

    return Predictor(name, version, tuple(labels), preprocessing, logits)


def predictor_of_file(path: str | Path, threads: int | None = None, device: str | torch.device = "cpu") -> Predictor:
    """Put a file that `vmamba export` wrote behind a Predictor.

    Raises:
        ValueError: It is none, or no classifier.
    """
    path = Path(path).expanduser()
    exported = load_exported(path, threads, device)
    description = exported.description
    if description.task != "classification":
        raise ValueError(f"{path} gives {description.task}; a classifier is needed")
    preprocessing = Preprocessing.from_metadata(dict(description.preprocessing))

    def logits(batch: np.ndarray) -> np.ndarray:
        return exported(batch)[0]

    size = preprocessing.img_size
    classes = logits(np.zeros((1, len(preprocessing.mean), size, size), dtype=np.float32)).shape[1]
    labels = description.labels or default_labels(classes)
    return Predictor(description.model, version_of(path), tuple(labels), preprocessing, logits)


def version_of(path: Path) -> str:
    """Return what tells a file from others of its kind: the first 12 digits of its checksum."""
    return sha256_of(path)[:12]


def default_labels(classes: int) -> tuple[str, ...]:
    """Name the classes of weights that store no labels: ImageNet's for a thousand, numbers otherwise."""
    if classes == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        return tuple(info.index_to_description(index) for index in range(classes))
    return tuple(str(index) for index in range(classes))
