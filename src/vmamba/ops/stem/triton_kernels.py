# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""The backward pass of the stem's first layer; the forward is `vmamba.ops.convolution.triton_kernels.conv_norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from vmamba.ops.linear.api import split_channels
from vmamba.ops.mlp.triton_kernels import gelu_and_slope


@triton.jit
def stem_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, partial_ptr, M, H, W, OH, OW,
    stride_b, stride_c, stride_h, stride_w, eps,
    CIN: constexpr, N0: constexpr, N1: constexpr, BM: constexpr, BK: constexpr,
):  # fmt: skip
    """Sums over blocks of BM positions i, i + programs, …: of the gradients [BK, N] of the filters, then of γ and β.

    Channels are N = N0 + N1 as in `vmamba.ops.linear.triton_kernels`; filters are [9·CIN, N] with 9·CIN < BK: the row
    after theirs is the bias's gradient, as if of a tap that is always 1. Sums over positions are products with ones,
    which need no barrier.
    """
    N: constexpr = N0 + N1
    exact: constexpr = x_ptr.dtype.element_ty == tl.float32
    o_k, o_0 = tl.arange(0, BK), tl.arange(0, N0)
    m_k = (o_k < 9 * CIN)[:, None]
    b_w0 = tl.load(w_ptr + o_k[:, None] * N + o_0[None, :], mask=m_k, other=0.0)
    b_bias0 = tl.load(b_ptr + o_0)[None, :]
    b_gamma0, b_beta0 = tl.load(gamma_ptr + o_0)[None, :], tl.load(beta_ptr + o_0)[None, :]
    b_dw0 = tl.zeros([BK, N0], tl.float32)
    b_dgamma0, b_dbeta0 = tl.zeros([16, N0], tl.float32), tl.zeros([16, N0], tl.float32)
    b_ones = tl.full([16, BM], 1.0, x_ptr.dtype.element_ty)
    if N1 > 0:
        o_1 = N0 + tl.arange(0, N1)
        b_w1 = tl.load(w_ptr + o_k[:, None] * N + o_1[None, :], mask=m_k, other=0.0)
        b_bias1 = tl.load(b_ptr + o_1)[None, :]
        b_gamma1, b_beta1 = tl.load(gamma_ptr + o_1)[None, :], tl.load(beta_ptr + o_1)[None, :]
        b_dw1 = tl.zeros([BK, N1], tl.float32)
        b_dgamma1, b_dbeta1 = tl.zeros([16, N1], tl.float32), tl.zeros([16, N1], tl.float32)
    for start in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        o_m = start + tl.arange(0, BM)
        r_m = tl.minimum(o_m, M - 1)
        column, row, i_b = r_m % OW, (r_m // OW) % OH, r_m // (OW * OH)
        h = row[:, None] * 2 - 1 + (o_k // (3 * CIN))[None, :]
        w = column[:, None] * 2 - 1 + (o_k // CIN % 3)[None, :]
        m = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (o_k < 9 * CIN)[None, :]
        p_x = x_ptr + i_b.to(tl.int64)[:, None] * stride_b + h * stride_h + w * stride_w
        b_x = tl.load(p_x + (o_k % CIN)[None, :] * stride_c, mask=m, other=0.0)
        p_dy, m_m = dy_ptr + o_m.to(tl.int64)[:, None] * N, (o_m < M)[:, None]
        b_n0 = tl.dot(b_x, b_w0) + b_bias0
        b_sum = tl.sum(b_n0, 1)
        if N1 > 0:
            b_n1 = tl.dot(b_x, b_w1) + b_bias1
            b_sum += tl.sum(b_n1, 1)
        mean = (b_sum / N)[:, None]
        b_n0 -= mean
        b_square = tl.sum(b_n0 * b_n0, 1)
        if N1 > 0:
            b_n1 -= mean
            b_square += tl.sum(b_n1 * b_n1, 1)
        scale = tl.rsqrt(b_square / N + eps)[:, None]
        b_n0 *= scale
        # Past the last position dy is loaded as zero, and so is all that follows from it.
        _, b_slope0 = gelu_and_slope(b_n0 * b_gamma0 + b_beta0, exact)
        b_dz0 = tl.load(p_dy + o_0[None, :], mask=m_m, other=0.0).to(tl.float32) * b_slope0
        b_dgamma0 = tl.dot(b_ones, (b_dz0 * b_n0).to(b_x.dtype), b_dgamma0)
        b_dbeta0 = tl.dot(b_ones, b_dz0.to(b_x.dtype), b_dbeta0)
        b_dz0 *= b_gamma0
        b_mean = tl.sum(b_dz0, 1)
        b_along = tl.sum(b_dz0 * b_n0, 1)
        if N1 > 0:
            b_n1 *= scale
            _, b_slope1 = gelu_and_slope(b_n1 * b_gamma1 + b_beta1, exact)
            b_dz1 = tl.load(p_dy + o_1[None, :], mask=m_m, other=0.0).to(tl.float32) * b_slope1
            b_dgamma1 = tl.dot(b_ones, (b_dz1 * b_n1).to(b_x.dtype), b_dgamma1)
            b_dbeta1 = tl.dot(b_ones, b_dz1.to(b_x.dtype), b_dbeta1)
            b_dz1 *= b_gamma1
            b_mean += tl.sum(b_dz1, 1)
            b_along += tl.sum(b_dz1 * b_n1, 1)
        b_mean, b_along = (b_mean / N)[:, None], (b_along / N)[:, None]
        b_across = tl.trans(tl.where((o_k == 9 * CIN)[None, :], 1.0, b_x.to(tl.float32)).to(b_x.dtype))
        b_dz0 = (b_dz0 - b_mean - b_n0 * b_along) * scale
        b_dw0 = tl.dot(b_across, b_dz0.to(b_x.dtype), b_dw0)
        if N1 > 0:
            b_dz1 = (b_dz1 - b_mean - b_n1 * b_along) * scale
            b_dw1 = tl.dot(b_across, b_dz1.to(b_x.dtype), b_dw1)
    p_dw = partial_ptr + tl.program_id(0).to(tl.int64) * (BK + 2) * N
    p_sums = p_dw + BK * N
    tl.store(p_dw + o_k[:, None] * N + o_0[None, :], b_dw0)
    tl.store(p_sums + o_0, tl.sum(b_dgamma0, 0) / 16)
    tl.store(p_sums + N + o_0, tl.sum(b_dbeta0, 0) / 16)
    if N1 > 0:
        tl.store(p_dw + o_k[:, None] * N + o_1[None, :], b_dw1)
        tl.store(p_sums + o_1, tl.sum(b_dgamma1, 0) / 16)
        tl.store(p_sums + N + o_1, tl.sum(b_dbeta1, 0) / 16)


def backward(
    dy: Tensor,
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of filters [9·C, N], bias, γ and β [N] in float32; dy is [B, OH, OW, N], x [B, C, H, W]."""
    B, C, H, W = x.shape
    _, OH, OW, N = dy.shape
    rows, warps, programs_each = tile or (64, 4, 2)
    step, M = max(triton.next_power_of_2(9 * C), 16), B * OH * OW
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(triton.cdiv(M, rows), programs_each * processors)
    partial = torch.empty(programs, step + 2, N, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        stem_bwd_kernel[(programs,)](
            dy, x, filters, bias, gamma, beta, partial, M, H, W, OH, OW, *x.stride(), eps, C, *split_channels(N), rows,
            step, num_warps=warps, num_stages=1,
        )  # fmt: skip
    total = partial.sum(0)
    dbias, dgamma, dbeta = (total[row].clone() for row in (9 * C, step, step + 1))
    return total[: 9 * C].clone(), dbias, dgamma, dbeta
