"""Annotations of objects in COCO's format, read defensively; docs/detection.md states the rule.

What makes a file as a whole meaningless is refused (ValueError); a single record that is wrong is skipped, counted and
named; a box that reaches over the image's edge is cut there.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vmamba.data.images import DamagedImageError, read_image

_TRAIN = ("annotations/instances_train2017.json", "train2017"), ("train/_annotations.coco.json", "train")
_HELD_OUT = (
    ("annotations/instances_val2017.json", "val2017"),
    ("valid/_annotations.coco.json", "valid"),
    ("val/_annotations.coco.json", "val"),
)


@dataclass(frozen=True, eq=False)
class CocoImage:
    """An image and what is known to be on it.

    Attributes:
        key: Its id in the file.
        path: The image file.
        height: In pixels.
        width: In pixels.
        boxes: `(n, 4)` float32, xyxy in pixels, inside the image.
        labels: `(n,)` class indices from 0.
        crowd: `(n,)`: whether the box stands for a crowd, which is neither learnt nor a mistake to find.
        areas: `(n,)` pixels covered.
        shapes: For each object its polygons (arrays of x, y, x, y, …), a run-length encoding, or None.
    """

    key: int
    path: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    shapes: tuple[Any, ...]

    def read(self) -> Any:
        """Decode the image.

        Raises:
            DamagedImageError: It cannot be decoded, or has another size than the annotations say.
            OSError: It is missing or may not be read.
        """
        picture = read_image(self.path)
        if picture.size != (self.width, self.height):
            width, height = picture.size
            raise DamagedImageError(
                self.path, f"it is {width}×{height} pixels when upright, annotated as {self.width}×{self.height}"
            )
        return picture


@dataclass
class Problems:
    """What was wrong with an annotation file: how often by kind, and each record by name, skipped or mended."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    records: int = 0
    skipped: int = 0

    def note(self, kind: str, line: str, skipped: bool = True) -> None:
        """Take down one record."""
        self.counts[kind] += 1
        self.skipped += skipped
        (self.lines if skipped else self.mended).append(line)

    def summary(self) -> str:
        """Return the kinds with their numbers, the most frequent first; empty when all is well."""
        return ", ".join(f"{number:,} × {kind}" for kind, number in self.counts.most_common())


@dataclass(frozen=True)
class CocoSet:
    """Annotated images.

    Attributes:
        file: The annotation file.
        classes: Their names, in the order of their ids in the file, gaps closed.
        images: The images.
        problems: What was skipped or mended on reading.
    """

    file: str
    classes: tuple[str, ...]
    images: tuple[CocoImage, ...]
    problems: Problems = field(default_factory=Problems)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> int:
        """Number of annotated objects."""
        return sum(len(image.labels) for image in self.images)

    def with_objects(self) -> CocoSet:
        """Return the images that have an object to learn, crowds not counted."""
        return replace(self, images=tuple(image for image in self.images if not image.crowd.all()))

    def split(self, held_out: float, seed: int = 0) -> tuple[CocoSet, CocoSet]:
        """Divide the images at random, the same way every time.

        Raises:
            ValueError: One part would be empty.
        """
        number = round(len(self) * held_out)
        if not 0 < number < len(self):
            raise ValueError(f"{self.file} has {len(self)} images, too few to hold {held_out:.0%} of them out")
        order = np.random.default_rng(seed).permutation(len(self))
        kept, out = sorted(order[number:]), sorted(order[:number])
        return (
            replace(self, images=tuple(self.images[i] for i in kept)),
            replace(self, images=tuple(self.images[i] for i in out), problems=Problems()),
        )


def find_sets(place: str | Path) -> list[tuple[Path, Path]]:
    """Return the annotation file and image folder of the training set, and of a held-out set where there is one.

    Args:
        place: COCO's own layout (`annotations/instances_train2017.json`, `train2017/`, …), that of exports
            (`train/_annotations.coco.json`, `valid/…`), a folder of `train.json` and perhaps `val.json` with the images
            beside them or in `images/`, or a JSON file.

    Raises:
        FileNotFoundError: There is no such thing.
    """
    root = Path(place).expanduser()
    if root.is_file():
        return [(root, _images_beside(root))]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder or annotation file {place}")
    found: list[tuple[Path, Path]] = []
    for kinds, plain in ((_TRAIN, "train.json"), (_HELD_OUT, "val.json")):
        choices = [(root / file, root / images) for file, images in kinds]
        choices.append((root / plain, _images_beside(root / plain)))
        found += [choice for choice in choices if choice[0].is_file()][:1]
        if not found:
            raise FileNotFoundError(
                f"{place} holds no annotations in COCO's format: neither {', '.join(file for file, _ in kinds)}"
                f" nor {plain}; a JSON file can be named itself"
            )
    return found


def _images_beside(file: Path) -> Path:
    inner = file.parent / "images"
    return inner if inner.is_dir() else file.parent


