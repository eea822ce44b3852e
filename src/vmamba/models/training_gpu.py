"""A block's branches as one node of autograd each: eager training on GPUs in 16 bits.

x + drop_path(op(norm(x))) by modules is some twenty operations with a node, a conversion of weights or a view each: on
all but large maps they cost the host more than the kernels take. Here the kernels follow one another, forward and
backward, with nothing in between; the weights of a stage are converted in one kernel, what drops its branches is drawn
in one, and the residual takes a branch in one. Results are those of the modules, with fewer roundings: the sum with the
residual and the gradients of weights are rounded once instead of twice. Compilers see the modules, which they fuse.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vmamba.models.layers import DepthwiseConv2d, DropPath, LayerNorm, Mlp, autocast_dtype, have_hooks
from vmamba.models.ss2d import SS2D
from vmamba.ops.convolution.api import depthwise_gradients, depthwise_operator, takes_depthwise
from vmamba.ops.layer_norm.api import norm_gradients, normalise_rows, takes_rows, takes_width
from vmamba.ops.mlp.api import mlp_gradients, mlp_operator, takes_mlp
from vmamba.ops.operator import nothing_watches
from vmamba.ops.ss2d.api import scan_gradients, scan_operator
from vmamba.ops.validation import state_dtype


class Parts(NamedTuple):
    """What a block consists of: x + drop(op(norm(x))), then x + drop(mlp(norm2(x)))."""

    op: nn.Module | None
    norm: nn.Module | None
    mlp: nn.Module | None
    norm2: nn.Module | None
    drop: nn.Module


def run_blocks(x: Tensor, blocks: Sequence[Parts]) -> Tensor | None:
    """Compute blocks one after the other, each of two nodes; None, and nothing done, where modules have to be called.

    They are called on anything but a 16-bit map on a GPU while gradients are enabled; where a compiler, an exporter, a
    transform, a dispatch mode or a hook would not see what it waits for; and if a block has other layers than those of
    the published models, vanilla VMamba excepted.

    Args:
        x: (B, H, W, D).
        blocks: all of that width.

    Returns:
        (B, H, W, D), of x's dtype.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not takes_rows(x):
        return None
    if not takes_depthwise(x) or x.dim() != 4 or x.numel() == 0:
        return None
    calls = []
    for parts in blocks:
        call = _find_call(x, *parts)
        if call is None:
            return None
        calls.append(call)
    with torch.no_grad():
        converted = iter(_convert([w for call in calls for w in call.products], x.dtype))
    for call, (first, second) in zip(calls, _draw([call.rate for call in calls], x), strict=True):
        weights = list(itertools.islice(converted, len(call.products)))
        x = _ScanBranch.apply(x, first, call.facts, weights[:4], *call.scan)
        x = _MlpBranch.apply(x, second, call.mlp_eps, weights[4:], *call.mlp)
    return x


class _Call(NamedTuple):
    """A block as its nodes take it: what is converted to the map's dtype, and parameters as gradients go to them."""

    rate: float
    products: tuple[Tensor, ...]
    facts: "_Scan"
    scan: tuple[Tensor | None, ...]
    mlp_eps: float
    mlp: tuple[Tensor, ...]


def _find_call(x: Tensor, op: Any, norm: Any, mlp: Any, norm2: Any, drop: Any) -> _Call | None:
    if not (type(op) is SS2D and type(mlp) is Mlp and type(drop) is DropPath and _can_scan(op) and _can_multiply(mlp)):
        return None
    if not type(norm) is type(norm2) is LayerNorm:
        return None
    conv, out_norm, fc1, fc2 = op.conv2d, op.out_norm, mlp.fc1, mlp.fc2
    assert conv is not None
    assert isinstance(out_norm, LayerNorm)
    modules = (
        *(op, op.in_proj, conv, op.act, out_norm, op.out_act, op.out_proj, op.dropout, norm, drop),
        *(mlp, fc1, mlp.act, fc2, mlp.drop, norm2),
    )
    scan_weights = (op.in_proj.weight, op.x_proj_weight, op.dt_projs_weight, op.out_proj.weight)
    scan_others = (op.dt_projs_bias, op.A_logs, op.Ds, norm.weight, norm.bias, conv.weight, conv.bias)
    scan = (*scan_weights, *scan_others, out_norm.weight, out_norm.bias)
    multiplied = (fc1.weight, fc2.weight, fc1.bias, fc2.bias)
    branch = (*multiplied, norm2.weight, norm2.bias)
    under = autocast_dtype(x)
    # Without autocast products refuse weights of another dtype: that is left to the modules to say.
    known = (x.dtype,) if under is None else (torch.float32, x.dtype)
    if x.dtype != (under or x.dtype) or any(w.dtype not in known for w in (*scan_weights, *multiplied)):
        return None
    if have_hooks(modules) or not nothing_watches(x, *scan, *branch):
        return None
    narrow = takes_mlp(x, fc1.out_features)  # its kernel takes biases in float32
    facts = _Scan(norm.eps, out_norm.eps, op.routes, op.backend)
    products = (*scan_weights, *multiplied[: 2 if narrow else 4])
    return _Call(drop.rate if drop.training else 0.0, products, facts, scan, norm2.eps, branch)


