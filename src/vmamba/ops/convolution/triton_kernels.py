# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Convolutions of channels-last maps with what surrounds them in VMamba, for inference.

`depthwise_silu`: 3×3 depthwise convolution, size kept, and SiLU. `conv_norm`: 3×3 convolution of stride 2, LayerNorm
over the channels and perhaps GELU, as in the stem: a program holds all channels of its positions, so the norm needs no
second pass. Maps are [B, H, W, C]; positions of the result are counted through the batch, M = B·H·W of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from vmamba.ops.linear.api import split_channels
from vmamba.ops.linear.triton_kernels import gelu


@triton.jit
def depthwise_silu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, H, W,
    C: constexpr, BIAS: constexpr, ROWS: constexpr, BW: constexpr, BC: constexpr,
):  # fmt: skip
    """ROWS rows of y, BW columns wide, BC channels. Weights are [3, 3, C].

    A row of x is read once (three times, shifted by a column) and added to the three rows of y that it belongs to.
    """
    strips: constexpr = (C + BC - 1) // BC
    o_c = tl.program_id(0) % strips * BC + tl.arange(0, BC)
    tiles_w = tl.cdiv(W, BW)
    rest = tl.program_id(0) // strips
    o_w = rest % tiles_w * BW + tl.arange(0, BW)
    rest //= tiles_w
    tiles_h = tl.cdiv(H, ROWS)
    h0 = rest % tiles_h * ROWS
    base = (rest // tiles_h).to(tl.int64) * H * W * C
    m_c, m_w = (o_c < C)[None, :], (o_w < W)[:, None]
    m, m_left, m_right = m_c & m_w, m_c & ((o_w > 0) & (o_w <= W))[:, None], m_c & (o_w < W - 1)[:, None]
    offset = o_w[:, None] * C + o_c[None, :]
    p_x, p_y = x_ptr + base + offset, y_ptr + base + offset
    r_c = tl.minimum(o_c, C - 1)
    w00, w01, w02 = tl.load(w_ptr + r_c), tl.load(w_ptr + C + r_c), tl.load(w_ptr + 2 * C + r_c)
    w10, w11, w12 = tl.load(w_ptr + 3 * C + r_c), tl.load(w_ptr + 4 * C + r_c), tl.load(w_ptr + 5 * C + r_c)
    w20, w21, w22 = tl.load(w_ptr + 6 * C + r_c), tl.load(w_ptr + 7 * C + r_c), tl.load(w_ptr + 8 * C + r_c)
    b_start = tl.zeros([BW, BC], tl.float32)
    if BIAS:
        b_start += tl.load(b_ptr + r_c).to(tl.float32)[None, :]
    b_above = b_start  # the row of y above the one of x at hand: lacks its last tap
    b_here = b_start
    for h in range(h0 - 1, tl.minimum(h0 + ROWS, H) + 1):
        i_h = tl.full([1, 1], 0, tl.int32) + h
        inside = (i_h >= 0) & (i_h < H)
        p_row = p_x + h * W * C
        left = tl.load(p_row - C, mask=m_left & inside, other=0.0).to(tl.float32)
        here = tl.load(p_row, mask=m & inside, other=0.0).to(tl.float32)
        right = tl.load(p_row + C, mask=m_right & inside, other=0.0).to(tl.float32)
        b_y = b_above + left * w20[None, :] + here * w21[None, :] + right * w22[None, :]
        b_above = b_here + left * w10[None, :] + here * w11[None, :] + right * w12[None, :]
        b_here = b_start + left * w00[None, :] + here * w01[None, :] + right * w02[None, :]
        b_y = b_y / (1.0 + tl.exp(-b_y))
        tl.store(p_y + (h - 1) * W * C, b_y.to(y_ptr.dtype.element_ty), mask=m & (i_h > h0))


@triton.jit
def conv_norm_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    M,
    H,
    W,
    OH,
    OW,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    eps,
    CIN: constexpr,
    N0: constexpr,
    N1: constexpr,
    ACT_GELU: constexpr,
    BM: constexpr,
    BK: constexpr,
):
    """[BM positions, N0 + N1 channels] of y: 3×3, stride 2, padding 1. Weights are [9·CIN, N], taps first.

    CIN < 16: all taps and channels are one product with 9·CIN ≤ BK rows; else one product a tap and BK channels.
    """
    N: constexpr = N0 + N1
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    r_m = tl.minimum(o_m, M - 1)
    column, row, i_b = r_m % OW, (r_m // OW) % OH, r_m // (OW * OH)
    p_x = x_ptr + i_b.to(tl.int64) * stride_b
    o_k = tl.arange(0, BK)
    o_0 = tl.arange(0, N0)
    b_y0 = tl.zeros([BM, N0], tl.float32)
    if N1 > 0:
        o_1 = N0 + tl.arange(0, N1)
        b_y1 = tl.zeros([BM, N1], tl.float32)
    if CIN < 16:
        h = row[:, None] * 2 - 1 + (o_k // (3 * CIN))[None, :]
        w = column[:, None] * 2 - 1 + (o_k // CIN % 3)[None, :]
        m = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (o_k < 9 * CIN)[None, :]
        b_x = tl.load(p_x[:, None] + h * stride_h + w * stride_w + (o_k % CIN)[None, :] * stride_c, mask=m, other=0.0)
        m_k = (o_k < 9 * CIN)[:, None]
        b_y0 = tl.dot(b_x, tl.load(w_ptr + o_k[:, None] * N + o_0[None, :], mask=m_k, other=0.0), b_y0)
        if N1 > 0:
            b_y1 = tl.dot(b_x, tl.load(w_ptr + o_k[:, None] * N + o_1[None, :], mask=m_k, other=0.0), b_y1)
    else:
        for tap in range(9):
            h, w = row * 2 - 1 + tap // 3, column * 2 - 1 + tap % 3
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            p_tap = p_x + h * stride_h + w * stride_w
            for k in tl.static_range(0, CIN, BK):
                m_k = k + o_k < CIN
                b_x = tl.load(
                    p_tap[:, None] + (k + o_k)[None, :] * stride_c, mask=inside[:, None] & m_k[None, :], other=0.0
                )
                p_w = w_ptr + (tap * CIN + k + o_k)[:, None] * N
                b_y0 = tl.dot(b_x, tl.load(p_w + o_0[None, :], mask=m_k[:, None], other=0.0), b_y0)
                if N1 > 0:
                    b_y1 = tl.dot(b_x, tl.load(p_w + o_1[None, :], mask=m_k[:, None], other=0.0), b_y1)
    b_y0 += tl.load(b_ptr + o_0).to(tl.float32)[None, :]
    b_sum = tl.sum(b_y0, 1)
    if N1 > 0:
        b_y1 += tl.load(b_ptr + o_1).to(tl.float32)[None, :]
        b_sum += tl.sum(b_y1, 1)
    mean = (b_sum / N)[:, None]
    b_y0 -= mean
    b_square = tl.sum(b_y0 * b_y0, 1)
    if N1 > 0:
        b_y1 -= mean
        b_square += tl.sum(b_y1 * b_y1, 1)
    scale = tl.rsqrt(b_square / N + eps)[:, None]
    exact: constexpr = y_ptr.dtype.element_ty == tl.float32
    p_y, m = y_ptr + o_m.to(tl.int64)[:, None] * N, (o_m < M)[:, None]
    b_y0 = (
        b_y0 * scale * tl.load(gamma_ptr + o_0).to(tl.float32)[None, :]
        + tl.load(beta_ptr + o_0).to(tl.float32)[None, :]
    )
    if ACT_GELU:
        b_y0 = gelu(b_y0, exact)
    tl.store(p_y + o_0[None, :], b_y0.to(y_ptr.dtype.element_ty), mask=m)
    if N1 > 0:
        b_y1 = (
            b_y1 * scale * tl.load(gamma_ptr + o_1).to(tl.float32)[None, :]
            + tl.load(beta_ptr + o_1).to(tl.float32)[None, :]
        )
        if ACT_GELU:
            b_y1 = gelu(b_y1, exact)
        tl.store(p_y + o_1[None, :], b_y1.to(y_ptr.dtype.element_ty), mask=m)


def depthwise_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Compute `vmamba.ops.convolution.api.depthwise_silu` of x [B, H, W, C] and weight [C, 3, 3] on its GPU."""
    B, H, W, C = x.shape
    weight = weight.permute(1, 2, 0).contiguous()
    if tile is None:
        tile = (H, 16, 32, 1) if B * triton.cdiv(W, 16) * triton.cdiv(C, 32) >= 2048 else (min(H, 14), 8, 64, 1)
        if B * triton.cdiv(H, 14) * triton.cdiv(W, 8) * triton.cdiv(C, 64) < 1024:  # small batches: more programs
            tile = (4, 4, 32, 1)
    rows, columns, channels, warps = tile
    y = torch.empty_like(x)
    grid = (B * triton.cdiv(H, rows) * triton.cdiv(W, columns) * triton.cdiv(C, channels),)
    with torch.cuda.device_of(x):
        depthwise_silu_kernel[grid](
            x, weight, bias, y, H, W, C, bias is not None, rows, columns, channels, num_warps=warps
        )
    return y


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    gelu_after: bool,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """Compute `vmamba.ops.convolution.api.conv_norm` of x [B, C, H, W], any strides, on its GPU."""
    B, C, H, W = x.shape
    N, OH, OW = weight.shape[1], (H + 1) // 2, (W + 1) // 2
    parts = split_channels(N)
    step = triton.next_power_of_2(9 * C) if C < 16 else min(64, triton.next_power_of_2(C))
    rows, warps, stages = tile or ((128, 4, 3) if B * OH * OW > 2**16 else (32, 4, 2))
    y = torch.empty(B, OH, OW, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        conv_norm_kernel[(triton.cdiv(B * OH * OW, rows),)](
            x, weight, bias, gamma, beta, y, B * OH * OW, H, W, OH, OW, *x.stride(), eps, C, *parts,
            gelu_after, rows, step, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y
