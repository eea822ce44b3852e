# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# ruff: noqa: RUF005 (Triton compiles what follows a constant branch that returns, and unpacks no tuples)
"""Triton kernels of the selective scan, shared by `selective_scan` (sequences) and `ss2d_scan` (maps).

One program is one warp that owns a block of channels and sweeps a stretch of one scanned sequence, T positions at a
time: channels lie across the lanes and positions in the registers of a lane, so the recurrence needs no exchange
between lanes. Where a sequence is cut into several stretches (chunks), `scan_carry_kernel` first finds what each hands
to the next when started from zero, and `scan_join_kernel` turns that into what each is handed. The backward pass
recomputes the states of a chunk from there, and goes through its tiles in reverse.

Prefixes: `b_` a block in registers, `i_` an index, `o_` offsets, `m_` a mask, `p_` a pointer. MAP selects where the
operands come from: a channels-last map with low-rank Δ (`ss2d_scan`), or sequences with Δ given (`selective_scan`). The
K groups are routes over one map there, and separate channels here. A program takes NB of the N states.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from vmamba.ops.scan_parts_triton_kernels import (
    LOG2E,
    adjoint,
    affine,
    affine_both,
    channel_block,
    constant_vectors,
    decay,
    describe_route,
    find_offsets,
    find_positions,
    find_state_offsets,
    has_state,
    load_inputs,
    load_ranks,
    load_rate,
    load_state_inputs,
    load_vectors,
    load_weights,
    locate,
    sigmoid,
    split_item,
    spread,
    step_size,
    store_vectors,
    take_row,
    write,
)

# Sizes and strides: not specialised on their values, so that a new image size compiles nothing.
INTEGERS = (
    "turn", "images", "K", "EV", "H", "W", "n_seq", "length", "chunks", "chunk_tiles", "lanes", "workers",
    "xs_b", "xs_s", "ds_b", "ds_s",
)  # fmt: skip


@triton.jit
def _advance(
    hs, b_dt, b_drive, edge_first, edge_last, a_ptr, b_ptr, c_ptr, p_pos, o_group, i_k, o_e, m_e, n0, E, N, length,
    MAP: constexpr, R: constexpr, NB: constexpr, FAST: constexpr, ASM: constexpr,
):  # fmt: skip
    """Carry the states hs over one tile; return them and Σ_n C h [T, CB]."""
    b_y = tl.zeros_like(b_dt)
    new = ()
    for j in tl.static_range(NB):
        b_b, b_c = load_state_inputs(b_ptr, c_ptr, p_pos, o_group, n0 + j, length, N, NB, MAP, R)
        if j % 4 == 0 and j > 0:
            tl.debug_barrier()  # else the loads of all states are issued first, and spill
        b_a = decay(b_dt, load_rate(a_ptr, i_k, o_e, m_e, n0 + j, E, N, NB), FAST, ASM)
        b_in = b_drive * b_b[:, None]
        b_in = tl.where(edge_first, b_a * hs[j][None, :] + b_in, b_in)
        _, b_h = tl.associative_scan((b_a, b_in), 0, affine)
        b_y += b_c[:, None] * b_h
        new = new + (take_row(b_h, edge_last),)
    return new, b_y


@triton.jit(do_not_specialize=INTEGERS)
def scan_fwd_kernel(
    x_ptr, d_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, skip_ptr, state_ptr, y_ptr,
    turn, K, EV, H, W, n_seq, length, chunks, chunk_tiles, lanes, xs_b, xs_s, ds_b, ds_s,
    MAP: constexpr, PATTERN: constexpr, FLIP_BACK: constexpr, SOFTPLUS: constexpr, CHUNKED: constexpr,
    MODE: constexpr, ORDERED: constexpr, N: constexpr, R: constexpr, RP: constexpr, T: constexpr, CB: constexpr,
    NB: constexpr, V: constexpr, SHORT: constexpr, EVEN: constexpr, WIDE: constexpr, DOT: constexpr,
    FAST: constexpr, ASM: constexpr,
):  # fmt: skip
    """Scan one chunk of one sequence for a block of channels and put the outputs on the map."""
    E = EV * V
    i_k, e0, n0 = locate(tl.program_id(0) % lanes, turn, K, E, N, CB, NB, ORDERED)
    i_b, i_seq, i_chunk, i_row = split_item(tl.program_id(0) // lanes, n_seq, chunks, K, i_k)
    o_e, m_e = channel_block(e0, E, CB, EVEN)
    column, reverse = describe_route(i_k, PATTERN)
    b_bias = tl.load(bias_ptr + i_k * E + o_e, mask=m_e, other=0.0)
    b_skip = tl.load(skip_ptr + i_k * E + o_e, mask=m_e if NB >= N else m_e & (spread(o_e, n0) == 0), other=0.0)
    b_w = load_weights(w_ptr, i_k, o_e, m_e, E, R, RP, DOT) if MAP else 0
    edge_first, edge_last = (tl.arange(0, T) == 0)[:, None], (tl.arange(0, T) == T - 1)[:, None]
    hs = load_vectors(state_ptr + i_row * N * E, n0, o_e, m_e, E, N, NB) if CHUNKED else constant_vectors(0.0, CB, NB)
    p_y = y_ptr + i_b * (1 if MAP else K) * E * n_seq * length
    first_tile = i_chunk * chunk_tiles
    for i_tile in range(first_tile, tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, T))):
        pos, m_t = find_positions(i_tile * T, i_seq, column, reverse, length, H, W, PATTERN, T, SHORT)
        b_x, b_raw, p_pos = load_inputs(
            x_ptr, d_ptr, b_bias, b_w, pos, i_b, i_k, o_e, m_e, xs_b, xs_s, ds_b, ds_s, E, N, MAP, R, RP, V, WIDE, DOT
        )  # fmt: skip
        b_dt = step_size(b_raw, m_t, SOFTPLUS, FAST, ASM)
        hs, b_y = _advance(
            hs, b_dt, b_dt * b_x, edge_first, edge_last, a_ptr, b_ptr, c_ptr, p_pos, (i_b * K + i_k) * N,
            i_k, o_e, m_e, n0, E, N, length, MAP, R, NB, FAST, ASM,
        )  # fmt: skip
        b_y += b_skip[None, :] * b_x
        if not FLIP_BACK:
            pos, _ = find_positions(i_tile * T, i_seq, column, 0, length, H, W, PATTERN, T, SHORT)
        o_y = find_offsets(pos, i_k, o_e, EV if MAP else length, E, MAP, V, WIDE)
        write(p_y + o_y, b_y, m_t[:, None] & m_e[None, :], MODE)


@triton.jit(do_not_specialize=INTEGERS)
def scan_carry_kernel(
    x_ptr, d_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, dy_ptr, state_ptr, adjoint_ptr, total_ptr,
    K, EV, H, W, n_seq, length, chunks, chunk_tiles, lanes, xs_b, xs_s, ds_b, ds_s,
    MAP: constexpr, PATTERN: constexpr, FLIP_BACK: constexpr, SOFTPLUS: constexpr, ADJOINT: constexpr,
    N: constexpr, R: constexpr, RP: constexpr, T: constexpr, CB: constexpr, NB: constexpr, V: constexpr,
    SHORT: constexpr, EVEN: constexpr, WIDE: constexpr, DOT: constexpr, FAST: constexpr, ASM: constexpr,
):  # fmt: skip
    """Find what each chunk, started from zero, hands on: its last state, ΣΔ and, if ADJOINT, its adjoint state."""
    E = EV * V
    i_k, e0, n0 = locate(tl.program_id(0) % lanes, 0, K, E, N, CB, NB, False)
    i_b, i_seq, i_chunk, i_row = split_item(tl.program_id(0) // lanes, n_seq, chunks, K, i_k)
    o_e, m_e = channel_block(e0, E, CB, EVEN)
    column, reverse = describe_route(i_k, PATTERN)
    b_bias = tl.load(bias_ptr + i_k * E + o_e, mask=m_e, other=0.0)
    b_w = load_weights(w_ptr, i_k, o_e, m_e, E, R, RP, DOT) if MAP else 0
    edge_first, edge_last = (tl.arange(0, T) == 0)[:, None], (tl.arange(0, T) == T - 1)[:, None]
    hs, gs, ps = constant_vectors(0.0, CB, NB), constant_vectors(0.0, CB, NB), constant_vectors(1.0, CB, NB)
    b_total = tl.zeros([CB], tl.float32)
    p_dy = dy_ptr + i_b * (1 if MAP else K) * E * n_seq * length
    o_group = (i_b * K + i_k) * N
    first_tile = i_chunk * chunk_tiles
    for i_tile in range(first_tile, tl.minimum(first_tile + chunk_tiles, tl.cdiv(length, T))):
        pos, m_t = find_positions(i_tile * T, i_seq, column, reverse, length, H, W, PATTERN, T, SHORT)
        b_x, b_raw, p_pos = load_inputs(
            x_ptr, d_ptr, b_bias, b_w, pos, i_b, i_k, o_e, m_e, xs_b, xs_s, ds_b, ds_s, E, N, MAP, R, RP, V, WIDE, DOT
        )  # fmt: skip
        b_dt = step_size(b_raw, m_t, SOFTPLUS, FAST, ASM)
        b_total += tl.sum(b_dt, 0)
        if ADJOINT:
            if not FLIP_BACK:
                pos, _ = find_positions(i_tile * T, i_seq, column, 0, length, H, W, PATTERN, T, SHORT)
            o_y = find_offsets(pos, i_k, o_e, EV if MAP else length, E, MAP, V, WIDE)
            b_dy = tl.load(p_dy + o_y, mask=m_t[:, None] & m_e[None, :], other=0.0).to(tl.float32)
            new_hs, new_gs, new_ps = (), (), ()
            for j in tl.static_range(NB):
                b_b, b_c = load_state_inputs(b_ptr, c_ptr, p_pos, o_group, n0 + j, length, N, NB, MAP, R)
                b_a = decay(b_dt, load_rate(a_ptr, i_k, o_e, m_e, n0 + j, E, N, NB), FAST, ASM)
                b_in = b_dt * b_x * b_b[:, None]
                b_in = tl.where(edge_first, b_a * hs[j][None, :] + b_in, b_in)
                b_prod = tl.where(edge_first, b_a * ps[j][None, :], b_a)
                b_prod, b_h = tl.associative_scan((b_prod, b_in), 0, affine)
                new_hs = new_hs + (take_row(b_h, edge_last),)
                new_ps = new_ps + (take_row(b_prod, edge_last),)
                new_gs = new_gs + (gs[j] + tl.sum(b_prod * (b_c[:, None] * b_dy), 0),)
            hs, gs, ps = new_hs, new_gs, new_ps
        else:
            hs, _ = _advance(
                hs, b_dt, b_dt * b_x, edge_first, edge_last, a_ptr, b_ptr, c_ptr, p_pos, o_group,
                i_k, o_e, m_e, n0, E, N, length, MAP, R, NB, FAST, ASM,
            )  # fmt: skip
    store_vectors(state_ptr + i_row * N * E, hs, n0, o_e, m_e, E, N, NB)
    if ADJOINT:
        store_vectors(adjoint_ptr + i_row * N * E, gs, n0, o_e, m_e, E, N, NB)
    tl.store(total_ptr + i_row * E + o_e, b_total, mask=m_e if NB >= N else m_e & (spread(o_e, n0) == 0))


@triton.jit(do_not_specialize=("K", "E", "N", "n_seq", "chunks"))
def scan_join_kernel(
    state_ptr, total_ptr, a_ptr, K, E, N, n_seq, chunks, REVERSE: constexpr, CC: constexpr, CB: constexpr
):
    """Replace what each chunk hands on from zero by what it is handed, in place: an exclusive scan over the chunks."""
    i_seq, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_e = tl.program_id(2) * CB + tl.arange(0, CB)
    m_e = o_e < E
    b_rate = load_rate(a_ptr, (tl.program_id(0) // n_seq) % K, o_e, m_e, i_n, E, N, 1) * LOG2E
    o_c = tl.arange(0, CC)
    edge_first, edge_last = (o_c == 0)[:, None], (o_c == CC - 1)[:, None]
    b_carry = tl.zeros([CB], tl.float32)
    for c0 in range(0, chunks, CC):
        i_c = chunks - 1 - c0 - o_c if REVERSE else c0 + o_c
        m = ((i_c >= 0) & (i_c < chunks))[:, None] & m_e[None, :]
        row = i_seq * chunks + i_c
        b_a = tl.exp2(tl.load(total_ptr + row[:, None] * E + o_e[None, :], mask=m, other=0.0) * b_rate[None, :])
        p_h = state_ptr + (row[:, None] * N + i_n) * E + o_e[None, :]
        b_h = tl.load(p_h, mask=m, other=0.0)
        b_h = tl.where(edge_first, b_a * b_carry[None, :] + b_h, b_h)
        b_one = tl.full([CC, CB], 1.0, tl.float32)
        b_q = tl.where(edge_first, b_carry[None, :], -0.0)
        _, b_h, _, b_q = tl.associative_scan((b_a, b_h, b_one, b_q), 0, affine_both)
        tl.store(p_h, b_q, mask=m)
        b_carry = take_row(b_h, edge_last)


@triton.jit
def _tile_gradients(
    starts, gs, das, b_x, b_dt, b_dy, edge_first, edge_last, a_ptr, b_ptr, c_ptr, db_ptr, dc_ptr, p_pos, pos,
    o_group, m_t, i_k, o_e, m_e, n0, E, N, length,
    MAP: constexpr, R: constexpr, NB: constexpr, MODE_P: constexpr, ASM: constexpr,
):  # fmt: skip
    """Recompute one tile from the states at its start and take its gradients.

    Returns the adjoint states handed to the tile before, dA so far, Σ_n B·dh, Σ_n A·dh·a·h', where h' is the state one
    position earlier, and the gradients of B and C, [T, 2·NB]; of sequences, those are written instead.
    """
    b_drive = b_dt * b_x
    b_bdh, b_adh = tl.zeros_like(b_x), tl.zeros_like(b_x)
    o_s = tl.arange(0, 2 * NB)[None, :]
    b_dbc = tl.zeros([b_x.shape[0], 2 * NB], tl.float32)
    new_gs, new_das = (), ()
    for j in tl.static_range(NB):
        b_b, b_c = load_state_inputs(b_ptr, c_ptr, p_pos, o_group, n0 + j, length, N, NB, MAP, R)
        b_rate = load_rate(a_ptr, i_k, o_e, m_e, n0 + j, E, N, NB)
        if j % 4 == 0 and j > 0:
            tl.debug_barrier()  # else the loads of all states are issued first, and spill
        b_a = decay(b_dt, b_rate, False, ASM)
        b_one = tl.full(b_a.shape, 1.0, tl.float32)
        start = starts[j][None, :]
        b_in = b_drive * b_b[:, None]
        b_in = tl.where(edge_first, b_a * start + b_in, b_in)
        b_old = tl.where(edge_first, start, -0.0)
        _, b_h, _, b_old = tl.associative_scan((b_a, b_in, b_one, b_old), 0, affine_both)
        b_out = b_c[:, None] * b_dy
        b_out = tl.where(edge_last, b_out + gs[j][None, :], b_out)
        _, _, b_dh = tl.associative_scan((b_a, b_one, b_out), 0, adjoint, reverse=True)
        new_gs = new_gs + (take_row(b_a, edge_first) * take_row(b_dh, edge_first),)
        b_bdh += b_dh * b_b[:, None]
        b_decayed = b_dh * (b_a * b_old)
        b_adh += b_decayed * b_rate[None, :]
        new_das = new_das + (das[j] + tl.sum(b_decayed * b_dt, 0),)
        b_db, b_dc = tl.sum(b_dh * b_drive, 1), tl.sum(b_h * b_dy, 1)
        if MAP:
            b_dbc = tl.where(o_s == j, b_db[:, None], tl.where(o_s == NB + j, b_dc[:, None], b_dbc))
        else:
            m = m_t & has_state(m_t, n0 + j, N, NB)
            o_n, _ = find_state_offsets(pos, o_group, n0 + j, length, N, MAP, R)
            write(db_ptr + o_n, b_db, m, MODE_P)
            write(dc_ptr + o_n, b_dc, m, MODE_P)
    return new_gs, new_das, b_bdh, b_adh, b_dbc


@triton.jit
def _over_positions(b_r, b_draw, T: constexpr, RP: constexpr, CB: constexpr, DOT: constexpr):
    """Sum r ⊗ draw over the positions of a tile, [RP, CB]."""
    if T < 16:
        # `dot` wants a sum over 16 at least: zeros fill it up.
        b_draw = tl.reshape(tl.permute(tl.join(b_draw, tl.zeros_like(b_draw)), (2, 0, 1)), (2 * T, CB))
        b_r = tl.reshape(tl.permute(tl.join(b_r, tl.zeros_like(b_r)), (2, 0, 1)), (2 * T, RP))
    return tl.dot(tl.trans(b_r), b_draw, input_precision=DOT)


@triton.jit
def _put_projections(p_pos, b_dr, b_dbc, m_t, n0, N, R: constexpr, RP: constexpr, NB: constexpr, MODE: constexpr):
    """Write the gradients of the projections of a tile: R entries of rank, N of B, N of C, side by side."""
    o_r = tl.arange(0, RP)
    if NB == 1 and N == 1 and R + 2 <= RP:
        # One row instead of three pieces of it.
        b_db = tl.sum(tl.where(tl.arange(0, 2)[None, :] == 0, b_dbc, 0.0), 1)
        b_dc = tl.sum(tl.where(tl.arange(0, 2)[None, :] == 1, b_dbc, 0.0), 1)
        b_dr = tl.where((o_r == R)[None, :], b_db[:, None], tl.where((o_r == R + 1)[None, :], b_dc[:, None], b_dr))
        write(p_pos[:, None] + o_r[None, :], b_dr, m_t[:, None] & (o_r < R + 2)[None, :], MODE)
    else:
        write(p_pos[:, None] + o_r[None, :], b_dr, m_t[:, None] & (o_r < R)[None, :], MODE)
        o_s = tl.arange(0, 2 * NB)
        i_n = n0 + o_s % NB
        p_s = p_pos[:, None] + (R + i_n + (o_s // NB) * N)[None, :]
        write(p_s, b_dbc, m_t[:, None] & (i_n < N)[None, :], MODE)


@triton.jit(do_not_specialize=INTEGERS)
def scan_bwd_kernel(
    x_ptr, d_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, skip_ptr, dy_ptr, state_ptr, adjoint_ptr, tile_ptr,
    dx_ptr, dd_ptr, db_ptr, dc_ptr, dw_ptr, dbias_ptr, da_ptr, dskip_ptr,
    turn, images, K, EV, H, W, n_seq, length, chunks, chunk_tiles, lanes, workers, xs_b, xs_s, ds_b, ds_s,
    MAP: constexpr, PATTERN: constexpr, FLIP_BACK: constexpr, SOFTPLUS: constexpr, CHUNKED: constexpr,
    MODE_X: constexpr, MODE_P: constexpr, ORDERED: constexpr, N: constexpr, R: constexpr, RP: constexpr,
    T: constexpr, CB: constexpr, NB: constexpr, V: constexpr, SHORT: constexpr, EVEN: constexpr, WIDE: constexpr,
    DOT: constexpr, DOT_GRAD: constexpr, ASM: constexpr,
):  # fmt: skip
    """Take the gradients of a block of channels of one group, over every chunk that falls to this worker.

    dx (MODE_X) and the gradient of the projections (MODE_P; of Δ: MODE_X) go to the map; those of the parameters are
    summed over the chunks and left in one row a worker.
    """
    E = EV * V
    i_worker, i_lane = tl.program_id(0) // lanes, tl.program_id(0) % lanes
    i_k, e0, n0 = locate(i_lane, turn, K, E, N, CB, NB, ORDERED)
    o_e, m_e = channel_block(e0, E, CB, EVEN)
    column, reverse = describe_route(i_k, PATTERN)
    b_bias = tl.load(bias_ptr + i_k * E + o_e, mask=m_e, other=0.0)
    b_skip = tl.load(skip_ptr + i_k * E + o_e, mask=m_e if NB >= N else m_e & (spread(o_e, n0) == 0), other=0.0)
    b_w = load_weights(w_ptr, i_k, o_e, m_e, E, R, RP, DOT) if MAP else 0
    edge_first, edge_last = (tl.arange(0, T) == 0)[:, None], (tl.arange(0, T) == T - 1)[:, None]
    das = constant_vectors(0.0, CB, NB)
    b_dbias, b_dskip = tl.zeros([CB], tl.float32), tl.zeros([CB], tl.float32)
    b_dw = tl.zeros([RP, CB], tl.float32)
    p_tiles = tile_ptr + tl.program_id(0).to(tl.int64) * chunk_tiles * NB * CB
    o_c = tl.arange(0, CB)
    for item in range(i_worker, images * n_seq * chunks, workers):
        i_b, i_seq, i_chunk, i_row = split_item(item, n_seq, chunks, K, i_k)
        o_group = (i_b * K + i_k) * N
        o_image = i_b * (1 if MAP else K) * E * n_seq * length
        hs, gs = constant_vectors(0.0, CB, NB), constant_vectors(0.0, CB, NB)
        if CHUNKED:
            hs = load_vectors(state_ptr + i_row * N * E, n0, o_e, m_e, E, N, NB)
            gs = load_vectors(adjoint_ptr + i_row * N * E, n0, o_e, m_e, E, N, NB)
        first_tile = i_chunk * chunk_tiles
        tiles = tl.minimum(chunk_tiles, tl.cdiv(length, T) - first_tile)
        for i_tile in range(tiles - 1):
            store_vectors(p_tiles + i_tile * NB * CB, hs, 0, o_c, o_c >= 0, CB, NB, NB)
            t0 = (first_tile + i_tile) * T
            pos, m_t = find_positions(t0, i_seq, column, reverse, length, H, W, PATTERN, T, SHORT)
            b_x, b_raw, p_pos = load_inputs(
                x_ptr, d_ptr, b_bias, b_w, pos, i_b, i_k, o_e, m_e, xs_b, xs_s, ds_b, ds_s, E, N,
                MAP, R, RP, V, WIDE, DOT,
            )  # fmt: skip
            b_dt = step_size(b_raw, m_t, SOFTPLUS, False, ASM)
            hs, _ = _advance(
                hs, b_dt, b_dt * b_x, edge_first, edge_last, a_ptr, b_ptr, c_ptr, p_pos, o_group,
                i_k, o_e, m_e, n0, E, N, length, MAP, R, NB, False, ASM,
            )  # fmt: skip
        store_vectors(p_tiles + (tiles - 1) * NB * CB, hs, 0, o_c, o_c >= 0, CB, NB, NB)
        tl.debug_barrier()
        for back in range(tiles):
            i_tile = tiles - 1 - back
            t0 = (first_tile + i_tile) * T
            pos, m_t = find_positions(t0, i_seq, column, reverse, length, H, W, PATTERN, T, SHORT)
            m = m_t[:, None] & m_e[None, :]
            b_x, b_raw, p_pos = load_inputs(
                x_ptr, d_ptr, b_bias, b_w, pos, i_b, i_k, o_e, m_e, xs_b, xs_s, ds_b, ds_s, E, N,
                MAP, R, RP, V, WIDE, DOT,
            )  # fmt: skip
            b_dt = step_size(b_raw, m_t, SOFTPLUS, False, ASM)
            o_x = o_image + find_offsets(pos, i_k, o_e, EV if MAP else length, E, MAP, V, WIDE)
            if FLIP_BACK:
                o_y = o_x
            else:
                out, _ = find_positions(t0, i_seq, column, 0, length, H, W, PATTERN, T, SHORT)
                o_y = o_image + find_offsets(out, i_k, o_e, EV if MAP else length, E, MAP, V, WIDE)
            b_dy = tl.load(dy_ptr + o_y, mask=m, other=0.0).to(tl.float32)
            starts = load_vectors(p_tiles + i_tile * NB * CB, 0, o_c, o_c >= 0, CB, NB, NB)
            gs, das, b_bdh, b_adh, b_dbc = _tile_gradients(
                starts, gs, das, b_x, b_dt, b_dy, edge_first, edge_last, a_ptr, b_ptr, c_ptr, db_ptr, dc_ptr, p_pos,
                pos, o_group, m_t, i_k, o_e, m_e, n0, E, N, length, MAP, R, NB, MODE_P, ASM,
            )  # fmt: skip
            write(dx_ptr + o_x, b_dt * b_bdh + b_skip[None, :] * b_dy, m, MODE_X)
            b_draw = b_bdh * b_x + b_adh
            if SOFTPLUS:
                b_draw *= sigmoid(b_raw, ASM)
            b_draw = tl.where(m_t[:, None], b_draw, 0.0)
            b_dbias += tl.sum(b_draw, 0)
            b_dskip += tl.sum(b_dy * b_x, 0)
            if MAP:
                b_r = load_ranks(p_pos, R, RP, DOT_GRAD)
                b_dw += _over_positions(b_r, b_draw, T, RP, CB, DOT_GRAD)
                b_dr = tl.dot(b_draw, tl.trans(b_w.to(tl.float32)), input_precision=DOT_GRAD)
                p_dpos = dd_ptr + (i_b * n_seq * length + pos) * (K * (R + 2 * N)) + i_k * (R + 2 * N)
                _put_projections(p_dpos, b_dr, b_dbc, m_t, n0, N, R, RP, NB, MODE_P)
            else:
                write(dd_ptr + o_x, b_draw, m, MODE_X)
        tl.debug_barrier()
    row = (i_worker * tl.cdiv(N, NB) + n0 // NB).to(tl.int64) * K + i_k
    tl.store(dbias_ptr + row * E + o_e, b_dbias, mask=m_e)
    tl.store(dskip_ptr + row * E + o_e, b_dskip, mask=m_e)
    if MAP:
        o_r = tl.arange(0, RP)
        p_dw = dw_ptr + (row * E + o_e)[None, :] * R + o_r[:, None]
        tl.store(p_dw, b_dw, mask=m_e[None, :] & (o_r < R)[:, None])
    p_da = da_ptr + ((i_worker.to(tl.int64) * K + i_k) * E + o_e) * N + n0
    for j in tl.static_range(NB):
        tl.store(p_da + j, das[j], mask=m_e & has_state(o_e, n0 + j, N, NB))
