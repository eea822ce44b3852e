"""Convolutions with what follows them in VMamba in one kernel: GPUs only.

`depthwise_silu` is CUDA, with gradients; where that cannot be compiled, Triton without. `conv_norm` is Triton, for
inference.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.convolution import cuda_kernels
from vmamba.ops.linear.api import split_channels, why_not
from vmamba.ops.operator import operator


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    """Whether kernels in CUDA can be compiled here; a constant to compilers, which cannot look into libraries."""
    return nvrtc.compiler_unavailable() is None


def takes_depthwise(x: Tensor) -> bool:
    """Whether `depthwise_silu` can run on a map (..., C): with gradients, if they are enabled."""
    if torch.is_grad_enabled():
        return x.is_cuda and _compiles() and cuda_kernels.why_not_map(x) is None
    return why_not(x) is None


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own 3×3 filter, size kept, and apply SiLU; with gradients for every argument.

    Nothing but x is kept for the backward pass, which computes the convolution anew.

    Args:
        x: (B, H, W, C), float16 or bfloat16.
        weight: (C, 3, 3), of any floating dtype; products and sums are float32.
        bias: (C).

    Returns:
        (B, H, W, C) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, or no kernel can run on these tensors; says why.
    """
    if x.dim() != 4 or weight.shape != (x.shape[-1], 3, 3):
        raise ValueError(
            f"depthwise_silu: x (B, H, W, C) and weight (C, 3, 3) do not agree: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    # Rows, not maps: inductor writes what it keeps of four dimensions beside a convolution in the order (B, W, C, H).
    y: Tensor = depthwise_operator(x.flatten(1, 2), weight, bias, x.shape[1], x.shape[2])
    return y.view(x.shape)


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
def depthwise_operator(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """See `depthwise_silu`, of which this is the operator, on (B, H·W, C)."""
    if cuda_kernels.why_not(x) is None:
        return cuda_kernels.depthwise_silu(x, weight, bias, height, width)
    module = _kernels(x)
    y: Tensor = module.depthwise_silu(x.reshape(len(x), height, width, -1).contiguous(), weight, bias)
    return y.view(x.shape)


@depthwise_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape)


@operator("vmamba::depthwise_silu_backward", gives_gradients=True)
def depthwise_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Give the gradient of x (B, H·W, C), and of the filters and the bias behind each other (10·C) in float32."""
    if reason := cuda_kernels.why_not(x):
        raise ValueError(f"depthwise_silu has no gradients here: {reason}")
    return cuda_kernels.depthwise_silu_backward(dy, x, weight, bias, height, width)


@depthwise_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.numel() + len(weight), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, sums = depthwise_gradients(dy.to(x.dtype), x, weight, bias, ctx.height, ctx.width)
    taps = weight.numel()
    dweight, dbias = sums[:taps].view(weight.shape).to(weight.dtype), sums[taps:]
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None, None


depthwise_operator.register_autograd(_backward, _setup_context)


@operator("vmamba::conv_norm")
def _conv_norm(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, gelu: bool) -> Tensor:
    y: Tensor = _kernels(x).conv_norm(x, weight.contiguous(), bias, gamma, beta, eps, gelu)
    return y


@_conv_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, gelu: bool) -> Tensor:
    B, _, H, W = x.shape
    return x.new_empty(B, (H + 1) // 2, (W + 1) // 2, weight.shape[1])
