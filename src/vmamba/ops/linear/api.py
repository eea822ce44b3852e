"""Linear layers with the norm before them and the activation or residual after them in one kernel, for inference.

The norm is LayerNorm without its affine part, which belongs in the weights: W·diag(γ) and b + W β. GPUs only, by
Triton: elsewhere nothing is won by fusing. No gradients: training has no use for folded weights.
"""

from types import ModuleType

from torch import Tensor

from vmamba.ops.operator import operator

HIDDEN_STEP = 64  # `norm_mlp` takes so many hidden channels at a time


def split_channels(channels: int) -> tuple[int, int]:
    """Write a width as a power of two and a smaller one or nothing, each at least 16: the tiles that hold a row.

    Raises:
        ValueError: it is not such a sum, as 64, 96, 144 and 192 are.
    """
    high = 1 << (channels.bit_length() - 1)
    low = channels - high
    if high < 16 or low & (low - 1) or 0 < low < 16:
        raise ValueError(f"{channels} channels are not a power of two, or two of them added, each at least 16")
    return high, low


def can_split(channels: int) -> bool:
    """Whether `split_channels` takes a width."""
    try:
        split_channels(channels)
    except ValueError:
        return False
    return True


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise rows, multiply, add: norm(x) Wᵀ + b + residual.

    Args:
        x: (..., K), float16 or bfloat16; K as `split_channels` takes it.
        weight: (N, K), of x's dtype.
        bias: (N), float32.
        residual: (..., N), of x's dtype.
        eps: added to the variance of a row.

    Returns:
        (..., N) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or the kernels cannot run on these tensors; says why.
    """
    _check("norm_linear", x, weight, bias)
    split_channels(x.shape[-1])
    if residual is not None and (residual.shape != (*x.shape[:-1], weight.shape[0]) or residual.dtype != x.dtype):
        raise ValueError(
            f"norm_linear: residual must be {(*x.shape[:-1], weight.shape[0])} of {x.dtype}, "
            f"got {tuple(residual.shape)} of {residual.dtype}"
        )
    return _norm_linear(x, weight, bias, residual, eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply and activate: gelu(x Wᵀ + b), to within 5e-4 of the exact GELU before rounding.

    Args:
        x: (..., K), float16 or bfloat16.
        weight: (N, K), of x's dtype.
        bias: (N), float32.

    Returns:
        (..., N) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or the kernels cannot run on these tensors; says why.
    """
    _check("linear_gelu", x, weight, bias)
    return _linear_gelu(x, weight, bias)


def norm_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Compute the whole MLP branch with its residual: x + gelu(norm(x) W1ᵀ + b1) W2ᵀ + b2.

    Args:
        x: (..., D), float16 or bfloat16; D as `split_channels` takes it.
        w1: (hidden, D), of x's dtype; hidden a multiple of `HIDDEN_STEP`.
        b1: (hidden), float32.
        w2: (D, hidden), of x's dtype.
        b2: (D), float32.
        eps: added to the variance of a row.

    Returns:
        (..., D) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or the kernels cannot run on these tensors; says why.
    """
    _check("norm_mlp", x, w1, b1)
    if w2.shape != (w1.shape[1], w1.shape[0]) or b2.shape != (w1.shape[1],):
        raise ValueError(
            f"norm_mlp: w2 and b2 must be {(w1.shape[1], w1.shape[0])} and {(w1.shape[1],)}, "
            f"got {tuple(w2.shape)} and {tuple(b2.shape)}"
        )
    split_channels(x.shape[-1])
    if w1.shape[0] % HIDDEN_STEP:
        raise ValueError(f"norm_mlp: the hidden channels must be a multiple of {HIDDEN_STEP}, got {w1.shape[0]}")
    return _norm_mlp(x, w1, b1, w2, b2, eps)


def why_not(x: Tensor) -> str | None:
    """Say in a sentence why these operations cannot run on a tensor; None if they can."""
    try:
        from vmamba.ops.linear import triton_kernels
    except ImportError as error:
        return f"Triton cannot be imported here ({error})."
    return triton_kernels.why_not(x)


def _kernels(x: Tensor) -> ModuleType:
    if reason := why_not(x):
        raise ValueError(f"the fused layers cannot run: {reason}")
    from vmamba.ops.linear import triton_kernels

    return triton_kernels


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: x (..., K) and weight (N, K) do not agree: {tuple(x.shape)}, {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")


@operator("vmamba::norm_linear")
def _norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    module = _kernels(x)
    y: Tensor = module.norm_linear(
        x.flatten(0, -2).contiguous(),
        weight.contiguous(),
        bias,
        None if residual is None else residual.flatten(0, -2).contiguous(),
        eps,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@operator("vmamba::linear_gelu")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    module = _kernels(x)
    y: Tensor = module.linear_gelu(x.flatten(0, -2).contiguous(), weight.contiguous(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@operator("vmamba::norm_mlp")
def _norm_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float) -> Tensor:
    module = _kernels(x)
    y: Tensor = module.norm_mlp(x.flatten(0, -2).contiguous(), w1.contiguous(), b1, w2.contiguous(), b2, eps)
    return y.view(x.shape)


@_norm_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_norm_mlp.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
