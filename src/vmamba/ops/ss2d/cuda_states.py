"""The gradients of SS2D's core with several states a channel as CUDA: 16-bit maps, capability 8.0 and newer."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.cuda_source import read_source

MAX_STATES, MAX_RANK = 16, 64
SPAN = 16  # positions of a chunk
TRUNCATED = 1 + 3.52e-4  # what sums of tensor cores lose on average to the bits that tf32 lacks, as in the source
MAP_KERNELS = ("prepare", "carry", "join", "main", "finish", "weights")
SEQUENCE_KERNELS = ("gather", "carry", "join", "main", "scatter")
_SOURCES = ("common.cuh", "backward_tools.cuh", "backward_states.cu")
_ENDINGS = {MAP_KERNELS: "backward_states_map.cu", SEQUENCE_KERNELS: "backward_states_sequences.cu"}
_ROUTES = {"cross2d": (1, 1), "bidi": (0, 1), "unidi": (0, 0)}  # whether some read columns, whether some run backwards
CHANNELS, _TILE, _PREPARED = 32, 32, 64
_RESIDENT = 12  # warps a multiprocessor that the main kernel has registers for
SHARE_OF_INPUTS = 0.9  # what may be held besides the gradients, over the bytes of the inputs


class Cut(NamedTuple):
    """How much is taken at once, so that what is held besides the gradients stays below the inputs."""

    images: int
    routes: int


class Problem(ctypes.Structure):
    """What the kernels take; see `backward_states.cu`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "projected", "weight", "bias", "A", "D")),
        *((name, ctypes.c_void_p) for name in ("raw", "states", "adjoints", "steps", "sums", "dx", "dprojected")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias", "dA", "dD")),
        *((name, ctypes.c_void_p) for name in ("u", "delta", "sequences_dy", "du", "ddelta")),
        *((name, ctypes.c_int) for name in ("length", "channels", "groups", "chunks", "images", "first_route")),
        *((name, ctypes.c_int) for name in ("routes", "height", "width")),
    ]


def source(kernels: tuple[str, ...]) -> str:
    """Give the translation unit of `MAP_KERNELS` or `SEQUENCE_KERNELS`."""
    return read_source("vmamba.ops.ss2d", *_SOURCES, _ENDINGS[kernels])


