"""`vmamba eval` and `vmamba predict` with `--task segmentation`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import parse
from vmamba.training.recipe import TaskName

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console

    from vmamba.data.segmentation_loaders import SegmentationPreprocessing
    from vmamba.tasks.segmentation import SegmentationReport, UperNet
    from vmamba.tasks.segmentation_inference import Segmenter


@dataclass(frozen=True)
class SegmentationOptions:
    """How a segmentation model looks at pictures.

    Args:
        task: What the model does.
        checkpoint: Weights file, run folder, or Hugging Face Hub id of a segmentation model; by default the newest run
            below runs/.
        mode: 'whole' segments a picture at once, 'slide' a window at a time; by default as in training.
        window: Side of the window in pixels; by default the crop of training.
        step: Pixels from one window to the next; 0 takes two thirds of the window.
        short_side: Pixels the shorter side of a picture is brought to; 0 leaves pictures as they are. By default as in
            training.
        scales: Factors the picture is resized by beyond that; what is found at all of them is averaged.
        flip: Whether the mirrored picture is segmented too.
        device: cpu, cuda, or auto for the best there is.
    """

    task: TaskName = "segmentation"
    checkpoint: str | None = None
    mode: Literal["whole", "slide"] | None = None
    window: int | None = None
    step: int = 0
    short_side: int | None = None
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 0:
            raise ValueError(f"short_side must be 0 or more, not {self.short_side}")


@dataclass(frozen=True)
class SegmentationEvalOptions(SegmentationOptions):
    """Measure how well a model segments pictures with masks.

    Args:
        data: ade20k:FOLDER, or a folder of images and masks; by default what the model was trained on.
        split: Which pairs: those held out from training, those trained on, or all.
        held_out: Share held out where the data brings no split of its own; by default as in training.
        workers: Processes that read pictures; -1 picks by the data.
        format: A table to read, or JSON.
        output: JSON file to write the whole report to.
    """

    data: str | None = None
    split: Literal["held-out", "train", "all"] = "held-out"
    held_out: float | None = None
    workers: int = -1
    format: Literal["table", "json"] = "table"
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")


@dataclass(frozen=True)
class SegmentationPredictOptions(SegmentationOptions):
    """Segment image files: writes each with its classes laid over it, and a mask of class numbers.

    Args:
        images: Image files, folders (with all images below them) or globs.
        output: Folder to write NAME.overlay.png and NAME.mask.png to.
        format: A table to read, or JSON.
    """

    images: list[str] = field(default_factory=list)
    output: str = "predictions"
    format: Literal["table", "json"] = "table"


for _options in (SegmentationEvalOptions, SegmentationPredictOptions):
    _shared = (SegmentationOptions.__doc__ or "").partition("Args:\n")[2].rstrip()
    _options.__doc__ = f"{(_options.__doc__ or '').rstrip()}\n{_shared}\n"


@dataclass(frozen=True)
class OpenedSegmenter:
    """A segmentation model ready for use, and what was stored with it."""

    model: UperNet
    segmenter: Segmenter
    preprocessing: SegmentationPreprocessing
    name: str
    labels: tuple[str, ...] | None
    metadata: dict[str, Any]
    device: torch.device

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, numbers where nobody stored them."""
        return self.labels or tuple(f"class {index}" for index in range(self.model.num_classes))

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """Colours of the classes in painted masks; empty where there are none."""
        return [(c >> 16 & 255, c >> 8 & 255, c & 255) for c in self.metadata.get("colours") or ()]


