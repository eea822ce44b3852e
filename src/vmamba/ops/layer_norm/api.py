"""LayerNorm over channels: its result in the dtype wanted, its backward pass in one kernel; and sums with their norm.

On a GPU with Triton the backward pass is `cuda_kernels` for 16-bit rows and `triton_kernels` for all others; everywhere
else it is torch's. The forward pass is torch's own operator where a compiler can fuse it with what comes before. In
eager mode that is a conversion to float32, the norm and a conversion back: there `cuda_kernels` takes 16-bit rows.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.layer_norm import cuda_kernels
from vmamba.ops.operator import nothing_watches, operator

_HAS_TRITON = find_spec("triton") is not None


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalise over the last dimension in float32 and round once.

    Args:
        x: (..., D).
        gamma: (D), scale.
        beta: (D), shift.
        eps: added to the variance.
        out_dtype: of the result.

    Returns:
        (..., D) of out_dtype.
    """
    if _takes_kernel(x):
        y: Tensor = _LayerNorm.apply(x, gamma, beta, eps, out_dtype)
        return y
    return _plain(x, gamma, beta, eps, out_dtype)


def skip_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x and its norm: the two ways into a residual block, whose gradients come back in one pass.

    Args:
        x: (..., D).
        gamma: (D), scale.
        beta: (D), shift.
        eps: added to the variance.
        out_dtype: of the norm.

    Returns:
        x itself and (..., D) of out_dtype. Take the first for the residual: its gradient is then added in the kernel.
    """
    if _takes_kernel(x):
        skip, y = _SkipNorm.apply(x, gamma, beta, eps, out_dtype)
        return skip, y
    return x, _plain(x, gamma, beta, eps, out_dtype)


def add_norm(
    x: Tensor,
    branch: Tensor,
    bias: Tensor,
    source: Tensor | None = None,
    *,
    eps: float = 1e-5,
    source_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual and normalise the sum, without affine part: for inference on GPUs with Triton.

    A linear layer on a norm needs no pass for the norm: its mean goes into the weights (each row of W less its mean);
    its deviation, one number a row, divides the result, and that is done here.

    Args:
        x: (..., D).
        branch: (..., D), of x's dtype.
        bias: (D), added too.
        source: (..., E), of x's dtype: the branch is divided by the deviation √(var + source_eps) of these rows first.
        eps: added to the variance of the sum.
        source_eps: added to the variance of the source.

    Returns:
        x + branch + bias, rounded once, and the norm of what was rounded: (..., D) each, of x's dtype.

    Raises:
        ValueError: shapes do not agree, or the tensors are on no GPU with Triton.
    """
    if branch.shape != x.shape or branch.dtype != x.dtype or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"add_norm: branch and bias must be {tuple(x.shape)} of {x.dtype} and {tuple(x.shape[-1:])}, "
            f"got {tuple(branch.shape)} of {branch.dtype} and {tuple(bias.shape)}"
        )
    if source is not None and (source.shape[:-1] != x.shape[:-1] or source.dtype != x.dtype):
        raise ValueError(
            f"add_norm: source must be {(*x.shape[:-1], 'E')} of {x.dtype}, got {tuple(source.shape)} of {source.dtype}"
        )
    total, y = _add_norm(x, branch, bias, source, eps, source_eps)
    return total, y


@operator("vmamba::add_norm")
def _add_norm(
    x: Tensor, branch: Tensor, bias: Tensor, source: Tensor | None, eps: float, source_eps: float
) -> tuple[Tensor, Tensor]:
    if not (x.is_cuda and _HAS_TRITON):
        raise ValueError(f"add_norm runs on GPUs with Triton; the tensors are on {x.device}")
    from vmamba.ops.layer_norm import triton_kernels

    x_rows, branch_rows, source_rows = (
        None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, branch, source)
    )
    assert x_rows is not None
    assert branch_rows is not None
    total, y = triton_kernels.add_norm(x_rows, branch_rows, bias.contiguous(), source_rows, eps, source_eps)
    return total.view(x.shape), y.view(x.shape)


@_add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, bias: Tensor, source: Tensor | None, eps: float, source_eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _takes_kernel(x: Tensor) -> bool:
    # Without gradients the plain form leaves more to the compiler, and float64 is for checks.
    return x.is_cuda and _HAS_TRITON and torch.is_grad_enabled() and x.dtype != torch.float64


