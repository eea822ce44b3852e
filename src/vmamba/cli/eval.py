"""`vmamba eval`: accuracy of a model on labelled images; under torchrun, several processes share them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import parse
from vmamba.cli.tasks import part, task_of
from vmamba.training.recipe import TaskName

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from vmamba.cli.opening import OpenedModel
    from vmamba.data.reading import Share
    from vmamba.data.sources import ImageSet, ShardSet, Source
    from vmamba.tasks.classification import ClassificationReport


@dataclass(frozen=True)
class EvalOptions:
    """Measure how well a model classifies labelled images.

    Args:
        task: What the model does; each task has flags of its own, which `--task NAME --help` lists.
        checkpoint: Weights file, run folder, Hugging Face Hub id or name of a published variant; by default the
            newest run below runs/.
        weights: Of a run folder: 'best' or 'last', which are the moving average where the run keeps one; 'ema' or
            'raw', those of the newest checkpoint.
        data: digits, fashion-mnist[:FOLDER], wds:SHARDS, hf:FOLDER or a folder of class folders; by default what the
            model was trained on.
        split: Which images: those held out from training, those trained on, or all.
        held_out: Share held out where the data brings no split of its own; by default as in training.
        img_size: Side of the images in pixels; by default as in training.
        crop_pct: Share of the resized picture's side that is kept; by default as in training.
        crop_mode: 'center' keeps the aspect ratio and cuts the rest off; 'squash' keeps all and the ratio not.
        batch_size: Images classified at once.
        device: cpu, cuda, or auto for the best there is.
        workers: Processes that read images; -1 picks by the data.
        format: A table to read, or JSON.
        output: JSON file to write the whole report to.
        picture: PNG file to draw the confusion matrix to.
    """

    task: TaskName = "classification"
    checkpoint: str | None = None
    weights: Literal["best", "last", "ema", "raw"] = "best"
    data: str | None = None
    split: Literal["held-out", "train", "all"] = "held-out"
    held_out: float | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash"] | None = None
    batch_size: int = 128
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = -1
    format: Literal["table", "json"] = "table"
    output: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], not {self.crop_pct}")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")


def run(argv: Sequence[str]) -> int:
    """Evaluate as the task does."""
    return part(task_of(argv), "evaluate")(argv)


def evaluate_classifier(argv: Sequence[str]) -> int:
    """Evaluate as the flags say; return the exit status: 1 when images could not be read."""
    options = parse("eval", EvalOptions, argv)
    from rich.console import Console

    from vmamba.cli.opening import check_targets, open_model, to_json, write_text
    from vmamba.data.sources import open_source
    from vmamba.training.processes import evaluation_group, leave

    check_targets(options.output, options.picture)
    group = evaluation_group(options.device)
    opened = open_model(_file_of(options), str(group.device), options.img_size)
    opened = _cropped(opened, options)
    spec = options.data or opened.metadata.get("data") or "digits"
    held_out = options.held_out or opened.metadata.get("held_out") or 0.2
    source = open_source(spec, held_out)
    damaged: list[str] = []
    report = _measure(opened, source, _images_of(source, options.split), options, damaged, group.share)
    damaged = group.collected(damaged)
    leave()
    if not group.speaks:
        return 1 if damaged else 0
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


def _file_of(options: EvalOptions) -> str | None:
    """Return the weights file of a run folder that `weights` names, or what was named as it is."""
    place = Path(options.checkpoint or "").expanduser()
    if options.checkpoint is None or not place.is_dir():
        if options.weights != "best":
            raise ValueError(
                f"--weights {options.weights} chooses among those of a run; --checkpoint must be its folder"
            )
        return options.checkpoint
    from vmamba.training.checkpointing import CheckpointFolder
    from vmamba.training.run_folder import RunFolder

    folder = RunFolder(place)
    if not any(path.exists() for path in (folder.config, folder.best, folder.last)):
        raise FileNotFoundError(f"{place} is not the folder of a run: it holds neither config.yaml nor weights")
    if options.weights in ("best", "last"):
        path = folder.best if options.weights == "best" and folder.best.is_file() else folder.last
    else:
        newest = CheckpointFolder(folder.checkpoints).read_newest(lambda sentence: print(sentence, file=sys.stderr))
        path = newest.path / ("model.safetensors" if options.weights == "raw" else "ema.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{place} holds no {path.name}: the run keeps no such weights, or none yet")
    return str(path)


def _cropped(opened: "OpenedModel", options: EvalOptions) -> "OpenedModel":
    asked = {"crop_pct": options.crop_pct, "crop_mode": options.crop_mode}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(opened, preprocessing=replace(opened.preprocessing, **changes))


def _images_of(source: "Source", split: str) -> "ImageSet | ShardSet":
    if split == "all":
        return source.train.joined(source.held_out)  # type: ignore[arg-type]  # both are of one kind
    return source.train if split == "train" else source.held_out


def _measure(
    opened: "OpenedModel",
    source: "Source",
    images: "ImageSet | ShardSet",
    options: EvalOptions,
    damaged: list[str],
    share: "Share",
) -> "ClassificationReport":
    from vmamba.data.loaders import evaluation_loader
    from vmamba.data.reading import guarded
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
    transform = opened.preprocessing.transform()
    loader = evaluation_loader(images, transform, options.batch_size, share=share, workers=options.workers)

    def batches() -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        for batch in guarded(loader):
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
