"""Images into vectors, in parts: what is interrupted goes on where it was, to the same file bit for bit.

The work is cut into parts that depend on the input and the batch size alone. Each part is computed in batches of its
own and written to a folder beside the result, whole or not at all; processes of `torchrun` share the parts. When all
are there, the first process joins them in order.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vmamba.data.images import IMAGE_EXTENSIONS, DamagedImageError, decode_image, image_files

SUFFIXES = (".parquet", ".npz")
_PLAN = "plan.json"


class EmptyResultError(ValueError):
    """There is not one image to embed."""


@dataclass(frozen=True)
class Part:
    """A piece of the work.

    Attributes:
        files: Image files; empty for a shard.
        shard: A tar file all of whose images are meant.
    """

    files: tuple[str, ...] = ()
    shard: str = ""

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the content of every image; content is empty where it could not be read."""
        if not self.shard:
            for name in self.files:
                try:
                    yield name, Path(name).read_bytes()
                except OSError:
                    yield name, b""
            return
        try:
            with tarfile.open(self.shard) as archive:
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(IMAGE_EXTENSIONS):
                        stream = archive.extractfile(member)
                        yield f"{self.shard}/{member.name}", stream.read() if stream else b""
        except (tarfile.TarError, EOFError) as error:
            reason = str(error).partition("\n")[0].rstrip(": ")
            raise ValueError(f"the shard {self.shard} is damaged: {reason}") from error


@dataclass(frozen=True)
class EmbeddingReport:
    """What was embedded.

    Attributes:
        images: Vectors written.
        width: Numbers in a vector.
        resumed: Parts that were there already.
        parts: Parts in all.
        damaged: Names of images that could not be decoded, which have no vector.
    """

    images: int
    width: int
    resumed: int
    parts: int
    damaged: tuple[str, ...]


def plan(source: str, part_size: int) -> list[Part]:
    """Cut a folder, a file, a glob, or `wds:` and tar files (a folder, a glob, braces) into parts.

    Raises:
        ValueError, FileNotFoundError: There is nothing to embed; the message says what was looked for.
    """
    if source.startswith("wds:"):
        return [Part(shard=shard) for shard in _shards(source[4:])]
    path = Path(source).expanduser()
    if path.is_dir():
        files = image_files(path)
    else:
        files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
        files = [name for name in files if Path(name).is_file()]
    if not files:
        raise FileNotFoundError(f"no images at {source}: looked for {' '.join(IMAGE_EXTENSIONS)}")
    return [Part(tuple(files[i : i + part_size])) for i in range(0, len(files), part_size)]


def _shards(place: str) -> list[str]:
    path = Path(place).expanduser()
    if path.is_dir():
        found = sorted(map(str, path.glob("*.tar")))
    else:
        try:
            from braceexpand import braceexpand
        except ImportError:
            patterns = [str(path)]
        else:
            patterns = list(braceexpand(str(path)))
        found = [name for pattern in patterns for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"no shards at wds:{place}: give a folder of .tar files, or a pattern of them")
    return found


