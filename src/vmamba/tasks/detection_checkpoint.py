"""Weights of detectors: our own files, and those of the authors, which mmdetection wrote.

The authors' layers have the same shapes and meaning as those of `make_detector` but for the order of classes: there the
background is the last class, here the first. What the definitions do not share plays no part in inference; the
differences are listed in docs/detection.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from vmamba.models.checkpoint import load_checkpoint, read_checkpoint
from vmamba.models.checkpoint_files import CheckpointError, locate, read_file, write_safetensors
from vmamba.models.checkpoint_fitting import unwrapped
from vmamba.models.checkpoint_layouts import by_pattern, infer_config, select_weights, to_published
from vmamba.models.config import VMambaConfig
from vmamba.tasks.detection import DetectorConfig, config_of, make_vmamba_detector

DETECTOR_FORMAT = 1
_BODY = "backbone.body."

_OFFICIAL_NAMES = (
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", r"rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", r"rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", r"rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", r"roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", r"roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", r"roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", r"roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", r"roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", r"roi_heads.mask_predictor.mask_fcn_logits."),
)
_NAMES = tuple((re.compile(f"^{old}"), new) for old, new in _OFFICIAL_NAMES)
_PER_CLASS = ("box_predictor.bbox_pred.", "mask_predictor.mask_fcn_logits.")


@dataclass(frozen=True)
class DetectorReport:
    """What `load_official_detector` did; `str()` of it is meant for people.

    Attributes:
        source: The file.
        backbone: Tensors of the backbone, output norms included.
        heads: Tensors of pyramid, proposals and heads.
        reordered: Those whose classes were put into our order.
        reset: Heads that start afresh, because the file has other classes.
    """

    source: str
    backbone: int
    heads: int
    reordered: tuple[str, ...]
    reset: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.source}: loaded {self.backbone} tensors of the backbone, {self.heads} of pyramid and heads"
            " (mmdetection's layout)",
            f"  background moved from the last class to the first in {len(self.reordered)}",
        ]
        if self.reset:
            lines.append(f"  initialised afresh, for the file has other classes: {', '.join(self.reset)}")
        return "\n".join(lines)


def is_official_detector(names: Mapping[str, Any]) -> bool:
    """Whether a state dict's names are those of a detector mmdetection wrote."""
    return any(name.startswith("roi_head.bbox_head.") for name in names)


