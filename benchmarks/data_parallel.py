"""Train on one GPU and on several by the engine: images per second with made-up and decoded images, and gradients.

    python benchmarks/data_parallel.py --output out
    torchrun --nproc-per-node 2 benchmarks/data_parallel.py --output out --compare out/1.json

Each run trains for two short epochs and counts the second half of the last: the model is compiled and the loader warm
by then. `gradients` compares what several GPUs compute for a batch with what one computes for the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image
from rich.console import Console

from vmamba.data.loaders import Batch
from vmamba.data.reading import Share
from vmamba.models.registry import create_model
from vmamba.tasks.classification import classification_loss
from vmamba.training.classification import ClassificationTask
from vmamba.training.engine import train
from vmamba.training.processes import leave, release
from vmamba.training.recipe import AugmentationOptions, OptimizerOptions, Recipe

PUBLISHED = AugmentationOptions(
    policy="photo", auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, mixup=0.8, cutmix=1.0
)


def photographs(folder: Path, count: int = 512) -> Path:
    """Write JPEGs of ImageNet's usual size, 500 × 375 pixels and about 110 kB: coarse shapes and fine grain."""
    generator = np.random.default_rng(0)
    for index in range(count):
        place = folder / f"{index % 8}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = generator.normal(0, 14, (375, 500, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.jpg", quality=88)
    return folder


class Made(ClassificationTask):
    """Images made up once, on the device; what is timed is the model and the engine alone."""

    steps = 40

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.source = replace(self.source, held_out=self.source.held_out.subset(np.arange(2)))

    def training_loader(self, share: Share, pin_memory: bool) -> Any:
        """Make a batch, and give it out again and again."""
        size = self.recipe.batch_size // share.processes
        side = self.preprocessing.img_size
        kind = "cuda" if pin_memory else "cpu"
        images = torch.randn(size, 3, side, side, device=kind)
        targets = torch.randint(len(self.source.classes), (size,), device=kind)
        plain = torch.zeros(size, dtype=torch.long)
        self._batch = Batch(images, targets, plain, plain, [""] * size, [], good=size)
        return self

    layout: dict[str, int] = {}  # noqa: RUF012

    def epoch(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """Yield the one batch."""
        for _ in range(first, self.steps):
            yield [self._batch]


class Decoded(ClassificationTask):
    """The photographs, repeated to fill an epoch, through the published augmentation."""

    steps = 40

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        train_set = self.source.train
        many = np.resize(np.arange(len(train_set)), self.steps * recipe.batch_size)
        self.source = replace(
            self.source, train=train_set.subset(many), held_out=self.source.held_out.subset(np.arange(2))
        )


def speed(kind: type, data: Path, arguments: argparse.Namespace, processes: int, output: Path) -> dict[str, float]:
    """Return images per second of all processes, and the share of time spent waiting for images."""
    recipe = Recipe(
        model=arguments.model,
        data=str(data),
        epochs=2,
        batch_size=arguments.batch * processes,
        output=str(output / kind.__name__),
        precision="bf16" if torch.cuda.is_available() else "fp32",
        compile=arguments.compile,
        compile_mode=arguments.compile_mode,
        parallel=arguments.parallel,
        workers=arguments.workers,
        log_every=10,
        trackers=(),
        optimizer=OptimizerOptions(lr=1e-3, warmup_epochs=0),
        augmentation=PUBLISHED,
        img_size=arguments.img_size,
    )
    result = train(recipe, Console(quiet=True), make_task=kind)
    steps = [record for record in result.folder.read_metrics() if record["kind"] == "step" and record["epoch"] == 2]
    first, last = steps[len(steps) // 2 - 1], steps[-1]
    seconds = last["seconds"] - first["seconds"]
    waited = last["data_wait"] * last["seconds"] - first["data_wait"] * first["seconds"]
    rate = (last["images"] - first["images"]) / seconds
    return {"images_per_second": rate, "data_wait": waited / seconds, "gib": last.get("gib", 0.0)}


def gradients(arguments: argparse.Namespace, batch: int = 32) -> dict[str, Any]:
    """Compare gradients over all processes with those of one process, part by part and of the batch at once."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs()])
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    torch.manual_seed(0)
    model = create_model(arguments.model, num_classes=1000, drop_path_rate=0.0).to(device)
    images = torch.randn(batch, 3, arguments.img_size, arguments.img_size).to(device)
    targets = torch.randint(1000, (batch,)).to(device)
    parts = list(zip(images.chunk(processes), targets.chunk(processes), strict=True))

    def compute(module: torch.nn.Module, pieces: list[Any]) -> list[torch.Tensor]:
        module.zero_grad()
        for x, y in pieces:
            (classification_loss(module(x), y, 0.1) / len(pieces)).backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    in_parts, again, at_once = compute(model, parts), compute(model, parts), compute(model, [(images, targets)])
    together = compute(accelerator.prepare(model), [parts[rank]])

    def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        distance = sum(((a - b).double() ** 2).sum() for a, b in zip(one, other, strict=True)) ** 0.5
        return float(distance / sum((b.double() ** 2).sum() for b in other) ** 0.5)

    found = {
        "bit_equal_to_one_process_in_parts": all(map(torch.equal, together, in_parts)),
        "distance_from_one_process_in_parts": apart(together, in_parts),
        "distance_from_one_process_at_once": apart(together, at_once),
        "distance_of_one_process_from_itself": apart(again, in_parts),
        "distance_in_parts_from_at_once": apart(in_parts, at_once),
    }
    release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128, help="images a process computes at once")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile_mode", default="default", help="as of `vmamba train`")
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--skip", default="", help="any of made, decoded, gradients")
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {"processes": processes, **{k: str(v) for k, v in vars(arguments).items()}}
    if processes > 1 and "gradients" not in arguments.skip:
        found["gradients"] = gradients(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        # Every process writes the same photographs to a folder of its own; only what they hold matters.
        data = photographs(Path(scratch) / "photographs")
        output = arguments.output / f"runs-{processes}-{arguments.parallel}"
        for kind in (Made, Decoded):
            if kind.__name__.lower() not in arguments.skip:
                found[kind.__name__.lower()] = speed(kind, data, arguments, processes, output)
    leave()
    if rank:
        return
    if arguments.compare:
        alone = json.loads(arguments.compare.read_text())
        for kind in ("made", "decoded"):
            if kind in found and kind in alone:
                found[f"{kind}_ratio"] = found[kind]["images_per_second"] / alone[kind]["images_per_second"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    suffix = "" if arguments.parallel == "ddp" else f"-{arguments.parallel}"
    (arguments.output / f"{processes}{suffix}.json").write_text(json.dumps(found, indent=1))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
