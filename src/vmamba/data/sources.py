"""From the text after `--data` to labelled images, split into those to train on and those held out.

A specification is one of

- `digits`: scikit-learn's 1,797 handwritten digits, 8×8 pixels brought to 32×32; needs no download;
- `fashion-mnist` (downloaded by torchvision) or `fashion-mnist:FOLDER` (the four IDX files, gzipped or not);
- `folder:PATH` or just a path: class folders, or `train` and `val` folders with class folders in them;
- `hf:FOLDER`: what `Dataset.save_to_disk` of Hugging Face datasets wrote;
- `wds:PLACE`: WebDataset shards, see `vmamba.data.shards`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vmamba.data.idx import read_idx_split
from vmamba.data.images import IMAGE_EXTENSIONS, decode_image, image_files, read_image
from vmamba.data.shards import ShardSet, open_shards

Style = Literal["glyphs", "garments", "photos"]

# The division into training and held-out images stays the same whatever the seed of a run is, so that runs compare.
_SPLIT_SEED = 0
_HELD_OUT_FOLDERS = ("val", "validation", "valid", "test")
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, read one at a time.

    Attributes:
        targets: Class index of each image.
        names: What to call each image: the path of its file, or "digits/17".
        pixels: Grey images `(count, height, width)` of unsigned bytes where they lie in memory; None otherwise.
        contents: Gives the encoded image of a position, where the names are no files; None otherwise.
    """

    targets: np.ndarray
    names: Sequence[str]
    pixels: np.ndarray | None = None
    contents: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Image.Image:
        """Return an image as RGB; raises DamagedImageError and OSError as `read_image` does."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index]).convert("RGB")
        if self.contents is not None:
            return decode_image(self.contents(index), self.names[index])
        return read_image(self.names[index])

    def subset(self, positions: np.ndarray) -> ImageSet:
        """Return the images at these positions."""
        pixels = None if self.pixels is None else self.pixels[positions]
        contents = self.contents and _Selected(self.contents, positions)
        return ImageSet(self.targets[positions], [self.names[i] for i in positions], pixels, contents)

    def joined(self, other: ImageSet) -> ImageSet:
        """Return these images followed by those of another set of the same kind."""
        pixels = None
        if self.pixels is not None and other.pixels is not None:
            pixels = np.concatenate([self.pixels, other.pixels])
        contents = self.contents and other.contents and _Joined(self.contents, len(self), other.contents)
        return ImageSet(np.concatenate([self.targets, other.targets]), [*self.names, *other.names], pixels, contents)

    def relabelled(self, numbers: np.ndarray) -> ImageSet:
        """Return the same images with target t replaced by `numbers[t]`."""
        return replace(self, targets=numbers[self.targets])


@dataclass(frozen=True)
class _Selected:
    contents: Callable[[int], bytes]
    positions: np.ndarray

    def __call__(self, index: int) -> bytes:
        return self.contents(int(self.positions[index]))


@dataclass(frozen=True)
class _Joined:
    first: Callable[[int], bytes]
    length: int
    second: Callable[[int], bytes]

    def __call__(self, index: int) -> bytes:
        return self.first(index) if index < self.length else self.second(index - self.length)


@dataclass(frozen=True)
class Source:
    """A data set as its specification describes it.

    Attributes:
        spec: The specification, with an absolute path.
        classes: Class names, in the order of the targets.
        train: Images to train on.
        held_out: Images to evaluate on.
        img_size: Side in pixels that suits the images.
        style: What augmentation suits them.
        note: One sentence on where the split comes from.
    """

    spec: str
    classes: tuple[str, ...]
    train: ImageSet | ShardSet
    held_out: ImageSet | ShardSet
    img_size: int
    style: Style
    note: str


def open_source(spec: str, held_out: float = 0.2) -> Source:
    """Open the data a specification names.

    Args:
        spec: See the head of this module.
        held_out: Share of every class held out, where the data brings no split of its own.

    Raises:
        ValueError, FileNotFoundError: There is no such data; the message says what was looked for.
    """
    kind, colon, place = spec.partition(":")
    if spec == "digits":
        return _digits(held_out)
    if kind == "fashion-mnist" and (place or not colon):
        return _fashion_mnist(place)
    if kind == "hf" and place:
        return _saved_dataset(Path(place).expanduser(), held_out)
    if kind == "wds" and place:
        return _shards(place)
    if kind == "folder" and place:
        return _folder(Path(place).expanduser(), held_out)
    if spec and Path(spec).expanduser().is_dir():
        return _folder(Path(spec).expanduser(), held_out)
    allowed = "digits, fashion-mnist, fashion-mnist:FOLDER, hf:FOLDER, wds:SHARDS, or a folder of class folders"
    close = difflib.get_close_matches(spec, ("digits", "fashion-mnist"), n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; {allowed} would do"
    raise ValueError(f"--data {spec!r} names no known data set, and there is no folder of that name{hint}")


def with_labels(images: ImageSet | ShardSet, classes: Sequence[str], labels: Sequence[str]) -> ImageSet | ShardSet:
    """Number the targets as a model does, whose labels may come in another order or be more.

    Args:
        images: Images whose targets count in `classes`.
        classes: Class names of the data.
        labels: Class names of the model.

    Raises:
        ValueError: A class of the data is none of the model's.
    """
    place = {label: index for index, label in enumerate(labels)}
    unknown = [name for name in classes if name not in place]
    if unknown:
        raise ValueError(
            f"the model does not know the class {unknown[0]!r} of this data ({len(unknown)} of {len(classes)} unknown);"
            f" its classes are {', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}"
        )
    return images.relabelled(np.array([place[name] for name in classes], dtype=np.int64))


def _digits(held_out: float) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("--data digits needs scikit-learn: pip install 'vmamba[train]'") from None
    bunch = load_digits()
    size = 32
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)) for digit in small]
    images = _in_memory(np.stack(pixels), bunch.target, "digits")
    targets = images.targets
    train, test = _stratified_split(targets, held_out)
    return Source(
        spec="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=images.subset(train),
        held_out=images.subset(test),
        img_size=size,
        style="glyphs",
        note=f"a fixed {held_out:.0%} of every class held out",
    )


def _fashion_mnist(place: str) -> Source:
    folder = Path(place).expanduser() if place else _download_fashion_mnist()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data fashion-mnist:{place}: there is no folder {folder}")
    train, test = (_in_memory(*read_idx_split(folder, split), f"fashion-mnist/{split}") for split in ("train", "test"))
    return Source(
        spec=f"fashion-mnist:{folder.resolve()}" if place else "fashion-mnist",
        classes=_FASHION_CLASSES,
        train=train,
        held_out=test,
        img_size=32,
        style="garments",
        note="the test images of Fashion-MNIST held out",
    )


def _in_memory(pixels: np.ndarray, targets: np.ndarray, name: str) -> ImageSet:
    return ImageSet(targets.astype(np.int64), [f"{name}/{index}" for index in range(len(targets))], pixels)


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    cache = Path(os.environ.get("VMAMBA_CACHE_DIR", "~/.cache/vmamba")).expanduser()
    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(
            f"Fashion-MNIST could not be downloaded to {cache} ({reason}); "
            "put its four IDX files in a folder and name it: --data fashion-mnist:FOLDER"
        ) from None
    return cache / "FashionMNIST" / "raw"


def _shards(place: str) -> Source:
    classes, train, test = open_shards(place)
    return Source(f"wds:{place}", classes, train, test, 224, "photos", "the shards named for it held out")


def _saved_dataset(folder: Path, held_out: float) -> Source:
    from vmamba.data.saved_datasets import open_saved

    classes, splits = open_saved(folder)
    train, own_split = splits["train"], next((name for name in _HELD_OUT_FOLDERS if name in splits), None)
    images = ImageSet(train.targets, train.names, contents=train.read)
    if own_split is None:
        images, test = _split(images, held_out)
        note = f"a fixed {held_out:.0%} of every class held out"
    else:
        other = splits[own_split]
        test, note = ImageSet(other.targets, other.names, contents=other.read), f"the split {own_split!r} held out"
    return Source(f"hf:{folder.resolve()}", classes, images, test, 224, "photos", note)


def _folder(root: Path, held_out: float) -> Source:
    if not root.is_dir():
        raise FileNotFoundError(f"--data: there is no folder {root}")
    train_root = root / "train"
    own_split = next((root / name for name in _HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if train_root.is_dir():
        classes, train = _class_folders(train_root)
        if own_split is None:
            train, test, note = *_split(train, held_out), f"{held_out:.0%} of every class of {train_root} held out"
        else:
            test, note = _class_folders(own_split, classes)[1], f"the images of {own_split} held out"
    else:
        classes, images = _class_folders(root)
        train, test, note = *_split(images, held_out), f"a fixed {held_out:.0%} of every class held out"
    return Source(f"folder:{root.resolve()}", classes, train, test, 224, "photos", note)


def _class_folders(root: Path, classes: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], ImageSet]:
    """Find the images below each class folder; with `classes`, only those may occur."""
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not found:
        raise FileNotFoundError(f"{root} holds no class folders: expected {root}/CLASS/IMAGE for every class")
    extra = sorted(set(found) - set(classes or found))
    if extra:
        raise ValueError(f"{root} has the class folder {extra[0]!r}, which the training images lack")
    classes = classes or found
    paths: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        below = image_files(root / name)
        paths += below
        targets += [target] * len(below)
    if not paths:
        raise FileNotFoundError(f"no images below {root}: looked for {' '.join(IMAGE_EXTENSIONS)}")
    return classes, ImageSet(np.array(targets), paths)


def _split(images: ImageSet, held_out: float) -> tuple[ImageSet, ImageSet]:
    train, test = _stratified_split(images.targets, held_out)
    if not len(train) or not len(test):
        raise ValueError(f"{len(images)} images are too few to hold {held_out:.0%} of every class out")
    return images.subset(train), images.subset(test)


def _stratified_split(targets: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted positions to train on and to hold out, the same share of every class."""
    generator = np.random.default_rng(_SPLIT_SEED)
    test: list[np.ndarray] = []
    for target in np.unique(targets):
        positions = generator.permutation(np.flatnonzero(targets == target))
        # A class of two or more images is on both sides; a single image is to be learned from.
        number = min(max(round(len(positions) * held_out), 1), len(positions) - 1)
        test.append(positions[:number])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(targets)), chosen), chosen