def from_official(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Bring a detector's state dict in mmdetection's layout to the names and the order of classes of `make_detector`.

    Returns:
        The tensors, and the names of those whose classes were put into order.

    Raises:
        CheckpointError: A name is of neither the backbone nor a known layer, or a shape is impossible.
    """
    layout = to_published({name: t for name, t in tensors.items() if name.startswith("backbone.")})
    found = {f"{_BODY}{name}": tensor for name, tensor in {**layout.tensors, **layout.extras}.items()}
    unknown, reordered = [], []
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            continue
        for pattern, replacement in _NAMES:
            if pattern.match(name):
                new = pattern.sub(replacement, name)
                break
        else:
            unknown.append(name)
            continue
        if ".cls_score." in new:
            tensor = torch.cat([tensor[-1:], tensor[:-1]])
        elif any(part in new for part in _PER_CLASS):
            rows = 4 if ".bbox_pred." in new else 1
            # The background has no box and no mask; nothing reads these rows.
            tensor = torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
        if new.startswith("roi_heads.") and tensor is not tensors[name]:
            reordered.append(new)
        found[new] = tensor
    if unknown:
        raise CheckpointError(
            f"is a detector of another kind than Mask R-CNN or Faster R-CNN with a feature pyramid: it has"
            f" {', '.join(by_pattern(unknown, limit=4))}"
        )
    return found, tuple(reordered)


def load_official_detector(model: FasterRCNN, source: str | os.PathLike[str]) -> DetectorReport:
    """Load the authors' weights of a whole detector; the model is not touched unless they fit.

    The last layers start afresh where the file has another number of classes.

    Args:
        model: As `make_vmamba_detector` returns it.
        source: The `.pth`, its address or a Hub id.

    Raises:
        CheckpointError: The file cannot be read, or is of another detector or backbone; says which.
    """
    path = locate(source)
    content, _ = read_file(path)
    try:
        tensors, _key = select_weights(content, prefer_ema=True)
        given, reordered = from_official(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"'{path}' {error}") from error
    wanted = model.state_dict()
    per_class = [name for name in wanted if "_predictor." in name and "conv5_mask" not in name]
    same = all(name in given and given[name].shape == wanted[name].shape for name in per_class)
    reset = () if same else tuple(per_class)
    given = {name: tensor for name, tensor in given.items() if name not in reset}
    _refuse_difference(str(path), given, {name: t for name, t in wanted.items() if name not in reset})
    model.load_state_dict(given, strict=False)
    backbone = sum(name.startswith(_BODY) for name in given)
    kept = tuple(name for name in reordered if name not in reset)
    return DetectorReport(str(source), backbone, len(given) - backbone, kept, reset)


def _refuse_difference(path: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    other = [n for n in given if n in wanted and given[n].shape != wanted[n].shape]
    bad = [n for n, t in given.items() if not bool(torch.isfinite(t).all())]
    for kind, names in (
        ("lacks", missing),
        ("has, and the model has not,", extra),
        ("has in another shape", other),
        ("holds NaN or infinity in", bad),
    ):
        if names:
            shape = f", {tuple(given[names[0]].shape)} for {tuple(wanted[names[0]].shape)}" if names is other else ""
            raise CheckpointError(f"'{path}' does not fit: it {kind} {', '.join(by_pattern(names, limit=4))}{shape}")


def start_from(model: FasterRCNN, source: str | os.PathLike[str]) -> str:
    """Load weights to fine-tune from: a detector's of either kind, or a classifier's into the backbone.

    Returns:
        What was done, for people.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
    """
    content, header = read_file(locate(source))
    if header is not None and "detector" in header:
        tensors, body = dict(content), model.state_dict()
        reset = tuple(n for n in body if "_predictor." in n and n in tensors and tensors[n].shape != body[n].shape)
        given = {name: tensor for name, tensor in tensors.items() if name not in reset and name in body}
        _refuse_difference(str(source), given, {n: t for n, t in body.items() if n not in reset})
        model.load_state_dict(given, strict=False)
        return f"{source}: loaded {len(given)} tensors of a detector, {len(reset)} initialised afresh"
    tensors, _ = select_weights(content, prefer_ema=True)
    if is_official_detector(tensors):
        return str(load_official_detector(model, source))
    return str(load_checkpoint(model.backbone.body, source))


def save_detector(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a detector on a VMamba as safetensors that stand for themselves: weights, both configurations, `metadata`.

    Args:
        model: As `make_vmamba_detector` returns it.
        path: Where to; an existing file is replaced as a whole.
        metadata: Anything JSON-able worth keeping, such as labels.
        state_dict: Weights to write instead of the model's own.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from vmamba import __version__

    inner: Any = unwrapped(model)
    header = {
        "format": "pt",
        "detector_version": str(DETECTOR_FORMAT),
        "vmamba_version": __version__,
        "detector": json.dumps(config_of(inner).to_dict()),
        "backbone": json.dumps(inner.backbone.body.config.to_dict()),
        "metadata": json.dumps(dict(metadata or {})),
    }
    write_safetensors(inner.state_dict() if state_dict is None else state_dict, path, header)


def load_detector(source: str | os.PathLike[str]) -> tuple[FasterRCNN, dict[str, Any]]:
    """Build the detector a file is of, ours or the authors', and load it.

    Returns:
        The detector, in evaluation mode, and the file's metadata (labels, …).

    Raises:
        CheckpointError: The file is missing, damaged or of no detector.
    """
    path = locate(source)
    content, header = read_file(path)
    if header is not None and "detector" in header:
        return _ours(str(path), content, header)
    tensors, _ = select_weights(content, prefer_ema=True)
    if not is_official_detector(tensors):
        raise CheckpointError(f"'{path}' holds no detector; train one with `vmamba train --task detection`")
    backbone = read_checkpoint(source)
    if "neck.lateral_convs.0.conv.weight" not in tensors or "roi_head.bbox_head.fc_cls.weight" not in tensors:
        raise CheckpointError(f"'{path}' is a detector of another kind than Mask R-CNN or Faster R-CNN with a pyramid")
    classes = tensors["roi_head.bbox_head.fc_cls.weight"].shape[0] - 1
    masks = any(name.startswith("roi_head.mask_head.") for name in tensors)
    config = DetectorConfig(classes, masks=masks, channels=tensors["neck.lateral_convs.0.conv.weight"].shape[0])
    model = make_vmamba_detector(infer_config(backbone.state_dict), config)
    load_official_detector(model, source)
    names = coco_classes()
    return model.eval(), {"labels": list(names)} if classes == len(names) else {}


def _ours(path: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> tuple[FasterRCNN, dict[str, Any]]:
    try:
        version = int(header["detector_version"])
        if version > DETECTOR_FORMAT:
            raise ValueError(f"format {version}, and this vmamba reads up to {DETECTOR_FORMAT}: upgrade vmamba")
        config = DetectorConfig.from_dict(json.loads(header["detector"]))
        backbone = VMambaConfig.from_dict(json.loads(header["backbone"]))
        metadata = dict(json.loads(header.get("metadata", "{}")))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{path}' has a header that cannot be read: {error}") from error
    model = make_vmamba_detector(backbone, config)
    _refuse_difference(path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model.eval(), metadata


def coco_classes() -> tuple[str, ...]:
    """Return the names of COCO's 80 classes in the order of their ids, as torchvision has them."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(name for name in names if name not in ("__background__", "N/A"))
