"""The selective scan in plain PyTorch for any device, blocked so that about √L steps are sequential in place of L.

A sequence is cut into G chunks of T steps. One sweep over the T positions, all chunks at once, finds the state in which
each chunk would end had it started from zero; a short pass over the chunks turns these into the states in which the
chunks really start; a second sweep runs the recurrence from there. Every step is `a·h + b` as in the recurrence itself:
nothing is divided and no exponential is taken but that of Δ·A, so nothing overflows that the recurrence would not.

Layout inside: [K, T, B, G, E]. A step over all chunks, sequences and channels of a group is then one contiguous row.
States are recomputed in the backward, one of the N at a time; what is kept of a forward is its inputs.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a work buffer beyond which batches, then routes, are split: a few such buffers are alive at a time, and
# stay in the last-level cache of a laptop.
SLAB_ELEMENTS = 5 << 18

# exp(x) is taken as 2^(x·log₂e), the factor folded into A: torch's exp2 is its own vector code everywhere, while exp is
# MKL's, which is up to 3.7 times slower on processors of other makers.
LOG2_E = math.log2(math.e)


def why_not(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> str | None:
    """Say why this backend cannot run: it always can."""
    return None


@cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory of up to 64 MB for reuse, where glibc is the allocator.

    By default it returns work buffers of a few megabytes to the system after every call, and faulting their pages in
    again costs more than the scan. Releasing a block just below 32 MB, untouched, raises the thresholds for good
    (M_MMAP_THRESHOLD in mallopt(3)); other allocators are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def chunk_grid(length: int) -> tuple[int, int]:
    """Cut a sequence into (G, T): G chunks of T steps, G·T ≥ length, both about √length."""
    steps = max(1, round(length**0.5))
    return -(-length // steps), steps


def images_per_slab(batch: int, elements: int) -> int:
    """Say how many batch entries of so many elements to work on at a time."""
    return max(1, min(batch, SLAB_ELEMENTS // max(1, elements)))


def scan_states(a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Run h_t = a_t h_{t-1} + b_t from zero, in place: `b` becomes h.

    Args:
        a: [K, T, B, G, E].
        b: [K, T, B, G, E].

    Returns:
        The states in which chunks 1…G-1 start, [K, B, G-1, E], and the products of `a` over each chunk,
        [K, B, G, E]; both None for a single chunk.
    """
    a_steps, b_steps = a.unbind(1), b.unbind(1)
    starts, products = None, None
    if a.shape[3] > 1:
        end = b_steps[0].clone()
        for a_t, b_t in zip(a_steps[1:], b_steps[1:], strict=True):
            torch.addcmul(b_t, a_t, end, out=end)
        products = a.prod(1)
        ends = end.unbind(2)
        for i, product in enumerate(products.unbind(2)[1:]):
            ends[i + 1].addcmul_(product, ends[i])
        starts = end[:, :, :-1]
        b_steps[0][:, :, 1:].addcmul_(a_steps[0][:, :, 1:], starts)
    h = b_steps[0]
    for a_t, b_t in zip(a_steps[1:], b_steps[1:], strict=True):
        h = b_t.addcmul_(a_t, h)
    return starts, products


def scan_adjoint(a: Tensor, g: Tensor, products: Tensor | None) -> None:
    """Run g_t = g_t + a_{t+1} g_{t+1} from the end, in place: the adjoint of `scan_states` with respect to `b`."""
    # Going down, step t is reached from step t+1 with the factor a_{t+1}.
    a_steps, g_steps = a.unbind(1)[::-1], g.unbind(1)[::-1]
    if products is not None:
        first = g_steps[0].clone()
        for a_t, g_t in zip(a_steps, g_steps[1:], strict=False):
            torch.addcmul(g_t, a_t, first, out=first)
        first.mul_(a_steps[-1])  # what each chunk, started from zero, hands to the last step of the one before
        handed = first.unbind(2)
        for i in range(len(handed) - 2, 0, -1):
            handed[i].addcmul_(products[:, :, i], handed[i + 1])
        g_steps[0][:, :, :-1].add_(first[:, :, 1:])
    running = g_steps[0]
    for a_t, g_t in zip(a_steps, g_steps[1:], strict=False):
        running = g_t.addcmul_(a_t, running)