def takes_rows(x: Tensor) -> bool:
    """Whether `normalise_rows` can run on (..., D), and `norm_gradients` is its backward pass."""
    return x.is_cuda and cuda_kernels.why_not_forward(x) is None


def takes_width(channels: int) -> bool:
    """Whether they could if there were so many channels."""
    return cuda_kernels.fits(channels)


def _takes_forward(x: Tensor, gamma: Tensor, out_dtype: torch.dtype) -> bool:
    # What a compiler, an exporter or a counter sees stays torch's operator, which they know.
    return x.is_cuda and x.dtype == out_dtype and nothing_watches(x, gamma) and takes_rows(x)


def _plain(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled() and _takes_forward(x, gamma, out_dtype):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return normalise_rows(rows, gamma, beta, eps)[0].view(x.shape)
    if x.device.type == "cpu" and x.dtype == out_dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        # torch's kernel there reads 16 bits beside float32 weights: one pass instead of three.
        return F.layer_norm(x, gamma.shape, gamma.float(), beta.float(), eps).to(out_dtype)
    wide = torch.promote_types(x.dtype, torch.float32) if out_dtype != x.dtype or gamma.dtype != x.dtype else x.dtype
    # Under autocast F.layer_norm works in float32 by itself.
    return F.layer_norm(x.to(wide), gamma.shape, gamma.to(wide), beta.to(wide), eps).to(out_dtype)


def normalise_rows(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise 16-bit rows (M, D) in one pass where `takes_rows`; with mean and 1 / deviation (M) in float32."""
    return cuda_kernels.forward(x.contiguous(), gamma, beta, eps)


def _normalise(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    # Rows, not maps: inductor writes what it keeps of four dimensions beside a convolution in the order (B, W, C, H).
    rows = x.reshape(-1, x.shape[-1])
    if _takes_forward(x, gamma, out_dtype):
        rows = rows.contiguous()
        y, mean, rstd = normalise_rows(rows, gamma, beta, eps)
    else:
        y, mean, rstd = torch.native_layer_norm(rows.float(), gamma.shape, gamma.float(), beta.float(), eps)
    y = y.view(x.shape)
    ctx.save_for_backward(rows, gamma, mean, rstd)
    ctx.beta_dtype = beta.dtype
    # The compiler of torch 2.11 loses all gradients of a function that ends in a conversion to the dtype it has.
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _differentiate(ctx: Any, dy: Tensor, skip: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, gamma, mean, rstd = ctx.saved_tensors
    dy_rows, skip_rows = (None if t is None else t.reshape(rows.shape) for t in (dy, skip))
    assert dy_rows is not None
    dx, dgamma, dbeta = norm_gradients(dy_rows, skip_rows, rows, mean, rstd, gamma)
    return dx.view(dy.shape), dgamma.to(gamma.dtype), dbeta.to(ctx.beta_dtype), None, None


# Two functions, since a compiler fills the gradient of an output that nobody uses with zeros, which cost a pass.
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        return _normalise(ctx, x, gamma, beta, eps, out_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dy, None)


class _SkipNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _normalise(ctx, x, gamma, beta, eps, out_dtype)

    @staticmethod
    def backward(ctx: Any, skip: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dy, skip)


@operator("vmamba::layer_norm_backward", gives_gradients=True)
def norm_gradients(
    dy: Tensor, skip: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate rows (M, D): dy and, where there is one, the gradient that comes in beside it are of x's shape."""
    skip = None if skip is None else skip.contiguous()
    arguments = (dy.contiguous(), skip, x.contiguous())
    rest = (mean.contiguous(), rstd.contiguous(), gamma.contiguous())
    if cuda_kernels.why_not(*arguments) is None:
        return cuda_kernels.backward(*arguments, *rest)
    from vmamba.ops.layer_norm import triton_kernels

    return triton_kernels.backward(*arguments, *rest)


@norm_gradients.register_fake
def _(
    dy: Tensor, skip: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = gamma.new_empty(gamma.shape, dtype=torch.float32)
    return x.new_empty(x.shape), sums, torch.empty_like(sums)