def read_coco(file: str | Path, images: str | Path, *, masks: bool, classes: Sequence[str] | None = None) -> CocoSet:
    """Read an annotation file.

    Args:
        file: The JSON.
        images: Folder that its `file_name`s are relative to.
        masks: Whether objects need a shape; those without one are skipped then.
        classes: Names of the classes, where a model decides them; by default all categories of the file.

    Raises:
        FileNotFoundError: The file or folder is missing.
        ValueError: It is no JSON or cut short, lacks one of its lists, repeats an id, or nothing usable is left.
    """
    content = _load(Path(file))
    if not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder {images} with the images of {file}")
    reader = _Reader(str(file), Path(images), masks)
    names, labels = reader.categories(content["categories"], classes)
    records = reader.images(content["images"])
    by_image = reader.annotations(content["annotations"], records, labels)
    found = tuple(reader.assemble(record, by_image.get(key, [])) for key, record in records.items())
    result = CocoSet(str(file), names, found, reader.problems)
    if not result.objects:
        why = f": {result.problems.lines[0]}" if result.problems.lines else ""
        raise ValueError(f"{file} has no usable annotation among {len(content['annotations'])}{why}")
    return result


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no annotation file {file}") from None
    except json.JSONDecodeError as error:
        size = file.stat().st_size
        at_end = error.pos >= size - 1 or "Unterminated" in error.msg
        cut = "; it seems to be cut short" if at_end else ""
        raise ValueError(
            f"{file} is not readable JSON (line {error.lineno}, column {error.colno}: {error.msg}){cut}"
        ) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} is not in COCO's format: it has no list {key!r} at its top level")
    return content


@dataclass
class _Record:
    key: int
    name: str
    path: str
    height: int
    width: int


@dataclass
class _Object:
    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float
    shape: Any


