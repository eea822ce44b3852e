"""Convolutions with what follows them in VMamba in one kernel, for inference: GPUs only, by Triton, no gradients."""

from types import ModuleType

from torch import Tensor

from vmamba.ops.linear.api import split_channels, why_not
from vmamba.ops.operator import operator


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own 3×3 filter, size kept, and apply SiLU.

    Args:
        x: (B, H, W, C), float16 or bfloat16.
        weight: (3, 3, C).
        bias: (C).

    Returns:
        (B, H, W, C) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or the kernel cannot run on these tensors; says why.
    """
    if x.dim() != 4 or weight.shape != (3, 3, x.shape[-1]):
        raise ValueError(
            f"depthwise_silu: x (B, H, W, C) and weight (3, 3, C) do not agree: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    return _depthwise_silu(x, weight, bias)


def conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *, eps: float = 1e-5, gelu: bool = False
) -> Tensor:
    """Convolve 3×3 at stride 2 with padding 1, normalise over the channels, perhaps apply GELU: a layer of the stem.

    Args:
        x: (B, C, H, W) in any memory layout, float16 or bfloat16.
        weight: (9·C, N), of x's dtype, N as `split_channels` takes it: rows are (row, column, channel) of the filters.
        bias: (N), of the convolution.
        gamma: (N), scale of the norm.
        beta: (N), shift of the norm.
        eps: added to the variance of a position.
        gelu: whether GELU follows.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), N) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or the kernel cannot run on these tensors; says why.
    """
    if x.dim() != 4 or weight.dim() != 2 or weight.shape[0] != 9 * x.shape[1]:
        raise ValueError(
            f"conv_norm: x (B, C, H, W) and weight (9·C, N) do not agree: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    split_channels(weight.shape[1])
    for name, tensor in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if tensor.shape != weight.shape[1:]:
            raise ValueError(f"conv_norm: {name} must be {tuple(weight.shape[1:])}, got {tuple(tensor.shape)}")
    return _conv_norm(x, weight, bias, gamma, beta, eps, gelu)


def _kernels(x: Tensor) -> ModuleType:
    if reason := why_not(x):
        raise ValueError(f"the fused convolutions cannot run: {reason}")
    from vmamba.ops.convolution import triton_kernels

    return triton_kernels


@operator("vmamba::depthwise_silu")
def _depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _kernels(x).depthwise_silu(x.contiguous(), weight.contiguous(), bias)
    return y


@_depthwise_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@operator("vmamba::conv_norm")
def _conv_norm(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, gelu: bool) -> Tensor:
    y: Tensor = _kernels(x).conv_norm(x, weight.contiguous(), bias, gamma, beta, eps, gelu)
    return y


@_conv_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, gelu: bool) -> Tensor:
    B, _, H, W = x.shape
    return x.new_empty(B, (H + 1) // 2, (W + 1) // 2, weight.shape[1])
