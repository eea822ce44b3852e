# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""The MLP's two directions over rows of the map, the hidden channels a few at a time; see `vmamba.ops.mlp.api`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from vmamba.ops.linear.api import HIDDEN_STEP, split_channels
from vmamba.ops.linear.triton_kernels import MANY_ROWS, Tile, half_tanh, norm_mlp_kernel


@triton.jit
def gelu_and_slope(x, EXACT: constexpr):
    """x·Φ(x) and its derivative Φ(x) + x·φ(x)."""
    cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) if EXACT else 0.5 + half_tanh(x)
    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)  # exp(−x² / 2) / √(2π)
    return x * cdf, cdf + x * density


@triton.jit
def mlp_bwd_kernel(
    dy_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, dx_ptr, hidden_ptr, dpre_ptr, partial_ptr, M,
    D0: constexpr, D1: constexpr, HIDDEN: constexpr, BM: constexpr, BH: constexpr,
):  # fmt: skip
    """BM rows: dx, the hidden activations, the gradient before them, and its sum over the rows for b1."""
    D: constexpr = D0 + D1
    dtype: constexpr = x_ptr.dtype.element_ty
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m = (o_m < M)[:, None]
    offset = o_m.to(tl.int64)[:, None]
    o_0, o_h = tl.arange(0, D0), tl.arange(0, BH)
    b_x0 = tl.load(x_ptr + offset * D + o_0[None, :], mask=m, other=0.0)
    b_dy0 = tl.load(dy_ptr + offset * D + o_0[None, :], mask=m, other=0.0)
    b_dx0 = tl.zeros([BM, D0], tl.float32)
    if D1 > 0:
        o_1 = D0 + tl.arange(0, D1)
        b_x1 = tl.load(x_ptr + offset * D + o_1[None, :], mask=m, other=0.0)
        b_dy1 = tl.load(dy_ptr + offset * D + o_1[None, :], mask=m, other=0.0)
        b_dx1 = tl.zeros([BM, D1], tl.float32)
    for h in range(0, HIDDEN, BH):
        p_w1 = w1_ptr + (h + o_h)[None, :] * D
        p_w2 = w2_ptr + (h + o_h)[None, :]
        b_w10 = tl.load(p_w1 + o_0[:, None])  # transposed: [D0, BH]
        b_pre = tl.dot(b_x0, b_w10)
        b_dh = tl.dot(b_dy0, tl.load(p_w2 + o_0[:, None] * HIDDEN))
        if D1 > 0:
            b_w11 = tl.load(p_w1 + o_1[:, None])
            b_pre = tl.dot(b_x1, b_w11, b_pre)
            b_dh = tl.dot(b_dy1, tl.load(p_w2 + o_1[:, None] * HIDDEN), b_dh)
        b_h, b_slope = gelu_and_slope(b_pre + tl.load(b1_ptr + h + o_h)[None, :], dtype == tl.float32)
        b_dpre = b_dh * b_slope  # zero past the last row, whose dy was loaded as zero
        tl.store(partial_ptr + tl.program_id(0) * HIDDEN + h + o_h, tl.sum(b_dpre, 0))
        b_low = b_dpre.to(dtype)
        tl.store(hidden_ptr + offset * HIDDEN + (h + o_h)[None, :], b_h.to(dtype), mask=m)
        tl.store(dpre_ptr + offset * HIDDEN + (h + o_h)[None, :], b_low, mask=m)
        b_dx0 = tl.dot(b_low, tl.trans(b_w10), b_dx0)
        if D1 > 0:
            b_dx1 = tl.dot(b_low, tl.trans(b_w11), b_dx1)
    tl.store(dx_ptr + offset * D + o_0[None, :], b_dx0.to(dtype), mask=m)
    if D1 > 0:
        tl.store(dx_ptr + offset * D + o_1[None, :], b_dx1.to(dtype), mask=m)


def _has_room(x: Tensor) -> bool:
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >= 200 * 1024


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tile: Tile | None = None) -> Tensor:
    """Compute `vmamba.ops.mlp.api.mlp` of x [M, D] on its GPU."""
    (M, D), hidden = x.shape, w1.shape[0]
    if tile is None:
        tile = Tile(128, 64, 0, 4, 2) if D <= 128 else Tile(128, 64, 0, 8, 3)
        tile = tile if _has_room(x) else Tile(64, 32, 0, 4, 2)
        tile = tile if M > MANY_ROWS else Tile(32, 32, 0, 4, 2)
    assert HIDDEN_STEP % tile.columns == 0  # the loop over hidden channels masks none
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        norm_mlp_kernel[(triton.cdiv(M, tile.rows),)](
            x, w1, b1, w2, b2, y, M, 0.0, *split_channels(D), hidden, False, tile.rows, tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx [M, D], the hidden activations and the gradient before them [M, hidden], and b1's gradient."""
    (M, D), hidden = x.shape, w1.shape[0]
    if tile is None:
        tile = Tile(64, 64, 0, 4, 3 if D <= 96 else 2) if D <= 128 else Tile(128, 64, 0, 8, 2)
        tile = tile if _has_room(x) else Tile(64, 32, 0, 4, 1)
        tile = tile if M > MANY_ROWS else Tile(32, 32, 0, 4, 2)
    assert HIDDEN_STEP % tile.columns == 0
    programs = triton.cdiv(M, tile.rows)
    dx, wide = torch.empty_like(x), x.new_empty(M, hidden)
    dpre, partial = torch.empty_like(wide), torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        mlp_bwd_kernel[(programs,)](
            dy, x, w1, b1, w2, dx, wide, dpre, partial, M, *split_channels(D), hidden, tile.rows, tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx, wide, dpre, partial.sum(0)
