"""`ss2d_scan`: the core of SS2D, from the convolved map and its projections to the merged map, as one operator."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmamba.ops.capabilities import check_backend, select_backend
from vmamba.ops.operator import operator
from vmamba.ops.routes import check_flip_back, get_routes
from vmamba.ops.ss2d.reference import ss2d_scan_reference
from vmamba.ops.validation import check_kind, check_shape, state_dtype

_NAME = "ss2d_scan"


def ss2d_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    height: int,
    width: int,
    routes: str = "cross2d",
    flip_back: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scan a map along every route and merge the results (section 4.2 of the paper), without the scanned copies.

    The same as cross-scan, Δ = softplus(W_dt r + b), `selective_scan` and cross-merge one after another. The Δ-rank r,
    B and C are pointwise in the map, so they commute with the scan and come projected once, in map order. State and
    merge are float32 (float64 for float64 inputs) whatever autocast says; gradients have the dtype of their input.

    Args:
        x: (B, L, E) map in row-major order, L = H·W.
        projected: (B, L, K·(R+2N)): for each route its Δ-rank, B and C. Of two dtypes, the wider is taken for both.
        dt_weight: (K, E, R), in the dtype of `x` or in float32.
        dt_bias: (K, E).
        A: (K, E, N), negative.
        D: (K, E).
        height: H.
        width: W.
        routes: "cross2d", "unidi", "bidi", "rows" or "columns" (see `vmamba.ops.routes.ROUTES`).
        flip_back: False adds reversed lines in the order they were read, as the published cascade does. Only for the
            routes "rows" and "columns".
        out_dtype: Of the result, rounded once; by default float64 for float64 inputs and float32 for all others.
        backend: "auto", or one of "cuda", "triton", "cpu", "chunked", "reference", which never falls back to another.

    Returns:
        (B, L, E), the merged map.

    Raises:
        ValueError: For shapes or devices that do not fit, unknown routes, an unknown backend, or one that cannot run.
        TypeError: For tensors or an `out_dtype` that are not floating point.
    """
    check_backend(_NAME, backend)
    named = {"x": x, "projected": projected, "dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    check_kind(_NAME, named)
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"{_NAME}: out_dtype must be a floating-point dtype, got {out_dtype!r}")
    _check_shapes(x, projected, dt_weight, dt_bias, A, D, height, width, routes)
    check_flip_back(routes, flip_back)

    common = torch.promote_types(x.dtype, projected.dtype)
    x, projected, state = x.to(common), projected.to(common), state_dtype(common)
    dt_weight = dt_weight if dt_weight.dtype == common else dt_weight.to(state)
    dt_bias, A, D = dt_bias.to(state), A.to(state), D.to(state)
    out_dtype = out_dtype or state
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return ss2d_scan_reference(
                x,
                projected,
                dt_weight,
                dt_bias,
                A,
                D,
                height=height,
                width=width,
                routes=routes,
                flip_back=flip_back,
                out_dtype=out_dtype,
            )
    return scan_operator(x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back, out_dtype, backend)


def _check_shapes(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
) -> None:
    for name, tensor, shape in (("x", x, "(B, L, E)"), ("dt_weight", dt_weight, "(K, E, R)"), ("A", A, "(K, E, N)")):
        if tensor.dim() != 3:
            raise ValueError(f"{_NAME}: {name} must be {shape}, got shape {tuple(tensor.shape)}")
    batch, length, channels = x.shape
    if channels < 1:
        raise ValueError(f"{_NAME}: x has no channels; its shape is {tuple(x.shape)}")
    K, N, R = len(get_routes(routes)), A.shape[2], dt_weight.shape[2]
    if height < 1 or width < 1 or length != height * width:
        raise ValueError(f"{_NAME}: x has {length} positions, which is not height·width = {height}·{width}")
    sizes = {"B": batch, "L": length, "E": channels, "K": K, "N": N, "R": R, "K·(R+2N)": K * (R + 2 * N)}
    check_shape(_NAME, "dt_weight", dt_weight, "K E R", sizes)
    check_shape(_NAME, "A", A, "K E N", sizes)
    check_shape(_NAME, "projected", projected, "B L K·(R+2N)", sizes)
    check_shape(_NAME, "dt_bias", dt_bias, "K E", sizes)
    check_shape(_NAME, "D", D, "K E", sizes)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    # The context costs the host more than asking for it.
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@operator("vmamba::ss2d_scan")
def scan_operator(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """See `ss2d_scan`, of which this is the operator: nothing is checked or converted."""
    if x.shape[1] != height * width:  # a program of torch.jit.trace brings maps of other sizes past the checks
        raise ValueError(f"{_NAME}: x has {x.shape[1]} positions, which is not height·width = {height}·{width}")
    # The choice is made in here, where tensors are real: a traced or exported program then runs on any device.
    implementation = select_backend(_NAME, backend, (x, projected, dt_weight, A, routes, height, width))
    with _without_autocast(x):
        y: Tensor = implementation.forward(
            x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back, out_dtype
        )
    return y


@scan_operator.register_fake
def _(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


@operator("vmamba::ss2d_scan_backward", gives_gradients=True)
def scan_gradients(
    dy: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of the six tensors of `scan_operator`, each in the dtype of its input."""
    implementation = select_backend(_NAME, backend, (x, projected, dt_weight, A, routes, height, width))
    with _without_autocast(x):
        grads = implementation.backward(dy, x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back)
    dx, dprojected, ddt_weight, ddt_bias, dA, dD = (grad.contiguous() for grad in grads)
    return dx, dprojected, ddt_weight, ddt_bias, dA, dD


@scan_gradients.register_fake
def _(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:6])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.height, ctx.width, ctx.routes, ctx.flip_back, _, ctx.backend = inputs[6:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = scan_gradients(dy, *ctx.saved_tensors, ctx.height, ctx.width, ctx.routes, ctx.flip_back, ctx.backend)
    wanted = ctx.needs_input_grad
    return (*(grad if wanted[i] else None for i, grad in enumerate(grads)), *[None] * 6)


scan_operator.register_autograd(_backward, _setup_context)
