"""Train `vmamba_nano` and timm's Swin and ConvNeXt, scaled to its number of parameters, on Fashion-MNIST by one recipe.

    python benchmarks/small_models.py --data FOLDER --output out.csv --seeds 0 1 2

All run through the package's engine. The images lie on the device, and are shifted, mirrored and erased there; every
model sees the same images in the same order. Accuracy is that of the last epoch, not of the best.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vmamba.data.loaders import Batch
from vmamba.data.reading import Share
from vmamba.data.sources import ImageSet
from vmamba.models.registry import create_model
from vmamba.training.classification import ClassificationTask
from vmamba.training.engine import train
from vmamba.training.recipe import OptimizerOptions, Recipe

SIDE = 32
DROP_PATH = 0.1
MODELS = {
    "vmamba_nano": lambda: create_model("vmamba_nano", num_classes=10, drop_path_rate=DROP_PATH),
    # The stem keeps half the resolution, as vmamba_nano's does: maps of 16, 8 and 4 (ConvNeXt has a fourth stage).
    "swin": lambda: SwinTransformer(
        img_size=SIDE, patch_size=2, window_size=4, embed_dim=60, depths=(2, 2, 2), num_heads=(4, 8, 16),
        num_classes=10, drop_path_rate=DROP_PATH,
    ),
    "convnext": lambda: ConvNeXt(
        patch_size=2, depths=(2, 2, 2, 2), dims=(36, 72, 144, 280), num_classes=10, drop_path_rate=DROP_PATH
    ),
}  # fmt: skip


class OnDevice(ClassificationTask):
    """Fashion-MNIST held on the device; what a batch holds is a function of seed, epoch and step."""

    def __init__(self, recipe: Recipe, kind: str) -> None:
        self._kind = kind
        super().__init__(recipe)
        self.layout: dict[str, int] = {}
        self.steps = len(self.source.train) // recipe.batch_size

    def _build_model(self) -> nn.Module:
        return MODELS[self._kind]()

    def _on_device(self, images: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        assert isinstance(images, ImageSet)
        assert images.pixels is not None
        padded = np.pad(images.pixels, [(0, 0), (2, 2), (2, 2)])  # 28 to 32 pixels, black as the background
        return torch.from_numpy(padded).to(device), torch.from_numpy(images.targets).to(device)

    def training_loader(self, share: Share, pin_memory: bool) -> Any:
        """Put the training images on the device."""
        self._device = torch.device("cuda" if pin_memory else "cpu")
        self._train = self._on_device(self.source.train, self._device)
        return self

    def epoch(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """Yield augmented batches."""
        pixels, targets = self._train
        size = self.recipe.batch_size
        order = torch.from_numpy(np.random.default_rng([self.recipe.seed, epoch]).permutation(len(pixels)))
        order = order.to(self._device)
        chance = torch.Generator(self._device).manual_seed(1000 * self.recipe.seed + epoch)
        for step in range(first, self.steps):
            chosen = order[step * size : (step + 1) * size]
            yield [_batch(augmented(pixels[chosen], chance), targets[chosen])]

    def evaluation_batches(self, share: Share, pin_memory: bool) -> Any:
        """Put the test images on the device."""
        pixels, targets = self._on_device(self.source.held_out, torch.device("cuda" if pin_memory else "cpu"))
        return [_batch(normalised(x), y) for x, y in zip(pixels.split(1000), targets.split(1000), strict=True)]


def _batch(images: Tensor, targets: Tensor) -> Batch:
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(images, targets, nothing, nothing, [], [], good=len(targets))


def normalised(pixels: Tensor) -> Tensor:
    """Map bytes (B, H, W) to images (B, 3, H, W) of mean 0.5 and deviation 0.5."""
    return (pixels.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def augmented(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Shift by up to two pixels, mirror half of the images, and erase a rectangle of a quarter of them."""
    batch, side, device = len(pixels), pixels.shape[-1], pixels.device

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, 1), generator=chance, device=device)

    line = torch.arange(side, device=device)
    rows, columns = (line + draw(-2, 3)).clamp(0, side - 1), (line + draw(-2, 3)).clamp(0, side - 1)
    columns = torch.where(draw(0, 2) == 1, columns.flip(1), columns)
    moved = pixels[torch.arange(batch, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    top, left, height, width = draw(0, side), draw(0, side), draw(4, 13), draw(4, 13)
    inside = ((line >= top) & (line < top + height))[:, :, None] & ((line >= left) & (line < left + width))[:, None, :]
    return normalised(moved.masked_fill(inside & (draw(0, 4) == 0)[:, :, None], 0))


def run(kind: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one model once; return a row of the table."""
    cuda = torch.cuda.is_available()
    recipe = Recipe(
        data=f"fashion-mnist:{arguments.data}",
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        seed=seed,
        precision="bf16" if cuda else "fp32",
        output=str(folder),
        trackers=(),
        log_every=50,
        optimizer=OptimizerOptions(lr=arguments.lr, min_lr=1e-5, warmup_epochs=arguments.epochs / 10),
    )
    recipe = replace(recipe, augmentation=replace(recipe.augmentation, policy="none"))
    began = time.perf_counter()
    result = train(recipe, Console(quiet=True), make_task=partial(OnDevice, kind=kind))
    epochs = [record for record in result.folder.read_metrics() if record["kind"] == "epoch"]
    return {
        "model": kind,
        "parameters": sum(p.numel() for p in MODELS[kind]().parameters()),
        "seed": seed,
        "epochs": arguments.epochs,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "top1": result.report.top1,
        "loss": result.report.loss,
        "train_loss": epochs[-1]["train_loss"],
        "images_per_second": epochs[-1]["images_per_second"],
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            # Another order for each seed, so that none is always the first to warm the device.
            kinds = [arguments.models[(i + seed) % len(arguments.models)] for i in range(len(arguments.models))]
            for kind in kinds:
                row = run(kind, seed, arguments, Path(scratch) / f"{kind}-{seed}")
                new = not arguments.output.is_file()
                with arguments.output.open("a", newline="") as stream:
                    writer = csv.DictWriter(stream, row)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(f"{kind:<12} seed {seed}: {row['top1']:.2%} in {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
