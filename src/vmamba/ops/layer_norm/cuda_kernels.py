"""LayerNorm in both directions as hand-laid CUDA, compiled at run time: 16-bit rows of a multiple of 8 channels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source

_DTYPES = (torch.bfloat16, torch.float16)
_UNIT = 8  # channels that a thread loads at once
_WIDEST = 32 * 6 * _UNIT  # channels: with more, a thread runs out of registers
_THREADS, _REGISTERS = 128, 65536
_FEWEST = 2  # rows of a thread, less than which a block's own sums outweigh
_SUM_COLUMNS, _SUM_THREADS = 32, 256


class Plan(NamedTuple):
    """How rows are cut up.

    Attributes:
        lanes: Threads that share a row.
        chunks: Groups of eight channels that a thread takes.
        blocks: Blocks that a multiprocessor should hold, which bounds the registers of a thread.
    """

    lanes: int
    chunks: int
    blocks: int


def plan_rows(channels: int, backward: bool = True) -> Plan:
    """Choose the threads a row: the fewest idle, then three chunks each or two, as measured (docs/performance.md)."""
    units = -(-channels // _UNIT)

    def cost(lanes: int) -> tuple[int, int]:
        chunks = -(-units // lanes)
        return lanes * chunks - units, abs(5 * chunks - 13)

    lanes = min((n for n in (1, 2, 4, 8, 16, 32) if -(-units // n) <= 6), key=cost)
    chunks = -(-units // lanes)
    # A chunk takes about 40 registers, or 30: sums or results, weights and what has been loaded.
    registers = 40 + (40 if backward else 30) * chunks
    return Plan(lanes, chunks, min(max(_REGISTERS // (_THREADS * registers), 2), 6))


def fits(channels: int) -> bool:
    """Whether the kernels take rows of a width."""
    return channels % _UNIT == 0 and channels <= _WIDEST


def why_not(dy: Tensor, skip: Tensor | None, x: Tensor) -> str | None:
    """Say why the backward pass cannot take rows, or return None when it can."""
    if x.dtype in _DTYPES and any(t is not None and t.dtype != x.dtype for t in (dy, skip)):
        return "the CUDA kernel takes gradients of x's dtype."
    return why_not_forward(x)


def why_not_forward(x: Tensor) -> str | None:
    """Say why the forward pass cannot take rows, or return None when it can."""
    unavailable = nvrtc.compiler_unavailable()
    if unavailable is not None:
        return unavailable
    if x.dtype not in _DTYPES:
        return f"the CUDA kernel takes bfloat16 or float16 rows, and x is {x.dtype}."
    if not fits(x.shape[-1]):
        return f"the CUDA kernel takes a multiple of {_UNIT} channels up to {_WIDEST}, and x has {x.shape[-1]}."
    if not x.is_cuda:
        return f"the CUDA kernel needs CUDA tensors, and x is on {x.device}."
    return nvrtc.device_unfit(x.device)


def source(direction: str = "backward") -> str:
    """Give the text of the kernels of a direction, "forward" or "backward"."""
    return read_source("vmamba.ops.layer_norm", "rows.cuh", f"layer_norm_{direction}.cu")


def row_defines(channels: int, dtype: torch.dtype, plan: Plan) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of either direction."""
    return (
        ("BF16", int(dtype == torch.bfloat16)),
        ("CHANNELS", channels),
        ("LANES", plan.lanes),
        ("CHUNKS", plan.chunks),
        ("THREADS", _THREADS),
        ("BLOCKS", plan.blocks),
    )


class _Prepared(NamedTuple):
    """What a launch takes beside tensors: its kernels, the rows of a block at least, and the most blocks."""

    kernels: tuple[nvrtc.Kernel, ...]
    rows: int
    blocks: int

    def blocks_for(self, rows: int) -> int:
        """Blocks to launch."""
        return min(-(-rows // self.rows), self.blocks)


@functools.cache
def _prepare(channels: int, dtype: torch.dtype, skip: bool | None, index: int) -> _Prepared:
    """Build the forward pass, or, with `skip`, the backward pass that has a gradient round the norm or has none."""
    backward = skip is not None
    plan, device = plan_rows(channels, backward), torch.device("cuda", index)
    defines = row_defines(channels, dtype, plan) + ((("SKIP", int(bool(skip))),) if backward else ())
    direction, names = ("backward", ("backward", "sums")) if backward else ("forward", ("forward",))
    kernels = tuple(nvrtc.get_kernel(source(direction), f"layer_norm_{name}", defines, device) for name in names)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _Prepared(kernels, (_FEWEST if backward else 1) * (_THREADS // plan.lanes), processors * plan.blocks)


def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise contiguous rows x [M, D]; return them, and mean and 1 / deviation [M] in float32 for `backward`."""
    M, D = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    if M:
        prepared = _prepare(D, x.dtype, None, x.get_device())
        weights = [gamma.float().contiguous(), beta.float().contiguous()]
        arguments: list[nvrtc.Argument] = [nvrtc.aligned(x), *weights, y, mean, rstd, eps, M]
        prepared.kernels[0].launch((prepared.blocks_for(M), 1, 1), _THREADS, arguments)
    return y, mean, rstd


def backward(
    dy: Tensor, skip: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x [M, D] (with `skip` added), γ and β [D], both float32; of contiguous rows."""
    M, D = x.shape
    dx = torch.empty_like(x)
    dgamma, dbeta = (torch.empty(D, dtype=torch.float32, device=x.device) for _ in range(2))
    if M == 0:
        return dx, dgamma.zero_(), dbeta.zero_()
    prepared = _prepare(D, x.dtype, skip is not None, x.get_device())
    blocks = prepared.blocks_for(M)
    partial = torch.empty(blocks, 2, D, dtype=torch.float32, device=x.device)
    skip = None if skip is None else nvrtc.aligned(skip)
    arguments = [nvrtc.aligned(dy), skip, nvrtc.aligned(x), mean, rstd, gamma.float(), dx, partial, M]
    main, sums = prepared.kernels
    main.launch((blocks, 1, 1), _THREADS, arguments)
    sums.launch((-(-2 * D // _SUM_COLUMNS), 1, 1), _SUM_THREADS, [partial, dgamma, dbeta, blocks])
    return dx, dgamma, dbeta
