"""The IDX format of MNIST and its relatives: a few bytes of shape, then raw values; often gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTES = 0x08
_PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Raises:
        ValueError: Not such a file, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    header = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    if len(shape) != content[3] or len(content) - header != math.prod(shape):
        raise ValueError(f"{path} is damaged: its header promises {shape} bytes, it holds {len(content) - header}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_idx_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images `(count, height, width)` and labels `(count,)` of "train" or "test" from a folder.

    Raises:
        FileNotFoundError: A file is missing; the message names what was looked for.
        ValueError: A file is damaged, or the two do not belong together.
    """
    images, labels = (read_idx(_find(folder, stem)) for stem in _PARTS[split])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{folder}: {images.shape} images and {labels.shape} labels do not belong together")
    return images, labels


def _find(folder: Path, stem: str) -> Path:
    names = (stem, f"{stem}.gz")
    for candidate in (place / name for place in (folder, folder / "FashionMNIST" / "raw") for name in names):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no {names[0]} or {names[1]} in {folder}")