def _draw(rates: Sequence[float], x: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """Draw, for both branches of every block, what (B, ...) is multiplied by, (B, 1, ...); None where that is one."""
    if not any(rates):
        return [(None, None)] * len(rates)
    kept = _find_kept(tuple(rates), x.device)
    factors = torch.bernoulli(kept.expand(-1, len(x))).div_(kept).to(x.dtype)
    drawn = iter(factors.view(-1, len(x), *[1] * (x.dim() - 1)).unbind())
    pairs = list(zip(drawn, drawn, strict=True))
    return [pair if rate else (None, None) for pair, rate in zip(pairs, rates, strict=True)]


@functools.lru_cache(maxsize=64)
def _find_kept(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """Give the probabilities (2·blocks, 1) with which branches are kept; above zero, to divide by them."""
    return torch.tensor([[max(1 - rate, 1e-30)] for rate in rates for _ in range(2)], device=device)


def _can_scan(op: SS2D) -> bool:
    """Whether this is in_proj, depthwise convolution, SiLU, scan, LayerNorm, out_proj and nothing else."""
    conv = op.conv2d
    return (
        type(conv) is DepthwiseConv2d
        and conv.kernel_size == (3, 3)
        and type(op.act) is nn.SiLU
        and type(op.out_norm) is LayerNorm
        and type(op.in_proj) is type(op.out_proj) is nn.Linear
        and op.in_proj.bias is op.out_proj.bias is None
        and type(op.out_act) is type(op.dropout) is nn.Identity
        and op.routes != "cascade2d"
        and not (op.gated or op.sequential_routes or op.force_fp32)
        and takes_width(op.d_inner)
    )


def _can_multiply(mlp: Mlp) -> bool:
    """Whether this is fc1, exact GELU, fc2 and nothing else."""
    return mlp.is_plain() and mlp.act.approximate == "none" and mlp.fc1.bias is not None and mlp.fc2.bias is not None


def _convert(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Round weights to a dtype, all in one kernel."""
    if all(w.dtype == dtype for w in weights):
        return list(weights)
    converted = [torch.empty_like(w, dtype=dtype) for w in weights]
    torch._foreach_copy_(converted, list(weights))
    return converted


class _Scan(NamedTuple):
    """What SS2D has beside tensors."""

    eps: float
    out_eps: float
    routes: str
    backend: str


def _add(x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
    """Add rows (M, D) of a branch to a map (B, H, W, D), times what was drawn for its image."""
    branch = branch.view(x.shape)
    return torch.add(x, branch) if factors is None else torch.addcmul(x, branch, factors)


def _rows_of(dy: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the gradients of the residual and of its branch, (M, D) each."""
    rows = dy.reshape(-1, dy.shape[-1]).contiguous()
    return rows, rows if factors is None else (dy * factors).reshape(rows.shape).contiguous()


def _product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the gradient of a weight (N, K), grad (M, N) transposed times x (M, K), not rounded to 16 bits first."""
    if dtype == torch.float32 and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x)


class _ScanBranch(torch.autograd.Function):
    """x + factors · out_proj(norm(scan(silu(conv(in_proj(norm(x)))))))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Tensor | None,
        facts: _Scan,
        converted: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        b_dt, A_logs, Ds, gamma, beta, w_conv, b_conv, out_gamma, out_beta = parameters[4:]
        w_in, w_x, w_dt, w_out = converted
        (B, H, W, D), L, dtype = x.shape, x.shape[1] * x.shape[2], x.dtype
        (K, E, _), ctx.facts, state, w_x = w_dt.shape, facts, state_dtype(dtype), w_x.flatten(0, 1)
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        A, Ds, b_dt = -torch.exp(A_logs.to(state)).view(K, E, -1), Ds.to(state).view(K, E), b_dt.to(state)
        rows = x.reshape(-1, D).contiguous()
        normed, mean, rstd = normalise_rows(rows, gamma, beta, facts.eps)
        u = torch.mm(normed, w_in.t()).view(B, L, E)
        v = depthwise_operator.compute(u, w_conv.squeeze(1), b_conv, H, W)
        projected = torch.mm(v.view(-1, E), w_x.t()).view(B, L, -1)
        scanned = scan_operator.compute(
            v, projected, w_dt, b_dt, A, Ds, H, W, facts.routes, True, dtype, facts.backend
        ).view(-1, E)  # fmt: skip
        out, out_mean, out_rstd = normalise_rows(scanned, out_gamma, out_beta, facts.out_eps)
        ctx.save_for_backward(
            factors, gamma, w_in, w_conv, b_conv, w_x, w_dt, b_dt, A, Ds, out_gamma, w_out,
            rows, mean, rstd, normed, u, v, projected, scanned, out_mean, out_rstd, out,
        )  # fmt: skip
        return _add(x, torch.mm(out, w_out.t()), factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (
            factors, gamma, w_in, w_conv, b_conv, w_x, w_dt, b_dt, A, Ds, out_gamma, w_out,
            rows, mean, rstd, normed, u, v, projected, scanned, out_mean, out_rstd, out,
        ) = ctx.saved_tensors  # fmt: skip
        (_, H, W, _), (K, E, _), (routes, backend) = dy.shape, w_dt.shape, ctx.facts[2:]
        skip, d_branch = _rows_of(dy.to(rows.dtype), factors)
        d_scanned, d_out_gamma, d_out_beta = norm_gradients.compute(
            torch.mm(d_branch, w_out), None, scanned, out_mean, out_rstd, out_gamma
        )
        dv, d_projected, d_w_dt, d_b_dt, dA, dDs = scan_gradients.compute(
            d_scanned.view(v.shape), v, projected, w_dt, b_dt, A, Ds, H, W, routes, True, backend
        )
        d_projected = d_projected.view(-1, d_projected.shape[-1])
        dv.view(-1, E).addmm_(d_projected, w_x)
        du, sums = depthwise_gradients.compute(dv, u, w_conv.squeeze(1), b_conv, H, W)
        du = du.view(-1, E)
        dx, d_gamma, d_beta = norm_gradients.compute(torch.mm(du, w_in), skip, rows, mean, rstd, gamma)
        taps, wanted, dtypes = w_conv.numel(), ctx.needs_input_grad[4:], ctx.dtypes
        grads = (
            _product(du, normed, dtypes[0]) if wanted[0] else None,
            _product(d_projected, v.view(-1, E), dtypes[1]).view(K, -1, E) if wanted[1] else None,
            d_w_dt,
            _product(d_branch, out, dtypes[3]) if wanted[3] else None,
            d_b_dt,
            (dA * A).flatten(0, 1),  # A is -exp(A_logs)
            dDs.flatten(),
            d_gamma,
            d_beta,
            sums[:taps].view(w_conv.shape),
            None if b_conv is None else sums[taps:],
            d_out_gamma,
            d_out_beta,
        )
        return dx.view(dy.shape), None, None, None, *_wanted(grads, wanted, dtypes)


class _MlpBranch(torch.autograd.Function):
    """x + factors · fc2(gelu(fc1(norm(x)))); on a narrow map in one kernel that keeps no hidden channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Tensor | None,
        eps: float,
        converted: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        b1, b2, gamma, beta = parameters[2:]
        w1, w2, *biases = converted
        ctx.dtypes, ctx.narrow = [p.dtype for p in parameters], not biases
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        normed, mean, rstd = normalise_rows(rows, gamma, beta, eps)
        if ctx.narrow:
            state = state_dtype(x.dtype)
            b1 = b1.to(state)
            branch = mlp_operator.compute(normed, w1, b1, w2, b2.to(state))
            ctx.save_for_backward(factors, gamma, rows, mean, rstd, normed, w1, w2, b1)
        else:
            before = torch.addmm(biases[0], normed, w1.t())
            hidden = nn.functional.gelu(before)
            branch = torch.addmm(biases[1], hidden, w2.t())
            ctx.save_for_backward(factors, gamma, rows, mean, rstd, normed, w1, w2, before, hidden)
        return _add(x, branch, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        factors, gamma, rows, mean, rstd, normed, w1, w2, *rest = ctx.saved_tensors
        skip, d_branch = _rows_of(dy.to(rows.dtype), factors)
        wanted, dtypes = ctx.needs_input_grad[4:], ctx.dtypes
        if ctx.narrow:
            d_normed, hidden, d_before, d_b1 = mlp_gradients.compute(d_branch, normed, w1, rest[0], w2)
        else:
            before, hidden = rest
            d_before = torch.ops.aten.gelu_backward(torch.mm(d_branch, w2), before)
            d_normed = torch.mm(d_before, w1)
            d_b1 = d_before.sum(0, dtype=state_dtype(dy.dtype)) if wanted[2] else None
        dx, d_gamma, d_beta = norm_gradients.compute(d_normed, skip, rows, mean, rstd, gamma)
        grads = (
            _product(d_before, normed, dtypes[0]) if wanted[0] else None,
            _product(d_branch, hidden, dtypes[1]) if wanted[1] else None,
            d_b1,
            d_branch.sum(0, dtype=state_dtype(dy.dtype)) if wanted[3] else None,
            d_gamma,
            d_beta,
        )
        return dx.view(dy.shape), None, None, None, *_wanted(grads, wanted, dtypes)


def _wanted(
    grads: tuple[Tensor | None, ...], wanted: tuple[bool, ...], dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    """Round the gradients that are asked for to the dtypes of their parameters, and drop the others."""
    return [
        None if grad is None or not want else grad if grad.dtype == dtype else grad.to(dtype)
        for grad, want, dtype in zip(grads, wanted, dtypes, strict=True)
    ]
