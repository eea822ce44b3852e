"""The backward pass of LayerNorm as hand-laid CUDA, compiled at run time: 16-bit rows of a multiple of 8 channels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source

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


def plan_rows(channels: int) -> Plan:
    """Choose the threads a row: the fewest idle, then three chunks each or two, as measured (docs/performance.md)."""
    units = -(-channels // _UNIT)

    def cost(lanes: int) -> tuple[int, int]:
        chunks = -(-units // lanes)
        return lanes * chunks - units, abs(5 * chunks - 13)

    lanes = min((n for n in (1, 2, 4, 8, 16, 32) if -(-units // n) <= 6), key=cost)
    chunks = -(-units // lanes)
    # A chunk takes about 40 registers: sums, weights and what has been loaded.
    return Plan(lanes, chunks, min(max(_REGISTERS // (_THREADS * (40 + 40 * chunks)), 2), 6))


def why_not(dy: Tensor, skip: Tensor | None, x: Tensor) -> str | None:
    """Say why the kernel cannot take rows, or return None when it can."""
    unavailable = nvrtc.compiler_unavailable()
    if unavailable is not None:
        return unavailable
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 or float16 rows, and x is {x.dtype}."
    if any(t is not None and t.dtype != x.dtype for t in (dy, skip)):
        return "the CUDA kernel takes gradients of x's dtype."
    if x.shape[-1] % _UNIT or x.shape[-1] > _WIDEST:
        return f"the CUDA kernel takes a multiple of {_UNIT} channels up to {_WIDEST}, and x has {x.shape[-1]}."
    if not x.is_cuda:
        return f"the CUDA kernel needs CUDA tensors, and x is on {x.device}."
    return nvrtc.device_unfit(x.device)


def source() -> str:
    """Give the text of the kernels."""
    return read_source("vmamba.ops.layer_norm", "layer_norm_backward.cu")


def backward_defines(channels: int, dtype: torch.dtype, skip: bool, plan: Plan) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters."""
    return (
        ("BF16", int(dtype == torch.bfloat16)),
        ("CHANNELS", channels),
        ("LANES", plan.lanes),
        ("CHUNKS", plan.chunks),
        ("SKIP", int(skip)),
        ("THREADS", _THREADS),
        ("BLOCKS", plan.blocks),
    )


class _Prepared(NamedTuple):
    """What a launch takes beside tensors: both kernels, the rows of a block at least, and the most blocks."""

    main: nvrtc.Kernel
    sums: nvrtc.Kernel
    rows: int
    blocks: int


@functools.cache
def _prepare(channels: int, dtype: torch.dtype, skip: bool, index: int) -> _Prepared:
    plan, device = plan_rows(channels), torch.device("cuda", index)
    defines = backward_defines(channels, dtype, skip, plan)
    main, sums = (nvrtc.get_kernel(source(), f"layer_norm_{name}", defines, device) for name in ("backward", "sums"))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _Prepared(main, sums, _FEWEST * (_THREADS // plan.lanes), processors * plan.blocks)


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
    blocks = min(-(-M // prepared.rows), prepared.blocks)
    partial = torch.empty(blocks, 2, D, dtype=torch.float32, device=x.device)
    skip = None if skip is None else nvrtc.aligned(skip)
    arguments = [nvrtc.aligned(dy), skip, nvrtc.aligned(x), mean, rstd, gamma.float(), dx, partial, M]
    prepared.main.launch((blocks, 1, 1), _THREADS, arguments)
    prepared.sums.launch((-(-2 * D // _SUM_COLUMNS), 1, 1), _SUM_THREADS, [partial, dgamma, dbeta, blocks])
    return dx, dgamma, dbeta
