"""`selective_scan`: the S6 recurrence on sequences, as a PyTorch operator with the field's customary signature."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from vmamba.ops.capabilities import check_backend, select_backend
from vmamba.ops.operator import operator
from vmamba.ops.s6.reference import selective_scan_reference
from vmamba.ops.validation import check_kind, check_shape, state_dtype

_NAME = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scan sequences with input-dependent Δ, B and C (S6; equations 1–4 of the paper).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t · h_t + D u_t, where Δ is `delta` plus `delta_bias`, through
    softplus if asked for. The state is float32 (float64 for float64 inputs) whatever autocast says; gradients have the
    dtype of their input.

    Args:
        u: (B, K·E, L) input.
        delta: (B, K·E, L) time step.
        A: (K·E, N), negative where the state is to decay.
        B: (B, K, N, L), or (B, N, L) for one group; each group of E channels shares its B and C.
        C: As B.
        D: (K·E), the skip connection.
        delta_bias: (K·E), added to `delta`.
        delta_softplus: Whether Δ goes through softplus.
        backend: "auto", or one of "triton", "chunked", "reference", which never falls back to another.

    Returns:
        (B, K·E, L): float64 for float64 inputs, float32 for all others.

    Raises:
        ValueError: For shapes or devices that do not fit, an unknown backend, or one that cannot run here.
        TypeError: For tensors that are not floating point.
    """
    check_backend(_NAME, backend)
    check_kind(_NAME, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, {"D": D, "delta_bias": delta_bias})
    if B.dim() == 3 and C.dim() == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    _check_shapes(u, delta, A, B, C, D, delta_bias)

    common = reduce(torch.promote_types, (delta.dtype, B.dtype, C.dtype), u.dtype)
    u, delta, B, C = u.to(common), delta.to(common), B.to(common), C.to(common)
    state = state_dtype(common)
    A = A.to(state)
    D = None if D is None else D.to(state)
    delta_bias = None if delta_bias is None else delta_bias.to(state)
    if backend == "reference":
        with torch.autocast(u.device.type, enabled=False):
            return selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend)


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    for name, tensor, dims, shape in (("u", u, 3, "(B, K·E, L)"), ("A", A, 2, "(K·E, N)"), ("B", B, 4, "(B, K, N, L)")):
        if tensor.dim() != dims:
            raise ValueError(f"{_NAME}: {name} must be {shape}, got shape {tuple(tensor.shape)}")
    if u.shape[2] < 1 or A.shape[1] < 1:
        raise ValueError(f"{_NAME}: there must be a position and a state; u is {tuple(u.shape)}, A {tuple(A.shape)}")
    sizes = {"B": u.shape[0], "K·E": u.shape[1], "L": u.shape[2], "K": B.shape[1], "N": A.shape[1]}
    if sizes["K"] < 1 or sizes["K·E"] % sizes["K"]:
        raise ValueError(f"{_NAME}: u has {u.shape[1]} channels, which B's {B.shape[1]} groups do not divide")
    check_shape(_NAME, "delta", delta, "B K·E L", sizes)
    check_shape(_NAME, "A", A, "K·E N", sizes)
    check_shape(_NAME, "B", B, "B K N L", sizes)
    check_shape(_NAME, "C", C, "B K N L", sizes)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(_NAME, name, vector, "K·E", sizes)


@operator("vmamba::selective_scan")
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> Tensor:
    # The choice is made in here, where tensors are real: a traced or exported program then runs on any device.
    implementation = select_backend(_NAME, backend, (u, delta, A, B))
    with torch.autocast(u.device.type, enabled=False):
        y: Tensor = implementation.forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y


@_selective_scan.register_fake
def _(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape, dtype=state_dtype(u.dtype))


@operator("vmamba::selective_scan_backward", gives_gradients=True)
def _selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = select_backend(_NAME, backend, (u, delta, A, B))
    with torch.autocast(u.device.type, enabled=False):
        grads = implementation.backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus)
    # An operator returns tensors only: an empty one stands for the gradient of an absent input.
    du, ddelta, dA, dB, dC, dD, dbias = (dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return du, ddelta, dA, dB, dC, dD, dbias


@_selective_scan_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = _selective_scan_backward(dy, *ctx.saved_tensors, ctx.delta_softplus, ctx.backend)
    wanted = ctx.needs_input_grad
    return (*(grad if wanted[i] else None for i, grad in enumerate(grads)), None, None)


_selective_scan.register_autograd(_backward, _setup_context)
