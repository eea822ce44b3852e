"""Pictures with a mask each: where they lie, what their classes are, and how they are read.

A specification is one of

- `ade20k:FOLDER`: ADE20K as its scene parsing challenge lays it out: `images/training`, `images/validation` and the
  same below `annotations`. Value 0 of a mask is no class; 1 to 150 are the classes, named by `objectInfo150.txt`;
- `FOLDER`: plain folders, either `images` and `masks` (a share is held out), or these below (or above) `train` and
  `val`. Values of a mask are the numbers of the classes, from 0; 255 is no class. `classes.txt` beside them names the
  classes, one a line, in order; a line may end in a colour (`sky #87ceeb`), and masks may then be painted in these.

**The rule for what is wrong.** A fault of the data set ends the command before anything is written: no such folder, no
picture with a mask, an unreadable list of classes. A fault of one pair is named with its file, the pair is skipped and
counted: a picture without mask or a mask without picture, a file that is empty, cut short or no image, a mask of
another size than its picture, a mask with a value or colour that stands for no class, a painted mask where
`classes.txt` has no colours. Training ends when too many are (`--guards.damaged`); evaluation and prediction go on,
and exit with status 1.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vmamba.data.images import DamagedImageError, image_files, read_image

NO_CLASS = 255
_MOST_CLASSES = 255  # masks are bytes, of which one stands for no class
_TRAIN, _HELD_OUT = ("train", "training"), ("val", "validation", "valid", "test")
_IMAGES, _MASKS = ("images", "image", "imgs"), ("masks", "mask", "annotations", "labels")
_SPLIT_SEED = 0  # as for classification: which images are held out does not depend on the seed of a run
_COLOUR = re.compile(r"^(?P<name>.*?)\s+#(?P<colour>[0-9a-fA-F]{6})$")


@dataclass(frozen=True)
class MaskFormat:
    """What the values of mask files mean.

    Attributes:
        classes: Number of classes.
        first: Value of the first class; a value below it is no class.
        colours: Colour of each class as 0xRRGGBB, for painted masks; empty where there are none.
    """

    classes: int
    first: int = 0
    colours: tuple[int, ...] = ()


@dataclass(frozen=True)
class PairSet:
    """Pictures with masks, read one at a time.

    Attributes:
        images: Path of each picture; empty where there is only a mask.
        masks: Path of each mask; empty where there is only a picture.
        format: What the values of the masks mean.
    """

    images: tuple[str, ...]
    masks: tuple[str, ...]
    format: MaskFormat

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return what a pair is called: the path of its picture."""
        return self.images[index] or self.masks[index]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return a picture as RGB and its mask `(H, W)` of unsigned bytes, NO_CLASS where there is no class.

        Raises:
            DamagedImageError: By the rule above.
            OSError: A file is missing or may not be read.
        """
        image, mask = self.images[index], self.masks[index]
        if not mask:
            raise DamagedImageError(image, "there is no mask of this name")
        if not image:
            raise DamagedImageError(mask, "there is no picture of this name")
        picture = read_image(image)
        values = read_mask(mask, self.format)
        if values.shape != (picture.height, picture.width):
            size = f"{values.shape[1]}×{values.shape[0]}"
            raise DamagedImageError(
                mask, f"the mask has {size} pixels, its picture {image} {picture.width}×{picture.height}"
            )
        return picture, values

    def subset(self, positions: Sequence[int]) -> PairSet:
        """Return the pairs at these positions."""
        return replace(
            self, images=tuple(self.images[i] for i in positions), masks=tuple(self.masks[i] for i in positions)
        )


@dataclass(frozen=True)
class SegmentationSource:
    """A data set for segmentation.

    Attributes:
        spec: What it was opened by.
        classes: Class names.
        train: Pairs to train on.
        held_out: Pairs held out.
        note: How the two were divided.
    """

    spec: str
    classes: tuple[str, ...]
    train: PairSet
    held_out: PairSet
    note: str


def open_segmentation_source(spec: str, held_out: float = 0.2) -> SegmentationSource:
    """Find the pairs of a data set; no picture is read but to count classes nobody has named.

    Args:
        spec: See the module.
        held_out: Share of the pairs held out where there is no split.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: The folder holds no pairs, or its list of classes cannot be read.
    """
    kind, colon, place = spec.partition(":")
    ade20k = bool(colon) and kind == "ade20k"
    root = Path(place if ade20k else spec).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; --data is ade20k:FOLDER or a folder of images and masks")
    train_places, held_out_places = _places(root)
    if train_places is None:
        raise ValueError(
            f"{root} must hold folders images and masks, or these below train and val; it holds"
            f" {', '.join(sorted(entry.name for entry in root.iterdir())[:6]) or 'nothing'}"
        )
    train_pairs = _pairs(*train_places)
    held_out_pairs = _pairs(*held_out_places) if held_out_places else ((), ())
    names, style = _classes(root, (*train_pairs[1], *held_out_pairs[1]), ade20k)
    train = PairSet(*train_pairs, style)
    if held_out_places:
        return SegmentationSource(spec, names, train, PairSet(*held_out_pairs, style), "the data set's own split")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
    number = min(max(round(len(train) * held_out), 1), len(train) - 1)
    if number < 1:
        raise ValueError(f"{root} holds one pair; two are needed, one of them to hold out")
    parts = [train.subset(sorted(part.tolist())) for part in (order[number:], order[:number])]
    return SegmentationSource(spec, names, parts[0], parts[1], f"a random {held_out:.0%}")


def _places(root: Path) -> tuple[tuple[Path, Path] | None, tuple[Path, Path] | None]:
    """Return the folders of pictures and masks to train on, and those held out; None where there are none."""
    split = [_pair_of_folders(root, names) for names in (_TRAIN, _HELD_OUT)]
    if split[0]:
        if not split[1]:
            raise ValueError(f"{root} has a folder {_TRAIN[0]} but none of {', '.join(_HELD_OUT)} beside it")
        return split[0], split[1]
    return _pair_of_folders(root, ("",)), None


def _pair_of_folders(root: Path, names: Sequence[str]) -> tuple[Path, Path] | None:
    for name in names:
        for image in _IMAGES:
            for mask in _MASKS:
                for pair in ((root / name / image, root / name / mask), (root / image / name, root / mask / name)):
                    if pair[0].is_dir() and pair[1].is_dir():
                        return pair
    return None


def _pairs(images: Path, masks: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Match pictures and masks by their path below the folder, extension aside; what has no partner is kept."""
    found = [
        {str(Path(path).relative_to(folder).with_suffix("")): path for path in image_files(folder)}
        for folder in (images, masks)
    ]
    if not found[0].keys() & found[1].keys():
        raise ValueError(f"no picture in {images} has a mask of the same name in {masks}")
    stems = sorted(found[0].keys() | found[1].keys())
    return tuple(found[0].get(stem, "") for stem in stems), tuple(found[1].get(stem, "") for stem in stems)


