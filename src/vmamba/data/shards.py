"""WebDataset shards: tar files of images and their classes, on disk or behind http(s), read as streams.

`wds:PLACE` names them, where PLACE is

- a folder, or the http(s) address, of a `dataset.json` as `write_shards` makes it;
- a folder with `train*.tar` and `val*.tar`;
- two patterns of local files, `TRAIN::HELD_OUT`, in which braces and wildcards are expanded, such as
  `a/t-{000..127}.tar::a/v*.tar`.

A sample is two files of one name in a tar, `KEY.jpg` (or another image) and `KEY.cls` with the number of its class.
Without a dataset.json the local shards are counted by reading through their headers once; addresses need one.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmamba.data.images import IMAGE_EXTENSIONS

DESCRIPTION = "dataset.json"
_SPLITS = {"train": ("train",), "held_out": ("val", "validation", "valid", "test")}
_REMOTE = ("http://", "https://")


@dataclass(frozen=True)
class ShardSet:
    """Shards of one split.

    Attributes:
        shards: Paths or addresses.
        samples: Samples in all of them.
        numbers: What each stored class number stands for; None for itself.
    """

    shards: tuple[str, ...]
    samples: int
    numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.samples

    def joined(self, other: ShardSet) -> ShardSet:
        """Return these shards followed by others."""
        return replace(self, shards=self.shards + other.shards, samples=self.samples + other.samples)

    def relabelled(self, numbers: np.ndarray) -> ShardSet:
        """Return the same shards with class t read as `numbers[t]`."""
        before = range(len(numbers)) if self.numbers is None else self.numbers
        return replace(self, numbers=tuple(int(numbers[number]) for number in before))


class RawSample(NamedTuple):
    """An encoded image of a shard; `problem` says why there is none."""

    name: str
    content: bytes
    target: int
    problem: str = ""


def open_shards(place: str) -> tuple[tuple[str, ...], ShardSet, ShardSet]:
    """Find the shards a specification names: class names, shards to train on, shards held out.

    Raises:
        ValueError, FileNotFoundError: There are none; the message says what was looked for.
    """
    _require_webdataset()
    if place.startswith(_REMOTE) or place.endswith(".json") or (Path(place).expanduser() / DESCRIPTION).is_file():
        return _described(place)
    if "::" in place:
        patterns = dict(zip(_SPLITS, place.split("::", 1), strict=True))
    elif Path(place).expanduser().is_dir():
        folder = Path(place).expanduser()
        patterns = {split: _pattern_in(folder, names) for split, names in _SPLITS.items()}
    else:
        raise ValueError(
            f"--data wds:{place} is neither a folder, nor a {DESCRIPTION}, nor two patterns TRAIN.tar::HELD_OUT.tar"
        )
    shards = {split: _expand(pattern) for split, pattern in patterns.items()}
    counted = {split: [_count(shard) for shard in paths] for split, paths in shards.items()}
    largest = max((top for counts in counted.values() for _, top in counts), default=-1)
    if largest < 0:
        raise ValueError(f"--data wds:{place}: no sample in the shards has an image and a class beside it (KEY.cls)")
    sets = {split: ShardSet(tuple(paths), sum(n for n, _ in counted[split])) for split, paths in shards.items()}
    return tuple(str(number) for number in range(largest + 1)), sets["train"], sets["held_out"]


def read_samples(images: ShardSet, shards: Sequence[str]) -> Iterator[RawSample]:
    """Yield the samples of some shards in order; what cannot be read becomes a sample with a problem."""
    from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

    for shard in shards:
        problems: list[str] = []
        seen = 0

        def note(error: Exception, problems: list[str] = problems) -> bool:
            reason = str(error.args[0] if error.args else error).partition("\n")[0] or type(error).__name__
            problems.append(reason.partition(" @ ")[0])
            return False  # nothing after the damage can be trusted

        files = tar_file_expander(url_opener([{"url": shard}], handler=note), handler=note)
        for sample in group_by_keys(files, handler=note):
            seen += 1
            yield _raw(sample, shard, images.numbers)
        for reason in problems:
            yield RawSample(shard, b"", 0, f"{shard}: damaged after {seen} samples ({reason})")


def write_shards(
    samples: Iterator[tuple[bytes, str, int]], classes: Sequence[str], folder: Path, split: str, per_shard: int = 1000
) -> None:
    """Write encoded images as shards and describe them in the folder's dataset.json.

    Args:
        samples: Encoded image, its extension without a dot, class number; shuffle them, for streams keep their order.
        classes: Class names.
        folder: Where to; made where it does not exist. The other split's shards in it stay.
        split: "train" or "held_out".
        per_shard: Samples in a shard; 100 MB to 1 GB a shard read well.

    Raises:
        ValueError: `split` is neither.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, not {split!r}")
    _require_webdataset()
    from webdataset import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    prefix, counts = _SPLITS[split][0], list[int]()
    with ShardWriter(str(folder / f"{prefix}-%06d.tar"), maxcount=per_shard, maxsize=2e12, verbose=0) as writer:
        for index, (content, extension, target) in enumerate(samples):
            writer.write({"__key__": f"{index:09d}", extension: content, "cls": str(target)})
            counts[index // per_shard :] = [index % per_shard + 1]
    path = folder / DESCRIPTION
    description = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = [f"{prefix}-{number:06d}.tar" for number in range(len(counts))]
    description |= {"classes": list(classes), split: {"shards": names, "samples": counts}}
    path.write_text(json.dumps(description, indent=1), encoding="utf-8")


def _described(place: str) -> tuple[tuple[str, ...], ShardSet, ShardSet]:
    """Read a dataset.json, whose shards lie beside it."""
    address = place if place.endswith(".json") else f"{place.rstrip('/')}/{DESCRIPTION}"
    base = address.rpartition("/")[0]
    try:
        if address.startswith(_REMOTE):
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        else:
            content = Path(address).expanduser().read_bytes()
    except (urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(f"--data wds:{place}: cannot read {address} ({error})") from None
    try:
        description = json.loads(content)
        classes = tuple(str(name) for name in description["classes"])
        sets = {
            split: ShardSet(
                tuple(_beside(base, str(name)) for name in description[split]["shards"]),
                sum(int(count) for count in description[split]["samples"]),
            )
            for split in _SPLITS
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{address} does not describe shards ({type(error).__name__}: {error}); it needs classes, and for train "
            "and held_out each shards (file names) and samples (their counts), as vmamba.data.shards.write_shards does"
        ) from None
    missing = [s for kept in sets.values() for s in kept.shards if not s.startswith(_REMOTE) and not Path(s).is_file()]
    if missing:
        raise FileNotFoundError(f"{address} names {missing[0]}, which is not there ({len(missing)} shards missing)")
    return classes, sets["train"], sets["held_out"]


def _beside(base: str, name: str) -> str:
    # webdataset would run a name such as "pipe:…" as a shell command.
    if ":" in name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"the shard {name!r} must be the name of a file beside the description")
    return f"{base}/{name}" if base else name


def _pattern_in(folder: Path, names: Sequence[str]) -> str:
    for name in names:
        if any(folder.glob(f"{name}*.tar")):
            return str(folder / f"{name}*.tar")
    raise FileNotFoundError(f"no {' or '.join(f'{name}*.tar' for name in names)} in {folder}")


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    found: list[str] = []
    for part in braceexpand(os.path.expanduser(pattern)):
        if ":" in part:
            raise ValueError(f"shards behind an address need a {DESCRIPTION}; {part!r} cannot be counted")
        matches = sorted(glob.glob(part))
        if not matches:
            raise FileNotFoundError(f"there is no shard {part}")
        found += matches
    return found


def _count(shard: str) -> tuple[int, int]:
    """Return the samples in a local shard and its largest class number, as far as it can be read."""
    classes: dict[str, int] = {}
    images: set[str] = set()
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = os.path.basename(member.name).partition(".")
                key = os.path.join(os.path.dirname(member.name), key)
                if suffix == "cls" and (stream := archive.extractfile(member)):
                    classes[key] = int(stream.read())
                elif f".{suffix.lower()}" in IMAGE_EXTENSIONS:
                    images.add(key)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass  # whoever reads the samples reports what is wrong
    both = [number for key, number in classes.items() if key in images]
    return len(both), max(both, default=-1)


def _raw(sample: dict[str, Any], shard: str, numbers: tuple[int, ...] | None) -> RawSample:
    name = f"{shard}::{sample['__key__']}"
    content = next((value for suffix, value in sample.items() if f".{suffix}" in IMAGE_EXTENSIONS), None)
    if content is None:
        return RawSample(name, b"", 0, f"{name}: no image of a known kind")
    try:
        target = int(sample["cls"])
        return RawSample(name, content, target if numbers is None else numbers[target])
    except (KeyError, ValueError, IndexError):
        return RawSample(name, b"", 0, f"{name}: no class of the data set beside it")


def _require_webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise ValueError("--data wds:… needs the package webdataset: pip install 'vmamba[train]'") from None
