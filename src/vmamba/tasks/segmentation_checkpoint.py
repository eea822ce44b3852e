"""Weights of segmentation models: the authors' files in the layout of mmsegmentation, and our own.

Both hold a backbone under `backbone.`, a decoder under `decode_head.` and an auxiliary head under `auxiliary_head.`.
mmsegmentation calls a head's norms `bn` and its classifier `conv_seg`, transformers `batch_norm` and `classifier`; all
else has the same name, shape and meaning in both, so the heads are mapped completely.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vmamba.models.checkpoint import LoadReport, infer_config, load_checkpoint, read_checkpoint, save_checkpoint
from vmamba.models.checkpoint_files import CheckpointError, locate, read_file
from vmamba.models.checkpoint_fitting import Checkpoint, unwrapped
from vmamba.models.checkpoint_layouts import by_pattern, select_weights
from vmamba.tasks.segmentation import UperNet, create_segmenter

_HEADS = ("decode_head.", "auxiliary_head.")
_HEAD = re.compile(r"(?:^|\.)((?:decode_head|auxiliary_head)\..+)")
_CLASSIFIER = re.compile(r"^(decode_head|auxiliary_head)\.classifier\.")
_RENAMES = ((".conv_seg.", ".classifier."), (".bn.", ".batch_norm."))


@dataclass(frozen=True)
class SegmentationCheckpoint:
    """What a file of a segmentation model holds.

    Attributes:
        backbone: The backbone, in the published layout; its metadata are the file's.
        heads: Weights of the heads under our names.
        renamed: Name in the file -> ours, for those of the heads that differ.
    """

    backbone: Checkpoint
    heads: Mapping[str, Tensor]
    renamed: Mapping[str, str]


@dataclass(frozen=True)
class SegmentationLoadReport:
    """What `load_segmentation_checkpoint` did; `str()` of it is meant for people.

    Attributes:
        backbone: Report on the backbone.
        matched: Weights of the heads that the file filled.
        renamed: Name in the file -> ours, for those that differ.
        reset: Weights of classifiers left as they were, because the file has another number of classes.
        unused: Weights of an auxiliary head that the model has not.
        kept: Weights of an auxiliary head that the file has not.
    """

    backbone: LoadReport
    matched: tuple[str, ...]
    renamed: Mapping[str, str]
    reset: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.backbone), f"  heads: loaded {len(self.matched)} tensors"]
        if self.renamed:
            old, new = next(iter(self.renamed.items()))
            lines.append(f"  heads: renamed {len(self.renamed)} from mmsegmentation's names, e.g. {old} -> {new}")
        for sentence, names in (
            ("for another number of classes, started afresh", self.reset),
            ("an auxiliary head that the model has not, skipped", self.unused),
            ("an auxiliary head that the file has not, left as it was", self.kept),
        ):
            if names:
                lines.append(f"  heads: {sentence}: {', '.join(by_pattern(names))}")
        return "\n".join(lines)


def holds_segmenter(checkpoint: Checkpoint) -> bool:
    """Whether the file that `read_checkpoint` read has a decoder beside the backbone."""
    return "decode_head" in checkpoint.skipped


def read_segmentation_checkpoint(source: str | os.PathLike[str]) -> SegmentationCheckpoint:
    """Read a segmentation model's weights, in mmsegmentation's layout or ours.

    Args:
        source: A path, a Hub id (`hf-hub:org/name`) or an address.

    Raises:
        CheckpointError: The file cannot be read, holds NaN or infinity, or holds no segmentation model.
    """
    backbone = read_checkpoint(source)
    if not holds_segmenter(backbone):
        raise CheckpointError(
            f"'{os.fspath(source)}' holds no decode_head: it is no segmentation model; train one from it with"
            " `vmamba train --task segmentation --weights`"
        )
    content, _ = read_file(locate(source))
    tensors, _ = select_weights(content, prefer_ema=True)
    heads: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for name, tensor in tensors.items():
        found = _HEAD.search(name)
        if not found:
            continue
        new = inner = found[1]
        for old_part, new_part in _RENAMES:
            new = new.replace(old_part, new_part)
        if new in heads:
            raise CheckpointError(f"'{os.fspath(source)}' holds {new!r} twice, under two names")
        if new != inner:
            renamed[inner] = new
        heads[new] = tensor
    bad = [name for name, tensor in heads.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"'{os.fspath(source)}' holds NaN or infinity in {len(bad)} tensors of the heads: {bad[0]}"
        )
    return SegmentationCheckpoint(backbone, heads, renamed)


def load_segmentation_checkpoint(
    model: UperNet,
    source: str | os.PathLike[str] | SegmentationCheckpoint,
    *,
    adapt_classifier: bool = False,
) -> SegmentationLoadReport:
    """Load a segmentation model; it is not touched unless everything fits.

    An auxiliary head that only one side has is reported, and no error: it has no part in predictions.

    Args:
        model: What to fill.
        source: A file, or what was read from it.
        adapt_classifier: Where the file has another number of classes, keep everything but the classifiers.

    Returns:
        What was loaded, renamed and left.

    Raises:
        CheckpointError: The file cannot be read or does not fit; the lines say what differs.
    """
    checkpoint = source if isinstance(source, SegmentationCheckpoint) else read_segmentation_checkpoint(source)
    model = unwrapped(model)  # type: ignore[assignment]
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_HEADS)}
    given = dict(checkpoint.heads)
    unused, kept = (
        tuple(name for name in one if name.startswith("auxiliary_head.")) if not _has_auxiliary(other) else ()
        for one, other in ((given, wanted), (wanted, given))
    )
    reset: tuple[str, ...] = ()
    if adapt_classifier:
        reset = tuple(
            name
            for name in wanted
            if _CLASSIFIER.match(name) and name in given and given[name].shape != wanted[name].shape
        )
    filled = {name: tensor for name, tensor in given.items() if name not in (*unused, *reset)}
    _check_heads(checkpoint, filled, {n: t for n, t in wanted.items() if n not in (*kept, *reset)})
    report = load_checkpoint(model.backbone, checkpoint.backbone)
    with torch.no_grad():
        model.load_state_dict({name: t.to(wanted[name].dtype) for name, t in filled.items()}, strict=False)
    others = {kind: names for kind, names in report.skipped.items() if not f"{kind}.".startswith(_HEADS)}
    report = replace(report, skipped=others)
    return SegmentationLoadReport(report, tuple(filled), checkpoint.renamed, reset, unused, kept)


def _has_auxiliary(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("auxiliary_head.") for name in tensors)


def _check_heads(checkpoint: SegmentationCheckpoint, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    # BatchNorm's step counter plays no part here, and some files lack it.
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    other = [name for name in given if name in wanted and given[name].shape != wanted[name].shape]
    if not (missing or unexpected or other):
        return
    lines = [f"the heads in '{checkpoint.backbone.source}' do not fit the model's:"]
    for title, names in (("missing in the file", missing), ("not in the model", unexpected), ("other shapes", other)):
        if names:
            lines += [f"  {title} ({len(names)}):", *(f"    {line}" for line in by_pattern(names))]
    if other:
        name = other[0]
        lines.append(
            f"    e.g. {name} is {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        )
        if all(_CLASSIFIER.match(name) for name in other):
            lines.append("  only the number of classes differs: adapt_classifier=True keeps all but the classifiers")
    raise CheckpointError("\n".join(lines))


def load_segmentation_model(source: str | os.PathLike[str]) -> tuple[UperNet, dict[str, Any]]:
    """Build the segmentation model a file is of, and load it.

    Returns:
        The model, in evaluation mode, and the metadata `save_segmentation_checkpoint` was given; empty for other files.

    Raises:
        CheckpointError: As `read_segmentation_checkpoint`, or the shapes are those of no UperNet.
    """
    checkpoint = read_segmentation_checkpoint(source)
    classifier = checkpoint.heads.get("decode_head.classifier.weight")
    if classifier is None or classifier.ndim != 4:
        raise CheckpointError(f"'{os.fspath(source)}' holds a decode_head without a classifier: it is no UperNet")
    auxiliary = checkpoint.heads.get("auxiliary_head.classifier.weight")
    file = checkpoint.backbone
    model = create_segmenter(
        file.config or infer_config(file.state_dict),
        classifier.shape[0],
        hidden=classifier.shape[1],
        auxiliary=0 if auxiliary is None else auxiliary.shape[1],
    )
    load_segmentation_checkpoint(model, checkpoint)
    return model.eval(), dict(file.metadata)


def save_segmentation_checkpoint(
    model: UperNet,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a segmentation model as safetensors, as `vmamba.save_checkpoint` writes classifiers.

    Args:
        model: What to write; its backbone's configuration is stored with it.
        path: Where to.
        metadata: Anything JSON-able, such as labels, mean and std; the task is added.
        state_dict: Weights to write instead of the model's own.
    """
    save_checkpoint(model, path, metadata={**(metadata or {}), "task": "segmentation"}, state_dict=state_dict)
