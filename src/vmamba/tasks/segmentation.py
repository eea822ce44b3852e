"""Semantic segmentation: UperNet on a backbone, the loss to train it with and the figures to report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmamba.models.config import VMambaConfig, get_config
from vmamba.models.vmamba import VMambaBackbone

IGNORE = 255  # value of pixels that neither loss nor figures look at


class SegmentationLogits(NamedTuple):
    """What UperNet says of images.

    Attributes:
        logits: `(B, classes, H/4, W/4)`.
        auxiliary: `(B, classes, H/16, W/16)` of the auxiliary head; None in evaluation mode, where it is not computed.
    """

    logits: Tensor
    auxiliary: Tensor | None


class UperNet(nn.Module):
    """UperNet (arXiv 1807.10221) with an auxiliary head on the third map, as the published models have it.

    The heads are transformers' classes; what those lack of the published definition is added: dropout of whole channels
    before each classifier, and the first weights (Kaiming for convolutions, 0.01 for classifiers).

    Args:
        backbone: Gives four maps, finest first; a VMambaBackbone, or for comparisons any other.
        channels: Channels of each map.
        num_classes: Number of classes.
        hidden: Channels inside the decoder.
        auxiliary: Channels inside the auxiliary head; 0 leaves it out.
        dropout: Share of channels dropped before the classifiers.
        stride: Pixels of an image for each pixel of the first map.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        num_classes: int,
        *,
        hidden: int = 512,
        auxiliary: int = 256,
        dropout: float = 0.1,
        stride: int = 4,
    ) -> None:
        super().__init__()
        from transformers.models.upernet.configuration_upernet import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        if num_classes < 2:
            raise ValueError(f"segmentation needs two classes or more, not {num_classes}")
        if len(channels) != 4:
            raise ValueError(f"UperNet takes the maps of four stages, not {len(channels)}")
        widths = list(channels)
        config = UperNetConfig(hidden_size=hidden, auxiliary_channels=auxiliary or 1, auxiliary_in_channels=widths[2])
        config.num_labels = num_classes
        self.backbone = backbone
        self.decode_head: nn.Module = UperNetHead(config, widths)
        self.auxiliary_head: nn.Module | None = UperNetFCNHead(config, widths) if auxiliary else None
        self.num_classes, self.hidden, self.auxiliary, self.dropout = num_classes, hidden, auxiliary, dropout
        self.stride = stride
        for head in self.heads():
            head.classifier = _DroppingConv2d(head.classifier.in_channels, num_classes, dropout)
            head.apply(_init_head)
            nn.init.normal_(head.classifier.weight, std=0.01)

    def heads(self) -> list[Any]:
        """Return the decoder and, where there is one, the auxiliary head."""
        return [head for head in (self.decode_head, self.auxiliary_head) if head is not None]

    @property
    def config(self) -> VMambaConfig | None:
        """The backbone's configuration, which is stored with the weights."""
        config = getattr(self.backbone, "config", None)
        return config if isinstance(config, VMambaConfig) else None

    def forward(self, images: Tensor) -> SegmentationLogits:
        """Map images (B, 3, H, W), normalised, to logits at a quarter of their size."""
        maps = self.backbone(images)
        auxiliary = self.auxiliary_head(maps) if self.auxiliary_head is not None and self.training else None
        return SegmentationLogits(self.decode_head(maps), auxiliary)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their insides."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare."""
        spared: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in spared}


