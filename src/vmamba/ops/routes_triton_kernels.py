# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Cross-scan and cross-merge as Triton kernels of their own: step (a) of the paper's acceleration ladder.

The fused kernels need neither; these are for code that wants the scanned copies, and for measuring the ladder. One pass
over the map each: the scan reads a tile once and writes it along every route, the merge reads it along every route and
writes the sum, taken in float32, once. Same arguments and results as the functions in `vmamba.ops.routes`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from vmamba.ops.routes import check_flip_back, get_routes

CROSS2D = tl.constexpr(0)
BIDI = tl.constexpr(1)
ROWS = tl.constexpr(2)
COLUMNS = tl.constexpr(3)
UNIDI = tl.constexpr(4)
_PATTERNS = {"cross2d": 0, "bidi": 1, "rows": 2, "columns": 3, "unidi": 4}


@triton.jit
def _step_of(i_h, i_w, H, W, k: constexpr, PATTERN: constexpr, FLIP: constexpr):
    """Return the step at which route k is at row i_h and column i_w. Without FLIP no line is turned round."""
    if PATTERN == CROSS2D:
        step = i_w * H + i_h if k % 2 == 1 else i_h * W + i_w
        if k >= 2:
            step = H * W - 1 - step
    elif PATTERN == BIDI:
        step = i_h * W + i_w
        if k >= 2:
            step = H * W - 1 - step
    elif PATTERN == ROWS:
        step = i_h * W + (W - 1 - i_w if k == 1 and FLIP else i_w)
    elif PATTERN == COLUMNS:
        step = i_w * H + (H - 1 - i_h if k == 1 and FLIP else i_h)
    else:
        step = i_h * W + i_w
    return step