def scan_outputs(dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, outs: Sequence[Tensor]) -> None:
    """Add Σ_n C_n h_n to the outputs. `dt` and `drive` are overwritten.

    Args:
        dt: Δ, [K, T, B, G, E].
        drive: Δ·u, [K, T, B, G, E].
        A: (K, E, N).
        B: [K, T, B, G, N].
        C: [K, T, B, G, N].
        outs: K views [T, B, G, E], which may be views of one map: they are added to one after another.
    """
    N = A.shape[2]
    A2 = A * LOG2_E
    for n in range(N):
        last = n == N - 1
        a = torch.mul(dt, A2[:, None, None, None, :, n], out=dt if last else None).exp2_()
        h = torch.mul(drive, B[..., n, None], out=drive if last else None)
        scan_states(a, h)
        for k, out in enumerate(outs):
            out.addcmul_(h[k], C[k, ..., n, None])


def scan_gradients(
    dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, dys: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `scan_outputs`.

    Args:
        dt: As in `scan_outputs`; kept.
        drive: As in `scan_outputs`; kept.
        A: As in `scan_outputs`.
        B: As in `scan_outputs`.
        C: As in `scan_outputs`.
        dys: K views [T, B, G, E], the gradients of the outputs.

    Returns:
        The gradients of dt (where it multiplies A), drive, A, B and C, each with the shape of what it belongs to.
    """
    N = A.shape[2]
    ddt, ddrive = torch.empty_like(dt), torch.empty_like(drive)
    dA, dB, dC = torch.empty_like(A), torch.empty_like(B), torch.empty_like(C)
    a, h, g, scratch = (torch.empty_like(dt) for _ in range(4))
    for n in range(N):
        A_n, B_n, C_n = A[:, None, None, None, :, n], B[..., n, None], C[..., n, None]
        torch.mul(dt, A_n * LOG2_E, out=a).exp2_()
        torch.mul(drive, B_n, out=h)
        starts, products = scan_states(a, h)
        for k, dy in enumerate(dys):
            torch.mul(h[k], dy, out=scratch[k])
            torch.mul(dy, C_n[k], out=g[k])
        dC[..., n] = scratch.sum(-1)
        scan_adjoint(a, g, products)
        dB[..., n] = torch.mul(g, drive, out=scratch).sum(-1)

        # d(Δ·A)_t = g_t a_t h_{t-1}; taking a·h from h - b instead would cancel where a is small.
        exponent = a.mul_(g)
        exponent[:, 1:].mul_(h[:, :-1])
        exponent[:, 0, :, 0].mul_(0)
        if starts is not None:
            exponent[:, 0, :, 1:].mul_(starts)
        if n == 0:
            torch.mul(exponent, A_n, out=ddt)
            torch.mul(g, B_n, out=ddrive)
        else:
            ddt.addcmul_(exponent, A_n)
            ddrive.addcmul_(g, B_n)
        dA[..., n] = exponent.mul_(dt).sum((1, 2, 3))
    return ddt, ddrive, dA, dB, dC


def softplus_(x: Tensor) -> Tensor:
    """Apply softplus in place."""
    torch.ops.aten.softplus.out(x, out=x)
    return x


def softplus_gradient_(dy: Tensor, x: Tensor) -> Tensor:
    """Multiply `dy` in place by the derivative of softplus at `x`; the same threshold as `F.softplus`."""
    torch.ops.aten.softplus_backward.grad_input(dy, x, 1, 20, grad_input=dy)
    return dy


def _to_grid(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Lay sequences (B, K·C, L) out as [K, T, B, G, C], with zeros after their end."""
    G, T = chunk_grid(x.shape[2])
    padding = G * T - x.shape[2]
    x = F.pad(x, (0, padding)) if padding else x
    grid = x.unflatten(2, (G, T)).unflatten(1, (groups, -1)).permute(1, 4, 0, 3, 2)
    # A copy in any case, never a view: callers work in place.
    return torch.empty(grid.shape, dtype=dtype, device=x.device).copy_(grid)


def _from_grid(x: Tensor, length: int) -> Tensor:
    """Undo `_to_grid`: [K, T, B, G, C] to (B, K·C, L)."""
    return x.permute(2, 0, 4, 3, 1).flatten(3).flatten(1, 2)[..., :length]


def _prepare(
    part: slice, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = B.shape[1]
    delta_grid = _to_grid(delta[part], groups, dtype)
    if delta_bias is not None:
        delta_grid += delta_bias.to(dtype).view(groups, 1, 1, 1, -1)
    u_grid = _to_grid(u[part], groups, dtype)
    B_grid, C_grid = (_to_grid(t[part].flatten(1, 2), groups, dtype) for t in (B, C))
    return u_grid, delta_grid, B_grid, C_grid


def _slabs(u: Tensor) -> list[slice]:
    batch, channels, length = u.shape
    count = images_per_slab(batch, channels * length)
    return [slice(i, min(i + count, batch)) for i in range(0, batch, count)]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Compute `selective_scan`, with B and C of shape (B, K, N, L)."""
    keep_freed_memory()
    dtype = A.dtype
    groups, length = B.shape[1], u.shape[2]
    grouped_A = A.view(groups, -1, A.shape[1])
    y = torch.empty(u.shape, dtype=dtype, device=u.device)
    for part in _slabs(u):
        u_grid, dt, B_grid, C_grid = _prepare(part, u, delta, B, C, delta_bias, dtype)
        if delta_softplus:
            softplus_(dt)
        drive = dt * u_grid
        out = u_grid.zero_() if D is None else u_grid.mul_(D.view(groups, 1, 1, 1, -1))
        scan_outputs(dt, drive, grouped_A, B_grid, C_grid, out.unbind(0))
        y[part] = _from_grid(out, length)
    return y


def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of u, delta, A, B, C, D and delta_bias, each in the dtype of its input."""
    keep_freed_memory()
    dtype = A.dtype
    groups, length = B.shape[1], u.shape[2]
    grouped_A = A.view(groups, -1, A.shape[1])
    du, ddelta, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta, B, C))
    dA = torch.zeros_like(grouped_A)
    dD = None if D is None else torch.zeros_like(D)
    dbias = None if delta_bias is None else torch.zeros_like(delta_bias)
    for part in _slabs(u):
        u_grid, delta_grid, B_grid, C_grid = _prepare(part, u, delta, B, C, delta_bias, dtype)
        dt = softplus_(delta_grid.clone()) if delta_softplus else delta_grid
        dy_grid = _to_grid(dy[part], groups, dtype)
        ddt, ddrive, dA_part, dB_grid, dC_grid = scan_gradients(
            dt, dt * u_grid, grouped_A, B_grid, C_grid, dy_grid.unbind(0)
        )
        dA += dA_part
        ddt.addcmul_(ddrive, u_grid)
        if delta_softplus:
            softplus_gradient_(ddt, delta_grid)
        if dbias is not None:
            dbias += ddt.sum((1, 2, 3)).flatten()
        if dD is not None and D is not None:
            dD += (dy_grid * u_grid).sum((1, 2, 3)).flatten()
            du_grid = ddrive.mul_(dt).addcmul_(dy_grid, D.view(groups, 1, 1, 1, -1))
        else:
            du_grid = ddrive.mul_(dt)
        du[part] = _from_grid(du_grid, length)
        ddelta[part] = _from_grid(ddt, length)
        dB[part] = _from_grid(dB_grid, length).view_as(dB[part])
        dC[part] = _from_grid(dC_grid, length).view_as(dC[part])
    return du, ddelta, dA.view_as(A), dB, dC, dD, dbias
