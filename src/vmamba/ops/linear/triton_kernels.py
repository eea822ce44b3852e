# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# ruff: noqa: RET505 (Triton compiles what follows a constant branch that returns)
"""Matrix products that do the norm before them and the activation and residual after them, in one pass over the map.

For narrow maps, whose rows fit in a tile: there the products are bound by memory, and each pass saved counts. The
norm's affine part is in the weights (`vmamba.models.fused` folds it), so what is left of it here is (x − mean)·rstd.

Shapes: x [M, K], weights [N, K]; a program takes BM rows of x whole. M is a run-time number, K and N are constants.
A row of K = K0 + K1 channels is two tiles, since tiles are powers of two wide and 96 or 192 channels are not.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from vmamba.ops.linear.api import HIDDEN_STEP, split_channels


@triton.jit
def half_tanh(x):
    """Φ(x) − 1/2 by the hardware's tanh, for 16-bit results: errs by 3e-4 where rounding errs by 2e-3."""
    # atanh(erf(x / √2)) / x, fitted in x² to the least error of the result; past x² = 36 it is ±1 all the same.
    t = tl.minimum(x * x, 36.0)
    p = -0.00035170863671661346 * t + 0.03700682709851308
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x * (p * t + 0.7975065863834936)], tl.float32, is_pure=True, pack=1
    )
    return 0.5 * tanh


