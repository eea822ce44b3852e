"""Measure whole models on a GPU beside their peers: inference, training step, latency, size of the image.

    python benchmarks/whole_models.py                            # every figure, appended to results/whole_models.csv
    python benchmarks/whole_models.py --figures inference training --sizes tiny
    python benchmarks/whole_models.py --profile vmamba_tiny      # the kernels a batch spends its time in
    python benchmarks/whole_models.py --draw                     # the newest rows of growth: docs/figures/growth.png

The models of a row take turns in one process, all compiled in the same way, all in the same dtype. With CUDA graphs
("reduce-overhead", unless --compiled says otherwise) a batch costs what its kernels cost; without, hosts that are slow
to launch kernels hold the GPU up. Training is measured both ways: what graphs allocate is not counted as peak memory.
"""

import argparse
import csv
import itertools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from vmamba.analysis.figures import new_figure, save_figure
from vmamba.analysis.throughput import CompileMode, Measurement, Precision, Runner, Workload, compare, measure, rows

RESULTS = Path(__file__).parent / "results" / "whole_models.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "growth"
SWIN = "swin_{}_patch4_window7_224"
FIGURES = ("inference", "training", "checkpointing", "latency", "growth", "detection")
# Side: batch, of about the same number of pixels.
GROWTH = {224: 128, 384: 43, 512: 24, 768: 11, 1024: 6}


def rows_of(figure: str, size: str, compiled: CompileMode, sides: list[int]) -> list[tuple[str, list[Workload]]]:
    """List the rows of a figure: the peer that ratios refer to, and the workloads measured together."""
    ours, swin = f"vmamba_{size}", SWIN.format(size)
    trio = [ours, swin, f"convnext_{size}"] if size == "tiny" else [ours, swin]

    def row(names: list[str], **conditions: Any) -> tuple[str, list[Workload]]:
        fused = conditions.get("mode") != "training"
        conditions["compiled"] = compiled
        workloads = [Workload(name, **conditions, fused=fused and name == ours) for name in names]
        plain = [Workload(ours, **conditions)] if figure == "inference" and size == "tiny" else []
        return swin, plain + workloads

    training: dict[str, Any] = {"precision": "autocast-bfloat16", "mode": "training"}
    if figure == "inference":
        return [row(trio)]
    if figure == "training":
        return [row(trio, **training)]
    if figure == "checkpointing":
        peer, workloads = row([ours, swin], **training)
        return [(peer, [replace(w, gradient_checkpointing=on) for w in workloads for on in (False, True)])]
    if figure == "latency":
        return [row(trio, batch_size=1)]
    if figure == "growth":
        return [
            row([*trio, "deit_small_patch16_224"], img_size=(side, side), batch_size=batch)
            for side, batch in GROWTH.items()
            if side in sides
        ]
    return [row(trio, img_size=(800, 1280), batch_size=2, **training)]


def show(results: list[Measurement]) -> None:
    for m in results:
        w = m.workload
        height, width = w.img_size
        form = " fused" if w.fused else " checkpointed" if w.gradient_checkpointing else ""
        print(
            f"{w.model + form:32} {w.mode:9} {w.compiled} {height}x{width} b{w.batch_size:<4}",
            f"{m.median_ms:9.3f} ms ±{m.spread:.1%} {m.images_per_second:9.1f} img/s {m.peak_memory_mib or 0:8.0f} MiB",
            f"first call {m.first_call_s:5.1f} s  ratio {m.ratio or 0:.3f}",
            flush=True,
        )


def append(path: Path, table: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(table)


def profile(workload: Workload) -> None:
    """Print milliseconds a batch by kernel, the digits in names that number compiled kernels left out."""
    runner = Runner(workload, torch.device("cuda"))
    runner.seconds(3)
    torch.cuda.reset_peak_memory_stats()
    runner.seconds(3)
    peak, calls = torch.cuda.max_memory_allocated() / 2**20, 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        runner.seconds(calls)
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"(_\d+)+$", "", event.name)[:110]
            total[name] += event.device_time / calls / 1e3
            count[name] += 1
    print(f"{workload}: {sum(total.values()):.3f} ms of kernels a batch, peak {peak:,.0f} MiB")
    for name, ms in total.most_common(45):
        print(f"  {ms:8.4f} ms {count[name] / calls:6.1f} x  {name}")


