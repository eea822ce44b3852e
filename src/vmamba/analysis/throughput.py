"""How fast models are: inference and training steps, timed against each other in one process.

Machines are noisy and drift, so the models take turns: each round times every model once, and what is reported is the
median over the rounds. Ratios between models of one run mean something; times from different runs rarely do.
"""

import csv
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmamba.models.checkpoint_files import replacing

Mode = Literal["inference", "training"]
Precision = Literal["float32", "bfloat16", "float16", "autocast-bfloat16", "autocast-float16"]
CompileMode = Literal["eager", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        model: a name that vmamba or timm knows.
        img_size: (height, width) in pixels.
        batch_size: images in a batch; halved until it fits the device's memory.
        precision: dtype of weights and images; "autocast-…" keeps float32 weights and casts in the operations.
        compiled: "eager", or the mode of torch.compile.
        mode: a forward pass in evaluation mode, or forward, cross-entropy and backward.
        memory_format: of the images and the convolutions' weights.
        fused: the inference form that `vmamba.fuse` makes; our models only.
        gradient_checkpointing: whether training recomputes the insides of blocks in the backward pass, to save memory.
    """

    model: str
    img_size: tuple[int, int] = (224, 224)
    batch_size: int = 128
    precision: Precision = "bfloat16"
    compiled: CompileMode = "default"
    mode: Mode = "inference"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    fused: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Measurement:
    """What was measured of a workload.

    Attributes:
        params: number of parameters.
        median_ms: milliseconds of a batch, median over the rounds.
        spread: interquartile range over the rounds, as a share of the median.
        images_per_second: of the median.
        peak_memory_mib: most memory allocated on the device while it ran alone; None off the GPU.
        first_call_s: seconds of the first call, compilation included.
        ratio: images a second over those of the peer compared with; None before `compare`.
    """

    workload: Workload
    params: int
    median_ms: float
    spread: float
    images_per_second: float
    peak_memory_mib: float | None
    first_call_s: float
    ratio: float | None = None


def load_model(name: str, img_size: tuple[int, int]) -> nn.Module:
    """Build a model by name, ours or timm's, with random weights, made for an image size where it must be.

    Raises:
        ValueError: neither vmamba nor timm knows the name; tells the nearest.
    """
    import timm

    import vmamba

    if name in (ours := vmamba.list_models(published=True)):
        return vmamba.create_model(name)
    if not timm.is_model(name):
        near = get_close_matches(name, {*ours, *timm.list_models()}, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `vmamba models` and timm.list_models() list them"
        raise ValueError(f"neither vmamba nor timm has a model called {name!r}{hint}")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        return timm.create_model(name, img_size=img_size)
    return timm.create_model(name)


Build = Callable[[str, tuple[int, int]], nn.Module]


class Runner:
    """A workload made ready: one call of `step` is one batch. `build` turns the model's name into a model."""

    def __init__(self, workload: Workload, device: torch.device, build: Build = load_model) -> None:
        self.workload, self.device = workload, device
        training = workload.mode == "training"
        cast = workload.precision.removeprefix("autocast-")
        self.autocast_dtype = _DTYPES[cast] if cast != workload.precision else None
        dtype = torch.float32 if self.autocast_dtype else _DTYPES[cast]
        model = build(workload.model, workload.img_size).to(device)
        self.params = sum(p.numel() for p in model.parameters())  # before fusing, which leaves buffers
        model = _fused(model, workload, dtype) if workload.fused else model.to(dtype).train(training)
        if workload.gradient_checkpointing:
            if not training or not hasattr(model, "set_grad_checkpointing"):
                what = workload.model if training else "inference"
                raise ValueError(f"{what} has no gradient checkpointing: it is for training with models that offer it")
            model.set_grad_checkpointing()  # type: ignore[operator]
        memory_format = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
        self.model = model.to(memory_format=memory_format[workload.memory_format])
        images = torch.randn(workload.batch_size, 3, *workload.img_size, device=device, dtype=dtype)
        self.images = images.to(memory_format=memory_format[workload.memory_format])
        classes: Any = model.num_classes
        self.targets = torch.randint(classes, (workload.batch_size,), device=device)
        run: Callable[[Tensor], Tensor] = self.model
        if workload.compiled != "eager":
            mode = None if workload.compiled == "default" else workload.compiled
            run = torch.compile(self.model, mode=mode)
        self._run = run

    def step(self) -> None:
        """Run one batch; it may still be running on the device when this returns."""
        if self.workload.compiled in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()  # the last batch's output may be overwritten
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if self.workload.mode == "inference":
                with torch.no_grad():
                    self._run(self.images)
                return
            loss = nn.functional.cross_entropy(self._run(self.images), self.targets)
        self.model.zero_grad(set_to_none=True)
        loss.backward()

    def seconds(self, calls: int) -> float:
        """Time some batches, one after the other: seconds a batch."""
        _synchronise(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            self.step()
        _synchronise(self.device)
        return (time.perf_counter() - start) / calls


def _fused(model: nn.Module, workload: Workload, dtype: torch.dtype) -> nn.Module:
    from vmamba.models.fused import fuse
    from vmamba.models.vmamba import VMamba

    if workload.mode == "training" or not isinstance(model, VMamba):
        what = "a training step" if workload.mode == "training" else workload.model
        raise ValueError(f"{what} has no fused form: it is for inference with VMamba")
    return fuse(model, dtype)


def measure(
    workloads: Sequence[Workload],
    device: torch.device | str,
    *,
    rounds: int = 10,
    seconds_a_round: float = 0.3,
    report: Callable[[str], None] = lambda _: None,
    build: Build = load_model,
) -> list[Measurement]:
    """Time workloads in turns.

    Args:
        workloads: what to time; all are kept on the device at once.
        device: where.
        rounds: turns each takes.
        seconds_a_round: about how long a turn lasts.
        report: called with a line of progress.
        build: makes a model from its name and the image size.

    Returns:
        A measurement for each workload, in their order.

    Raises:
        ValueError: a model is unknown, or does not fit the device with a single image.
    """
    device = torch.device(device)
    ready, calls = [], []
    for workload in workloads:
        report(f"preparing {workload.model} ({workload.mode}, {workload.precision}, {workload.compiled})")
        ready.append(_prepare(workload, device, report, build))
        seconds = ready[-1][0].seconds(2)
        report(f"{workload.model}: about {1e3 * seconds:.2f} ms a batch")
        calls.append(max(1, round(seconds_a_round / seconds)))
    times: list[list[float]] = [[] for _ in ready]
    for turn in range(rounds):
        report(f"round {turn + 1} of {rounds}")
        for (runner, _, _), count, results in zip(ready, calls, times, strict=True):
            results.append(runner.seconds(count))
    return [_summary(runner, results, peak, first) for (runner, peak, first), results in zip(ready, times, strict=True)]


def compare(measurements: Iterable[Measurement], peer: str) -> list[Measurement]:
    """Fill in the ratio of images a second to the peer's, which must be among those measured together.

    A batch that had to be halved still compares: images a second do not depend on it where the device is full.
    """
    measurements = list(measurements)

    def conditions(workload: Workload) -> Workload:
        return replace(workload, model="", batch_size=0, fused=False)

    speed = {conditions(m.workload): m.images_per_second for m in measurements if m.workload.model == peer}
    return [
        replace(m, ratio=m.images_per_second / speed[key] if (key := conditions(m.workload)) in speed else None)
        for m in measurements
    ]


def environment(device: torch.device | str) -> dict[str, str]:
    """Describe what a measurement depends on besides the workload: device, versions, commit, precision switches."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.processor() or platform.machine()} CPU"
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        commit = found.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {
        "device": name if on_gpu else f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": os.environ.get("VMAMBA_COMMIT", commit),
        "tf32": str(torch.backends.cuda.matmul.allow_tf32) if on_gpu else "",
    }


def rows(measurements: Iterable[Measurement], device: torch.device | str) -> list[dict[str, Any]]:
    """Turn measurements into flat rows for a table or CSV file."""
    facts = environment(device)
    result = []
    for m in measurements:
        workload = asdict(m.workload)
        height, width = workload.pop("img_size")
        last = {name: workload.pop(name) for name in ("memory_format", "gradient_checkpointing")}
        measured = {f.name: getattr(m, f.name) for f in fields(m) if f.name != "workload"}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
        result.append({**workload, "height": height, "width": width, **rounded, **facts, **last})
    return result


def write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Write rows to a CSV file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _prepare(
    workload: Workload, device: torch.device, report: Callable[[str], None], build: Build
) -> tuple[Runner, float | None, float]:
    """Build, compile and warm a workload up, at half the batch as often as memory asks for it."""
    while True:
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            runner = Runner(workload, device, build)
            first = runner.seconds(1)
            runner.seconds(2)
            if device.type != "cuda":
                return runner, None, first
            torch.cuda.reset_peak_memory_stats(device)
            runner.seconds(2)
            return runner, (torch.cuda.max_memory_allocated(device) - before) / 2**20, first
        except torch.OutOfMemoryError:
            if workload.batch_size == 1:
                raise ValueError(f"{workload.model} does not fit {device} with a single image") from None
            workload = replace(workload, batch_size=workload.batch_size // 2)
            report(f"out of memory: {workload.model} at batch {workload.batch_size}")
        runner = None  # type: ignore[assignment]  # its memory, before the next try
        gc.collect()
        torch.cuda.empty_cache()


def _summary(runner: Runner, results: list[float], peak: float | None, first: float) -> Measurement:
    median = statistics.median(results)
    quartiles = statistics.quantiles(results, n=4) if len(results) > 1 else [median] * 3
    return Measurement(
        workload=runner.workload,
        params=runner.params,
        median_ms=1e3 * median,
        spread=(quartiles[2] - quartiles[0]) / median,
        images_per_second=runner.workload.batch_size / median,
        peak_memory_mib=peak,
        first_call_s=first,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
