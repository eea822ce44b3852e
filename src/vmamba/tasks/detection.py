"""Mask R-CNN and Faster R-CNN, torchvision's, on a VMamba backbone with a feature pyramid (section 5.2 of the paper).

image -> four stage maps, each with its norm -> feature pyramid (strides 4 to 64) -> region proposals -> for each region
its class, its box and, with masks, its shape. The parts are torchvision's; what is put in their place here follows the
definitions the published models were trained with, so that their weights mean the same: regions are pooled at pixel
centres (`PyramidRoIAlign`), anchors are not rounded, and coordinates stay float32 in mixed precision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vmamba.models.config import VMambaConfig, get_config
from vmamba.models.vmamba import VMambaBackbone

STRIDES = (4, 8, 16, 32, 64)
_FINEST = 56.0  # regions of this side, in pixels, are the smallest pooled from the second map
_ASPECTS = (0.5, 1.0, 2.0)
_REGIONS, _MASKED_REGIONS = 1000, 100  # for which the published FLOPs count the two heads


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is, beside its backbone.

    Args:
        classes: Number of classes, background not counted.
        masks: Whether it tells shapes too (Mask R-CNN) or boxes alone (Faster R-CNN).
        min_size: Length in pixels that the short side of an image is brought to.
        max_size: Length that the long side may have then.
        channels: Width of the feature pyramid and of the mask head, and a quarter of the box head's; 256 as published.
        score_threshold: Confidence below which nothing is reported.
        nms_threshold: Overlap (IoU) above which the less confident of two boxes of a class is dropped.
        detections: Most objects reported in an image.
    """

    classes: int
    masks: bool = True
    min_size: int = 800
    max_size: int = 1333
    channels: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        for name, lowest in (("classes", 1), ("min_size", 32), ("max_size", 32), ("channels", 1), ("detections", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be {lowest} or more, not {getattr(self, name)}")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size must be min_size ({self.min_size}) or more, not {self.max_size}")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorConfig:
        """Return the configuration `to_dict` wrote.

        Raises:
            ValueError: There are fields this version does not know.
        """
        if unknown := sorted(set(values) - {item.name for item in fields(cls)}):
            raise ValueError(f"a detector has no {unknown[0]!r}; was the file written by a later version of vmamba?")
        return cls(**values)


class PyramidBackbone(nn.Module):
    """Stage maps into a feature pyramid (Lin et al. 2017) with a fifth map, every second pixel of the fourth.

    Args:
        body: Maps images `(B, 3, H, W)` to four maps `(B, C_i, H/s, W/s)`, s = 4, 8, 16, 32.
        widths: The C_i.
        channels: Width of the pyramid.
    """

    def __init__(self, body: nn.Module, widths: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(widths), channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images `(B, 3, H, W)` to maps `(B, channels, H/s, W/s)` named "0" to "3" (s = 4 … 32) and "pool" (64)."""
        maps = self.body(images)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class PyramidRoIAlign(MultiScaleRoIAlign):
    """Pool regions from the map that suits their size, sampling at pixel centres.

    torchvision's own shifts by half a pixel (`aligned=False`) and takes 2 × 2 samples a cell; the published models take
    aligned ones, as many as there are pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool boxes (xyxy in pixels, one tensor `(n_i, 4)` an image) to `(Σ n_i, C, size, size)`."""
        maps = [x[name] for name in self.featmap_names]
        every = torch.cat(boxes)
        owner = torch.cat([torch.full_like(part[:, :1], i) for i, part in enumerate(boxes)])
        regions = torch.cat([owner, every], dim=1)
        sides = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
        levels = torch.log2(sides / _FINEST + 1e-6).floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=False)):
            chosen = torch.nonzero(levels == level)[:, 0]
            cells = roi_align(features, regions[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[chosen] = cells.to(pooled.dtype)
        return pooled


class _Anchors(AnchorGenerator):
    """Boxes of eight strides' side in three shapes, their corners not rounded, float32 whatever the maps are."""

    def __init__(self) -> None:
        super().__init__(tuple((8 * stride,) for stride in STRIDES), (_ASPECTS,) * len(STRIDES))

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (the signature is torchvision's)
    ) -> Tensor:
        """Return the boxes `(scales · shapes, 4)` around the origin, xyxy."""
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.as_tensor(scales, dtype=dtype, device=device)[None]
        half_width, half_height = (sides / roots).flatten() / 2, (sides * roots).flatten() / 2
        return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Keep coordinates in float32: 16-bit formats cannot tell neighbouring pixels of a large image apart."""
        super().set_cell_anchors(torch.float32, device)


class _ProposalHead(RPNHead):
    """torchvision's, with float32 outputs: boxes are decoded in their precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, offsets = super().forward(x)
        return [score.float() for score in scores], [offset.float() for offset in offsets]


class _BoxPredictor(FastRCNNPredictor):
    """torchvision's, with float32 outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()


class _Resizing(GeneralizedRCNNTransform):
    """Normalises, brings images to their size in evaluation alone, and leaves masks small.

    Training images come resized, by the processes that read them; masks of the image's size are made one at a time by
    `paste_masks`, for a hundred of a large image fill a memory.
    """

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return (image, target) if self.training else super().resize(image, target)

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        if not self.training:
            for found, seen, original in zip(result, image_shapes, original_image_sizes, strict=True):
                found["boxes"] = resize_boxes(found["boxes"], seen, original)
        return result


def make_detector(body: nn.Module, widths: Sequence[int], config: DetectorConfig) -> FasterRCNN:
    """Put a detector on any backbone.

    Args:
        body: Maps normalised images `(B, 3, H, W)` to four maps `(B, C_i, H/s, W/s)`, s = 4, 8, 16, 32.
        widths: The C_i.
        config: The detector.

    Returns:
        A torchvision model. In training mode it takes a list of images `(3, H, W)` in [0, 1], already at their size,
        and a list of targets (boxes xyxy `(n, 4)`, labels `(n,)` from 1, masks `(n, H, W)`), and returns the losses. In
        evaluation mode it takes images of any size and returns for each boxes xyxy `(n, 4)` in its pixels, labels from
        1, scores, and masks `(n, 1, 28, 28)`: probabilities within the box, for `paste_masks`.
    """
    backbone = PyramidBackbone(body, widths, config.channels)
    anchors = _Anchors()
    size = {"min_size": config.min_size, "max_size": config.max_size}
    options: dict[str, Any] = {
        **size,
        "rpn_anchor_generator": anchors,
        "rpn_head": _ProposalHead(config.channels, anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_train": 1000,
        "rpn_pre_nms_top_n_test": 1000,
        "rpn_post_nms_top_n_test": 1000,
        "box_roi_pool": PyramidRoIAlign(7),
        "box_head": TwoMLPHead(49 * config.channels, 4 * config.channels),
        "box_predictor": _BoxPredictor(4 * config.channels, config.classes + 1),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.nms_threshold,
        "box_detections_per_img": config.detections,
    }
    if config.masks:
        options |= {
            "mask_roi_pool": PyramidRoIAlign(14),
            "mask_head": MaskRCNNHeads(config.channels, (config.channels,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(config.channels, config.channels, config.classes + 1),
        }
    detector = (MaskRCNN if config.masks else FasterRCNN)(backbone, **options)
    before = detector.transform
    detector.transform = _Resizing(image_mean=before.image_mean, image_std=before.image_std, **size)
    detector.config = config
    return detector


def make_vmamba_detector(
    backbone: str | VMambaConfig, config: DetectorConfig, overrides: Mapping[str, Any] | None = None
) -> FasterRCNN:
    """Build a detector on a VMamba, with fresh weights.

    Args:
        backbone: A variant's name or a configuration.
        config: The detector.
        overrides: Fields of the backbone's configuration to change, such as drop_path_rate.

    Raises:
        ValueError: There is no such variant, or its maps are not at strides 4, 8, 16 and 32.
    """
    chosen = get_config(backbone) if isinstance(backbone, str) else backbone
    name = backbone if isinstance(backbone, str) else "this configuration"
    if (stages := len(chosen.depths)) != 4:
        raise ValueError(
            f"a detector needs four stages, with maps at strides 4, 8, 16 and 32; {name} has {stages}: take vmamba_tiny"
        )
    body = VMambaBackbone(chosen, **(overrides or {}))
    strides = tuple(info["reduction"] for info in body.feature_info)
    if strides != STRIDES[:4]:
        raise ValueError(f"a detector needs maps at strides 4, 8, 16 and 32; {name} has them at {strides}")
    return make_detector(body, body.config.stage_dims, config)


def config_of(detector: nn.Module) -> DetectorConfig:
    """Return the configuration a detector was made with."""
    config = detector.config
    assert isinstance(config, DetectorConfig), "not made by make_detector"
    return config


def paste_masks(found: Mapping[str, Tensor], size: tuple[int, int], first: int = 0, number: int = 0) -> Tensor:
    """Turn an image's small masks into masks of its size.

    Args:
        found: What the detector returned for the image.
        size: Its height and width.
        first: First object wanted.
        number: Objects wanted; 0 means all the others. Each takes 5 bytes a pixel while it is made.

    Returns:
        `(number, height, width)`, True where the object is.
    """
    chosen = slice(first, first + number if number else None)
    masks, boxes = found["masks"][chosen].float(), found["boxes"][chosen]
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
    one_by_one = (paste_masks_in_image(masks[i : i + 1], boxes[i : i + 1], size) for i in range(len(masks)))
    return torch.cat([mask[:, 0] > 0.5 for mask in one_by_one])


class CountedForward(nn.Module):
    """What the published FLOPs of a detector count: everything dense, and the heads for a fixed number of regions.

    The rule of mmdetection's counter, which the published figures are from: backbone, pyramid and proposal head on the
    whole image, the box head on 1000 regions, the mask head on the first 100 of them. Pooling regions, decoding,
    choosing and resizing are free. `count_flops(CountedForward(detector), (800, 1280))` gives the figure of the tables.
    """

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run images `(B, 3, H, W)` through the parts that count; what it returns means nothing."""
        maps = self.detector.backbone(images)
        scores, _ = self.detector.rpn.head(list(maps.values()))
        heads, channels = self.detector.roi_heads, maps["0"].shape[1]
        boxes = heads.box_predictor(heads.box_head(images.new_zeros(_REGIONS, channels, 7, 7)))
        outputs = [*scores, *boxes]
        if heads.has_mask():
            regions = images.new_zeros(_MASKED_REGIONS, channels, 14, 14)
            outputs.append(heads.mask_predictor(heads.mask_head(regions)))
        return outputs