def draw(path: Path) -> None:
    """Draw the newest rows of growth in a table: nanoseconds a pixel over the side of the image, a line a model."""
    with path.open(newline="") as stream:
        table = [row for row in csv.DictReader(stream) if row["figure"] == "growth"]
    if not table:
        raise SystemExit(f"{path} holds no rows of growth; measure them first: --figures growth")
    newest = {(row["model"], int(row["width"])): row for row in table}  # later rows take the place of earlier ones
    figure, axes = new_figure(4.2)
    for name, marker in zip(dict.fromkeys(name for name, _ in newest), "os^D", strict=False):
        own = {side: row for (model, side), row in sorted(newest.items()) if model == name}
        pixels = [float(row["median_ms"]) * 1e6 / (int(row["batch_size"]) * side**2) for side, row in own.items()]
        axes.plot(list(own), pixels, marker=marker, label=name)
        print(f"{name:32}", *(f"{side}: {ns:.3f}" for side, ns in zip(own, pixels, strict=True)), "ns a pixel")
    axes.set(xlabel="side of the image, pixels", ylabel="nanoseconds a pixel", ylim=(0, None))
    axes.set_xticks(sorted({side for _, side in newest}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    print(*save_figure(figure, FIGURE), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES)
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "small", "base"), default=["tiny", "small", "base"])
    parser.add_argument("--compiled", nargs="+", choices=get_args(CompileMode), help="modes of torch.compile")
    parser.add_argument("--models", nargs="+", help="only these of each row; by default all")
    parser.add_argument("--sides", nargs="+", type=int, choices=GROWTH, default=list(GROWTH), help="of growth")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="a turn of a model lasts about this long")
    parser.add_argument("--profile", nargs="+", metavar="MODEL", help="kernels of these models, nothing else")
    parser.add_argument("--fused", action="store_true", help="profile the fused form")
    parser.add_argument("--mode", choices=("inference", "training"), default="inference", help="of --profile")
    parser.add_argument("--img_size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"), help="of --profile")
    parser.add_argument("--batch_size", type=int, default=128, help="of --profile")
    parser.add_argument("--draw", action="store_true", help="draw the growth in --output, measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.output)
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; these figures are measured on one")
    torch.set_float32_matmul_precision("high")
    precision: Precision = "bfloat16" if arguments.mode == "inference" else "autocast-bfloat16"
    for name in arguments.profile or ():
        conditions: dict[str, Any] = {"img_size": tuple(arguments.img_size), "batch_size": arguments.batch_size}
        conditions["compiled"] = (arguments.compiled or ["default"])[0]
        profile(Workload(name, mode=arguments.mode, precision=precision, fused=arguments.fused, **conditions))
    if arguments.profile:
        return
    for figure in arguments.figures:
        modes: list[CompileMode] = ["default", "reduce-overhead"] if figure == "training" else ["reduce-overhead"]
        sizes = arguments.sizes if figure in ("inference", "training") else ["tiny"]
        for size, mode in itertools.product(sizes, arguments.compiled or modes):
            for peer, workloads in rows_of(figure, size, mode, arguments.sides):
                workloads = [w for w in workloads if arguments.models is None or w.model in arguments.models]
                torch._dynamo.reset()
                measured = measure(workloads, "cuda", rounds=arguments.rounds, seconds_a_round=arguments.seconds)
                results = compare(measured, peer)
                show(results)
                append(arguments.output, [{"figure": figure, **row} for row in rows(results, "cuda")])


if __name__ == "__main__":
    main()
