"""`vmamba eval`: accuracy of a model on labelled images."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmamba.cli.arguments import parse

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from vmamba.cli.opening import OpenedModel
    from vmamba.data.sources import ImageSet, Source
    from vmamba.tasks.classification import ClassificationReport


@dataclass(frozen=True)
class EvalOptions:
    """Measure how well a model classifies labelled images.

    Args:
        checkpoint: Weights file, run folder, Hugging Face Hub id or name of a published variant; by default the
            newest run below runs/.
        data: digits, fashion-mnist, fashion-mnist:FOLDER or a folder of class folders; by default what the model was
            trained on.
        split: Which images: those held out from training, those trained on, or all.
        held_out: Share held out where the data brings no split of its own; by default as in training.
        img_size: Side of the images in pixels; by default as in training.
        batch_size: Images classified at once.
        device: cpu, cuda, or auto for the best there is.
        workers: Processes that read images; -1 picks by the data.
        format: A table to read, or JSON.
        output: JSON file to write the whole report to.
        picture: PNG file to draw the confusion matrix to.
    """

    checkpoint: str | None = None
    data: str | None = None
    split: Literal["held-out", "train", "all"] = "held-out"
    held_out: float | None = None
    img_size: int | None = None
    batch_size: int = 128
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = -1
    format: Literal["table", "json"] = "table"
    output: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")


def run(argv: Sequence[str]) -> int:
    """Evaluate as the flags say; return the exit status: 1 when images could not be read."""
    options = parse("eval", EvalOptions, argv)
    from rich.console import Console

    from vmamba.cli.opening import open_model, to_json, write_text
    from vmamba.data.sources import open_source

    opened = open_model(options.checkpoint, options.device, options.img_size)
    spec = options.data or opened.metadata.get("data") or "digits"
    held_out = options.held_out or opened.metadata.get("held_out") or 0.2
    source = open_source(spec, held_out)
    images = {"held-out": source.held_out, "train": source.train, "all": source.train.joined(source.held_out)}
    damaged: list[str] = []
    report = _measure(opened, source, images[options.split], options, damaged)
    content = {"checkpoint": opened.name, "data": source.spec, "split": options.split, **report.to_dict()}
    text = to_json({**content, "damaged": damaged})
    if options.output:
        write_text(options.output, text)
    if options.picture:
        from vmamba.training.pictures import draw_confusion

        draw_confusion(report.confusion, report.classes, Path(options.picture).expanduser())
    if options.format == "json":
        print(text)
    else:
        which = {"held-out": f"held out ({source.note})", "train": "trained on", "all": "trained on and held out"}
        heading = f"{opened.name} on {source.spec}: {report.count:,} images {which[options.split]}"
        print_report(report, heading, Console())
    for problem in damaged:
        print(f"vmamba eval: skipped {problem}", file=sys.stderr)
    return 1 if damaged else 0


def _measure(
    opened: "OpenedModel", source: "Source", images: "ImageSet", options: EvalOptions, damaged: list[str]
) -> "ClassificationReport":
    from vmamba.data.loaders import evaluation_loader
    from vmamba.data.sources import with_labels
    from vmamba.tasks.classification import evaluate

    labels = opened.labels
    if labels is None and len(source.classes) != opened.model.config.num_classes:
        raise ValueError(
            f"{opened.name} knows {opened.model.config.num_classes} classes without names;"
            f" {source.spec} has {len(source.classes)}"
        )
    labels = labels or source.classes
    images = with_labels(images, source.classes, labels)
    loader = evaluation_loader(images, opened.preprocessing.transform(), options.batch_size, workers=options.workers)

    def batches() -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        for batch in loader:
            damaged.extend(batch.damaged)
            yield batch.images.to(opened.device), batch.targets.to(opened.device)

    return evaluate(opened.model, batches(), labels)


def print_report(report: "ClassificationReport", heading: str, console: "Console") -> None:
    """Print the totals, the classes and the most frequent mistakes."""
    from rich.table import Table

    console.print(heading, highlight=False, soft_wrap=True)
    console.print(
        f"top-1 {report.top1:.2%}   top-5 {report.top5:.2%}   cross-entropy {report.loss:.4f} nats", highlight=False
    )
    table = Table("class", "images", "right", "most often taken for")
    for column in table.columns[1:3]:
        column.justify = "right"
    for index, (name, share) in enumerate(zip(report.classes, report.per_class, strict=True)):
        row = report.confusion[index]
        wrong = sorted(((n, other) for other, n in enumerate(row) if n and other != index), key=lambda pair: -pair[0])
        mistakes = ", ".join(f"{report.classes[other]} ({n})" for n, other in wrong[:3])
        table.add_row(name, str(sum(row)), "–" if share is None else f"{share:.1%}", mistakes)
    console.print(table)
