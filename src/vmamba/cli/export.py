"""`vmamba export`: a model as ONNX, as a `torch.export` program or as an AOTInductor package, proven on real images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import UsageError, parse
from vmamba.cli.ending import leaving_on_sigterm

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from vmamba.cli.opening import OpenedModel
    from vmamba.data.sources import Source
    from vmamba.deployment.export import ExportReport
    from vmamba.deployment.files import Description


_PYRAMID = ("p2", "p3", "p4", "p5", "p6")


@dataclass(frozen=True)
class ExportOptions:
    """Export a model to an .onnx or .pt2 file and run the file against the model on real images at three sizes.

    Args:
        source: Weights file, run folder, Hugging Face Hub id, or name of a variant.
        target: File to write; by default the source's name with the format's ending, here.
        format: onnx; program (torch.export); aoti (an AOTInductor package for this kind of machine; needs a C++
            compiler while it is built).
        task: classification gives logits, segmentation logits at a quarter of the image's size, features the maps of
            the four stages, or of a detector's feature pyramid; by default what the file holds.
        precision: float32 or float16, of weights, images and outputs.
        quantization: int8-weights or int8-dynamic, for ONNX on CPUs.
        pretrained: Whether a variant's name stands for its published weights; false exports freshly initialised ones.
        img_size: Height and width to fix, in pixels; by default both stay open.
        images: Image file, folder or glob to prove the export on, or a list of them; by default two photographs that
            come with scikit-learn.
        data: Data set whose held-out images tell the accuracy of the exported file and of the model; see `vmamba eval`.
        device: What an AOTInductor package is for.
        overwrite: Replace the target if it exists.
    """

    source: str | None = None
    target: str | None = None
    format: Literal["onnx", "program", "aoti"] | None = None
    task: Literal["classification", "features", "segmentation"] | None = None
    precision: Literal["float32", "float16"] = "float32"
    quantization: Literal["none", "int8-weights", "int8-dynamic"] = "none"
    pretrained: bool = True
    img_size: int | None = None
    images: list[str] | str | None = None
    data: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    overwrite: bool = False


def run(argv: Sequence[str]) -> int:
    """Export as the words say."""
    options = parse("export", ExportOptions, argv, positionals=[("source", "?"), ("target", "?")])
    if not options.source:
        raise UsageError("name what to export: vmamba export SOURCE [TARGET], where TARGET ends in .onnx or .pt2")
    format = options.format or ("program" if (options.target or "").endswith(".pt2") else "onnx")
    if options.img_size is not None and options.img_size < 32:
        raise ValueError(f"img_size must be 32 or more, not {options.img_size}")
    if options.data and options.task not in (None, "classification"):
        raise ValueError("--data measures accuracy, which is a matter of --task classification")
    from vmamba.data.sources import open_source
    from vmamba.deployment.export import export
    from vmamba.deployment.files import SUFFIXES

    name = Path(options.source).stem or options.source
    target = Path(options.target or f"{name}{SUFFIXES[format]}")
    subject = _open(options)
    data = open_source(options.data) if options.data else None  # now rather than after the work
    if options.data and subject.classifier is None:
        raise ValueError("--data measures accuracy, which is a matter of --task classification")
    told = subject.description
    numbers = options.precision if options.quantization == "none" else options.quantization
    print(f"exporting {told.source}: {told.task} to {target} ({format}, {numbers})", file=sys.stderr)
    with leaving_on_sigterm("export"):
        report = export(
            subject.model,
            target,
            told,
            format=format,
            precision=options.precision,
            quantization=options.quantization,
            device=options.device,
            photographs=_photographs(options.images),
            img_size=None if options.img_size is None else (options.img_size, options.img_size),
            overwrite=options.overwrite,
        )
    _print(report)
    if data is not None and subject.classifier is not None:
        _print_accuracy(subject.classifier, target, data, options.device)
    return 0


@dataclass(frozen=True)
class _Subject:
    """What is exported, and what the file will say of it; `classifier` for those that can be measured."""

    model: nn.Module
    description: Description
    classifier: OpenedModel | None = None


def _open(options: ExportOptions) -> _Subject:
    """Open what the flags name.

    Raises:
        ValueError, FileNotFoundError: There is no such thing, or it does not do the task asked for.
    """
    from vmamba.cli.opening import held_task, open_model
    from vmamba.models.config import list_models
    from vmamba.training.run_folder import RunFolder

    source = options.source or ""
    if options.pretrained:
        place = source
        if Path(source).expanduser().is_dir():
            folder = RunFolder(Path(source).expanduser())
            place = str(folder.best if folder.best.is_file() else folder.last)
        held = held_task(place)
        if held == "segmentation":
            return _segmenter(place, options.task or held)
        if held == "detection":
            return _detector(place, options.task or held)
    if options.task == "segmentation":
        raise ValueError(f"{source} holds no segmentation model; train one with `vmamba train --task segmentation`")
    try:
        opened = open_model(source, "cpu") if options.pretrained else _untrained(source)
    except ValueError as error:
        if options.pretrained and source in list_models(published=True):
            raise ValueError(f"{error}; --pretrained false exports it untrained") from None
        raise
    task = options.task or "classification"
    model = _model(opened, task)
    return _Subject(model, _description(opened, task), opened if task == "classification" else None)


def _segmenter(place: str, task: str) -> _Subject:
    from vmamba.data.segmentation_loaders import SegmentationPreprocessing
    from vmamba.models.config import variant_name
    from vmamba.tasks.segmentation_checkpoint import load_segmentation_model

    if task == "classification":
        raise ValueError(f"{place} holds a segmentation model: --task segmentation, or features for its backbone")
    model, metadata = load_segmentation_model(place)
    known = {name: metadata[name] for name in ("short_side", "long_side", "mean", "std") if name in metadata}
    name = (variant_name(model.config) if model.config else None) or "VMamba"
    features = task == "features"
    return _Subject(
        model.backbone if features else model,
        _described(
            place,
            name if features else f"UperNet on {name}",
            task,
            tuple(f"stage{i}" for i in range(4)) if features else ("logits",),
            () if features else tuple(metadata.get("labels") or ()),
            asdict(SegmentationPreprocessing(**known)),
        ),
    )


def _detector(place: str, task: str) -> _Subject:
    from vmamba.tasks.detection_checkpoint import load_detector

    if task != "features":
        raise ValueError(
            f"{place} holds a detector, which cannot be exported whole: how many boxes it proposes and keeps depends on"
            " the image, and torch.export wants a program of fixed steps. Its backbone with the feature pyramid can:"
            " --task features"
        )
    model, _ = load_detector(place)
    body = model.backbone
    return _Subject(body, _described(place, "feature pyramid of a detector", task, _PYRAMID, (), {}))


def _described(
    place: str,
    model: str,
    task: str,
    outputs: tuple[str, ...],
    labels: tuple[str, ...],
    preprocessing: dict[str, Any],
) -> Description:
    from vmamba.deployment.export import sha256_of
    from vmamba.deployment.files import Description

    return Description(
        model=model,
        task=task,  # type: ignore[arg-type]
        outputs=outputs,
        labels=labels,
        preprocessing=preprocessing,
        source=place,
        source_sha256=sha256_of(Path(place).expanduser()),
    )


def _untrained(name: str) -> OpenedModel:
    """Build a variant with fresh weights, for trying things out."""
    import torch

    from vmamba.cli.opening import OpenedModel
    from vmamba.data.transforms import Preprocessing
    from vmamba.models.registry import create_model

    torch.manual_seed(0)
    model = create_model(name).eval()
    size = model.config.img_size
    preprocessing = Preprocessing(img_size=size if isinstance(size, int) else max(size))
    return OpenedModel(model, f"{name} (not trained)", None, preprocessing, {}, torch.device("cpu"))


def _model(opened: OpenedModel, task: str) -> nn.Module:
    if task == "classification":
        return opened.model
    from vmamba.deployment.program import FeatureMaps

    return FeatureMaps(opened.model)


def _description(opened: OpenedModel, task: Literal["classification", "features"]) -> Description:
    from vmamba.deployment.export import sha256_of
    from vmamba.deployment.files import Description
    from vmamba.models.config import variant_name

    stages = len(opened.model.config.depths)
    file = Path(opened.name)
    return Description(
        model=variant_name(opened.model.config) or "VMamba",
        task=task,
        outputs=("logits",) if task == "classification" else tuple(f"stage{i}" for i in range(stages)),
        labels=opened.labels or (),
        preprocessing=opened.preprocessing.to_dict(),
        source=opened.name,
        source_sha256=sha256_of(file) if file.is_file() else "",
    )


def _photographs(words: Sequence[str] | str | None) -> list[Image.Image] | None:
    if not words:
        return None
    from vmamba.cli.predict import find_images
    from vmamba.data.images import read_image

    return [read_image(path) for path in find_images([words] if isinstance(words, str) else words)]


def _print(report: ExportReport) -> None:
    for difference in report.differences:
        batch, height, width = difference.shape
        print(f"  {batch} × {height}×{width}: differs by {difference.relative:.1e}, {1e3 * difference.seconds:.0f} ms")
    print(f"largest difference from the model in PyTorch: {report.largest:.1e} (allowed: {report.bound:.2g})")
    print(f"wrote {report.path} ({report.megabytes:.1f} MB)")


def _print_accuracy(opened: OpenedModel, target: Path, source: Source, device: str) -> None:
    from vmamba.data.sources import ImageSet, with_labels
    from vmamba.deployment.accuracy import compare_on
    from vmamba.deployment.files import load_exported

    images = source.held_out
    if opened.labels:
        images = with_labels(images, source.classes, opened.labels)
    if not isinstance(images, ImageSet):
        raise ValueError("--data must name image files or a small data set here, not shards")
    compared = compare_on(images, opened.model, load_exported(target, device=device), opened.preprocessing.transform())
    print(
        f"accuracy on {compared.count} held-out images: {compared.exported:.2%}, the model's {compared.model:.2%}; "
        f"{compared.speedup:.2f} times as fast as the model in PyTorch"
    )
