"""Depthwise 3×3 convolution with SiLU as hand-laid CUDA in both directions, compiled at run time: 16-bit maps."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source

_CHANNELS = 32  # that neighbouring threads take, two each
_TAPS = 9


class Plan(NamedTuple):
    """How a map is cut up.

    Attributes:
        columns: Columns of the strip that a thread walks down.
        threads: Threads of a block.
        blocks: Blocks that a multiprocessor should hold; what it holds at most bounds the registers of a thread.
        rows: Rows of a strip.
        grid: Blocks for each group of 32 channels.
    """

    columns: int
    threads: int
    blocks: int
    rows: int
    grid: int


# Columns, threads, blocks, as measured (docs/performance.md): strips of 7, or of 5 where they end with the map.
_FORWARD, _BACKWARD, _BACKWARD_OF_5 = (7, 128, 5), (7, 128, 2), (5, 128, 3)
_SHORTEST = 4  # rows
_HALO = {False: 2.5, True: 4.0}  # rows' worth of time that the rows around a tile cost, forward and backward
_QUEUED = 4  # waves of blocks from which on the forward's are spread evenly


class _Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("height", "width", "rows", "strips", "tiles", "items")]


@functools.cache
def plan_depthwise(shape: tuple[int, int, int, int], multiprocessors: int, backward: bool) -> Plan:
    """Choose how to cut up a map (B, H, W, C): the rows of a tile that keep a device busy with the least repeated."""
    batch, height, width, channels = shape
    cut = _BACKWARD_OF_5 if width % 5 == 0 and width % 7 else _BACKWARD
    columns, threads, blocks = cut if backward else _FORWARD
    slots, strips = threads * 2 // _CHANNELS, -(-width // columns)
    resident = max(multiprocessors * blocks // -(-channels // _CHANNELS), 1)

    def items(rows: int) -> int:
        return batch * strips * -(-height // rows)

    def cost(rows: int) -> float:
        waves = items(rows) / (slots * resident)
        return (waves if waves > _QUEUED and not backward else -(-waves // 1)) * (rows + _HALO[backward])

    rows = min({-(-height // tiles) for tiles in range(1, max(height // _SHORTEST, 1) + 1)}, key=cost)
    needed = -(-items(rows) // slots)
    # Each row of blocks leaves its own sums of the filters' gradients, so there are no more than run at once.
    return Plan(columns, threads, blocks, rows, min(needed, resident) if backward else needed)


def source(backward: bool) -> str:
    """Give the text of a direction's kernel."""
    return read_source(
        "vmamba.ops.convolution", "depthwise.cuh", f"depthwise_{'backward' if backward else 'forward'}.cu"
    )


def depthwise_defines(
    channels: int, dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool, plan: Plan
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters."""
    return (
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", int(weight_dtype != torch.float32)),
        ("BIAS", int(bias)),
        ("CHANNELS", channels),
        ("COLUMNS", plan.columns),
        ("THREADS", plan.threads),
        ("BLOCKS", plan.blocks),
    )


def why_not(x: Tensor) -> str | None:
    """Say why the kernels cannot take a map (..., C), or return None when they can."""
    return nvrtc.compiler_unavailable() or why_not_map(x)


def why_not_map(x: Tensor) -> str | None:
    """Say why the kernels could not take a map (..., C) even if they can be compiled."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels take bfloat16 or float16 maps, and x is {x.dtype}."
    if x.shape[-1] % 2:
        return f"the CUDA kernels take an even number of channels, and x has {x.shape[-1]}."
    if not x.is_cuda:
        return f"the CUDA kernels need CUDA tensors, and x is on {x.device}."
    return nvrtc.device_unfit(x.device)


class _Prepared(NamedTuple):
    """What a launch takes beside tensors: the kernel, blocks, threads of a block, the map, and rows of blocks."""

    kernel: nvrtc.Kernel
    blocks: int
    threads: int
    sizes: _Map
    grid: int


@functools.lru_cache(maxsize=1024)
def _prepare(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias: bool,
    backward: bool,
    index: int,
) -> _Prepared:
    batch, height, width, channels = shape
    device = torch.device("cuda", index)
    plan = plan_depthwise(shape, torch.cuda.get_device_properties(device).multi_processor_count, backward)
    defines = depthwise_defines(channels, dtype, weight_dtype, bias, plan)
    name = "depthwise_silu_backward" if backward else "depthwise_silu"
    kernel = nvrtc.get_kernel(source(backward), name, defines, device)
    strips, tiles = -(-width // plan.columns), -(-height // plan.rows)
    sizes = _Map(height, width, plan.rows, strips, tiles, batch * strips * tiles)
    return _Prepared(kernel, plan.grid * -(-channels // _CHANNELS), plan.threads, sizes, plan.grid)


def _launch(
    maps: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor, height: int, width: int
) -> Tensor | None:
    """Run a direction's kernel, the backward's on dy and x.

    It gives the gradients of the filters and the bias, a row for each row of blocks.
    """
    batch, _, channels = out.shape
    backward = len(maps) > 1
    if weight.dtype != out.dtype or (bias is not None and bias.dtype != weight.dtype):
        weight, bias = weight.float(), None if bias is None else bias.float()
    shape = (batch, height, width, channels)
    prepared = _prepare(shape, out.dtype, weight.dtype, bias is not None, backward, out.get_device())
    partial = out.new_empty(prepared.grid, (_TAPS + 1) * channels, dtype=torch.float32) if backward else None
    arguments: list[nvrtc.Argument] = [*(nvrtc.aligned(t, 4) for t in maps), weight.contiguous(), bias, out]
    arguments += [partial, prepared.sizes] if backward else [prepared.sizes]
    prepared.kernel.launch((prepared.blocks, 1, 1), prepared.threads, arguments)
    return partial


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Compute `vmamba.ops.convolution.api.depthwise_silu` of x (B, H·W, C) with filters (C, 3, 3)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        _launch([x], weight, bias, y, height, width)
    return y


def depthwise_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x (B, H·W, C), and of filters (C, 3, 3) and bias (C) behind each other in float32.

    Sums over positions are taken in a fixed order: results are bit-equal from run to run.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, x.new_zeros((_TAPS + 1) * x.shape[-1], dtype=torch.float32)
    partial = _launch([dy, x], weight, bias, dx, height, width)
    assert partial is not None
    return dx, partial.sum(0)
