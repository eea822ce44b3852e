"""`vmamba benchmark`: throughput, latency and memory of models, side by side in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.arguments import parse

if TYPE_CHECKING:
    from vmamba.analysis.throughput import Measurement, Workload


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time models against each other in one process, taking turns.

    Args:
        models: Names of models, ours or timm's.
        compare: Peers to time beside them; ratios are to the first.
        img_sizes: Sides of the images in pixels, or HEIGHTxWIDTH.
        batch_sizes: Images in a batch; halved until it fits the memory.
        precisions: float32, bfloat16, float16 (weights and images), autocast-bfloat16 or autocast-float16.
        compiled: eager, or a mode of torch.compile (default, reduce-overhead, max-autotune,
            max-autotune-no-cudagraphs).
        modes: inference (a forward pass) or training (forward, cross-entropy and backward).
        fused: Time our models for inference in the form that `vmamba.fuse` makes.
        gradient_checkpointing: Recompute the insides of blocks in the backward pass of training, to save memory.
        device: cpu, cuda, or auto for the best there is.
        rounds: Turns each model takes; the median is reported.
        seconds_a_round: About how long a turn lasts.
        tf32: Whether float32 matrix products on a GPU may use TF32.
        output: CSV file to write, with device, versions and commit in every row.
        picture: PNG file to draw the speeds to.
    """

    models: list[str] = field(default_factory=lambda: ["vmamba_tiny"])
    compare: list[str] = field(default_factory=list)
    img_sizes: list[int | str] = field(default_factory=lambda: [224])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 128])
    precisions: list[str] | None = None
    compiled: list[str] | None = None
    modes: list[str] = field(default_factory=lambda: ["inference"])
    fused: bool = False
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 10
    seconds_a_round: float = 0.3
    tf32: bool = False
    output: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.seconds_a_round <= 0:
            raise ValueError("rounds must be 1 or more, and seconds_a_round more than 0")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"batch_sizes must be 1 or more, not {self.batch_sizes}")


def run(argv: Sequence[str]) -> int:
    """Benchmark as the flags say."""
    options = parse("benchmark", BenchmarkOptions, argv)
    import torch
    from rich.console import Console

    from vmamba.analysis.throughput import compare, environment, measure, rows, write_csv

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu times on the CPU")
    if options.output and not Path(options.output).expanduser().parent.is_dir():
        raise ValueError(f"the folder of --output {options.output} does not exist")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    groups = _groups(options, device)
    peer = (options.compare or options.models)[0]
    console, progress = Console(), Console(stderr=True)
    measurements: list[Measurement] = []
    with progress.status("starting") as status:
        for group in groups:
            measured = measure(
                group,
                device,
                rounds=options.rounds,
                seconds_a_round=options.seconds_a_round,
                report=lambda line: status.update(line),
            )
            measurements += compare(measured, peer)
    facts = environment(device)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value), highlight=False)
    _print(measurements, peer, console)
    if options.output:
        write_csv(Path(options.output).expanduser(), rows(measurements, device))
        print(f"written to {options.output}", file=sys.stderr)
    if options.picture:
        _draw(measurements, f"{facts['device']}, torch {facts['torch']}", Path(options.picture).expanduser())
    return 0


def _groups(options: BenchmarkOptions, device: str) -> list[list[Workload]]:
    """List the workloads, those of the same conditions together: they take turns."""
    from typing import get_args

    from vmamba.analysis.throughput import CompileMode, Mode, Precision, Workload
    from vmamba.models.config import list_models

    precisions = options.precisions or (["bfloat16"] if device == "cuda" else ["float32"])
    compiled = options.compiled or (["default"] if device == "cuda" else ["eager"])
    for name, given, allowed in (
        ("precisions", precisions, get_args(Precision)),
        ("compiled", compiled, get_args(CompileMode)),
        ("modes", options.modes, get_args(Mode)),
    ):
        for word in given:
            if word not in allowed:
                raise ValueError(f"--{name} takes {', '.join(allowed)}; not {word}")
    names = list(dict.fromkeys([*options.models, *options.compare]))
    conditions = product(map(_size, options.img_sizes), options.batch_sizes, precisions, compiled, options.modes)
    own = set(list_models(published=True)) if options.fused else set()
    return [
        [
            Workload(
                name,
                size,
                batch,
                precision,  # type: ignore[arg-type]
                how,  # type: ignore[arg-type]
                mode,  # type: ignore[arg-type]
                fused=name in own and mode == "inference",
                gradient_checkpointing=options.gradient_checkpointing and mode == "training",
            )
            for name in names
        ]
        for size, batch, precision, how, mode in conditions
    ]


def _form(workload: Workload) -> str:
    return ", fused" if workload.fused else ", checkpointed" if workload.gradient_checkpointing else ""


def _size(text: int | str) -> tuple[int, int]:
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"an image size is a number of pixels or HEIGHTxWIDTH, such as 800x1280; not {text}")
    return int(parts[0]), int(parts[-1])


def _print(measurements: Sequence[Measurement], peer: str, console: Any) -> None:
    """Print a table for each set of conditions."""
    from itertools import groupby

    from rich.table import Table

    def conditions(m: Measurement) -> str:
        height, width = m.workload.img_size
        return f"{m.workload.mode}, {height}×{width}, {m.workload.precision}, {m.workload.compiled}"

    for heading, group in groupby(measurements, conditions):
        table = Table("model", "batch", "ms", "spread", "images/s", "MiB", "ratio", title=heading, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for m in group:
            table.add_row(
                m.workload.model + _form(m.workload),
                str(m.workload.batch_size),
                f"{m.median_ms:.2f}",
                f"{m.spread:.0%}",
                f"{m.images_per_second:,.0f}",
                "–" if m.peak_memory_mib is None else f"{m.peak_memory_mib:,.0f}",
                "–" if m.ratio is None else f"{m.ratio:.2f}",
            )
        console.print(table)
    console.print(f"ratio: images per second over those of {peer}", highlight=False)


def _draw(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    labels = [_label(m.workload) for m in measurements]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(labels, [m.images_per_second for m in measurements], color="#3465a4")
    axes.bar_label(bars, [f"{m.images_per_second:,.0f}" for m in measurements], padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("images per second")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _label(workload: Workload) -> str:
    height, width = workload.img_size
    name = workload.model + (", fused" if workload.fused else "")
    return f"{name}\n{workload.mode}, {height}×{width}, batch {workload.batch_size}, {workload.precision}"
