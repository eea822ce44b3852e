"""Measure whole models on the CPU in float32 or bfloat16 beside their peers, eager, ours also in its fused form.

    python benchmarks/cpu_models.py                       # appended to results/cpu_models.csv
    python benchmarks/cpu_models.py --precisions bfloat16 # weights and images, where the processor computes in it
    python benchmarks/cpu_models.py --batch-sizes 1 --rounds 20 --threads 1 2

The models of a row take turns in one process. What else runs on the machine shows in the load average: it counts the
threads that wanted a core in the last minute, so about `threads` where this was alone.
"""

import argparse
import csv
import itertools
import os
from pathlib import Path

import torch
from torch import nn

from vmamba.analysis.throughput import Measurement, Workload, compare, load_model, measure, rows

RESULTS = Path(__file__).parent / "results" / "cpu_models.csv"
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
OURS = "vmamba_tiny"
FUSED = f"{OURS} (fused)"


def build(name: str, img_size: tuple[int, int]) -> nn.Module:
    return load_model(OURS if name == FUSED else name, img_size)


def run(batch_size: int, precision: str, rounds: int) -> list[Measurement]:
    shape = {"batch_size": batch_size, "precision": precision, "compiled": "eager"}
    workloads = [Workload(name, fused=name == FUSED, **shape) for name in (OURS, FUSED, *PEERS)]  # type: ignore[arg-type]
    return compare(measure(workloads, "cpu", rounds=rounds, build=build), PEERS[0])


def append(path: Path, table: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch_size, precision in itertools.product(arguments.batch_sizes, arguments.precisions):
            results = run(batch_size, precision, arguments.rounds)
            load = round(os.getloadavg()[0], 2)
            for m in results:
                what = f"{threads} threads  batch {batch_size}  {precision}  {m.workload.model:30}"
                print(
                    f"{what} {m.median_ms:8.1f} ms ±{m.spread:4.0%}  speed over {PEERS[0]}: {m.ratio:.2f}", flush=True
                )
            append(arguments.output, [{**row, "load_average": load} for row in rows(results, "cpu")])


if __name__ == "__main__":
    main()