class _Wrong(Exception):
    """A record that is skipped: its kind, and what is the matter with this one."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}{f' ({detail})' if detail else ''}")
        self.kind = kind


class _Reader:
    """Checks the records of one file."""

    def __init__(self, file: str, folder: Path, masks: bool) -> None:
        self.file, self.folder, self.masks = file, folder, masks
        self.problems = Problems()
        self._listings: dict[str, set[str]] = {}
        self._names: dict[int, str] = {}

    def categories(self, items: list[Any], classes: Sequence[str] | None) -> tuple[tuple[str, ...], dict[int, int]]:
        """Return the names of the classes and the class index of each category id."""
        names: dict[int, str] = {}
        for item in items:
            key = _integer(item, "id")
            if key is None:
                raise ValueError(f"{self.file} has a category without a whole number as id: {str(item)[:80]}")
            if key in names:
                raise ValueError(f"{self.file} has two categories with the id {key}")
            names[key] = str(item.get("name") or key)
        if double := [name for name, number in Counter(names.values()).items() if number > 1]:
            raise ValueError(f"{self.file} has two categories named {double[0]!r}")
        if not names:
            raise ValueError(f"{self.file} has no categories")
        ordered = tuple(classes) if classes else tuple(names[key] for key in sorted(names))
        index = {name: i for i, name in enumerate(ordered)}
        self._names = names
        if not index.keys() & set(names.values()):
            own, others = (", ".join(list(some)[:5]) for some in (names.values(), ordered))
            raise ValueError(f"no category of {self.file} ({own}, …) is a class of the model ({others}, …)")
        return ordered, {key: index[name] for key, name in names.items() if name in index}

    def images(self, items: list[Any]) -> dict[int, _Record]:
        """Return the images that exist, by id."""
        records: dict[int, _Record] = {}
        for item in items:
            key, name = _integer(item, "id"), item.get("file_name") if isinstance(item, Mapping) else None
            called = f"{self.file}: image {key if key is not None else '?'} ({name})"
            height, width = _integer(item, "height") or 0, _integer(item, "width") or 0
            if key is None or not isinstance(name, str) or not name:
                what = f"{self.file}: image record {str(item)[:80]} has no whole number as id, or no file_name"
                self.problems.note("image without id or file_name", what)
            elif key in records:
                raise ValueError(f"{self.file} has two images with the id {key}: {records[key].name} and {name}")
            elif height < 1 or width < 1:
                self.problems.note("image without a size", f"{called}: height and width must be 1 or more")
            elif not self._exists(name):
                self.problems.note("missing image file", f"{called}: there is no such file in {self.folder}")
            else:
                records[key] = _Record(key, name, str(self.folder / name), height, width)
        return records

    def _exists(self, name: str) -> bool:
        """Look a file up in the listing of its folder: asking for each of 100,000 takes minutes on a network disk."""
        place, base = os.path.split(os.path.join(self.folder, name))
        if place not in self._listings:
            self._listings[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        return base in self._listings[place]

    def annotations(
        self, items: list[Any], records: Mapping[int, _Record], labels: Mapping[int, int]
    ) -> dict[int, list[_Object]]:
        """Return the usable objects of each image."""
        found: dict[int, list[_Object]] = {}
        self.problems.records = len(items)
        for position, item in enumerate(items):
            key = _integer(item, "id")
            called = f"{self.file}: annotation {key if key is not None else f'number {position}'}"
            image = _integer(item, "image_id")
            try:
                if image is None or image not in records:
                    raise _Wrong("annotation of an image that is not there", f"image_id {image}")
                record = records[image]
                called += f" of {record.name}"
                found.setdefault(image, []).append(self._object(item, record, labels, called))
            except _Wrong as wrong:
                self.problems.note(wrong.kind, f"{called}: {wrong}")
        return found

    def _object(self, item: Mapping[str, Any], record: _Record, labels: Mapping[int, int], called: str) -> _Object:
        category = _integer(item, "category_id")
        if category is None or category not in labels:
            name = self._names.get(category)  # type: ignore[arg-type]
            what = f"category_id {category}" + (f", {name!r}, which the model does not know" if name else "")
            raise _Wrong("unknown category", what)
        box = self._box(item.get("bbox"), record, called)
        shape = self._shape(item.get("segmentation"), record)
        crowd = bool(item.get("iscrowd"))
        if shape is None and self.masks and not crowd:
            raise _Wrong("no mask", "the model needs one; boxes alone train Faster R-CNN (--masks false)")
        area: Any = item.get("area")
        if not _is_number(area) or area <= 0:
            area = (box[2] - box[0]) * (box[3] - box[1])
        return _Object(box, labels[category], crowd, float(area), shape)

    def _box(self, given: Any, record: _Record, called: str) -> tuple[float, float, float, float]:
        if not isinstance(given, list) or len(given) != 4 or not all(map(_is_number, given)):
            raise _Wrong("box that is not four numbers", str(given)[:60])
        x, y, width, height = map(float, given)
        if width <= 0 or height <= 0:
            raise _Wrong("box of no area", f"{width:g}×{height:g}")
        box = max(x, 0.0), max(y, 0.0), min(x + width, float(record.width)), min(y + height, float(record.height))
        if box[2] - box[0] <= 0 or box[3] - box[1] <= 0:
            raise _Wrong("box outside the image", f"{given} on {record.width}×{record.height}")
        over = max(box[0] - x, box[1] - y, x + width - box[2], y + height - box[3])
        if over > 1:  # rounding in other people's tools reaches over by less than a pixel
            self.problems.note(
                "box cut at the edge",
                f"{called}: box {given} reaches {over:g} pixels out of the image, and was cut",
                skipped=False,
            )
        return box

    def _shape(self, given: Any, record: _Record) -> Any:
        """Return polygons as arrays, a run-length encoding, or None where there is no shape."""
        if given is None or given in ([], {}):
            return None
        if isinstance(given, Mapping):
            return _run_lengths(given, record)
        if not isinstance(given, list):
            raise _Wrong("mask of an unknown kind", type(given).__name__)
        polygons = [
            np.asarray(polygon, np.float64)
            for polygon in given
            if isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(map(_is_number, polygon))
        ]
        if len(polygons) != len(given):
            raise _Wrong("polygon without three corners", f"{len(given) - len(polygons)} of {len(given)}")
        x, y = (np.concatenate([polygon[axis::2] for polygon in polygons]) for axis in (0, 1))
        inside = x.max() > 0 and y.max() > 0 and x.min() < record.width and y.min() < record.height
        if not inside or np.ptp(x) == 0 or np.ptp(y) == 0:
            raise _Wrong("mask outside the image or of no area")
        return tuple(polygons)

    def assemble(self, record: _Record, objects: list[_Object]) -> CocoImage:
        """Put an image's objects into arrays."""
        return CocoImage(
            record.key,
            record.path,
            record.height,
            record.width,
            np.asarray([item.box for item in objects], np.float32).reshape(-1, 4),
            np.asarray([item.label for item in objects], np.int64),
            np.asarray([item.crowd for item in objects], bool),
            np.asarray([item.area for item in objects], np.float64),
            tuple(item.shape for item in objects),
        )


def _run_lengths(given: Mapping[str, Any], record: _Record) -> dict[str, Any]:
    size, counts = given.get("size"), given.get("counts")
    if size != [record.height, record.width]:
        raise _Wrong("mask of another size", f"{size} on an image of [{record.height}, {record.width}]")
    if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        runs = counts
    elif isinstance(counts, str):
        runs = list(_decoded_runs(counts))
    else:
        raise _Wrong("run lengths that cannot be read")
    if sum(runs) != record.height * record.width or min(runs, default=0) < 0:
        raise _Wrong("run lengths that do not fill the image", f"{sum(runs)} of {record.height * record.width} pixels")
    if not sum(runs[1::2]):
        raise _Wrong("mask without a pixel")
    return {"size": size, "counts": counts}


def _decoded_runs(text: str) -> Iterator[int]:
    """Yield the run lengths of COCO's compressed form: 5 bits a character, each run from the third on a difference."""
    before: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise _Wrong("run lengths that cannot be read", f"character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(before) > 2:
            value += before[-2]
        before.append(value)
        yield value
        value = shift = 0
    if shift:
        raise _Wrong("run lengths that cannot be read", "cut short")


def _integer(item: Any, name: str) -> int | None:
    """Return a field that is a whole number, in digits or text; None where it is not."""
    value = item.get(name) if isinstance(item, Mapping) else None
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole and math.isfinite(value) else None  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
