"""Every variant of the paper in onnxruntime: its difference from PyTorch at several sizes, its time beside a peer's.

    python benchmarks/onnx_models.py exact --models vmamba_tiny
    python benchmarks/onnx_models.py time --models vmamba_tiny --peer swin_tiny_patch4_window7_224
    python benchmarks/onnx_models.py time --models vmamba_tiny --forms chunks plain doubling

Weights are drawn at random, with the scales and shifts of norms and Δ's bias moved off their initial values. Forms of
the recurrence: the chunks that are exported; one ONNX `Scan` over all positions; and doubling (Hillis and Steele), a
logarithm of the positions many passes over whole maps.
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
from vmamba.deployment import onnx_scan
from vmamba.deployment.export import photograph_batch, sample_photographs, verify
from vmamba.deployment.files import Description, load_exported
from vmamba.deployment.onnx_model import save_onnx, to_onnx
from vmamba.deployment.program import trace

SIZES = ((64, 64), (224, 224), (97, 161), (384, 640))
PAPER = [name for name in vmamba.list_models() if name not in ("vmamba_nano", "vmamba_test")]
BOUND = 1e-4

SEQUENCES = """
  a_t = Transpose<perm = [3, 2, 0, 1, 4, 5]>(a)
  b_t = Transpose<perm = [3, 2, 0, 1, 4, 5]>(b)
  three = Constant<value_ints = [-1]>()
  step = Shape<start = 3>(a_t)
  long = Concat<axis = 0>(three, step)
  a_long = Reshape(a_t, long)
  b_long = Reshape(b_t, long)
"""
IN_CHUNKS = """
  cut = Shape(a_t)
  h_cut = Reshape(h_long, cut)
  h_back = Transpose<perm = [2, 3, 1, 0, 4, 5]>(h_cut)
  y = Mul(h_back, c)
"""
# The exported text is `onnx_scan._RECURRENCE`; these take its place.
FORMS = {
    "chunks": onnx_scan._RECURRENCE,
    "plain": f"""
Recurrence (a, b, c) => (y)
{{
{SEQUENCES}
  zeros = ConstantOfShape<value = float[1] {{0.0}}>(step)
  last, h_long = Scan<num_scan_inputs = 2, body = steps (float[] h, float[] a, float[] b) => (float[] next, float[] out)
    {{
    ah = Mul(a, h) next = Add(ah, b) out = Identity(next)
  }}>(zeros, a_long, b_long)
{IN_CHUNKS}
}}
""",
    "doubling": f"""
Recurrence (a, b, c) => (y)
{{
{SEQUENCES}
  one = Constant<value_ints = [1]>()
  zero = Constant<value_ints = [0]>()
  true = Constant<value = bool[1] {{1}}>()
  one_value = Constant<value_float = 1.0>()
  zero_value = Constant<value_float = 0.0>()
  first = Constant<value_ints = [0]>()
  length = Shape<start = 0, end = 1>(a_long)
  length_value = Cast<to = 1>(length)
  two_value = Constant<value_float = 2.0>()
  log_length = Log(length_value)
  log_two = Log(two_value)
  doublings = Div(log_length, log_two)
  doublings_up = Ceil(doublings)
  count_row = Cast<to = 7>(doublings_up)
  count = Squeeze(count_row)
  go = Squeeze(true)
  a_end, h_long, distance = Loop<body = doubled (int64 i, bool going, float[] a, float[] h, int64[] d) =>
    (bool still, float[] a_more, float[] h_more, int64[] d_more) {{
    still = Identity(going)
    back = Neg(d)
    pads = Concat<axis = 0>(d, zero)
    h_cut = Slice(h, zero, back, zero)
    a_cut = Slice(a, zero, back, zero)
    h_shifted = Pad(h_cut, pads, zero_value, first)
    a_shifted = Pad(a_cut, pads, one_value, first)
    ah = Mul(a, h_shifted)
    h_more = Add(h, ah)
    a_more = Mul(a, a_shifted)
    d_more = Add(d, d)
  }}>(count, go, a_long, b_long, one)
{IN_CHUNKS}
}}
""",
}


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
    path = args.output or "benchmarks/results/onnx_exactness.csv"
    with open(path, "a", newline="") as stream, tempfile.TemporaryDirectory() as folder:
        rows = csv.writer(stream)
        if not stream.tell():
            rows.writerow(["model", "batch", "height", "width", "relative_difference", "torch", "onnxruntime"])
        worst = 0.0
        for name in args.models:
            model = make(name)
            exported = load_exported(write(model, name, folder), args.threads)
            for height, width in (SIZES[i] for i in args.sizes):
                for batch in args.batches:
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
        paths = {}
        for name in args.models:
            model = make(name)
            for form in args.forms:
                onnx_scan._RECURRENCE = FORMS[form]
                paths[name, form] = write(model, f"{name}-{form}", folder)
        onnx_scan._RECURRENCE = FORMS["chunks"]
        peer = timm.create_model(args.peer).eval()
        paths[args.peer, ""] = Path(folder) / "peer.onnx"
        torch.onnx.export(peer, (torch.zeros(1, 3, 224, 224),), str(paths[args.peer, ""]), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        options.log_severity_level = 3
        sessions = {key: onnxruntime.InferenceSession(str(path), options) for key, path in paths.items()}
    times = measure(sessions, args.rounds)
    theirs = times[args.peer, ""]
    path = Path(args.output or "benchmarks/results/onnx_times.csv")
    with path.open("a", newline="") as stream:
        rows = csv.writer(stream)
        if not stream.tell():
            rows.writerow(["model", "form", "threads", "rounds", "median_ms", "peer", "peer_median_ms", "median_ratio"])
        for (name, form), ours in times.items():
            if not form:
                continue
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            ours_ms, theirs_ms = (1e3 * statistics.median(seconds) for seconds in (ours, theirs))
            print(f"{name}, {form}: {ours_ms:.0f} ms, {ratio:.2f} times {args.peer}'s {theirs_ms:.0f} ms; fastest "
                  f"{1e3 * min(ours):.0f} and {1e3 * min(theirs):.0f} ms ({args.rounds} rounds)")  # fmt: skip
            rows.writerow(
                [name, form, args.threads, args.rounds, f"{ours_ms:.1f}", args.peer, f"{theirs_ms:.1f}", f"{ratio:.3f}"]
            )


def measure(sessions, rounds):
    """Run all in turns; give the median seconds of each in each round, whose members see the same machine."""
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    times = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, session in sessions.items():
            time.sleep(0.1)  # the threads of the others go to sleep
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: image})
                seconds.append(time.perf_counter() - start)
            times[key].append(statistics.median(seconds[1:]))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exact", "time"])
    parser.add_argument("--models", nargs="+", default=PAPER)
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["chunks"])
    parser.add_argument("--sizes", nargs="+", type=int, default=range(len(SIZES)), help="indices of the sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--output", help="CSV file; by default in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (exact if args.what == "exact" else timed)(args)


if __name__ == "__main__":
    main()