@triton.jit(do_not_specialize=("C", "H", "W"))
def cross_kernel(
    map_ptr, seq_ptr, C, H, W, map_b, map_c, map_h, map_w,
    K: constexpr, PATTERN: constexpr, FLIP: constexpr, MERGE: constexpr, LAST: constexpr, WIDE: constexpr,
    BH: constexpr, BW: constexpr, BC: constexpr,
):  # fmt: skip
    """Copy a tile [BH, BW, BC] of a map to every route (MERGE: add every route up on the tile).

    LAST: channels are last in the sequences, (B, K, L, C) rather than (B, K, C, L).
    """
    tiles_w, tiles_c = tl.cdiv(W, BW), tl.cdiv(C, BC)
    tile = tl.program_id(0)
    i_c = (tile % tiles_c) * BC + tl.arange(0, BC)[None, None, :]
    rest = tile // tiles_c
    i_w = (rest % tiles_w) * BW + tl.arange(0, BW)[None, :, None]
    rest = rest // tiles_w
    i_h = (rest % tl.cdiv(H, BH)) * BH + tl.arange(0, BH)[:, None, None]
    i_b = (rest // tl.cdiv(H, BH)).to(tl.int64)
    m = (i_h < H) & (i_w < W) & (i_c < C)
    if WIDE:
        i_h, i_w, i_c = i_h.to(tl.int64), i_w.to(tl.int64), i_c.to(tl.int64)
    p_map = map_ptr + i_b * map_b + (i_h * map_h + i_w * map_w + i_c * map_c)
    L = H * W
    b_sum = tl.zeros([BH, BW, BC], tl.float32)
    if not MERGE:
        b_map = tl.load(p_map, mask=m)
    for k in tl.static_range(K):
        step = _step_of(i_h, i_w, H, W, k, PATTERN, FLIP)
        p_seq = seq_ptr + (i_b * K + k) * C * L + (step * C + i_c if LAST else step + i_c * L)
        if MERGE:
            b_sum += tl.load(p_seq, mask=m, other=0.0).to(tl.float32)
        else:
            tl.store(p_seq, b_map, mask=m)
    if MERGE:
        tl.store(p_map, b_sum.to(map_ptr.dtype.element_ty), mask=m)


def why_not(x: Tensor) -> str | None:
    """Say why these kernels cannot run on such a tensor; None if they can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}."
    if isinstance(cross_kernel, triton.JITFunction) and not x.is_cuda:
        return f"it needs a CUDA device, and the tensor is on {x.device}."
    return None


def _require(x: Tensor) -> None:
    reason = why_not(x)
    if reason is not None:
        raise ValueError(f"the Triton cross-scan cannot run: {reason} vmamba.ops.cross_scan runs anywhere.")


def _launch(grid: Tensor, sequences: Tensor, routes: str, flip: bool, merge: bool, channels_last: bool) -> None:
    """Run the kernel between a map and its sequences; `grid` has any strides, `sequences` is contiguous."""
    if channels_last:
        grid = grid.permute(0, 3, 1, 2)
    batch, channels, height, width = grid.shape
    if not grid.numel():
        return
    tile = (4, 8, 64) if channels_last else (32, 32, 1)
    programs = triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1]) * triton.cdiv(channels, tile[2]) * batch
    reach = sum((size - 1) * stride for size, stride in zip(grid.shape[1:], grid.stride()[1:], strict=True))
    with torch.cuda.device_of(grid):  # Triton launches on the current device
        cross_kernel[(programs,)](
            grid,
            sequences,
            channels,
            height,
            width,
            *grid.stride(),
            K=sequences.shape[1],
            PATTERN=_PATTERNS[routes],
            FLIP=flip,
            MERGE=merge,
            LAST=channels_last,
            WIDE=max(reach, channels * height * width) >= 2**31,
            BH=tile[0],
            BW=tile[1],
            BC=tile[2],
        )


def _scan(x: Tensor, routes: str, flip: bool, channels_last: bool) -> Tensor:
    batch, K = x.shape[0], len(get_routes(routes))
    shape = (batch, K, -1, x.shape[3]) if channels_last else (batch, K, x.shape[1], -1)
    sequences = x.new_empty((batch, K, x.shape[1], x.shape[2], x.shape[3])).view(shape)
    _launch(x, sequences, routes, flip, False, channels_last)
    return sequences


def _merge(y: Tensor, routes: str, flip: bool, height: int, width: int, channels_last: bool) -> Tensor:
    batch = y.shape[0]
    shape = (batch, height, width, y.shape[3]) if channels_last else (batch, y.shape[2], height, width)
    merged = y.new_empty(shape)
    _launch(merged, y.contiguous(), routes, flip, True, channels_last)
    return merged


class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: str, channels_last: bool) -> Tensor:
        ctx.routes, ctx.channels_last = routes, channels_last
        ctx.size = x.shape[1:3] if channels_last else x.shape[2:]
        return _scan(x, routes, True, channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _merge(dy, ctx.routes, True, *ctx.size, ctx.channels_last), None, None


class _CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, routes: str, flip: bool, height: int, width: int, channels_last: bool) -> Tensor:
        ctx.routes, ctx.flip, ctx.channels_last = routes, flip, channels_last
        return _merge(y, routes, flip, height, width, channels_last)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _scan(dx, ctx.routes, ctx.flip, ctx.channels_last), None, None, None, None, None


def cross_scan(x: Tensor, routes: str = "cross2d", *, channels_last: bool = False) -> Tensor:
    """Read a map along every route: `vmamba.ops.cross_scan` in one pass over memory.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channels_last`; any strides.
        routes: A key of `vmamba.ops.routes.ROUTES`.
        channels_last: Where the channels are, in the input and in the result.

    Returns:
        (B, K, C, L), or (B, K, L, C) with `channels_last`, where L = H·W; contiguous.

    Raises:
        ValueError: For an unknown pattern, an input that is not 4-dimensional, or one the kernel cannot run on.
    """
    get_routes(routes)
    if x.dim() != 4:
        layout = "(B, H, W, C)" if channels_last else "(B, C, H, W)"
        raise ValueError(f"cross_scan reads a map of shape {layout}, got {tuple(x.shape)}")
    _require(x)
    return _CrossScan.apply(x, routes, channels_last)  # type: ignore[no-any-return]


def cross_merge(
    y: Tensor,
    routes: str = "cross2d",
    *,
    height: int,
    width: int,
    channels_last: bool = False,
    flip_back: bool = True,
) -> Tensor:
    """Add the sequences of a pattern up on the map: `vmamba.ops.cross_merge` in one pass over memory.

    Args:
        y: (B, K, C, L), or (B, K, L, C) with `channels_last`, where L = H·W.
        routes: A key of `vmamba.ops.routes.ROUTES`.
        height: H.
        width: W.
        channels_last: Where the channels are, in the input and in the result.
        flip_back: False adds reversed lines in the order they were read. Only for the routes "rows" and "columns".

    Returns:
        (B, C, H, W), or (B, H, W, C) with `channels_last`, in the dtype of `y`; summed in float32 and rounded once.

    Raises:
        ValueError: For an unknown pattern, a shape that does not fit it, or an input the kernel cannot run on.
    """
    K = len(get_routes(routes))
    check_flip_back(routes, flip_back)
    if y.dim() != 4 or y.shape[1] != K or y.shape[2 if channels_last else 3] != height * width:
        layout = "(B, K, L, C)" if channels_last else "(B, K, C, L)"
        raise ValueError(
            f"cross_merge of {routes!r} on a {height}×{width} map needs {layout} with K = {K} and "
            f"L = {height * width}, got {tuple(y.shape)}"
        )
    _require(y)
    return _CrossMerge.apply(y, routes, flip_back, height, width, channels_last)  # type: ignore[no-any-return]
