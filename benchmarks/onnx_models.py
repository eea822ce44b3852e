"""Every variant of the paper in onnxruntime: its difference from PyTorch at several sizes, its time beside a peer's.

    python benchmarks/onnx_models.py exact --models vmamba_tiny --output results.csv
    python benchmarks/onnx_models.py time --models vmamba_tiny --peer swin_tiny_patch4_window7_224

Weights are drawn at random, with the scales and shifts of norms and Δ's bias moved off their initial values.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import vmamba
from vmamba.deployment.export import photograph_batch, sample_photographs, verify
from vmamba.deployment.files import Description, load_exported
from vmamba.deployment.onnx_model import save_onnx, to_onnx
from vmamba.deployment.program import trace

SIZES = ((64, 64), (224, 224), (97, 161), (384, 640))
PAPER = [name for name in vmamba.list_models() if name not in ("vmamba_nano", "vmamba_test")]
BOUND = 1e-4


def make(name):
    torch.manual_seed(0)
    model = vmamba.create_model(name).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or "A_logs" in key or "dt_projs_bias" in key:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(model, name, folder):
    path = Path(folder) / f"{name}.onnx"
    save_onnx(to_onnx(trace(model), ("logits",), Description(name).to_metadata()), path)
    return path


def exact(args):
    photographs = sample_photographs()
    with open(args.output, "a", newline="") as stream, tempfile.TemporaryDirectory() as folder:
        rows = csv.writer(stream)
        if not stream.tell():
            rows.writerow(["model", "batch", "height", "width", "relative_difference", "torch", "onnxruntime"])
        worst = 0.0
        for name in args.models:
            model = make(name)
            exported = load_exported(write(model, name, folder), args.threads)
            for height, width in SIZES:
                for batch in (1, 5):
                    images = photograph_batch(photographs, (batch, height, width), Description(name))
                    with torch.inference_mode():
                        expected = [model(images)]
                    (found,) = verify(exported, [images], [expected])
                    worst = max(worst, found.relative)
                    print(f"{name} {batch} x {height} x {width}: {found.relative:.1e}", flush=True)
                    shape = [batch, height, width]
                    rows.writerow([name, *shape, f"{found.relative:.2e}", torch.__version__, onnxruntime.__version__])
                    stream.flush()
    print(f"largest difference {worst:.1e}, allowed {BOUND:.0e}: {'met' if worst <= BOUND else 'MISSED'}")


def timed(args):
    import timm

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: write(make(name), name, folder) for name in args.models}
        peer = timm.create_model(args.peer).eval()
        paths[args.peer] = Path(folder) / "peer.onnx"
        torch.onnx.export(peer, (torch.zeros(1, 3, 224, 224),), str(paths[args.peer]), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        sessions = {name: onnxruntime.InferenceSession(str(path), options) for name, path in paths.items()}
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    # Ratios within a round, whose members see the same machine; pauses let the threads of the others go to sleep.
    ratios = {name: [] for name in args.models}
    fastest = dict.fromkeys(paths, float("inf"))
    for _ in range(args.rounds):
        medians = {}
        for name, session in sessions.items():
            time.sleep(0.1)
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: image})
                seconds.append(time.perf_counter() - start)
            medians[name] = statistics.median(seconds[1:])
            fastest[name] = min(fastest[name], *seconds)
        for name in args.models:
            ratios[name].append(medians[name] / medians[args.peer])
    for name in args.models:
        print(
            f"{name}: {statistics.median(ratios[name]):.2f} times {args.peer}'s time in the median round of "
            f"{args.rounds}; fastest runs {1e3 * fastest[name]:.0f} ms and {1e3 * fastest[args.peer]:.0f} ms, ratio "
            f"{fastest[name] / fastest[args.peer]:.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exact", "time"])
    parser.add_argument("--models", nargs="+", default=PAPER)
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", default="benchmarks/results/onnx_exactness.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (exact if args.what == "exact" else timed)(args)


if __name__ == "__main__":
    main()