def _classes(root: Path, masks: Sequence[str], ade20k: bool) -> tuple[tuple[str, ...], MaskFormat]:
    if ade20k:
        names = _ade20k_names(root / "objectInfo150.txt")
        return names, MaskFormat(len(names), first=1)
    listed = root / "classes.txt"
    if listed.is_file():
        names, colours = _listed_classes(listed)
        return names, MaskFormat(len(names), colours=colours)
    number = _count_classes([mask for mask in masks if mask])
    return tuple(f"class {value}" for value in range(number)), MaskFormat(number)


def _ade20k_names(path: Path) -> tuple[str, ...]:
    """Read the names of ADE20K's classes: the last of five columns, synonyms cut off; numbers without the file."""
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, 151))
    lines = [line for line in _text(path).splitlines()[1:] if line.strip()]
    names = tuple(line.split("\t")[-1].partition(",")[0].strip() for line in lines)
    if len(names) != 150:
        raise ValueError(f"{path} names {len(names)} classes, not 150")
    return names


def _listed_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    painted = [_COLOUR.match(line) for line in lines]
    names = tuple(found["name"] if found else line for found, line in zip(painted, lines, strict=True))
    colours = tuple(int(found["colour"], 16) for found in painted if found)
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise ValueError(f"{path} names {len(names)} classes; 2 to {_MOST_CLASSES} are possible")
    if colours and len(colours) != len(names):
        raise ValueError(f"{path} gives {len(colours)} of {len(names)} classes a colour; all or none must have one")
    for what, values in (("name", names), ("colour", colours)):
        if len(set(values)) != len(values):
            raise ValueError(f"{path} gives two classes the same {what}")
    return names, colours


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None


