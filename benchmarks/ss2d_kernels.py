"""Measure SS2D's core on a GPU: time, memory, error and growth of each backend, beside a composition of separate steps.

    python benchmarks/ss2d_kernels.py                  # everything, appended to benchmarks/results/ss2d_kernels.csv
    python benchmarks/ss2d_kernels.py --figures forward --backends cuda

Times are medians over replays of a CUDA graph that rotates among input sets, all in one process. Where results are
wrong nothing is timed: the error against float64 is checked first, by the rule of the tests.
"""

import argparse
import csv
import datetime
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import cross_merge, cross_scan, selective_scan, ss2d_scan

FIGURES = ("forward", "forward+backward", "memory", "error", "growth")
RESULTS = Path(__file__).parent / "results" / "ss2d_kernels.csv"


class Case(NamedTuple):
    """One shape, with the bars of issue 3 in milliseconds where it has any."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    rank: int
    forward_bar: float | None = None
    both_bar: float | None = None


CASES = (
    Case("stage 1", 128, 56, 56, 96, 6, 0.30, 0.90),
    Case("stage 2", 128, 28, 28, 192, 12, 0.13, 0.42),
    Case("stage 3", 128, 14, 14, 384, 24, 0.075, 0.25),
    Case("stage 4", 128, 7, 7, 768, 48, 0.06, 0.21),
    Case("stage 3, wide", 128, 14, 14, 768, 24),
    Case("detection", 4, 200, 200, 192, 6, 0.20),
    Case("one image", 1, 56, 56, 96, 6, 0.03),
)
GROWTH = tuple(
    Case(f"growth {side}", max(1, 2**19 // side**2), side, side, 96, 6) for side in (14, 28, 56, 64, 112, 128, 256)
)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Draw x, projected, dt_weight, dt_bias, A, D as they are at initialisation: steps from 0.001 to 0.1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = functools.partial(torch.randn, device="cuda", generator=generator)
    E, R, L = case.channels, case.rank, case.height * case.width
    step = torch.exp(torch.rand(4, E, device="cuda", generator=generator) * 4.6 - 6.9)
    return [
        normal(case.batch, L, E).to(dtype),
        normal(case.batch, L, 4 * (R + 2)).to(dtype),
        normal(4, E, R) * R**-0.5,
        step + torch.log(-torch.expm1(-step)),
        -torch.exp(0.3 * normal(4, E, 1)),
        1 + 0.1 * normal(4, E),
    ]


def composition(
    case: Case, x: Tensor, projected: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """Do what the published implementation does, one operation after another with everything in between in memory."""
    batch, L, E = x.shape
    H, W, R = case.height, case.width, case.rank
    xs = cross_scan(x.view(batch, H, W, E).permute(0, 3, 1, 2))
    rows = projected.view(batch, H, W, 4, R + 2)
    routed = torch.stack(
        [cross_scan(rows[..., k, :].permute(0, 3, 1, 2))[:, k] for k in range(4)], dim=1
    )  # (B, 4, R + 2, L)
    rank, Bs, Cs = routed.split([R, 1, 1], dim=2)
    delta = torch.einsum("bkrl,ker->bkel", rank, dt_weight.to(x.dtype))
    ys = selective_scan(
        xs.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), Bs, Cs, D.flatten(), dt_bias.flatten(), True
    )
    merged = cross_merge(ys.view(batch, 4, E, L), height=H, width=W)
    return merged.flatten(2).transpose(1, 2).to(x.dtype)


def runner(case: Case, backend: str, out_dtype: torch.dtype) -> Callable[[list[Tensor]], Tensor]:
    """Give the function to time."""
    if backend == "composition":
        return lambda tensors: composition(case, *tensors)
    return lambda tensors: ss2d_scan(
        *tensors, height=case.height, width=case.width, out_dtype=out_dtype, backend=backend
    )


def with_gradients(run: Callable[[list[Tensor]], Tensor], dy: Tensor) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """Extend a forward by its backward."""
    return lambda tensors: torch.autograd.grad(run(tensors), tensors, dy)


def time_ms(
    run: Callable[[list[Tensor]], object], sets: list[list[Tensor]], calls: int = 12, replays: int = 9
) -> float:
    """Median milliseconds a call, over replays of a graph of `calls` calls that rotates among the input sets."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for tensors in sets:
            run(tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            run(sets[i % len(sets)])
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def exact(case: Case, tensors: list[Tensor]) -> Tensor:
    """Compute the result in float64 by the blocked scan, image by image."""
    parts = []
    for i in range(min(case.batch, 2)):
        wide = [t.double() for t in (tensors[0][i : i + 1], tensors[1][i : i + 1], *tensors[2:])]
        parts.append(ss2d_scan(*wide, height=case.height, width=case.width, backend="chunked"))
    return torch.cat(parts)


def error(y: Tensor, truth: Tensor) -> float:
    """Relative error in norm of the images that the float64 result covers."""
    return ((y[: len(truth)].double() - truth).norm() / truth.norm()).item()


def extra_bytes(run: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> int:
    """Bytes allocated at the peak beyond what was there and what the call returns."""
    run(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(tensors)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak - kept


def backward_extra_bytes(run: Callable[[list[Tensor]], Tensor], leaves: list[Tensor], dy: Tensor) -> int:
    """Bytes that a backward allocates at the peak beyond inputs, result, dy and gradients."""
    y = run(leaves)
    return extra_bytes(lambda tensors: torch.autograd.grad(y, tensors, dy, retain_graph=True), leaves)


def measure(
    case: Case, backend: str, figures: tuple[str, ...], dtype: torch.dtype
) -> Iterator[tuple[str, float, str, object]]:
    """Yield (figure, value, unit, bar) for one case and backend."""
    tensors = make_inputs(case, dtype)
    truth = exact(case, tensors)
    rounded = error(truth.to(dtype), truth)
    for out_dtype in (dtype,) if backend == "composition" else (dtype, torch.float32):
        value = error(runner(case, backend, out_dtype)(tensors), truth)
        if "error" in figures:
            yield f"error, {str(out_dtype)[6:]} result", value, "relative", None
        if backend != "composition" and out_dtype == dtype and not value <= 2 * rounded:
            print(
                f"{case.name}, {backend}: error {value:.2e}, rounding alone gives {rounded:.2e}: not timed",
                file=sys.stderr,
            )
            return
    sets = [tensors, *(make_inputs(case, dtype, seed) for seed in (1, 2))]
    run = runner(case, backend, dtype)
    forward = time_ms(run, sets) if {"forward", "growth"} & set(figures) else 0.0
    if case.name.startswith("growth"):
        yield "time a position", forward / (case.batch * case.height * case.width) * 1e6, "ns", None
        return
    if "forward" in figures:
        yield "forward", forward, "ms", case.forward_bar
    if "memory" in figures:
        size = sum(t.numel() * t.element_size() for t in tensors)
        yield "forward memory over inputs", extra_bytes(run, tensors) / size, "ratio", 0.1
    if "forward+backward" in figures:
        leaves = [[t.requires_grad_() for t in tensors_] for tensors_ in sets]
        dy = torch.randn_like(tensors[0])
        both = with_gradients(run, dy)
        yield "forward+backward", time_ms(both, leaves), "ms", case.both_bar
        if "memory" in figures:
            yield "backward memory over inputs", backward_extra_bytes(run, leaves[0], dy) / size, "ratio", 1.0


def environment(commit: str | None) -> dict[str, str]:
    """Describe machine, versions and commit, for every row."""
    if commit is None:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES)
    parser.add_argument("--backends", nargs="+", default=["composition", "triton", "cuda"])
    parser.add_argument("--cases", nargs="+", help="names of cases; by default all")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in every row; by default what git says")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; these figures are measured on one")
    cases = [*CASES, *(GROWTH if "growth" in arguments.figures else ())]
    shared = environment(arguments.commit)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = not arguments.output.exists()
    with arguments.output.open("a", newline="") as file:
        columns = ["case", *Case._fields[1:6], "dtype", "backend", "figure", "value", "unit", "bar", *shared]
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        for case in cases:
            for backend in arguments.backends:
                if arguments.cases and case.name not in arguments.cases:
                    continue
                try:
                    rows = list(measure(case, backend, tuple(arguments.figures), getattr(torch, arguments.dtype)))
                except (ValueError, torch.cuda.OutOfMemoryError) as reason:
                    print(f"{case.name}, {backend}: {str(reason).splitlines()[0]}", file=sys.stderr)
                    continue
                for figure, value, unit, bar in rows:
                    print(
                        f"{case.name:14} {backend:11} {figure:28} {value:10.4g} {unit}"
                        + (f"  (bar {bar})" if bar else "")
                    )
                    named = dict(zip(Case._fields[1:6], case[1:6], strict=True))
                    result = {"backend": backend, "figure": figure, "value": f"{value:.5g}", "unit": unit, "bar": bar}
                    writer.writerow({"case": case.name, "dtype": arguments.dtype, **named, **result, **shared})
                file.flush()


if __name__ == "__main__":
    main()
