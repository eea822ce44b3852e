"""The paper's acceleration ladder (section 4.3, table 5): every step built, counted and timed on this machine.

The first steps change only how SS2D is carried out, the later ones the architecture. How a step is carried out is the
module `StepSS2D`, made of the package's operations; it takes the place of a model's SS2D and keeps its parameters. The
last rows are the model of the last step as this package runs it, fused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.analysis.flops import count_flops
from vmamba.analysis.throughput import Measurement, Mode, Precision, Workload, environment, measure
from vmamba.models.published import PUBLISHED
from vmamba.models.registry import create_model
from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VSSBlock
from vmamba.ops import routes as plain_routes
from vmamba.ops import selective_scan


@dataclass(frozen=True)
class Implementation:
    """How a step carries SS2D out.

    Attributes:
        triton_routes: cross-scan and cross-merge as Triton kernels instead of PyTorch's copies.
        wide_scan: the scan gets float32 inputs whatever autocast says; otherwise 16-bit ones, and gives float32.
        linear: Δ, B and C come from matrix products on the sequences as they lie, and maps change their layout without
            a copy; otherwise from einsum, with the map copied to channels-first before the scan and back after it.
    """

    triton_routes: bool
    wide_scan: bool
    linear: bool


_PLAIN = Implementation(triton_routes=False, wide_scan=True, linear=False)
_TRITON = replace(_PLAIN, triton_routes=True)
_NARROW = replace(_TRITON, wide_scan=False)
_LINEAR = replace(_NARROW, linear=True)


@dataclass(frozen=True)
class Step:
    """One rung.

    Attributes:
        label: the paper's name of it.
        change: what differs from the row before.
        model: the published configuration.
        implementation: how SS2D is carried out; None is the package's fused operation.
        train_throughput: published, images a second on one A100 at batch 128; None for rows that are ours.
        compiled: whether torch.compile takes the model, with CUDA graphs.
        fused: whether inference runs in the form that `vmamba.fuse` makes, its weights in 16 bits; it has no training.
    """

    label: str
    change: str
    model: str
    implementation: Implementation | None
    train_throughput: int | None = None
    compiled: bool = False
    fused: bool = False

    @property
    def throughput(self) -> int | None:
        """Published images a second of inference, on one A100 at batch 128; None for rows that are ours."""
        return None if self.train_throughput is None else PUBLISHED[self.model].throughput


LADDER: tuple[Step, ...] = (
    Step("Vanilla", "cross-scan in PyTorch, 32-bit scan, einsum", "vmambav0_tiny_224_a0", _PLAIN, 138),
    Step("(a)", "Triton cross-scan and cross-merge", "vmambav0_tiny_224_a1", _TRITON, 165),
    Step("(b)", "scan reads 16 bits, gives 32", "vmambav0_tiny_224_a2", _NARROW, 184),
    Step("(c)", "linear layers for einsum, no layout copies", "vmambav0_tiny_224_a3", _LINEAR, 195),
    Step("(d)", "MLP, new stem and downsampling, no DWConv, depths 2-2-2-2", "vmambav0_tiny_224_a7", _LINEAR, 248),
    Step("(d.1)", "ssm_ratio 2 → 1", "vmambav0_tiny_224_a7a", _LINEAR, 405),
    Step("(d.2)", "depths 2-2-5-2", "vmambav0_tiny_224_a8", _LINEAR, 348),
    Step("(e)", "no multiplicative branch", "vmambav2_tiny_224_a9d", _LINEAR, 360),
    Step("(e.1)", "DWConv again", "vmambav2_tiny_224_ds16", _LINEAR, 358),
    Step("(e.2)", "d_state 16 → 1", "vmambav2_tiny_224_sr1l5", _LINEAR, 647),
    Step("(f)", "ssm_ratio 1 → 2", "vmambav2_tiny_224", _LINEAR, 464),
    Step("(g)", "ssm_ratio 2 → 1, depths 2-2-8-2", "vmambav2v_tiny_224", _LINEAR, 571),
    Step("ours", "scan, Δ and merge in one kernel", "vmambav2v_tiny_224", None),
    Step("ours, compiled", "torch.compile with CUDA graphs", "vmambav2v_tiny_224", None, compiled=True),
    Step("ours, fused", "norms, GELU and residuals in products", "vmambav2v_tiny_224", None, compiled=True, fused=True),
)


class StepSS2D(nn.Module):
    """An SS2D carried out as a step of the ladder says, operation by operation; the parameters are those of `op`.

    Args:
        op: the SS2D to stand in for.
        implementation: how.

    Raises:
        ValueError: `op` scans row by row (the cascade), which no step of the ladder does.
    """

    def __init__(self, op: SS2D, implementation: Implementation) -> None:
        super().__init__()
        if op.routes == "cascade2d":
            raise ValueError("the ladder's steps scan whole maps; a model with routes='cascade2d' is none of them")
        self.op, self.implementation = op, implementation
        routes: ModuleType = plain_routes
        if implementation.triton_routes:
            from vmamba.ops import routes_triton_kernels as routes
        self.cross_scan, self.cross_merge = routes.cross_scan, routes.cross_merge

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        op = self.op
        x = op.in_proj(x)
        dtype, z = x.dtype, None
        if op.gated:
            x, z = x.chunk(2, dim=-1)
            z = op.gate_act(z)
        if self.implementation.linear:
            x = (x if op.conv2d is None else op.conv2d(x)).permute(0, 3, 1, 2)
        else:
            x = x.permute(0, 3, 1, 2).contiguous()
            if op.conv2d is not None:
                x = F.conv2d(x, op.conv2d.weight, op.conv2d.bias, padding=op.conv2d.padding, groups=op.d_inner)
        y = self._scan(op.act(x)).permute(0, 2, 3, 1)
        if not self.implementation.linear:
            y = y.contiguous()
        y = op.out_act(op.out_norm(y).to(dtype))
        return op.dropout(op.out_proj(y if z is None else y * z))

    def _scan(self, x: Tensor) -> Tensor:
        """Map (B, E, H, W) to the merged (B, E, H, W)."""
        op, (B, E, H, W) = self.op, x.shape
        N, R, K = op.d_state, op.dt_rank, op.k_group
        u = self.cross_scan(x, op.routes)  # (B, K, E, L)
        if self.implementation.linear:
            projected = op.x_proj_weight @ u  # (B, K, R + 2N, L)
            delta = op.dt_projs_weight @ projected[:, :, :R]
        else:
            projected = torch.einsum("bkel,kce->bkcl", u, op.x_proj_weight)
            delta = torch.einsum("bkrl,ker->bkel", projected[:, :, :R], op.dt_projs_weight)
        Bs, Cs = projected[:, :, R:].split([N, N], dim=2)
        if self.implementation.wide_scan:
            u, delta, Bs, Cs = u.float(), delta.float(), Bs.float(), Cs.float()
        A = -torch.exp(op.A_logs.float())
        y = selective_scan(
            u.reshape(B, K * E, H * W),
            delta.reshape(B, K * E, H * W),
            A,
            Bs,
            Cs,
            op.Ds.float(),
            op.dt_projs_bias.float().flatten(),
            True,
            backend=op.backend,
        )
        merged: Tensor = self.cross_merge(y.view(B, K, E, H * W), op.routes, height=H, width=W)
        return merged


def build_step(step: Step, **overrides: Any) -> nn.Module:
    """Build the model of a step with random weights, its SS2D carried out as the step says.

    Args:
        step: one of `LADDER`.
        **overrides: fields of VMambaConfig.
    """
    model = create_model(step.model, **overrides)
    if step.implementation is not None:
        for block in model.modules():
            if isinstance(block, VSSBlock) and isinstance(block.op, SS2D):
                block.op = StepSS2D(block.op, step.implementation)  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class LadderRow:
    """What there is to say about a step.

    Attributes:
        params: parameters, exact.
        gflops: 10⁹ multiply-accumulates of an image, as the authors count them.
        inference: images a second; None where not measured.
        training: the same for forward, cross-entropy and backward.
        reason: why it was not measured; None where it was.
    """

    step: Step
    params: int
    gflops: float
    inference: Measurement | None = None
    training: Measurement | None = None
    reason: str | None = None

    @property
    def measured(self) -> dict[Mode, float | None]:
        """Images a second by mode."""
        speeds = {"inference": self.inference, "training": self.training}
        return {mode: m.images_per_second if m else None for mode, m in speeds.items()}  # type: ignore[misc]


def count_ladder(img_size: tuple[int, int] = (224, 224), *, steps: Sequence[Step] | None = None) -> list[LadderRow]:
    """Give parameters and FLOPs of every step (or of some), without running one."""
    rows = []
    for step in LADDER if steps is None else steps:
        with torch.device("meta"):
            model = create_model(step.model)
        gflops = count_flops(model, img_size).total / 1e9
        rows.append(LadderRow(step, sum(p.numel() for p in model.parameters()), gflops))
    return rows


def measure_ladder(
    device: torch.device | str,
    *,
    steps: Sequence[Step] | None = None,
    img_size: tuple[int, int] = (224, 224),
    batch_size: int = 128,
    precision: Precision = "autocast-bfloat16",
    modes: Sequence[Mode] = ("inference", "training"),
    rounds: int = 5,
    seconds_a_round: float = 0.3,
    report: Callable[[str], None] = lambda _: None,
) -> list[LadderRow]:
    """Time every step that can run here, taking turns; the others say why they cannot.

    The protocol is the paper's: batch 128, automatic mixed precision, cuDNN's benchmark mode.

    Args:
        device: where.
        steps: which of `LADDER`; None for all.
        img_size: (height, width) in pixels.
        batch_size: images in a batch.
        precision: see `Workload`; the published runs used "autocast-float16".
        modes: what to time.
        rounds: turns each step takes; the median counts.
        seconds_a_round: about how long a turn lasts.
        report: called with a line of progress.

    Returns:
        A row for each step.
    """
    device = torch.device(device)
    ladder = [replace(row, reason=_why_not(row.step, device)) for row in count_ladder(img_size, steps=steps)]
    runnable = {row.step.label: row.step for row in ladder if row.reason is None}
    speeds: dict[Mode, dict[str, Measurement]] = {}
    for mode in modes:
        workloads = [
            _workload(step, mode, img_size, batch_size, precision)
            for step in runnable.values()
            if mode == "inference" or not step.fused
        ]
        with _cudnn_benchmark():
            measured = measure(
                workloads,
                device,
                rounds=rounds,
                seconds_a_round=seconds_a_round,
                report=report,
                build=lambda label, _: build_step(runnable[label]),
            )
        speeds[mode] = {m.workload.model: m for m in measured}
    return [
        replace(row, **{mode: found.get(row.step.label) for mode, found in speeds.items()})  # type: ignore[arg-type]
        for row in ladder
    ]


def _workload(step: Step, mode: Mode, img_size: tuple[int, int], batch_size: int, precision: Precision) -> Workload:
    copies = step.implementation is not None and not step.implementation.linear
    plain: Any = precision.removeprefix("autocast-")
    return Workload(
        step.label,
        img_size,
        batch_size,
        plain if step.fused else precision,
        "reduce-overhead" if step.compiled else "eager",
        mode,
        "contiguous" if copies else "channels_last",
        step.fused,
    )


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _why_not(step: Step, device: torch.device) -> str | None:
    """Say why a step cannot run on a device; None if it can."""
    if device.type == "cuda":
        return None
    if step.implementation is not None and step.implementation.triton_routes:
        return "its Triton kernels need a CUDA device"
    return "torch.compile would need a C++ compiler; timed on CUDA devices" if step.compiled else None


def reversals(rows: Sequence[LadderRow], mode: Mode) -> list[tuple[str, str]]:
    """List the neighbouring steps of which the paper has the other one faster, as pairs of labels."""
    known = [
        (row.step.label, row.step.throughput if mode == "inference" else row.step.train_throughput, row.measured[mode])
        for row in rows
    ]
    complete = [(label, paper, here) for label, paper, here in known if paper is not None and here is not None]
    return [
        (first[0], second[0])
        for first, second in pairwise(complete)
        if (second[1] > first[1]) != (second[2] > first[2])
    ]


def ladder_table(rows: Sequence[LadderRow], device: torch.device | str) -> list[dict[str, Any]]:
    """Turn rows into flat records for a CSV or JSON file: published beside measured, device and versions in each."""
    facts = environment(device)
    table = []
    for row in rows:
        published, some = PUBLISHED[row.step.model], row.inference or row.training
        record: dict[str, Any] = {
            "step": row.step.label,
            "change": row.step.change,
            "model": row.step.model,
            "params": row.params,
            "gflops": round(row.gflops, 6),
            "published_top1": published.top1,
            "published_inference": row.step.throughput,
            "published_training": row.step.train_throughput,
        }
        for mode, m in (("inference", row.inference), ("training", row.training)):
            record[f"measured_{mode}"] = m and round(m.images_per_second, 1)
            record[f"spread_{mode}"] = m and round(m.spread, 4)
            record[f"peak_mib_{mode}"] = m and m.peak_memory_mib and round(m.peak_memory_mib)
        record |= {
            "batch_size": some and some.workload.batch_size,
            "precision": some and some.workload.precision,
            "reason": row.reason or "",
            **facts,
        }
        table.append(record)
    return table