def _count_classes(masks: Sequence[str]) -> int:
    """Return one more than the largest value in masks, which tells how many classes there are where nobody says so."""
    highest = -1
    for mask in masks:
        try:
            values = _values(mask)
        except (DamagedImageError, OSError):
            continue  # named when it is its turn to be read
        if values.ndim == 3:
            raise ValueError(f"{mask} is painted in colours: name the classes and their colours in classes.txt")
        known = values[values != NO_CLASS]
        highest = max(highest, int(known.max()) if known.size else -1)
    if not 1 <= highest < _MOST_CLASSES:
        raise ValueError(
            f"the masks have values up to {highest}: name the classes in classes.txt, one a line, if that is right"
            if highest < 1
            else f"the masks have values up to {highest}; classes are numbered from 0 to {_MOST_CLASSES - 1} at most"
        )
    return highest + 1


def read_mask(path: str | Path, style: MaskFormat) -> np.ndarray:
    """Read a mask as class numbers from 0, NO_CLASS where there is none; palettes count as numbers.

    Returns:
        `(H, W)`, unsigned bytes.

    Raises:
        DamagedImageError: It cannot be decoded, or holds a value or colour that stands for no class.
        OSError: It is missing or may not be read.
    """
    values = _values(path)
    if values.ndim == 3:
        return _from_colours(path, values, style)
    kept = values != NO_CLASS
    shifted = values.astype(np.int64) - style.first
    unknown = kept & ((shifted >= style.classes) | (values < 0))
    if unknown.any():
        shown = ", ".join(map(str, np.unique(values[unknown])[:4].tolist()))
        raise DamagedImageError(
            path,
            f"the mask has values that stand for no class ({shown}); classes are {style.first} to"
            f" {style.first + style.classes - 1}, and {NO_CLASS} is none",
        )
    return np.where(kept & (shifted >= 0), shifted, NO_CLASS).astype(np.uint8)


def _values(path: str | Path) -> np.ndarray:
    """Return a mask's numbers `(H, W)`, or its colours `(H, W, 3)` where its channels differ."""
    content = Path(path).read_bytes()
    if not content:
        raise DamagedImageError(path, "the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                image.load()
                plain = image.mode in ("L", "P", "1", "F") or image.mode.startswith("I")
                pixels = np.asarray(image if plain else image.convert("RGB"))
        except Image.DecompressionBombError:
            raise DamagedImageError(path, "more pixels than is safe to decode") from None
        except Exception as error:  # decoders meet corrupt data in many ways
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DamagedImageError(path, f"cannot be decoded ({reason})") from None
    if pixels.dtype.kind == "f":
        if not (pixels == np.rint(pixels)).all() or np.abs(pixels).max(initial=0) > 2**24:  # NaN differs from itself
            raise DamagedImageError(path, "the mask has values that are no whole numbers, and so of no class")
        pixels = pixels.astype(np.int64)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _from_colours(path: str | Path, pixels: np.ndarray, style: MaskFormat) -> np.ndarray:
    if not style.colours:
        raise DamagedImageError(path, "the mask is painted in colours, and classes.txt gives the classes none")
    coded = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    values = np.full(coded.shape, NO_CLASS, dtype=np.uint8)
    unknown = coded != 0xFFFFFF
    for number, colour in enumerate(style.colours):
        here = coded == colour
        values[here] = number
        unknown &= ~here
    if unknown.any():
        shown = ", ".join(f"#{int(colour):06x}" for colour in np.unique(coded[unknown])[:4])
        raise DamagedImageError(path, f"the mask has colours that stand for no class ({shown}); white is none")
    return values