def open_segmenter(options: SegmentationOptions, device: str) -> OpenedSegmenter:
    """Open a segmentation model and what it was trained to see.

    Raises:
        ValueError, FileNotFoundError: There is no such model, or it is of another task.
    """
    from dataclasses import replace

    from vmamba.cli.opening import pick_device
    from vmamba.data.segmentation_loaders import SegmentationPreprocessing
    from vmamba.tasks.segmentation_checkpoint import load_segmentation_model
    from vmamba.tasks.segmentation_inference import InferenceOptions, Segmenter
    from vmamba.training.run_folder import RunFolder, newest_checkpoint

    target = pick_device(device) if device in ("auto", "cpu", "cuda") else _device(device)
    place = options.checkpoint
    if place is None:
        place = str(newest_checkpoint())
        print(f"using the newest run: {place}", file=sys.stderr)
    elif Path(place).expanduser().is_dir():
        folder = RunFolder(Path(place).expanduser())
        place = str(folder.best if folder.best.is_file() else folder.last)
    model, metadata = load_segmentation_model(place)
    labels = metadata.get("labels")
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f"{place} stores {len(labels)} labels for {model.num_classes} classes")
    known = {name: metadata[name] for name in ("short_side", "long_side", "mean", "std") if name in metadata}
    preprocessing = SegmentationPreprocessing(**known)
    if options.short_side is not None:
        preprocessing = replace(preprocessing, short_side=options.short_side)
    inference = InferenceOptions(
        options.mode or metadata.get("evaluation", "whole"),
        options.window or metadata.get("crop", 512),
        options.step,
        tuple(options.scales),
        options.flip,
    )
    model = model.to(target)
    segmenter = Segmenter(model, inference)
    return OpenedSegmenter(model, segmenter, preprocessing, place, tuple(labels) if labels else None, metadata, target)


def _device(name: str) -> torch.device:
    import torch

    return torch.device(name)


def headline(report: SegmentationReport, best: float) -> str:
    """Say how well the held-out pictures were segmented."""
    return (
        f"mIoU {report.miou:.2%}, {report.pixel_accuracy:.2%} of the pixels of {report.count:,} held-out pictures right"
        f" (best epoch {best:.2%})"
    )


def evaluate_segmenter(argv: Sequence[str]) -> int:
    """Evaluate as the flags say; return the exit status: 1 when pairs could not be read."""
    options = parse("eval", SegmentationEvalOptions, argv)
    from rich.console import Console

    from vmamba.cli.opening import check_targets, to_json, write_text
    from vmamba.data.reading import guarded
    from vmamba.data.segmentation import PairSet, open_segmentation_source
    from vmamba.data.segmentation_loaders import evaluation_pairs
    from vmamba.tasks.segmentation import evaluate
    from vmamba.training.processes import evaluation_group

    check_targets(options.output)
    group = evaluation_group(options.device)
    opened = open_segmenter(options, str(group.device))
    spec = options.data or opened.metadata.get("data")
    if not spec:
        raise ValueError(f"{opened.name} does not tell what it was trained on; name pictures and masks with --data")
    source = open_segmentation_source(spec, options.held_out or opened.metadata.get("held_out") or 0.2)
    _check_classes(opened, source.classes, source.spec)
    parts = {"held-out": [source.held_out], "train": [source.train], "all": [source.train, source.held_out]}
    chosen = parts[options.split]
    pairs = PairSet(
        tuple(name for part in chosen for name in part.images),
        tuple(name for part in chosen for name in part.masks),
        source.train.format,
    )
    loader = evaluation_pairs(pairs, opened.preprocessing, share=group.share, workers=options.workers)
    damaged: list[str] = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        found: Any
        for found in guarded(loader):
            damaged.extend(found.damaged)
            yield found.images.to(opened.device), found.masks.to(opened.device)

    report = evaluate(opened.segmenter, batches(), opened.labels or source.classes, opened.device)
    problems = group.collected(damaged)
    if not group.speaks:
        return 1 if problems else 0
    content = {"checkpoint": opened.name, "data": source.spec, "split": options.split, **report.to_dict()}
    text = to_json({**content, "damaged": problems})
    if options.output:
        write_text(options.output, text)
    if options.format == "json":
        print(text)
    else:
        heading = f"{opened.name} on {source.spec}: {report.count:,} pictures ({options.split})"
        print_report(report, heading, Console())
    for problem in problems:
        print(f"vmamba eval: skipped {problem}", file=sys.stderr)
    return 1 if problems else 0


