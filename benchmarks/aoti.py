"""AOTInductor packages, of open size and of 224², beside the model in eager mode and under torch.compile.

    python benchmarks/aoti.py --model vmamba_tiny --device cpu --output benchmarks/results/aoti.csv

Weights are drawn at random, with the scales and shifts of norms and Δ's bias moved off their initial values.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch
from onnx_models import make

from vmamba.deployment.export import export
from vmamba.deployment.files import Description
from vmamba.deployment.program import prepared


def timed(calls, device, rounds):
    """Run all in turns; return the median seconds of each."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(2):
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", default="benchmarks/results/aoti.csv")
    args = parser.parse_args()
    model = make(args.model)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    eager = prepared(model).to(args.device)
    compiled = torch.compile(eager)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls, differences = {"eager": eager, "compiled": compiled}, []
        for name, size in (("package_open", None), ("package_fixed", (224, 224))):
            path = Path(folder) / f"{name}.pt2"
            told = Description(args.model)
            report = export(model, path, told, format="aoti", device=args.device, img_size=size)
            calls[name] = torch._inductor.aoti_load_package(str(path))
            differences.append(report.largest)
        runs = {name: lambda f=f: f(images) for name, f in calls.items()}
        outputs = {name: run()[0] for name, run in runs.items()}
        for name in ("package_open", "package_fixed"):
            differences.append(((outputs[name] - outputs["eager"]).norm() / outputs["eager"].norm()).item())
        seconds = timed(runs, args.device, args.rounds)
    row = {"model": args.model, "device": args.device, "batch": args.batch}
    row |= {"relative_difference": f"{max(differences):.1e}"}
    row |= {f"{name}_ms": f"{1e3 * value:.2f}" for name, value in seconds.items()} | {"torch": torch.__version__}
    print(row)
    with open(args.output, "a", newline="") as stream:
        rows = csv.DictWriter(stream, row)
        if not stream.tell():
            rows.writeheader()
        rows.writerow(row)


if __name__ == "__main__":
    main()
