"""Measure the paper's acceleration ladder and resolution scaling on this GPU; write CSV files into a folder.

Every figure, into benchmarks/results: `python benchmarks/paper_analyses.py`; one of them, elsewhere: `--only ladder
--output FOLDER`; that every step of the ladder computes what the model does: `--only check`. `--only report` needs no
GPU: it prints the ladder of results/ladder.csv as Markdown and draws docs/figures/ladder.png.
"""

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import torch

from vmamba.analysis.ladder import (
    LADDER,
    LadderRow,
    StepSS2D,
    build_step,
    count_ladder,
    ladder_table,
    measure_ladder,
    reversals,
)
from vmamba.analysis.scaling import SIZES, measure_scaling, scaling_table
from vmamba.analysis.throughput import Measurement, Workload, write_csv

PEERS = ("vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224")
START = time.perf_counter()


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)


def check() -> None:
    """Compare every step, forward and backward, with the model whose SS2D it carries out."""
    for step in LADDER:
        if step.implementation is None:
            continue
        torch.manual_seed(0)
        model = build_step(step, depths=(1, 1), dims=(32, 64), drop_path_rate=0.0).cuda().train()
        images = torch.randn(2, 3, 64, 96, device="cuda")
        results = []
        for _ in range(2):
            model.zero_grad()
            logits = model(images)
            logits.square().mean().backward()
            results.append((logits.detach(), model.patch_embed[0].weight.grad.clone()))
            for block in (block for stage in model.layers for block in stage.blocks):
                if isinstance(block.op, StepSS2D):
                    block.op = block.op.op
        for got, expected in zip(*results, strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < 1e-3:
                raise SystemExit(f"{step.label} differs from the model by {error:.1e}")
    say("every step agrees with the model")


def show(rows: list[LadderRow]) -> None:
    for row in rows:
        speeds = " ".join(f"{mode} {speed or 0:8.1f}" for mode, speed in row.measured.items())
        print(f"{row.step.label:15} {row.gflops:.2f} G {speeds} {row.reason or ''}", flush=True)
    for mode in ("inference", "training"):
        print(f"{mode}: the paper's order of neighbours is reversed for {reversals(rows, mode) or 'none'}", flush=True)


def report(path: Path) -> None:
    """Print a measured ladder as Markdown, published figures beside, and draw its staircase."""
    from vmamba.analysis.figures import draw_ladder, save_figure

    with path.open() as stream:
        records = {record["step"]: record for record in csv.DictReader(stream)}
    rows = []
    for row in count_ladder():
        record = records[row.step.label]
        speeds = {}
        for mode in ("inference", "training"):
            if record[f"measured_{mode}"]:
                speed = float(record[f"measured_{mode}"])
                peak = float(record[f"peak_mib_{mode}"])
                speeds[mode] = Measurement(Workload(row.step.label), row.params, 0.0, 0.0, speed, peak, 0.0)
        rows.append(replace(row, **speeds))
    facts = records[rows[0].step.label]
    machine = f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}"
    print(
        f"Images a second: batch {facts['batch_size']}, {facts['precision']}, 224², {machine}.\nPublished: one A100.\n"
    )
    columns = ("inference, published", "measured", "training, published", "measured", "memory, GiB")
    print("| step | change | params, M | GFLOPs |", " | ".join(columns), "|")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        published = [str(value or "–") for value in (row.step.throughput, row.step.train_throughput)]
        here = [f"{value:,.0f}" if value else "–" for value in row.measured.values()]
        memory = (
            "–" if not (row.training and row.training.peak_memory_mib) else f"{row.training.peak_memory_mib / 1024:.1f}"
        )
        cells = [row.step.label, row.step.change, f"{row.params / 1e6:.1f}", f"{row.gflops:.2f}"]
        print("| " + " | ".join([*cells, published[0], here[0], published[1], here[1], memory]) + " |")
    for mode in ("inference", "training"):
        if not any(row.measured[mode] for row in rows):
            print(f"\n{mode.capitalize()} is not measured.")
            continue
        pairs = ", ".join(f"{a}–{b}" for a, b in reversals(rows, mode))
        print(f"\nNeighbours that go the other way than published, {mode}: {pairs or 'none'}.")
    png, svg = save_figure(
        draw_ladder(rows, facts["device"]), Path(__file__).parents[1] / "docs" / "figures" / "ladder.png"
    )
    svg.unlink()
    print(f"\n![the ladder as a staircase](figures/{png.name})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("check", "ladder", "scaling", "report"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="a turn of a model lasts about this long")
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=("inference", "training"))
    parser.add_argument("--compile-training", action="store_true", help="also time the compiled row in training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.only == "report":
        report(arguments.output / "ladder.csv")
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; these figures are measured on one")
    pace = {"rounds": arguments.rounds, "seconds_a_round": arguments.seconds, "report": say}
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "check"):  # a wrong step has no speed
        torch.backends.cudnn.allow_tf32 = False
        check()
        torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    if arguments.only in (None, "ladder"):
        rows = count_ladder()
        if "inference" in arguments.modes:
            rows = measure_ladder("cuda", modes=["inference"], **pace)
            write_csv(arguments.output / "ladder.csv", ladder_table(rows, "cuda"))
            show(rows)
        if "training" in arguments.modes:
            eager = [step for step in LADDER if not step.fused and (arguments.compile_training or not step.compiled)]
            measured = measure_ladder("cuda", steps=eager, modes=["training"], **pace)
            training = {row.step: row.training for row in measured}
            rows = [replace(row, training=training.get(row.step)) for row in rows]
            write_csv(arguments.output / "ladder.csv", ladder_table(rows, "cuda"))
            show(rows)
    if arguments.only in (None, "scaling"):
        scaling = measure_scaling(PEERS, SIZES, "cuda", **pace)
        write_csv(arguments.output / "scaling.csv", scaling_table(scaling, "cuda"))
        for found in scaling:
            assert found.speed is not None
            print(f"{found.model:30} {found.size:5} {found.speed.images_per_second:8.1f} images/s", flush=True)


if __name__ == "__main__":
    main()