class _DroppingConv2d(nn.Conv2d):
    """A pointwise convolution behind dropout of whole channels, with the names of a plain one in the state dict."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__(channels, classes, kernel_size=1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout2d(x, self.dropout, self.training))


def _init_head(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_segmenter(
    variant: str | VMambaConfig,
    num_classes: int,
    *,
    hidden: int = 512,
    auxiliary: int = 256,
    dropout: float = 0.1,
    **overrides: Any,
) -> UperNet:
    """Build UperNet on a VMamba with a norm on each stage's map; nothing is downloaded.

    Args:
        variant: Name of a variant, or a configuration.
        num_classes: Number of classes.
        hidden: See UperNet, as for `auxiliary` and `dropout`.
        auxiliary: Channels of the auxiliary head.
        dropout: Share of channels dropped before the classifiers.
        **overrides: Fields of the backbone's configuration to change, for example drop_path_rate.

    Raises:
        ValueError: There is no such variant or field, or it has no four stages.
    """
    overrides["num_classes"] = 0  # those of a classifier, which the backbone has not
    config = get_config(variant, **overrides) if isinstance(variant, str) else variant.replace(**overrides)
    if (stages := len(config.depths)) != 4:
        name = variant if isinstance(variant, str) else "this configuration"
        raise ValueError(f"UperNet takes the maps of four stages; {name} has {stages}: take vmamba_tiny")
    backbone = VMambaBackbone(config)
    return UperNet(
        backbone,
        config.stage_dims,
        num_classes,
        hidden=hidden,
        auxiliary=auxiliary,
        dropout=dropout,
        stride=config.patch_size,
    )


def segmentation_loss(output: SegmentationLogits, masks: Tensor, auxiliary_weight: float = 0.4) -> Tensor:
    """Return the cross-entropy of the decoder plus that of the auxiliary head times its weight.

    The logits are brought to the masks' size (bilinear) in float32. The mean is over all pixels, those with no say
    included, as in the published training: so a picture of which little is labelled weighs little, and one of which
    nothing is labelled gives 0 instead of NaN.

    Args:
        output: Logits.
        masks: `(B, H, W)` class indices, IGNORE where there is none.
        auxiliary_weight: Weight of the auxiliary head.
    """
    loss = _cross_entropy(output.logits, masks)
    if output.auxiliary is not None:
        loss = loss + auxiliary_weight * _cross_entropy(output.auxiliary, masks)
    return loss


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    resized = functional.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = functional.cross_entropy(resized, masks.long(), ignore_index=IGNORE, reduction="sum")
    return total / masks.numel()


@dataclass(frozen=True)
class SegmentationReport:
    """How well a model segments a set of images, all of it from one confusion matrix over their pixels.

    Attributes:
        count: Images.
        pixels: Pixels with a class.
        miou: Mean intersection over union of the classes that occur in masks or predictions.
        pixel_accuracy: Share of pixels given the right class.
        mean_accuracy: Mean over the classes that occur in masks of the share of their pixels that were found.
        classes: Class names.
        iou: Intersection over union by class; None for one that occurs neither in masks nor in predictions.
        accuracy: Share of the class's pixels that were found; None without pixels.
        confusion: Number of pixels by true class (row) and predicted class (column).
    """

    count: int
    pixels: int
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    classes: tuple[str, ...]
    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def figures(self) -> dict[str, float]:
        """Return miou, pixel_accuracy and mean_accuracy."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "mean_accuracy": self.mean_accuracy}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of_confusion(cls, counts: Tensor, classes: Sequence[str], images: int) -> SegmentationReport:
        """Work the figures out.

        Args:
            counts: Pixels by true (row) and predicted class (column).
            classes: Class names.
            images: Number of images.

        Raises:
            ValueError: No pixel was counted.
        """
        rows = counts.tolist()
        hits, true, predicted = counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()
        unions = [t + p - h for h, t, p in zip(hits, true, predicted, strict=True)]
        iou = tuple(h / u if u else None for h, u in zip(hits, unions, strict=True))
        accuracy = tuple(h / t if t else None for h, t in zip(hits, true, strict=True))
        pixels = sum(true)
        if not pixels:
            raise ValueError("there is no readable image with labelled pixels to evaluate on")
        return cls(
            count=images,
            pixels=pixels,
            miou=_mean(iou),
            pixel_accuracy=sum(hits) / pixels,
            mean_accuracy=_mean(accuracy),
            classes=tuple(classes),
            iou=iou,
            accuracy=accuracy,
            confusion=tuple(tuple(row) for row in rows),
        )


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def evaluate(
    segment: Callable[[Tensor, tuple[int, int]], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    device: torch.device,
) -> SegmentationReport:
    """Segment images and count pixels.

    Under torch.distributed, every process brings its own share of the images, of whatever length; pixels are summed
    over all, so the figures are those of one process that has seen everything, and the same in each.

    Args:
        segment: Gives for images `(B, 3, h, w)` and a size (H, W) class indices `(B, H, W)`; see `Segmenter`.
        batches: Pairs of images and masks `(B, H, W)`, IGNORE where there is no class; an empty batch is passed over.
        classes: Class names.
        device: Where it is counted.

    Raises:
        ValueError: There was no labelled pixel.
    """
    from torchmetrics import SumMetric
    from torchmetrics.classification import MulticlassConfusionMatrix

    matrix = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORE, validate_args=False).to(device)
    images_seen = SumMetric().to(device).set_dtype(torch.float64)
    for images, masks in batches:
        if not len(images):
            continue
        labels = segment(images, (masks.shape[1], masks.shape[2]))
        matrix.update(labels.long(), masks.long())
        images_seen.update(len(images))
    with warnings.catch_warnings():
        # A process whose share held no readable image takes part in the sums with nothing.
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        counts, count = matrix.compute().cpu(), int(images_seen.compute())
    return SegmentationReport.of_confusion(counts, classes, count)
