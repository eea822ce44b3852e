"""`vmamba predict`: what is in image files."""

import csv
import glob
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import UsageError, parse
from vmamba.cli.tasks import part, task_of
from vmamba.training.recipe import TaskName

if TYPE_CHECKING:
    from vmamba.cli.opening import OpenedModel


@dataclass(frozen=True)
class PredictOptions:
    """Say what is in image files.

    Args:
        images: Image files, folders (with all images below them) or globs.
        task: What the model does; each task has flags of its own, which `--task NAME --help` lists.
        checkpoint: Weights file, run folder, Hugging Face Hub id or name of a published variant; by default the
            newest run below runs/.
        top: How many of the most probable labels to give.
        img_size: Side of the images in pixels; by default as in training.
        batch_size: Images classified at once.
        device: cpu, cuda, or auto for the best there is.
        format: A table to read, JSON or CSV.
        output: File to write to instead of standard output.
    """

    images: list[str]
    task: TaskName = "classification"
    checkpoint: str | None = None
    top: int = 3
    img_size: int | None = None
    batch_size: int = 32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    format: Literal["table", "json", "csv"] = "table"
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


def run(argv: Sequence[str]) -> int:
    """Predict as the task does."""
    return part(task_of(argv), "predict")(argv)


def predict_classes(argv: Sequence[str]) -> int:
    """Classify as the flags say; return the exit status: 1 when some images are damaged."""
    options = parse("predict", PredictOptions, argv, positionals=[("images", "*")])
    paths = find_images(options.images)
    from vmamba.cli.opening import check_targets, open_model, write_text

    check_targets(options.output)
    opened = open_model(options.checkpoint, options.device, options.img_size)
    records = classify(opened, paths, options.top, options.batch_size)
    text = _FORMATS[options.format](records)
    if options.output:
        write_text(options.output, text)
    else:
        print(text)
    damaged = [record for record in records if record["error"]]
    for record in damaged:
        print(f"vmamba predict: skipped {record['file']}: {record['error']}", file=sys.stderr)
    if damaged:
        print(f"vmamba predict: {len(damaged)} of {len(records)} images could not be read", file=sys.stderr)
    return 1 if damaged else 0


def find_images(words: Sequence[str]) -> list[str]:
    """Return the files that paths, folders and globs stand for, each once, in their order.

    Raises:
        UsageError: No word was given.
        FileNotFoundError: A word stands for nothing.
    """
    from vmamba.data.images import image_files

    if not words:
        raise UsageError("name images: files, folders or globs")
    found: dict[str, None] = {}
    for word in words:
        path = Path(word).expanduser()
        matches = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise FileNotFoundError(f"there is no file, folder or match for {word}")
        for match in matches:
            below = image_files(match) if Path(match).is_dir() else [match]
            found.update(dict.fromkeys(below))
    if not found:
        raise FileNotFoundError(f"there are no images in {', '.join(words)}")
    return list(found)


def classify(opened: "OpenedModel", paths: Sequence[str], top: int, batch_size: int) -> list[dict[str, Any]]:
    """Classify image files.

    Returns:
        For each file its name, `error` (None, or why it could not be read), and `predictions`: label and confidence of
        the `top` most probable classes, most probable first.
    """
    import torch

    from vmamba.data.images import DamagedImageError, read_image

    labels = opened.labels or _default_labels(opened.model.config.num_classes)
    transform = opened.preprocessing.transform()
    records: list[dict[str, Any]] = [{"file": path, "error": None, "predictions": []} for path in paths]
    for first in range(0, len(paths), batch_size):
        readable, tensors = [], []
        for record in records[first : first + batch_size]:
            try:
                tensors.append(transform(read_image(record["file"])))
                readable.append(record)
            except DamagedImageError as error:
                record["error"] = error.reason
            except OSError as error:
                record["error"] = error.strerror or str(error)
        if not readable:
            continue
        with torch.inference_mode():
            shares = opened.model(torch.stack(tensors).to(opened.device)).float().softmax(1).cpu()
        best = shares.topk(min(top, shares.shape[1]), dim=1)
        for record, values, indices in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
            record["predictions"] = [
                {"label": labels[index], "confidence": round(value, 6)}
                for value, index in zip(values, indices, strict=True)
            ]
    return records


def _default_labels(number: int) -> list[str]:
    """Name the classes of weights that store no labels: ImageNet's for a thousand, numbers otherwise."""
    if number == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(number)]
    return [str(index) for index in range(number)]


def _as_table(records: Sequence[dict[str, Any]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "label", "confidence", "then")
    table.columns[0].overflow = "fold"
    for record in records:
        first, *others = record["predictions"] or [None]
        if first is None:
            table.add_row(record["file"], f"[red]unreadable: {record['error']}[/red]", "", "")
            continue
        then = ", ".join(f"{other['label']} {other['confidence']:.1%}" for other in others)
        table.add_row(record["file"], first["label"], f"{first['confidence']:.1%}", then)
    console = Console(file=io.StringIO(), width=Console().width, force_terminal=sys.stdout.isatty())
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def _as_json(records: Sequence[dict[str, Any]]) -> str:
    from vmamba.cli.opening import to_json

    return to_json(records)


def _as_csv(records: Sequence[dict[str, Any]]) -> str:
    places = max((len(record["predictions"]) for record in records), default=0)
    columns = [f"{what}_{place}" for place in range(1, places + 1) for what in ("label", "confidence")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", *columns, "error"])
    for record in records:
        cells = [cell for entry in record["predictions"] for cell in (entry["label"], entry["confidence"])]
        writer.writerow([record["file"], *cells, *[""] * (len(columns) - len(cells)), record["error"] or ""])
    return stream.getvalue().rstrip("\n")


_FORMATS = {"table": _as_table, "json": _as_json, "csv": _as_csv}
