"""`vmamba eval` and `vmamba predict` with `--task detection`: average precision, and pictures of what was found."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import parse
from vmamba.training.recipe import TaskName

if TYPE_CHECKING:
    import torch
    from torchvision.models.detection import FasterRCNN

    from vmamba.data.coco import CocoSet
    from vmamba.training.detection_evaluation import DetectionReport, Precision


@dataclass(frozen=True)
class DetectionEvalOptions:
    """Measure how well a detector finds objects.

    Args:
        task: What the model does.
        checkpoint: Weights file, run folder or Hugging Face Hub id; by default the newest run below runs/.
        data: COCO's folder, a folder of train.json and val.json, or an annotation file; by default what the model was
            trained with.
        images: Folder of the images, where it is not beside the annotations.
        split: Which images: those held out from training, those trained on, or all of an annotation file.
        held_out: Share held out where there is no annotation file for that; by default as in training.
        batch_size: Images looked at at once.
        device: cpu, cuda, or auto for the best there is.
        workers: Processes that read images; -1 picks by the data.
        format: A table to read, or JSON.
        output: JSON file to write the whole report to.
    """

    task: TaskName = "detection"
    checkpoint: str | None = None
    data: str | None = None
    images: str | None = None
    split: Literal["held-out", "train", "all"] = "held-out"
    held_out: float | None = None
    batch_size: int = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = -1
    format: Literal["table", "json"] = "table"
    output: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")


@dataclass(frozen=True)
class DetectionPredictOptions:
    """Find objects in image files, and draw them.

    Args:
        images: Image files, folders (with all images below them) or globs.
        task: What the model does.
        checkpoint: Weights file, run folder or Hugging Face Hub id; by default the newest run below runs/.
        score: Confidence from which an object is shown.
        device: cpu, cuda, or auto for the best there is.
        format: A table to read, or JSON.
        output: Folder for the pictures with boxes, masks and labels.
    """

    images: list[str]
    task: TaskName = "detection"
    checkpoint: str | None = None
    score: float = 0.5
    device: Literal["auto", "cpu", "cuda"] = "auto"
    format: Literal["table", "json"] = "table"
    output: str = "predictions"

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score must lie in [0, 1], not {self.score}")


def headline(report: "DetectionReport", best: float) -> str:
    """Tell the figures of a finished run."""
    masks = f", of masks {report.mask.totals['AP'] or 0:.1%}" if report.mask else ""
    return (
        f"AP of boxes {report.box.totals['AP'] or 0:.1%}{masks} on {report.images:,} held-out images with"
        f" {report.objects:,} objects (best epoch {best:.1%})"
    )


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate as the flags say; return the exit status: 1 when images or records could not be used."""
    options = parse("eval", DetectionEvalOptions, argv)
    from rich.console import Console

    from vmamba.cli.opening import check_targets, to_json, write_text
    from vmamba.data.coco_loading import detection_evaluation_loader
    from vmamba.training.detection_evaluation import evaluate_detector
    from vmamba.training.processes import evaluation_group

    check_targets(options.output)
    group = evaluation_group(options.device)
    model, name, metadata = _open(options.checkpoint, group.device)
    images = _images(options, metadata, model)
    damaged: list[str] = []

    def batches() -> Any:
        loader = detection_evaluation_loader(
            images,
            options.batch_size,
            share=group.share,
            workers=options.workers,
            pin_memory=group.device.type == "cuda",
        )
        for batch in loader:
            damaged.extend(batch.damaged)
            yield batch.to(group.device)

    report = evaluate_detector(model, batches(), images)
    damaged = group.collected(damaged)
    problems = [*images.problems.lines, *damaged]
    if not group.speaks:
        return 1 if problems else 0
    content = {"checkpoint": name, "data": images.file, "split": options.split, **report.to_dict(), "skipped": problems}
    content["mended"] = images.problems.mended
    if options.output:
        write_text(options.output, to_json(content))
    if options.format == "json":
        print(to_json(content))
    else:
        print_report(report, f"{name} on {images.file}", Console())
    for problem in problems:
        print(f"vmamba eval: skipped {problem}", file=sys.stderr)
    for problem in images.problems.mended:
        print(f"vmamba eval: mended {problem}", file=sys.stderr)
    return 1 if problems else 0


def _open(checkpoint: str | None, device: "torch.device") -> "tuple[FasterRCNN, str, dict[str, Any]]":
    from vmamba.tasks.detection_checkpoint import load_detector
    from vmamba.training.run_folder import RunFolder, newest_checkpoint

    if checkpoint is None:
        checkpoint = str(newest_checkpoint())
        print(f"using the newest run: {checkpoint}", file=sys.stderr)
    elif Path(checkpoint).expanduser().is_dir():
        folder = RunFolder(Path(checkpoint).expanduser())
        checkpoint = str(folder.best if folder.best.is_file() else folder.last)
    model, metadata = load_detector(checkpoint)
    return model.to(device), checkpoint, metadata


