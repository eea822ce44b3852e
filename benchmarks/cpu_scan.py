"""The scans of the CPU in a whole model: vector code, blocked, the recurrence step by step; timm's Swin-T beside them.

    python benchmarks/cpu_scan.py

Models take turns in one process; medians. Scan time is what is left after a pass in which the scan is skipped.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import timm
import torch

import vmamba
from vmamba.models import ss2d

ROUNDS, IN_A_ROW = 8, 3


def main() -> None:
    image = torch.randn(1, 3, 224, 224)
    models = {name: vmamba.create_model("vmamba_tiny", backend=name).eval() for name in ("cpu", "chunked", "reference")}

    def without_scan() -> None:
        with mock.patch.object(ss2d, "ss2d_scan", lambda x, *_, **__: x):
            models["chunked"](image)

    swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
    runs: dict[str, Callable[[], object]] = {
        "cpu": lambda: models["cpu"](image),
        "chunked": lambda: models["chunked"](image),
        "reference": lambda: models["reference"](image),
        "without the scan": without_scan,
        "swin_tiny": lambda: swin(image),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, run in runs.items():
                run()  # its weights back into the cache
                for _ in range(IN_A_ROW):
                    start = time.perf_counter()
                    run()
                    times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, vmamba_tiny, 224 × 224, batch 1, float32")
    for name, value in ms.items():
        print(f"{name:>17} {value:7.1f} ms")
    rest = ms["without the scan"]
    for slower, faster in (("reference", "chunked"), ("chunked", "cpu")):
        print(f"{slower} / {faster}: model {ms[slower] / ms[faster]:.2f} ×")
        print(f"{slower} / {faster}: scan  {(ms[slower] - rest) / (ms[faster] - rest):.2f} ×")
    print(f"cpu / swin_tiny: model {ms['cpu'] / ms['swin_tiny']:.2f} ×")


if __name__ == "__main__":
    main()
