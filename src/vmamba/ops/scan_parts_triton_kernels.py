# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# ruff: noqa: RET505, RUF005 (Triton compiles what follows a constant branch that returns, and unpacks no tuples)
"""The parts of the scan kernels: elementary functions, routes, addresses, loads and stores of one tile.

Conventions as in `vmamba.ops.scan_triton_kernels`, whose kernels are made of these.
"""

import triton
import triton.language as tl
from triton.language import constexpr

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_REST = tl.constexpr(1.925963033500895e-08)
# ex2.approx is 1.8e-8 too small on average for arguments in (-0.5, 0) (benchmarks/special_functions.py): in base 2
EX2_BIAS = tl.constexpr(2.6e-08)
# What a kernel does to its target: it is the only writer, one of several at once, or one of several in a fixed order.
STORE = tl.constexpr(0)
ATOMIC = tl.constexpr(1)
ADD = tl.constexpr(2)
# The orders in which a map is read (see `_route`).
CROSS2D = tl.constexpr(0)
UNIDI = tl.constexpr(1)
BIDI = tl.constexpr(2)
ROWS = tl.constexpr(3)
COLUMNS = tl.constexpr(4)


@triton.jit
def second(a, b):
    """Combine two elements of a scan into the later one."""
    return b


@triton.jit
def settle(b):
    """Return b [T, CB], laid out as scans want it."""
    # A scan along the positions that changes nothing. It costs nothing either, but the layouts of matrix products and
    # of loads do not pass through it: one conversion is made here and not one for every state further on.
    return tl.associative_scan(b, 0, second)


@triton.jit
def affine(a1, b1, a2, b2):
    """Compose the maps h → a1·h + b1 and then h → a2·h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def affine_both(a1, b1, p1, q1, a2, b2, p2, q2):
    """Compose maps (a, b) as `affine` does, and keep with each the map (p, q) that lacks its last position."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def adjoint(a1, p1, g1, a2, p2, g2):
    """Compose stretches of the adjoint dh_t = g_t + a_{t+1}·dh_{t+1}, the later one first.

    A stretch is (a of its first position, product of its other a, dh of its first position if nothing follows).
    """
    return a2, p2 * (a1 * p1), p2 * (a1 * g1) + g2


