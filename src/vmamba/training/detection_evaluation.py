"""Average precision as COCO defines it, by faster-coco-eval, over the images of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor, nn

from vmamba.data.coco import CocoImage, CocoSet
from vmamba.data.coco_loading import DetectionBatch, encoding_of
from vmamba.tasks.detection import config_of, paste_masks

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_MASK_PIXELS = 2**26  # of masks pasted at once: a third of a GB


@dataclass(frozen=True)
class Precision:
    """Average precision of boxes or of masks; every figure a share, None where no image has such an object.

    Attributes:
        totals: AP (mean over overlaps 0.5 to 0.95), AP50, AP75, of small, medium and large objects, and average recall
            with 1, 10 and 100 detections an image.
        per_class: AP of each class.
    """

    totals: dict[str, float | None]
    per_class: tuple[float | None, ...]


@dataclass(frozen=True)
class DetectionReport:
    """What an evaluation found.

    Attributes:
        box: Of boxes.
        mask: Of masks; None for a detector without them.
        classes: Their names.
        images: Images evaluated.
        objects: Objects on them, crowds not counted.
    """

    box: Precision
    mask: Precision | None
    classes: tuple[str, ...]
    images: int
    objects: int

    def figures(self) -> dict[str, float]:
        """Return the totals that are numbers, as `box_AP`, `mask_AP50`, …; `box_AP` always, 0 where it has no sense."""
        found = {"box_AP": 0.0}
        for kind, precision in (("box", self.box), ("mask", self.mask)):
            totals = precision.totals if precision else {}
            found |= {f"{kind}_{name}": value for name, value in totals.items() if value is not None}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def evaluate_detector(model: nn.Module, batches: Iterable[DetectionBatch], images: CocoSet) -> DetectionReport:
    """Find objects on this process's images and compare with all processes' annotations.

    Under torch.distributed, what was found is gathered once, after the last batch; the report is the same everywhere.

    Args:
        model: As `make_detector` returns it.
        batches: On the model's device; only images that come in them count.
        images: The annotated set they are from.
    """
    model.eval()
    seen: list[int] = []
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):
                continue
            sizes = [(height, width) for height, width in batch.sizes.tolist()]
            for key, size, result in zip(batch.keys.tolist(), sizes, model(batch.pictures()), strict=True):
                seen.append(key)
                found += to_coco(result, key, size)
    parts: list[Any] = [(seen, found)]
    if distributed.is_available() and distributed.is_initialized():
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, (seen, found))
    # In the order of the images, so that ties in confidence fall the same whatever the number of processes.
    keys = {key for keys, _ in parts for key in keys}
    together = sorted((item for _, items in parts for item in items), key=lambda item: item["image_id"])
    return report_of(together, keys, images, masks=config_of(model).masks)


def to_coco(result: Mapping[str, Tensor], key: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Turn what a detector returned for an image into records of COCO's results format, without the image's masks.

    Args:
        result: Boxes xyxy, labels from 1, scores, and perhaps small masks.
        key: Id of the image.
        size: Its height and width.
    """
    boxes, scores, labels = (result[name].float().cpu().numpy() for name in ("boxes", "scores", "labels"))
    records: list[dict[str, Any]] = [
        {"image_id": key, "category_id": int(label), "bbox": [x, y, right - x, bottom - y], "score": float(score)}
        for (x, y, right, bottom), label, score in zip(boxes.astype(np.float64).tolist(), labels, scores, strict=True)
    ]
    if "masks" in result:
        step = max(_MASK_PIXELS // (size[0] * size[1]), 1)
        for first in range(0, len(records), step):
            masks = paste_masks(result, size, first, step).cpu().numpy().astype(np.uint8)
            encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
            for record, encoding in zip(records[first : first + step], encoded, strict=True):
                record["segmentation"] = encoding
    return records


def report_of(
    found: Sequence[Mapping[str, Any]], keys: Iterable[int], images: CocoSet, *, masks: bool
) -> DetectionReport:
    """Compare results with annotations.

    Args:
        found: Records as of `to_coco`.
        keys: Images that were looked at.
        images: The annotated set.
        masks: Whether to compare masks too.
    """
    wanted = set(keys)
    looked_at = [image for image in images.images if image.key in wanted]
    truth = _truth(looked_at, images.classes)
    boxes = [{name: record[name] for name in ("image_id", "category_id", "bbox", "score")} for record in found]
    shapes = (
        [{name: record[name] for name in ("image_id", "category_id", "segmentation", "score")} for record in found]
        if masks
        else []
    )
    return DetectionReport(
        _precision(truth, boxes, "bbox", images.classes),
        _precision(truth, shapes, "segm", images.classes) if masks else None,
        images.classes,
        len(looked_at),
        sum(int((~image.crowd).sum()) for image in looked_at),
    )


def _truth(images: Sequence[CocoImage], classes: Sequence[str]) -> COCO:
    annotations: list[dict[str, Any]] = []
    for image in images:
        parts = zip(image.boxes.tolist(), image.labels, image.crowd, image.areas, image.shapes, strict=True)
        for (x, y, right, bottom), label, crowd, area, shape in parts:
            record = {
                "id": len(annotations) + 1,
                "image_id": image.key,
                "category_id": int(label) + 1,
                "bbox": [x, y, right - x, bottom - y],
                "area": float(area),
                "iscrowd": int(crowd),
            }
            if isinstance(shape, Mapping):
                record["segmentation"] = encoding_of(shape)
            elif shape:
                record["segmentation"] = [polygon.tolist() for polygon in shape]
            else:  # a crowd may come without a shape: its box then
                record["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
            annotations.append(record)
    return COCO(
        {
            "images": [{"id": image.key, "height": image.height, "width": image.width} for image in images],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        }
    )


def _precision(truth: COCO, found: list[dict[str, Any]], kind: str, classes: Sequence[str]) -> Precision:
    if not truth.imgs:
        return Precision(dict.fromkeys(_FIGURES), (None,) * len(classes))
    evaluation = COCOeval_faster(truth, truth.loadRes(found), kind, print_function=lambda *_: None)
    evaluation.run()
    totals = {name: _known(value) for name, value in zip(_FIGURES, evaluation.stats, strict=False)}
    # Precision by overlap, recall, class, range of areas and number of detections; -1 where there is no object.
    curves = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    per_class = (curves[:, :, index] for index in range(len(classes)))
    return Precision(totals, tuple(_known(c[c > -1].mean()) if (c > -1).any() else None for c in per_class))


def _known(value: Any) -> float | None:
    return None if value < 0 else float(value)
