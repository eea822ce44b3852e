"""The tables of docs/scaling.md: what 1, 8, 64 and 512 GPUs need, computed from measured speeds.

    python benchmarks/scaling_table.py --step benchmarks/results/training_step.csv > tables.md

The file has a row for each measured training step, with columns model, device, batch_size, params and median_ms, as
`vmamba benchmark` writes them. Assumptions are arguments; each is printed above the tables.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

IMAGENET, BILLION = 1_281_167, 1_000_000_000
GPUS = (1, 8, 64, 512)
NODE = 8


@dataclass(frozen=True)
class Step:
    """One measured training step on one GPU.

    Attributes:
        model: Its name.
        device: The GPU.
        batch: Images.
        parameters: Of the model.
        seconds: Time.
    """

    model: str
    device: str
    batch: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Assumptions:
    """What is not measured.

    Attributes:
        nvlink: Bytes per second each GPU sends to the others of its node, in collectives.
        network: Bytes per second each GPU sends to other nodes: a 400 Gb/s card, of which 80 % is used.
        overlap: Share of the gradients' exchange that is hidden behind the backward pass.
        images_per_core: Images per second a core decodes and augments.
        bytes_per_image: Size of an encoded image.
        disk: Bytes per second a checkpoint is written with.
        price: Cost of a GPU hour.
    """

    nvlink: float = 300e9
    network: float = 40e9
    overlap: float = 0.0
    images_per_core: float = 100.0
    bytes_per_image: float = 110e3
    disk: float = 1e9
    price: float = 3.0


@dataclass(frozen=True)
class Row:
    """What so many GPUs make of it.

    Attributes:
        gpus: Number of GPUs.
        batch: Images in an update.
        traffic: Bytes each GPU sends in a step for the sum of gradients (a ring: twice its size, less a share).
        exchange: Seconds that takes at the slowest link.
        rate: Images per second of all.
        cores: Cores that decode, for each GPU.
        read: Bytes per second of encoded images, of all GPUs.
    """

    gpus: int
    batch: int
    traffic: float
    exchange: float
    rate: float
    cores: float
    read: float


def row(step: Step, gpus: int, given: Assumptions) -> Row:
    """Compute what `gpus` GPUs need, each with the measured batch."""
    gradients = 4.0 * step.parameters  # float32
    traffic = 2 * gradients * (gpus - 1) / gpus
    link = given.network if gpus > NODE else given.nvlink
    exchange = traffic / link
    seconds = step.seconds + (1 - given.overlap) * exchange
    rate = gpus * step.batch / seconds
    return Row(
        gpus,
        gpus * step.batch,
        traffic,
        exchange,
        rate,
        rate / gpus / given.images_per_core,
        rate * given.bytes_per_image,
    )


def read_steps(path: Path) -> list[Step]:
    """Read measured training steps.

    Raises:
        ValueError: A column is missing, or there is no row of training.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("mode", "training") == "training"]
    try:
        steps = [
            Step(r["model"], r["device"], int(r["batch_size"]), int(r["params"]), float(r["median_ms"]) / 1e3)
            for r in rows
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: a row lacks a readable column ({error})") from None
    if not steps:
        raise ValueError(f"{path} has no row whose mode is training")
    return steps


def tables(step: Step, given: Assumptions) -> str:
    """Return the tables in Markdown."""
    rows = [row(step, gpus, given) for gpus in GPUS]
    alone = rows[0].rate
    lines = [
        f"{step.model}, {step.parameters:,} parameters, {step.device}: {1e3 * step.seconds:.1f} ms a step of"
        f" {step.batch} images, {alone:,.0f} images/s.",
        "",
        "| GPUs | images in an update | gradients sent, GB a step and GPU | at the slowest link, ms | share of the step"
        " | images/s | efficiency | cores a GPU to decode | images read, GB/s |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.gpus} | {r.batch:,} | {r.traffic / 1e9:.3f} | {1e3 * r.exchange:.2f}"
            f" | {r.exchange / step.seconds:.1%}"
            f" | {r.rate:,.0f} | {r.rate / r.gpus / alone:.1%} | {r.cores:.0f} | {r.read / 1e9:.2f} |"
        )
    lines += [
        "",
        "| run | images seen | "
        + " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)
        + " | GPU hours | cost |",
        "|---|---:|" + "---:|" * (len(GPUS) + 2),
    ]
    runs = (("ImageNet-1K, 300 epochs", 300 * IMAGENET), ("a billion images, 10 passes", 10 * BILLION))
    for name, images in runs:
        times = [images / r.rate / 3600 for r in rows]
        spent = GPUS[1] * times[1]
        cells = " | ".join(_duration(hours) for hours in times)
        lines.append(f"| {name} | {images / 1e9:.2f} billion | {cells} | {spent:,.0f} | {spent * given.price:,.0f} |")
    weights = 4 * step.parameters
    checkpoint = 4 * weights  # weights, their average, two moments
    lines += [
        "",
        f"A checkpoint: weights {weights / 1e6:.0f} MB, moving average {weights / 1e6:.0f} MB, two moments"
        f" {2 * weights / 1e6:.0f} MB: {checkpoint / 1e6:.0f} MB, {checkpoint / given.disk:.1f} s at"
        f" {given.disk / 1e9:.0f} GB/s, whatever the number of GPUs, for one process writes it.",
    ]
    return "\n".join(lines)


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=Path, required=True)
    for name, value in vars(Assumptions()).items():
        parser.add_argument(f"--{name}", type=float, default=value)
    arguments = vars(parser.parse_args())
    steps = read_steps(arguments.pop("step"))
    given = Assumptions(**arguments)
    print("Assumed: " + ", ".join(f"{name} {value:g}" for name, value in vars(given).items()) + ".")
    for step in steps:
        print(f"\n{tables(step, given)}")


if __name__ == "__main__":
    main()