@triton.jit
def power_of_two(x, ASM: constexpr):
    """2^x. Denormal results flush to zero with ASM: no scaling round them."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def exp_negative(size, ASM: constexpr):
    """exp(-size) for size ≥ 0, with what the product by log2(e) rounds away put back."""
    if ASM:
        power = size * LOG2E
        rest = tl.fma(size, LOG2E, -power) + size * LOG2E_REST
        z = power_of_two(-power, ASM)
        return z - z * (rest * LN2)
    else:
        return tl.exp(-size)  # the interpreter's fma rounds twice, its exp once


@triton.jit
def softplus(raw, FAST: constexpr, ASM: constexpr):
    """Softplus, as max(raw, 0) + log1p(exp(-|raw|)): to 2e-7 of its value, or with FAST to an absolute 1e-7."""
    size = tl.minimum(tl.abs(raw), 87.0)
    if FAST:
        log1p = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1.0 + power_of_two(size * -LOG2E, True)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        log1p *= LN2
    else:
        z = exp_negative(size, ASM)
        # (log1p(z) - z) / z² on [0, 1], fitted to the least relative error of log1p(z).
        p = -0.003243980696424842 * z + 0.019851261749863625
        p = p * z - 0.056959159672260284
        p = p * z + 0.10603617131710052
        p = p * z - 0.15305569767951965
        p = p * z + 0.19675931334495544
        p = p * z - 0.24954132735729218
        p = p * z + 0.3332996368408203
        p = p * z - 0.4999990165233612
        log1p = z * z * p + z
    return tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def sigmoid(raw, ASM: constexpr):
    """The derivative of softplus, without cancellation on either side."""
    z = exp_negative(tl.minimum(tl.abs(raw), 87.0), ASM)
    return tl.div_rn(tl.where(raw >= 0.0, 1.0, z), 1.0 + z)


@triton.jit
def describe_route(k, PATTERN: constexpr):
    """Return (column-major, reversed) of route k, both 0 or 1."""
    if PATTERN == CROSS2D:
        return k % 2, k // 2
    elif PATTERN == BIDI:
        return k * 0, k // 2
    elif PATTERN == ROWS:
        return k * 0, k
    elif PATTERN == COLUMNS:
        return k * 0 + 1, k
    else:
        return k * 0, k * 0


@triton.jit
def find_positions(t0, i_seq, column, flipped, length, H, W, PATTERN: constexpr, T: constexpr, SHORT: constexpr):
    """Return where on the map the T positions of a sequence from t0 on lie, and which of them exist.

    Those that do not are given the place of the last one, so that loads need no mask. One division serves all T
    positions; SHORT says that a line may be shorter than T, so that each needs its own.
    """
    i_t = tl.arange(0, T)
    last = tl.minimum(T, length - t0) - 1
    lowest = tl.where(flipped != 0, length - 1 - t0 - last, t0)
    step = tl.minimum(i_t, last)
    step = tl.where(flipped != 0, last - step, step)
    if PATTERN == ROWS:
        pos = i_seq * W + lowest + step
    elif PATTERN == COLUMNS:
        pos = i_seq + (lowest + step) * W
    elif PATTERN == CROSS2D:
        inside = tl.where(column != 0, H, H * W)
        line = lowest // inside
        at = lowest - line * inside + step
        wraps = at // inside if SHORT else (at >= inside).to(tl.int32)
        pos = (line + wraps) + (at - wraps * inside) * tl.where(column != 0, W, 1)
    else:
        pos = lowest + step
    return pos, i_t <= last


@triton.jit
def find_offsets(pos, i_k, o_e, stride, E, MAP: constexpr, V: constexpr, WIDE: constexpr):
    """Offsets [T, CB] into a map (position stride V·stride) or into sequences (channel stride `stride`)."""
    if MAP:
        rows = pos.to(tl.int64) if WIDE else pos
        return (rows * stride * V)[:, None] + o_e[None, :]
    else:
        channels = (i_k * E + o_e).to(tl.int64) if WIDE else i_k * E + o_e
        return (channels * stride)[None, :] + pos[:, None]


@triton.jit
def write(pointer, value, mask, MODE: constexpr):
    """Store a block, or add it to what is there: at once with others, or as the only one of its launch."""
    if MODE == ATOMIC:
        tl.atomic_add(pointer, value, mask=mask, sem="relaxed")
    elif MODE == ADD:
        tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def spread(b, value):
    """Spread a scalar over the shape of a block.

    For conditions: the interpreter loses the type of a comparison of scalars where it spreads that.
    """
    return tl.full(b.shape, 0, tl.int32) + value


@triton.jit
def has_state(b, i_n, N, NB):
    """Mask of the shape of b: whether state i_n exists. A constant where blocks of states divide N."""
    return tl.full(b.shape, 1, tl.int1) if N % NB == 0 else spread(b, i_n) < N


@triton.jit
def channel_block(e0, E, CB: constexpr, EVEN: constexpr):
    """Return the channels of a block and which of them exist: a constant where blocks divide E."""
    o_e = e0 + tl.arange(0, CB)
    return o_e, tl.full([CB], 1, tl.int1) if EVEN else o_e < E


@triton.jit
def locate(i_lane, turn, K, E, N, CB: constexpr, NB: constexpr, ORDERED: constexpr):
    """Return (group, first channel, first state) of a program; the last is a constant where one block has all states.

    ORDERED: of the launch's programs no two share a group or a block of channels (a Latin square over the launches), so
    sums over either can be read, added to and written without atomics, in the order of the launches.
    """
    blocks = tl.cdiv(E, CB)
    if ORDERED:
        turns = tl.maximum(blocks, K)
        return i_lane, ((turn % turns + i_lane) % turns) * CB, 0 if NB >= N else (turn // turns) * NB
    elif NB >= N:
        return i_lane // blocks, (i_lane % blocks) * CB, 0
    else:
        i_nb = i_lane // (K * blocks)
        rest = i_lane - i_nb * K * blocks
        return rest // blocks, (rest % blocks) * CB, i_nb * NB


@triton.jit
def load_weights(w_ptr, i_k, o_e, m_e, E, R: constexpr, RP: constexpr, DOT: constexpr):
    """Load W_dt of a block of channels, [RP, CB], zeros below R."""
    o_r = tl.arange(0, RP)
    b_w = tl.load(
        w_ptr + (i_k * E + o_e)[None, :] * R + o_r[:, None], mask=(o_r < R)[:, None] & m_e[None, :], other=0.0
    )
    return b_w if DOT == "native" else b_w.to(tl.float32)  # [RP, CB]


@triton.jit
def load_ranks(p_pos, R: constexpr, RP: constexpr, DOT: constexpr):
    """Load the Δ-rank of a tile, [T, RP], zeros beyond R."""
    o_r = tl.arange(0, RP)
    b_r = tl.load(p_pos[:, None] + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)
    return b_r if DOT == "native" else b_r.to(tl.float32)  # [T, RP]


@triton.jit
def product(a, b, DOT: constexpr):
    """Multiply matrices: 16-bit operands as they are ("native"), or float32 ones at a named precision."""
    if DOT == "native":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=DOT)


@triton.jit
def load_inputs(
    x_ptr, d_ptr, b_bias, b_w, pos, i_b, i_k, o_e, m_e, xs_b, xs_s, ds_b, ds_s, E, N,
    MAP: constexpr, R: constexpr, RP: constexpr, V: constexpr, WIDE: constexpr, DOT: constexpr,
):  # fmt: skip
    """Return x [T, CB], Δ before its softplus [T, CB] and, on a map, the pointers [T] at the projections."""
    m = m_e[None, :]
    b_x = tl.load(x_ptr + i_b * xs_b + find_offsets(pos, i_k, o_e, xs_s, E, MAP, V, WIDE), mask=m, other=0.0)
    if MAP:
        rows = pos.to(tl.int64) if WIDE else pos
        p_pos = d_ptr + i_b * ds_b + rows * ds_s + i_k * (R + 2 * N)
        b_raw = product(load_ranks(p_pos, R, RP, DOT), b_w, DOT)
    else:
        p_pos = pos
        o_d = find_offsets(pos, i_k, o_e, ds_s, E, MAP, V, WIDE)
        b_raw = tl.load(d_ptr + i_b * ds_b + o_d, mask=m, other=0.0).to(tl.float32)
    return settle(b_x.to(tl.float32)), settle(b_raw) + b_bias[None, :], p_pos


@triton.jit
def step_size(b_raw, m_t, SOFTPLUS: constexpr, FAST: constexpr, ASM: constexpr):
    """Δ [T, CB]: 0 where there is no position, which passes the state on unchanged."""
    b_dt = softplus(b_raw, FAST, ASM) if SOFTPLUS else b_raw
    return tl.where(m_t[:, None], b_dt, 0.0)


@triton.jit
def find_state_offsets(p_pos, o_group, i_n, L, N, MAP: constexpr, R: constexpr):
    """Where B and C of one state are: pointers on a map (relative to the projections), offsets in sequences."""
    if MAP:
        return p_pos + (R + i_n), p_pos + (R + N + i_n)
    else:
        return p_pos + (o_group + i_n) * L, p_pos + (o_group + i_n) * L


@triton.jit
def load_state_inputs(b_ptr, c_ptr, p_pos, o_group, i_n, L, N, NB, MAP: constexpr, R: constexpr):
    """Load B and C of one state, [T] each."""
    o_b, o_c = find_state_offsets(p_pos, o_group, i_n, L, N, MAP, R)
    p_b, p_c = (o_b, o_c) if MAP else (b_ptr + o_b, c_ptr + o_c)
    m = has_state(p_pos, i_n, N, NB)
    return tl.load(p_b, mask=m, other=0.0).to(tl.float32), tl.load(p_c, mask=m, other=0.0).to(tl.float32)


@triton.jit
def take_row(b, edge):
    """Take the row of b [T, CB] that edge [T, 1] marks."""
    # -0 is what an addition leaves alone: where positions lie within a lane, this compiles to nothing.
    return tl.sum(tl.where(edge, b, -0.0), 0)


@triton.jit
def constant_vectors(value, CB: constexpr, NB: constexpr):
    """NB constant vectors, one a state."""
    b = ()
    for _ in tl.static_range(NB):
        b = b + (tl.full([CB], value, tl.float32),)
    return b


@triton.jit
def load_vectors(pointer, i_n, o_e, m_e, E, N, NB: constexpr):
    """Load [E] vectors of NB states from a buffer row [N, E]."""
    b = ()
    for j in tl.static_range(NB):
        b = b + (tl.load(pointer + (i_n + j) * E + o_e, mask=m_e & has_state(o_e, i_n + j, N, NB), other=0.0),)
    return b


@triton.jit
def store_vectors(pointer, vectors, i_n, o_e, m_e, E, N, NB: constexpr):
    """Store [E] vectors of NB states in a buffer row [N, E]."""
    for j in tl.static_range(NB):
        tl.store(pointer + (i_n + j) * E + o_e, vectors[j], mask=m_e & has_state(o_e, i_n + j, N, NB))


@triton.jit
def load_rate(a_ptr, i_k, o_e, m_e, i_n, E, N, NB):
    """Load A of one state, [CB]."""
    return tl.load(a_ptr + (i_k * E + o_e) * N + i_n, mask=m_e & has_state(o_e, i_n, N, NB), other=0.0)


@triton.jit
def decay(b_dt, b_rate, FAST: constexpr, ASM: constexpr):
    """exp(Δ A) [T, CB], from A [CB]."""
    high = b_rate * LOG2E
    if FAST:
        return power_of_two(b_dt * high[None, :], ASM)
    elif ASM:
        # What the product rounds away would bend every step of a channel alike, and add up over the sequence.
        low = tl.fma(b_rate, LOG2E, -high) + b_rate * LOG2E_REST
        low = tl.broadcast_to(low[None, :], b_dt.shape)
        bias = tl.full(b_dt.shape, EX2_BIAS, tl.float32)
        return power_of_two(tl.fma(b_dt, low, tl.fma(b_dt, tl.broadcast_to(high[None, :], b_dt.shape), bias)), ASM)
    else:
        return tl.exp(b_dt * b_rate[None, :])


@triton.jit
def split_item(item, n_seq, chunks, K, i_k):
    """Split a work item into image, sequence and chunk; the last result is its row in the buffers of carries."""
    i_chunk = item % chunks
    rest = item // chunks
    i_b = (rest // n_seq).to(tl.int64)
    return i_b, rest % n_seq, i_chunk, ((i_b * K + i_k) * n_seq + rest % n_seq) * chunks + i_chunk
