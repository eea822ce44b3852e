r"""What the engine costs over a bare loop: the same model, images, optimiser and number of updates.

    OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py --rounds 5
    python benchmarks/engine_overhead.py --model vmamba_tiny --batch 128 --img_size 224 --precision bf16 \
        --compile_mode reduce-overhead

The bare loop is forward, loss, backward, clipping and step; it reads its loss when the engine does, every tenth update,
and otherwise never waits for a GPU. The engine also seeds every update, asks whether loss and gradient are finite,
counts, times, and writes metrics. Ten updates are timed together. Rounds of both alternate; the ratio of the fastest
is given, for other programs of the machine only ever slow a round down.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from vmamba.data.loaders import Batch
from vmamba.data.reading import Share
from vmamba.models.registry import create_model
from vmamba.tasks.classification import classification_loss
from vmamba.training.classification import ClassificationTask
from vmamba.training.engine import train
from vmamba.training.optim import make_optimizer, parameter_groups
from vmamba.training.recipe import Recipe

# On a processor, its own time: other programs do not count in it. A GPU is waited for.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
READ = Recipe().log_every


class OneBatch(ClassificationTask):
    """The same images again and again; notes the time whenever the loss has been read."""

    def __init__(self, recipe: Recipe, steps: int, times: list[float]) -> None:
        super().__init__(recipe)
        self.steps, self.layout, self._times = steps, dict[str, int](), times
        self.source = replace(self.source, held_out=self.source.held_out.subset(np.arange(2)))

    def training_loader(self, share: Share, pin_memory: bool) -> Any:
        """Make the batch."""
        self._batch = make_batch(self.recipe, self.preprocessing.img_size, "cuda" if pin_memory else "cpu")
        return self

    def epoch(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """Yield the batch, and note when."""
        for step in range(first, self.steps + 1):
            if step % READ == 0:
                self._times.append(clock())
            if step < self.steps:
                yield [self._batch]


def make_batch(recipe: Recipe, side: int, device: str) -> Batch:
    """Return a batch of noise."""
    size = recipe.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator).to(device)
    targets = torch.randint(10, (size,), generator=generator).to(device)
    plain = torch.zeros(size, dtype=torch.long)
    return Batch(images, targets, plain, plain, [""] * size, [], good=size)


def by_engine(recipe: Recipe, steps: int, folder: Path) -> list[float]:
    """Return seconds of an update, of every ten."""
    times: list[float] = []
    train(
        replace(recipe, output=str(folder)), Console(quiet=True), make_task=partial(OneBatch, steps=steps, times=times)
    )
    return [(after - before) / READ for before, after in pairwise(times)]


def bare(recipe: Recipe, steps: int, device: str) -> list[float]:
    """Return the same for a loop that does nothing else."""
    torch.manual_seed(0)
    module = create_model(recipe.model, num_classes=10).to(device).train()
    optimizer = make_optimizer(parameter_groups(module, recipe.optimizer), recipe.optimizer, fused=device == "cuda")
    model = torch.compile(module, mode=recipe.compile_mode) if recipe.compile else module
    batch = make_batch(recipe, recipe.img_size or 32, device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16")
    times = [clock()]
    for step in range(steps):
        with autocast:
            logits = model(batch.images)
        loss = classification_loss(logits, batch.targets, 0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % READ == 0:
            loss.item()
            times.append(clock())
    return [(after - before) / READ for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vmamba_nano")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="updates in a round; the first ten do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile_mode", help="compile both, in this mode of torch.compile")
    arguments = parser.parse_args()
    if arguments.steps < 2 * READ:
        parser.error(f"--steps must be {2 * READ} or more: the first {READ} are not counted")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(
        model=arguments.model,
        batch_size=arguments.batch,
        epochs=1,
        img_size=arguments.img_size,
        trackers=(),
        precision=arguments.precision,
        compile=bool(arguments.compile_mode),
        compile_mode=arguments.compile_mode or "default",
    )
    engine: list[float] = []
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            engine += by_engine(recipe, arguments.steps, Path(scratch) / str(number))[1:]
            alone += bare(recipe, arguments.steps, device)[1:]
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{key: str(value) for key, value in vars(arguments).items()},
        "fastest_ms": {"engine": 1e3 * min(engine), "bare": 1e3 * min(alone)},
        "quartile_ms": {
            "engine": 1e3 * float(np.quantile(engine, 0.25)),
            "bare": 1e3 * float(np.quantile(alone, 0.25)),
        },
        "overhead_fastest": min(engine) / min(alone) - 1,
        "overhead_quartile": float(np.quantile(engine, 0.25) / np.quantile(alone, 0.25)) - 1,
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