def _images(options: DetectionEvalOptions, metadata: dict[str, Any], model: "FasterRCNN") -> "CocoSet":
    """Return the images of the flags, all of an annotation file; else those of the run, divided as it divided them."""
    from vmamba.data.coco import find_sets, read_coco
    from vmamba.tasks.detection import config_of

    reading: dict[str, Any] = {"masks": config_of(model).masks, "classes": metadata.get("labels")}
    held_out = options.split == "held-out"
    if options.data:
        file, folder = find_sets(options.data)[-1 if held_out else 0]
        return read_coco(file, options.images or folder, **reading)
    if not metadata.get("data"):
        raise ValueError("the weights do not say what they were trained with; name annotations with --data")
    found = find_sets(metadata["data"])
    if own := metadata.get("held_out_data"):
        found = [found[0], find_sets(own)[0]]
    separate = len(found) > 1
    file, folder = found[-1] if held_out else found[0]
    stored = metadata.get("held_out_images" if held_out and separate else "images")
    images = read_coco(file, options.images or stored or folder, **reading)
    if separate or options.split == "all":
        return images
    kept, out = images.split(options.held_out or metadata.get("held_out") or 0.2)
    return out if held_out else kept


def print_report(report: "DetectionReport", heading: str, console: Any) -> None:
    """Print the totals and the classes."""
    from rich.table import Table

    console.print(f"{heading}: {report.images:,} images, {report.objects:,} objects", highlight=False, soft_wrap=True)
    kinds: list[tuple[str, Precision]] = [("boxes", report.box), *([("masks", report.mask)] if report.mask else [])]
    table = Table("", *(name for name, _ in kinds))
    for figure in report.box.totals:
        table.add_row(figure, *(_share(precision.totals[figure]) for _, precision in kinds))
    console.print(table)
    table = Table("class", *(f"AP of {name}" for name, _ in kinds))
    for index, name in enumerate(report.classes):
        table.add_row(name, *(_share(precision.per_class[index]) for _, precision in kinds))
    console.print(table)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def predict(argv: Sequence[str]) -> int:
    """Find and draw as the flags say; return the exit status: 1 when some images are damaged."""
    options = parse("predict", DetectionPredictOptions, argv, positionals=[("images", "*")])
    from vmamba.cli.opening import pick_device, to_json
    from vmamba.cli.predict import find_images

    paths = find_images(options.images)
    model, _, metadata = _open(options.checkpoint, pick_device(options.device))
    folder = Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    records = [_find(model, path, folder / f"{name}.png", metadata, options) for path, name in _named(paths)]
    print(to_json(records) if options.format == "json" else _as_table(records))
    damaged = [record for record in records if record["error"]]
    for record in damaged:
        print(f"vmamba predict: skipped {record['file']}: {record['error']}", file=sys.stderr)
    if damaged:
        print(f"vmamba predict: {len(damaged)} of {len(records)} images could not be read", file=sys.stderr)
    return 1 if damaged else 0


def _named(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Give every image a name of its own for the picture."""
    taken: dict[str, int] = {}
    named = []
    for path in paths:
        stem = Path(path).stem
        number = taken[stem] = taken.get(stem, 0) + 1
        named.append((path, stem if number == 1 else f"{stem}-{number}"))
    return named


def _find(
    model: "FasterRCNN", path: str, target: Path, metadata: dict[str, Any], options: DetectionPredictOptions
) -> dict[str, Any]:
    import torch
    from torchvision.transforms.v2.functional import pil_to_tensor

    from vmamba.data.images import DamagedImageError, read_image
    from vmamba.tasks.detection import config_of
    from vmamba.training.detection_pictures import draw_objects

    record: dict[str, Any] = {"file": path, "error": None, "picture": None, "objects": []}
    try:
        picture = read_image(path)
    except DamagedImageError as error:
        return record | {"error": error.reason}
    except OSError as error:
        return record | {"error": error.strerror or str(error)}
    image = pil_to_tensor(picture).to(next(model.parameters()).device).float() / 255
    with torch.inference_mode():
        (found,) = model([image])
    found = {name: value[found["scores"] >= options.score] for name, value in found.items()}
    classes = metadata.get("labels") or [str(label) for label in range(1, config_of(model).classes + 1)]
    draw_objects(picture, found, classes).save(target)
    parts = zip(*(found[name].tolist() for name in ("labels", "scores", "boxes")), strict=True)
    objects = [
        {"label": classes[label - 1], "confidence": round(score, 6), "box": [round(edge, 2) for edge in box]}
        for label, score, box in parts
    ]
    return record | {"picture": str(target), "objects": objects}


def _as_table(records: Sequence[dict[str, Any]]) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table("file", "objects", "picture")
    for column in table.columns:
        column.overflow = "fold"
    for record in records:
        if record["error"]:
            table.add_row(record["file"], f"[red]unreadable: {record['error']}[/red]", "")
            continue
        found = ", ".join(f"{item['label']} {item['confidence']:.0%}" for item in record["objects"]) or "none"
        table.add_row(record["file"], found, record["picture"])
    stream = StringIO()
    Console(file=stream, width=Console().width).print(table)
    return stream.getvalue().rstrip("\n")
