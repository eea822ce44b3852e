"""Measure the candidate launches of the Triton kernels on the GPU at hand and rewrite the launch table.

    python benchmarks/autotune.py            # all classes of problems, a few minutes
    python benchmarks/autotune.py --only ss2d-forward

Each class is measured on the shapes it will mostly see, in bfloat16; the launch with the least sum of medians, each
relative to the best of its shape, wins. Entries of other GPU generations are kept.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from triton.testing import do_bench

from vmamba.ops.launch_table import TABLE_PATH, Launch, shape_class
from vmamba.ops.s6 import triton_kernels as s6
from vmamba.ops.ss2d import triton_kernels as ss2d

# Batch, height, width, E, R, N.
SHAPES = [
    (128, 56, 56, 96, 6, 1),
    (128, 28, 28, 192, 12, 1),
    (128, 14, 14, 384, 24, 1),
    (128, 7, 7, 768, 48, 1),
    (4, 200, 200, 192, 6, 1),
    (64, 28, 28, 96, 6, 4),
    (64, 28, 28, 192, 12, 4),
    (32, 56, 56, 96, 6, 16),
    (32, 56, 56, 192, 6, 16),
    (32, 14, 14, 768, 24, 16),
]


def candidates(direction: str, N: int) -> list[Launch]:
    states = sorted({min(n, 1 << (N - 1).bit_length()) for n in (1, 2, 4, 8, 16)}) if N > 1 else [1]
    chunks = (128, 256) if direction == "backward" else (128,)
    registers = (0, 168) if direction == "backward" else (0, 128)
    grid = itertools.product((8, 16), (32, 64), states, chunks, registers)
    return [Launch(*point) for point in grid if point[0] * point[1] <= 512 or N == 1]


def make_call(op: str, direction: str, shape: tuple[int, ...]) -> Callable[[Launch], object]:
    batch, height, width, E, R, N = shape
    L, K, kind = height * width, 4, {"device": "cuda", "dtype": torch.bfloat16}
    A, D, bias = (
        -torch.rand(K, E, N, device="cuda") - 0.1,
        torch.randn(K, E, device="cuda"),
        torch.randn(K, E, device="cuda"),
    )
    if op == "ss2d":
        inputs = (torch.randn(batch, L, E, **kind), torch.randn(batch, L, K * (R + 2 * N), **kind))
        operands = (*inputs, torch.randn(K, E, R, **kind), bias - 3, A, D, height, width, "cross2d", True)
        if direction == "forward":
            return lambda launch: ss2d.forward(*operands, torch.float32, launch)
        dy = torch.randn(batch, L, E, device="cuda")
        return lambda launch: ss2d.backward(dy, *operands, launch)
    batch = max(1, batch // 4)
    u, delta = torch.randn(batch, K * E, L, **kind), torch.randn(batch, K * E, L, **kind)
    B, C = torch.randn(batch, K, N, L, **kind), torch.randn(batch, K, N, L, **kind)
    sequences = (u, delta, A.flatten(0, 1), B, C, D.flatten(), bias.flatten() - 3, True)
    if direction == "forward":
        return lambda launch: s6.forward(*sequences, launch)
    dy = torch.randn(batch, K * E, L, device="cuda")
    return lambda launch: s6.backward(dy, *sequences, launch)


def measure(call: Callable[[Launch], object], launch: Launch) -> float:
    """Median milliseconds; infinite for a launch that this GPU or compiler refuses."""
    try:
        call(launch)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"    {launch}: {str(error).splitlines()[0][:80]}")
        return float("inf")
    return float(do_bench(lambda: call(launch), warmup=5, rep=30, return_mode="median"))


def tune(op: str, direction: str) -> dict[str, Launch]:
    """Choose a launch for every class of problems of one pass."""
    relative: dict[str, dict[Launch, float]] = {}
    for shape in SHAPES:
        call, N, E = make_call(op, direction, shape), shape[5], shape[3]
        times = {launch: measure(call, launch) for launch in candidates(direction, N)}
        best = min(times, key=lambda launch: times[launch])
        key = shape_class(op, direction, N, E)
        print(f"{key} {shape}: {times[best]:.3f} ms with {best}", flush=True)
        scores = relative.setdefault(key, dict.fromkeys(times, 0.0))
        for launch, time in times.items():
            scores[launch] += time / times[best]
    return {key: min(scores, key=lambda launch: scores[launch]) for key, scores in relative.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only classes that begin so: ss2d-forward, s6, …")
    only = parser.parse_args().only
    major, minor = torch.cuda.get_device_capability()
    table = json.loads(TABLE_PATH.read_text())
    entries = table.setdefault(str(10 * major + minor), dict(max(table.items(), key=lambda item: int(item[0]))[1]))
    for op, direction in itertools.product(("ss2d", "s6"), ("forward", "backward")):
        if f"{op}-{direction}".startswith(only):
            entries.update({key: asdict(launch) for key, launch in tune(op, direction).items()})
    blocks = []
    for capability, classes in sorted(table.items(), key=lambda item: int(item[0])):
        rows = ",\n".join(f'  "{key}": {json.dumps(entry)}' for key, entry in classes.items())
        blocks.append(f'"{capability}": {{\n{rows}\n}}')
    TABLE_PATH.write_text("{" + ",\n".join(blocks) + "}\n")
    print(f"wrote {TABLE_PATH} for {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
