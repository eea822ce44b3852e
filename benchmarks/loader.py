"""How many images a second the loader makes of JPEGs, by number of worker processes, with the published augmentation.

    python benchmarks/loader.py --workers 0 2 8 16

The JPEGs are made up, of ImageNet's usual size (see data_parallel.py); they lie in the page cache, so this is the
processor's share. `needed` is the training speed to keep up with, in images per second; what it takes is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_parallel import PUBLISHED, photographs

from vmamba.data.loaders import training_loader
from vmamba.data.sources import open_source
from vmamba.data.transforms import Preprocessing


def rate(data: Path, workers: int, seconds: float, batch: int = 64) -> float:
    """Return images per second in steady state; without workers, of the processor's time that this process got."""
    source = open_source(str(data))
    transform = Preprocessing().training_transform(
        "photos", "photo", auto_augment=PUBLISHED.auto_augment, random_erasing=PUBLISHED.random_erasing
    )
    images = source.train.subset(np.resize(np.arange(len(source.train)), 10**6))
    loader = training_loader(images, transform, batch, img_size=224, seed=0, workers=workers).epoch(0)
    for _ in range(2 * max(workers, 1)):  # what the workers hold ready by now
        next(loader)
    clock = time.perf_counter if workers else time.process_time
    began, seen = clock(), 0
    while clock() - began < seconds:
        next(loader)
        seen += batch
    return seen / (clock() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--needed", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = photographs(Path(scratch) / "photographs")
        size = sum(path.stat().st_size for path in data.rglob("*.jpg")) / 512
        rates = {workers: rate(data, workers, arguments.seconds) for workers in arguments.workers}
    each = rates.get(0) or max(value / workers for workers, value in rates.items())
    found = {"cores": os.cpu_count(), "bytes_per_image": size, "images_per_second": rates, "per_core": each}
    if arguments.needed:
        found["cores_needed"] = arguments.needed / each
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
