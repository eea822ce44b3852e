"""Image data sets that Hugging Face `datasets` saved on disk, as encoded images and class numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SavedSplit:
    """One split: a table of images and their classes.

    Attributes:
        table: The split, its images not decoded.
        column: Name of the column of images.
        targets: Class index of each image.
        names: What to call each image: its own path where it has one, else split and row.
    """

    table: Any
    column: str
    targets: np.ndarray
    names: list[str]

    def read(self, index: int) -> bytes:
        """Return the encoded image of a row; raises OSError when it lies in a file that cannot be read."""
        cell = self.table[index][self.column] or {}
        if cell.get("bytes") is None and cell.get("path"):
            return Path(cell["path"]).read_bytes()
        return cell.get("bytes") or b""


def open_saved(folder: Path) -> tuple[tuple[str, ...], dict[str, SavedSplit]]:
    """Open what `save_to_disk` wrote: class names, and the splits by name; a data set without splits is "train".

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: `datasets` is not installed, or the folder holds no labelled images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--data hf:{folder}: there is no such folder")
    try:
        import datasets
    except ImportError:
        raise ValueError("--data hf:FOLDER needs the package datasets: pip install 'vmamba[train]'") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--data hf:{folder} is not what Dataset.save_to_disk writes: {reason}") from None
    tables = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if "train" not in tables:
        raise ValueError(f"--data hf:{folder} has no split 'train'; it has {', '.join(tables)}")
    features = tables["train"].features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"--data hf:{folder} needs a column of type Image and one of type ClassLabel; it has "
            + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        )
    image, label = images[0], labels[0]
    splits = {}
    for name, table in tables.items():
        table = table.cast_column(image, datasets.Image(decode=False))
        targets = np.asarray(table[label], dtype=np.int64)
        if len(targets) and targets.min() < 0:
            raise ValueError(f"--data hf:{folder}: the split {name!r} has images without a class (label -1)")
        splits[name] = SavedSplit(table, image, targets, [f"{name}/{row}" for row in range(len(table))])
    return tuple(features[label].names), splits