def embed(
    model: Callable[[Tensor], Tensor],
    transform: Callable[[Image.Image], Tensor],
    source: str,
    target: str | os.PathLike[str],
    *,
    identity: str,
    device: torch.device,
    batch_size: int = 32,
    part_size: int = 1024,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> EmbeddingReport | None:
    """Embed images into a Parquet or NumPy file.

    Args:
        model: Maps images (B, C, H, W) on `device` to vectors (B, D).
        transform: Brings a picture into the shape the model was trained on.
        source: See `plan`.
        target: File to write: `.parquet` (columns file, embedding) or `.npz` (arrays files, embeddings).
        identity: What the vectors depend on besides the images: model, weights, preprocessing. Parts of another are not
            taken over.
        device: Where the model lies.
        batch_size: Images computed at once.
        part_size: Images between two savings, for image files; shards are parts themselves.
        overwrite: Replace the target if it exists.
        progress: Told how many parts are done, of how many.

    Returns:
        What was embedded; None in processes of torchrun but the first.

    Raises:
        ValueError: The target is there, or the parts beside it are of something else.
    """
    target = Path(target).expanduser()
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} must end in {' or '.join(SUFFIXES)}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; overwrite it with --overwrite true")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = plan(source, part_size)
    folder = target.with_name(f"{target.name}.parts")
    _prepare_folder(folder, parts, f"{identity}, batches of {batch_size}", rank)
    places = [folder / f"{index:06d}.npz" for index in range(len(parts))]
    resumed = sum(place.is_file() for place in places)
    for index in range(rank, len(parts), world):
        if not places[index].is_file():
            _write_part(places[index], *_embed_part(model, transform, parts[index], device, batch_size))
        progress(sum(place.is_file() for place in places), len(parts))
    if rank:
        return None
    while not all(place.is_file() for place in places):  # of the other processes, which torchrun ends if one fails
        time.sleep(0.5)
    try:
        report = _join(places, target, resumed)
    except EmptyResultError:
        shutil.rmtree(folder)  # nothing in it is worth going on with, and mended images would not be looked at
        raise
    shutil.rmtree(folder)
    return report


def _prepare_folder(folder: Path, parts: Sequence[Part], identity: str, rank: int) -> None:
    """Make the folder of parts, or make sure that what lies there is of this work."""
    listed = json.dumps([[part.shard, *part.files] for part in parts])
    wanted = {"identity": identity, "input": hashlib.sha256(listed.encode()).hexdigest(), "parts": len(parts)}
    file = folder / _PLAN
    if rank:
        for _ in range(600):
            if file.is_file():
                break
            time.sleep(0.1)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            _replace(file, json.dumps(wanted).encode())
    if json.loads(file.read_text(encoding="utf-8")) != wanted:
        raise ValueError(
            f"{folder} holds parts of other images, another model or another batch size; "
            "remove that folder to start anew"
        )


def _embed_part(
    model: Callable[[Tensor], Tensor],
    transform: Callable[[Image.Image], Tensor],
    part: Part,
    device: torch.device,
    batch_size: int,
) -> tuple[list[str], np.ndarray, list[str]]:
    names: list[str] = []
    damaged: list[str] = []
    waiting: list[Tensor] = []
    vectors: list[np.ndarray] = []

    def run() -> None:
        if waiting:
            with torch.inference_mode():
                vectors.append(model(torch.stack(waiting).to(device)).float().cpu().numpy())
            waiting.clear()

    for name, content in part.read():
        try:
            waiting.append(transform(decode_image(content, name)))
        except DamagedImageError:
            damaged.append(name)
            continue
        names.append(name)
        if len(waiting) == batch_size:
            run()
    run()
    return names, np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32), damaged


def _write_part(place: Path, names: list[str], vectors: np.ndarray, damaged: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, files=np.array(names, dtype=str), embeddings=vectors, damaged=np.array(damaged, dtype=str))
    _replace(place, buffer.getvalue())


def _replace(place: Path, content: bytes) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, place)


def _join(places: Sequence[Path], target: Path, resumed: int) -> EmbeddingReport:
    """Join the parts, in order, into the result."""
    names: list[str] = []
    damaged: list[str] = []
    pieces: list[np.ndarray] = []
    for place in places:
        with np.load(place) as part:
            names += part["files"].tolist()
            damaged += part["damaged"].tolist()
            if len(part["embeddings"]):
                pieces.append(part["embeddings"])
    if not pieces:
        raise EmptyResultError(f"none of the {len(damaged)} images could be decoded")
    vectors = np.concatenate(pieces)
    temporary = target.with_name(f".{target.name}.tmp")
    if target.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        flat = pyarrow.array(vectors.ravel())
        columns = {"file": names, "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
        parquet.write_table(pyarrow.table(columns), temporary)
    else:
        with temporary.open("wb") as stream:
            np.savez(stream, files=np.array(names, dtype=str), embeddings=vectors)
    os.replace(temporary, target)
    return EmbeddingReport(len(names), vectors.shape[1], resumed, len(places), tuple(damaged))