def _check_classes(opened: OpenedSegmenter, classes: tuple[str, ...], spec: str) -> None:
    if len(classes) != opened.model.num_classes:
        raise ValueError(f"{opened.name} knows {opened.model.num_classes} classes, {spec} has {len(classes)}")
    if opened.labels and opened.labels != classes:
        number = next(i for i, (one, other) in enumerate(zip(opened.labels, classes, strict=True)) if one != other)
        raise ValueError(
            f"class {number} is {opened.labels[number]!r} in {opened.name} and {classes[number]!r} in {spec};"
            " masks are compared by number, so the names must be the same, in the same order"
        )


def print_report(report: SegmentationReport, heading: str, console: Console) -> None:
    """Print the totals and the classes."""
    from rich.table import Table

    console.print(heading, highlight=False, soft_wrap=True)
    console.print(
        f"mIoU {report.miou:.2%}   pixel accuracy {report.pixel_accuracy:.2%}   mean class accuracy"
        f" {report.mean_accuracy:.2%}",
        highlight=False,
    )
    table = Table("class", "pixels", "IoU", "found", "most often taken for")
    for column in table.columns[1:4]:
        column.justify = "right"
    for index, name in enumerate(report.classes):
        row = report.confusion[index]
        total = sum(row)
        wrong = sorted(((n, other) for other, n in enumerate(row) if n and other != index), key=lambda pair: -pair[0])
        mistakes = ", ".join(f"{report.classes[other]} ({n / total:.1%})" for n, other in wrong[:3])
        shown = ("–" if value is None else f"{value:.1%}" for value in (report.iou[index], report.accuracy[index]))
        table.add_row(name, f"{total:,}", *shown, mistakes)
    console.print(table)


def predict_masks(argv: Sequence[str]) -> int:
    """Segment as the flags say; return the exit status: 1 when some images are damaged."""
    options = parse("predict", SegmentationPredictOptions, argv, positionals=[("images", "*")])
    from vmamba.cli.predict import find_images

    paths = find_images(options.images)
    opened = open_segmenter(options, options.device)
    folder = Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    stems = Counter(Path(path).stem for path in paths)
    records = []
    for number, path in enumerate(paths):
        stem = Path(path).stem
        records.append(_segment_file(opened, path, folder, stem if stems[stem] == 1 else f"{stem}-{number + 1}"))
    if options.format == "json":
        print(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        _print_records(records)
    damaged = [record for record in records if record["error"]]
    for record in damaged:
        print(f"vmamba predict: skipped {record['file']}: {record['error']}", file=sys.stderr)
    return 1 if damaged else 0


def _segment_file(opened: OpenedSegmenter, path: str, folder: Path, stem: str) -> dict[str, Any]:
    from vmamba.data.images import DamagedImageError, read_image
    from vmamba.training.segmentation_pictures import draw_overlay, index_picture

    record: dict[str, Any] = {"file": path, "error": None, "overlay": None, "mask": None, "classes": {}}
    try:
        picture = read_image(path)
    except DamagedImageError as error:
        return {**record, "error": error.reason}
    except OSError as error:
        return {**record, "error": error.strerror or str(error)}
    image = opened.preprocessing(picture)[None].to(opened.device)
    labels = opened.segmenter(image, (picture.height, picture.width))[0].cpu().numpy()
    overlay, mask = folder / f"{stem}.overlay.png", folder / f"{stem}.mask.png"
    draw_overlay(picture, labels, opened.classes, opened.colours).save(overlay)
    index_picture(labels, opened.classes, opened.colours).save(mask)
    return {**record, "overlay": str(overlay), "mask": str(mask), "classes": _shares(labels, opened.classes)}


def _shares(labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Return the share of the picture each class that occurs takes, the largest first."""
    import numpy as np

    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    return {classes[i]: round(float(counts[i] / labels.size), 6) for i in order if counts[i]}


def _print_records(records: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "classes", "overlay")
    for column in table.columns:
        column.overflow = "fold"
    for record in records:
        found = ", ".join(f"{name} {share:.1%}" for name, share in list(record["classes"].items())[:5])
        unreadable = f"[red]unreadable: {record['error']}[/red]"
        table.add_row(record["file"], unreadable if record["error"] else found, record["overlay"] or "")
    Console().print(table)