@triton.jit
def gelu(x, EXACT: constexpr):
    """x·Φ(x)."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x * half_tanh(x) + 0.5 * x


@triton.jit
def load_normed(x_ptr, r_m, eps, K0: constexpr, K1: constexpr):
    """Load rows r_m of x [M, K0 + K1] and normalise them: [BM, K0] and [BM, K1] (the first again if K1 is 0)."""
    K: constexpr = K0 + K1
    p_x = x_ptr + r_m[:, None] * K
    dtype: constexpr = x_ptr.dtype.element_ty
    b_0 = tl.load(p_x + tl.arange(0, K0)[None, :]).to(tl.float32)
    if K1 == 0:
        b_0 -= (tl.sum(b_0, 1) / K)[:, None]
        b_0 = (b_0 * tl.rsqrt(tl.sum(b_0 * b_0, 1) / K + eps)[:, None]).to(dtype)
        return b_0, b_0
    else:
        b_1 = tl.load(p_x + (K0 + tl.arange(0, K1))[None, :]).to(tl.float32)
        mean = ((tl.sum(b_0, 1) + tl.sum(b_1, 1)) / K)[:, None]
        b_0 -= mean
        b_1 -= mean
        scale = tl.rsqrt((tl.sum(b_0 * b_0, 1) + tl.sum(b_1 * b_1, 1)) / K + eps)[:, None]
        return (b_0 * scale).to(dtype), (b_1 * scale).to(dtype)


@triton.jit
def norm_linear_kernel(
    x_ptr, w_ptr, b_ptr, residual_ptr, y_ptr, M, eps,
    K0: constexpr, K1: constexpr, N: constexpr, BIAS: constexpr, RESIDUAL: constexpr,
    BM: constexpr, BN: constexpr,
):  # fmt: skip
    """BM rows of y = norm(x) Wᵀ + b + residual, BN columns after BN columns."""
    K: constexpr = K0 + K1
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    r_m = tl.minimum(o_m, M - 1).to(tl.int64)  # rows past the end repeat the last: only the store is masked
    b_0, b_1 = load_normed(x_ptr, r_m, eps, K0, K1)
    for n in tl.static_range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        r_n = tl.minimum(o_n, N - 1)
        p_w = w_ptr + r_n[None, :] * K
        b_y = tl.dot(b_0, tl.load(p_w + tl.arange(0, K0)[:, None]))
        if K1 > 0:
            b_y = tl.dot(b_1, tl.load(p_w + (K0 + tl.arange(0, K1))[:, None]), b_y)
        if BIAS:
            b_y += tl.load(b_ptr + r_n).to(tl.float32)[None, :]
        offset = r_m[:, None] * N + o_n[None, :]
        m = (o_m < M)[:, None] & (o_n < N)[None, :]
        if RESIDUAL:
            b_y += tl.load(residual_ptr + offset, mask=m, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def linear_gelu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, M,
    K: constexpr, N: constexpr, BM: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    """One tile of y = gelu(x Wᵀ + b). Tiles of a row block follow each other, so that x is in the cache."""
    COLUMNS: constexpr = (N + BN - 1) // BN
    o_m = tl.program_id(0) // COLUMNS * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) % COLUMNS * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    r_m = tl.minimum(o_m, M - 1).to(tl.int64)
    r_n = tl.minimum(o_n, N - 1)
    p_x = x_ptr + r_m[:, None] * K + o_k[None, :]
    p_w = w_ptr + r_n[None, :] * K + o_k[:, None]
    b_y = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        if K % BK == 0:
            b_x, b_w = tl.load(p_x + k), tl.load(p_w + k)
        else:
            b_x = tl.load(p_x + k, mask=(o_k < K - k)[None, :], other=0.0)
            b_w = tl.load(p_w + k, mask=(o_k < K - k)[:, None], other=0.0)
        b_y = tl.dot(b_x, b_w, b_y)
    b_y = gelu(b_y + tl.load(b_ptr + r_n).to(tl.float32)[None, :], y_ptr.dtype.element_ty == tl.float32)
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(y_ptr + r_m[:, None] * N + o_n[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def norm_mlp_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, M, eps,
    D0: constexpr, D1: constexpr, HIDDEN: constexpr, BRANCH: constexpr, BM: constexpr, BH: constexpr,
):  # fmt: skip
    """BM rows of y = gelu(n W1ᵀ + b1) W2ᵀ + b2, the hidden activations BH at a time and never in memory.

    The whole BRANCH has n = norm(x) and adds x; otherwise n = x.
    """
    D: constexpr = D0 + D1
    dtype: constexpr = y_ptr.dtype.element_ty
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    r_m = tl.minimum(o_m, M - 1).to(tl.int64)
    o_0, o_h = tl.arange(0, D0), tl.arange(0, BH)
    if D1 > 0:
        o_1 = D0 + tl.arange(0, D1)
        b_y1 = tl.zeros([BM, D1], tl.float32)
    if BRANCH:
        b_n0, b_n1 = load_normed(x_ptr, r_m, eps, D0, D1)
    else:
        b_n0 = tl.load(x_ptr + r_m[:, None] * D + o_0[None, :])
        if D1 > 0:
            b_n1 = tl.load(x_ptr + r_m[:, None] * D + o_1[None, :])
    b_y0 = tl.zeros([BM, D0], tl.float32)
    for h in range(0, HIDDEN, BH):
        p_w1 = w1_ptr + (h + o_h)[None, :] * D
        p_w2 = w2_ptr + (h + o_h)[:, None]
        b_h = tl.dot(b_n0, tl.load(p_w1 + o_0[:, None]))
        if D1 > 0:
            b_h = tl.dot(b_n1, tl.load(p_w1 + o_1[:, None]), b_h)
        b_h = gelu(b_h + tl.load(b1_ptr + h + o_h).to(tl.float32)[None, :], dtype == tl.float32).to(dtype)
        b_y0 = tl.dot(b_h, tl.load(p_w2 + o_0[None, :] * HIDDEN), b_y0)
        if D1 > 0:
            b_y1 = tl.dot(b_h, tl.load(p_w2 + o_1[None, :] * HIDDEN), b_y1)
    m = (o_m < M)[:, None]
    offset = r_m[:, None] * D
    b_y0 += tl.load(b2_ptr + o_0).to(tl.float32)[None, :]
    if BRANCH:
        b_y0 += tl.load(x_ptr + offset + o_0[None, :]).to(tl.float32)
    tl.store(y_ptr + offset + o_0[None, :], b_y0.to(dtype), mask=m)
    if D1 > 0:
        b_y1 += tl.load(b2_ptr + o_1).to(tl.float32)[None, :]
        if BRANCH:
            b_y1 += tl.load(x_ptr + offset + o_1[None, :]).to(tl.float32)
        tl.store(y_ptr + offset + o_1[None, :], b_y1.to(dtype), mask=m)


MANY_ROWS = 2**15  # from here on large tiles fill the GPU


class Tile(NamedTuple):
    """How a product is cut: rows, columns (or hidden channels), channels a step; warps a program, loads in flight."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def why_not(x: Tensor) -> str | None:
    """Say in a sentence why the kernels cannot run on a tensor; None if they can."""
    if not x.is_cuda:
        return f"they need a CUDA device, and the tensors are on {x.device}."
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"they take float16 and bfloat16, and x is {x.dtype}."
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "they need compute capability 8.0 or newer."
    return None


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, tile: Tile | None = None
) -> Tensor:
    """Compute `vmamba.ops.linear.api.norm_linear` of x [M, K] on its GPU."""
    (M, K), N = x.shape, weight.shape[0]
    parts = split_channels(K)
    if tile is None:
        tile = Tile(128 if residual is None else 64, 32, 0, 4, 1) if K <= 128 else Tile(64, 64, 0, 4, 1)
        tile = tile if M > MANY_ROWS else Tile(32, 32, 0, 4, 1)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        norm_linear_kernel[(triton.cdiv(M, tile.rows),)](
            x, weight, bias, residual, y, M, eps, *parts, N, bias is not None, residual is not None,
            tile.rows, tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile | None = None) -> Tensor:
    """Compute `vmamba.ops.linear.api.linear_gelu` of x [M, K] on its GPU."""
    (M, K), N = x.shape, weight.shape[0]
    many = M * N > MANY_ROWS * 128
    if tile is None and many and x.dtype == torch.bfloat16:
        # cuBLAS is 8–15 % faster. Its GELU is the tanh form: 5e-4 off at most, where rounding to bfloat16 errs by 2e-3.
        return torch._addmm_activation(bias.to(x.dtype), x, weight.t(), use_gelu=True)
    step = 64 if K % 64 == 0 else 32
    if tile is None:
        tile = Tile(128, 128, step, 8, 3) if many else Tile(32, 64, step, 4, 3)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        linear_gelu_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            x, weight, bias, y, M, K, N, tile.rows, tile.columns, tile.step,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def norm_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, tile: Tile | None = None) -> Tensor:
    """Compute `vmamba.ops.linear.api.norm_mlp` of x [M, D] on its GPU."""
    (M, D), hidden = x.shape, w1.shape[0]
    parts = split_channels(D)
    if tile is None:
        memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
        tile = Tile(128 if D < 128 else 64, 64, 0, 4, 2) if D <= 128 else Tile(128, 64, 0, 8, 3 if D <= 192 else 2)
        tile = tile if memory >= 200 * 1024 else Tile(64, 32, 0, 4, 2)
        tile = tile if M > MANY_ROWS else Tile(32, 32, 0, 4, 2)
    assert HIDDEN_STEP % tile.columns == 0  # the loop over hidden channels masks none
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        norm_mlp_kernel[(triton.cdiv(M, tile.rows),)](
            x, w1, b1, w2, b2, y, M, eps, *parts, hidden, True, tile.rows, tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y
