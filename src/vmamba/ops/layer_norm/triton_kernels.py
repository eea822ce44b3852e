# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""LayerNorm over channels: its backward pass, the gradient that goes round the norm added in the same pass; and, for
inference, a sum with the norm of it.

A program takes rows in strides, holds its sums for γ and β in registers and leaves them as one row of partial sums;
a second kernel adds these up in a fixed order, so results do not change from run to run. Compiled reductions over
400,000 rows of 96 channels were four times slower (docs/performance.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr


@triton.jit
def add_norm_kernel(
    x_ptr, branch_ptr, bias_ptr, source_ptr, sum_ptr, y_ptr, M, eps, source_eps,
    D: constexpr, E: constexpr, BM: constexpr, BD: constexpr, BE: constexpr,
):  # fmt: skip
    """BM rows of x + branch + bias, rounded, and of their norm; if E > 0, with the branch over source's deviation."""
    o_d, o_m = tl.arange(0, BD), tl.program_id(0) * BM + tl.arange(0, BM)
    m_d = (o_d < D)[None, :]
    m = (o_m < M)[:, None] & m_d
    offset = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    b_sum = tl.load(x_ptr + offset, mask=m, other=0.0).to(tl.float32)
    b_branch = tl.load(branch_ptr + offset, mask=m, other=0.0).to(tl.float32)
    if E > 0:
        o_e = tl.arange(0, BE)
        m_e = (o_m < M)[:, None] & (o_e < E)[None, :]
        p_source = source_ptr + o_m.to(tl.int64)[:, None] * E + o_e[None, :]
        b_s = tl.load(p_source, mask=m_e, other=0.0).to(tl.float32)
        b_s = tl.where(m_e, b_s - (tl.sum(b_s, 1) / E)[:, None], 0.0)
        b_branch *= tl.rsqrt(tl.sum(b_s * b_s, 1) / E + source_eps)[:, None]
    b_sum += b_branch
    b_sum += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_low = b_sum.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offset, b_low, mask=m)
    b_sum = b_low.to(tl.float32)
    b_y = tl.where(m_d, b_sum - (tl.sum(b_sum, 1) / D)[:, None], 0.0)
    b_y *= tl.rsqrt(tl.sum(b_y * b_y, 1) / D + eps)[:, None]
    tl.store(y_ptr + offset, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, skip_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, dx_ptr, partial_ptr, M,
    D: constexpr, SKIP: constexpr, BM: constexpr, BD: constexpr,
):  # fmt: skip
    """Gradient of rows i, i + programs, … (blocks of BM), and this program's sums [2, D] for γ and β."""
    o_d, o_m = tl.arange(0, BD), tl.arange(0, BM)
    m_d = (o_d < D)[None, :]
    b_gamma = tl.load(gamma_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_dgamma = tl.zeros([BM, BD], tl.float32)
    b_dbeta = tl.zeros([BM, BD], tl.float32)
    for row in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        r_m = row + o_m
        m = (r_m < M)[:, None] & m_d
        offset = r_m.to(tl.int64)[:, None] * D + o_d[None, :]
        mean = tl.load(mean_ptr + r_m, mask=r_m < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r_m, mask=r_m < M, other=0.0)[:, None]
        b_x = (tl.load(x_ptr + offset, mask=m, other=0.0).to(tl.float32) - mean) * rstd
        b_x = tl.where(m_d, b_x, 0.0)
        b_dy = tl.load(dy_ptr + offset, mask=m, other=0.0).to(tl.float32)
        b_dgamma += b_dy * b_x
        b_dbeta += b_dy
        b_dy *= b_gamma
        along = tl.sum(b_dy * b_x, 1)[:, None] / D
        b_dx = (b_dy - tl.sum(b_dy, 1)[:, None] / D - b_x * along) * rstd
        if SKIP:
            b_dx += tl.load(skip_ptr + offset, mask=m, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, b_dx.to(dx_ptr.dtype.element_ty), mask=m)
    p_partial = partial_ptr + tl.program_id(0) * 2 * D + o_d
    tl.store(p_partial, tl.sum(b_dgamma, 0), mask=o_d < D)
    tl.store(p_partial + D, tl.sum(b_dbeta, 0), mask=o_d < D)


@triton.jit
def layer_norm_sums_kernel(partial_ptr, dgamma_ptr, dbeta_ptr, P, D: constexpr, BP: constexpr, BD: constexpr):
    """Add P rows of partial sums [2, D] up: BD channels of γ or of β a program."""
    BLOCKS: constexpr = (D + BD - 1) // BD
    which = tl.program_id(0) // BLOCKS
    o_d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    o_p = tl.arange(0, BP)
    b_sum = tl.zeros([BP, BD], tl.float32)
    for p in range(0, P, BP):
        m = (p + o_p < P)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(partial_ptr + ((p + o_p) * 2 + which)[:, None] * D + o_d[None, :], mask=m, other=0.0)
    b_total = tl.sum(b_sum, 0)
    tl.store(dgamma_ptr + o_d, b_total, mask=o_d < D * (1 - which))
    tl.store(dbeta_ptr + o_d, b_total, mask=o_d < D * which)


def add_norm(
    x: Tensor, branch: Tensor, bias: Tensor, source: Tensor | None, eps: float, source_eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `vmamba.ops.layer_norm.api.add_norm` of x and branch [M, D] and source [M, E] on their GPU."""
    (M, D), E = x.shape, 0 if source is None else source.shape[1]
    width, source_width = triton.next_power_of_2(D), triton.next_power_of_2(max(E, 1))
    rows = max(1, min(16, 2048 // width))
    warps = 4 if rows * max(width, source_width) <= 4096 else 8
    total, y = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        add_norm_kernel[(triton.cdiv(M, rows),)](
            x, branch, bias, source, total, y, M, eps, source_eps, D, E, rows, width, source_width, num_warps=warps
        )
    return total, y


def backward(
    dy: Tensor,
    skip: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x [M, D] (with `skip` added), γ and β [D], both float32."""
    M, D = x.shape
    width = triton.next_power_of_2(D)
    rows, warps, programs_each = tile or (
        (8, 4, 8) if width == 128 and skip is None else (max(1, min(16, 2048 // width)), 4, 4)
    )
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(triton.cdiv(M, rows), programs_each * processors)
    dx = torch.empty_like(x)
    partial = torch.empty(programs, 2, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        layer_norm_bwd_kernel[(programs,)](
            dy, skip, x, mean, rstd, gamma, dx, partial, M, D, skip is not None, rows, width, num_warps=warps
        )
        dgamma, dbeta = (torch.empty(D, dtype=torch.float32, device=x.device) for _ in range(2))
        layer_norm_sums_kernel[(2 * triton.cdiv(D, 32),)](partial, dgamma, dbeta, programs, D, 64, 32, num_warps=4)
    return dx, dgamma, dbeta