def find_cut(batch: int, length: int, channels: int, rank: int, states: int) -> Cut | None:
    """Choose how many images and routes to take at once; None if not even one of each keeps to the memory.

    Args:
        batch: images.
        length: positions of the map.
        channels: E.
        rank: R.
        states: N.
    """
    chunks = -(-length // SPAN)
    budget = SHARE_OF_INPUTS * batch * length * (channels + 4 * (rank + 2 * states)) * 2
    of_route = 4 * (length * (channels + 2 * states) + chunks * channels * (2 * states + 1))
    for routes in (4, 2, 1):
        images = min(batch, int(budget / (routes * of_route + 4 * length * channels)))
        if images:
            return Cut(-(-batch // -(-batch // images)), routes)  # the rounds are even
    return None


def why_not(x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str) -> str | None:
    """Say why this backward cannot or should not take the inputs, or return None when it does."""
    unavailable = nvrtc.compiler_unavailable()
    if unavailable is not None:
        return unavailable
    if not x.is_cuda:
        return f"the CUDA backward needs CUDA tensors, and x is on {x.device}."
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA backward takes bfloat16 or float16 maps, and x is {x.dtype}."
    if routes not in _ROUTES:
        return f"the CUDA backward reads the routes {', '.join(map(repr, _ROUTES))}, not {routes!r}."
    (batch, length, channels), rank, states = x.shape, dt_weight.shape[-1], A.shape[-1]
    if not 1 < states <= MAX_STATES:
        return f"the CUDA backward is for 2 to {MAX_STATES} states a channel, and A has {states}."
    if rank > MAX_RANK:
        return f"the CUDA backward takes a rank of at most {MAX_RANK}, and dt_weight has {rank}."
    if length * max(channels, projected.shape[-1]) >= 2**31:
        return f"the CUDA backward takes fewer than 2**31 values of an image, and x has {length} by {channels}."
    if (unfit := nvrtc.device_unfit(x.device)) is not None:
        return unfit
    if torch.are_deterministic_algorithms_enabled():
        return "the CUDA backward adds in no fixed order, and deterministic algorithms are asked for."
    if find_cut(batch, length, channels, rank, states) is None:
        return f"the CUDA backward would hold more than its inputs for a batch of {batch}."
    return None


def states_defines(
    rank: int, states: int, dtype: torch.dtype, dy_dtype: torch.dtype, routes: str | None
) -> tuple[nvrtc.Define, ...]:
    """Give the compile-time parameters of `backward_states.cu`; of plain sequences, `routes` is None."""
    columns, reversed_ = _ROUTES["unidi" if routes is None else routes]
    return (
        ("RANK", rank),
        ("N", states),
        ("SPAN", SPAN),
        ("BF16", int(dtype == torch.bfloat16)),
        ("WEIGHT16", 0),
        ("DY32", int(dy_dtype == torch.float32)),
        ("COLUMNS", columns),
        ("REVERSED", reversed_),
        ("BLOCKS", _RESIDENT),
        ("SEQUENCES", int(routes is None)),
    )


def allocate(
    count: int, outputs: int, length: int, channels: int, states: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Make what is held between the kernels: raw, states, adjoints, steps, sums and dx.

    Args:
        count: routes of all images taken at once.
        outputs: those that have a gradient of x of their own.
        length: positions of a route.
        channels: E.
        states: N.
        device: where.
    """
    of_chunk = count * -(-length // SPAN) * channels
    sizes = (count * length * channels, of_chunk * states, of_chunk * states, of_chunk, count * length * 2 * states)
    return tuple(
        torch.empty(size, dtype=torch.float32, device=device) for size in (*sizes, outputs * length * channels)
    )


def find_kernels(names: tuple[str, ...], defines: tuple[nvrtc.Define, ...], device: torch.device) -> list[nvrtc.Kernel]:
    """Compile, or find compiled, the kernels of these names."""
    return [nvrtc.get_kernel(source(names), f"ss2d_states_{name}", defines, device) for name in names]


def find_image(tensor: Tensor, image: int) -> int:
    """Return the address of an image of a contiguous batch."""
    return tensor.data_ptr() + image * tensor.stride(0) * tensor.element_size()


def run(names: tuple[str, ...], kernels: list[nvrtc.Kernel], p: Problem, states: int, multiprocessors: int) -> None:
    """Launch the kernels for some images and routes."""
    tiles, sequences, lines = -(-p.length // _TILE), p.images * p.routes, p.groups * p.routes
    items, resident = lines * p.images * p.chunks, _RESIDENT * multiprocessors
    parts = max(1, min(tiles * p.images, resident // (2 * lines)))
    turned = (sequences * tiles * p.groups, 256)
    grids = {
        "prepare": (sequences * tiles * -(-p.channels // _PREPARED), _PREPARED),
        "gather": turned,
        "carry": (items, 32),
        "join": (-(-sequences * states * p.channels // 128), 128),
        "main": (min(items, resident), 32),
        "finish": (sequences * tiles, 128),
        "weights": (lines * parts, 128),
        "scatter": turned,
    }
    for name, kernel in zip(names, kernels, strict=True):
        blocks, threads = grids[name]
        kernel.launch((blocks, 1, 1), threads, [p])


def backward(
    dy: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `vmamba.ops.ss2d_scan`; states are recomputed (section 4.2 of the paper for the routes).

    Args:
        dy: (B, L, E), the gradient of the merged map.
        x: (B, L, E), bfloat16 or float16.
        projected: (B, L, 4·(R+2N)), as x.
        dt_weight: (4, E, R), as x or float32.
        dt_bias: (4, E), float32.
        A: (4, E, N), float32.
        D: (4, E), float32.
        height: H.
        width: W.
        routes: A key of `vmamba.ops.routes.ROUTES` for which `why_not` is None.
        cut: stands in for what `find_cut` chooses.

    Returns:
        The gradients of x, projected, dt_weight, dt_bias, A and D, each in the dtype of its input.

    Raises:
        ValueError: the batch is so small that the workspace would outweigh the inputs.
    """
    (batch, length, channels), rank, states = x.shape, dt_weight.shape[-1], A.shape[-1]
    dy = (dy if dy.dtype == x.dtype else dy.float()).contiguous()
    x, projected, device = x.contiguous(), projected.contiguous(), x.device
    dx, dprojected = torch.empty_like(x), torch.empty_like(projected)
    # Of many images: float32 sums would err by more than their own parts do.
    totals = [
        torch.zeros(4, size, channels, dtype=torch.float64, device=device) for size in (rank, 1, states, 1)
    ]  # dt_weight, dt_bias, A, D
    if x.numel():
        cut = cut or find_cut(batch, length, channels, rank, states)
        if cut is None:
            raise ValueError(f"the CUDA backward would hold more than its inputs for a batch of {batch}.")
        weights = [dt_weight.float().contiguous(), dt_bias.contiguous(), A.transpose(1, 2).contiguous(), D.contiguous()]
        space = allocate(cut.images * cut.routes, cut.images, length, channels, states, device)
        *_, sums, dx_sum = space
        defines = states_defines(rank, states, x.dtype, dy.dtype, routes)
        kernels = find_kernels(MAP_KERNELS, defines, device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        tensors = (x, dy, projected, *weights, *space, dprojected, *totals)
        sizes = (length, channels, -(-channels // CHANNELS), -(-length // SPAN), 0, 0, cut.routes, height, width)
        problem = Problem(*(t.data_ptr() for t in tensors), *[None] * 5, *sizes)
        for start in range(0, batch, cut.images):
            problem.images = count = min(cut.images, batch - start)
            for name, tensor in (("x", x), ("dy", dy), ("projected", projected), ("dprojected", dprojected)):
                setattr(problem, name, find_image(tensor, start))
            dx_sum.zero_()
            for first in range(0, 4, cut.routes):
                problem.first_route = first
                sums.zero_()
                run(MAP_KERNELS, kernels, problem, states, multiprocessors)
            dx[start : start + count] = dx_sum[: count * length * channels].view(count, length, channels)
    dweight, dbias, dA, dD = totals
    return (
        dx,
        dprojected,
        dweight.transpose(1, 2).to(dt_weight.dtype).contiguous(),
        dbias[:, 0].to(dt_bias.dtype),
        dA.transpose(1, 2).to(A.dtype).contiguous(),
        dD[:, 0].to(D.dtype),
    )
