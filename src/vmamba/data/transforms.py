"""From RGB pictures to normalised tensors: what a model was trained to see, and augmentation on the way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from vmamba.data.sources import Style

# Four stages halve the map of the stem three times.
SMALLEST_IMG_SIZE = 32

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every picture before the model sees it; stored with the weights.

    Attributes:
        img_size: Side of the square the model sees, in pixels.
        mean: Mean of each channel, for values in 0–1.
        std: Standard deviation of each channel.
        interpolation: Resampling filter, in timm's words.
        crop_pct: Share of the resized picture's side that is kept.
        crop_mode: "center" keeps the aspect ratio and cuts the rest off; "squash" keeps all and the ratio not.
    """

    img_size: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def for_style(cls, style: Style, img_size: int) -> Preprocessing:
        """Return what suits a kind of picture: photographs as in the paper, small grey ones whole."""
        if style == "photos":
            return cls(img_size=img_size)
        return cls(img_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", crop_pct=1.0, crop_mode="squash")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the metadata of a weights file."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], img_size: int | None = None) -> Preprocessing:
        """Read what `to_dict` wrote; whatever is missing is as the paper has it.

        Args:
            metadata: Metadata of a weights file, perhaps empty.
            img_size: Side to use instead of the stored one.

        Raises:
            ValueError: `img_size` is too small for the models.
        """
        if img_size is not None and img_size < SMALLEST_IMG_SIZE:
            raise ValueError(f"img_size must be {SMALLEST_IMG_SIZE} or more, not {img_size}")
        known = {name: metadata[name] for name in cls.__dataclass_fields__ if metadata.get(name) is not None}
        for name in ("mean", "std"):
            if name in known:
                known[name] = tuple(known[name])
        if isinstance(known.get("img_size"), (list, tuple)):
            known["img_size"] = max(known["img_size"])
        return cls(**(known | ({"img_size": img_size} if img_size else {})))

    def transform(self) -> Transform:
        """Return the transform of evaluation, without chance."""
        return create_transform(
            input_size=(3, self.img_size, self.img_size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def training_transform(
        self,
        style: Style,
        policy: str = "auto",
        *,
        auto_augment: str | None = None,
        color_jitter: float = 0.4,
        random_erasing: float = 0.0,
    ) -> Transform:
        """Return the transform of training, which draws from the random generators of python, numpy and torch.

        Args:
            style: What the pictures show.
            policy: "light", "photo", "none", or "auto" to pick by the style.
            auto_augment: See AugmentationOptions, as for the rest.
            color_jitter: Strength for "photo".
            random_erasing: Chance of an erased rectangle.

        Raises:
            ValueError: timm does not understand `auto_augment`.
        """
        if policy == "auto":
            policy = "photo" if style == "photos" else "light"
        if auto_augment and policy != "photo":
            raise ValueError(f"auto_augment needs the augmentation policy 'photo'; here it is {policy!r}")
        if policy == "photo":
            return self._photo_transform(auto_augment, color_jitter, random_erasing)
        steps: list[Any] = []
        if policy == "light":
            # Mirrored digits are no digits; mirrored garments are.
            steps += [transforms.RandomHorizontalFlip()] if style == "garments" else []
            degrees, shift = (10, 0.08) if style == "glyphs" else (5, 0.06)
            bilinear = transforms.InterpolationMode.BILINEAR
            steps.append(transforms.RandomAffine(degrees, (shift, shift), scale=(0.9, 1.1), interpolation=bilinear))
        steps.append(self.transform())
        if random_erasing:
            steps.append(RandomErasing(random_erasing, mode="pixel", device="cpu"))
        return transforms.Compose(steps)

    def _photo_transform(self, auto_augment: str | None, color_jitter: float, random_erasing: float) -> Transform:
        try:
            return create_transform(
                input_size=(3, self.img_size, self.img_size),
                is_training=True,
                auto_augment=auto_augment,
                color_jitter=color_jitter,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, KeyError, IndexError, ValueError):
            raise ValueError(
                f"timm does not understand auto_augment {auto_augment!r}; an example: rand-m9-mstd0.5-inc1"
            ) from None
