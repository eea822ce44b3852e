"""The first layer of the stem as one operator in both directions: 3×3 convolution of stride 2, LayerNorm, GELU.

For GPUs, by Triton. An image has three channels, so the convolution is a product with 27 rows, which costs next to
nothing beside reading and writing the map of half the image's resolution. Nothing but the result is written, nothing
but the image is kept: the backward pass computes the rest anew.
"""

from typing import Any

import torch
from torch import Tensor

from vmamba.ops.linear.api import can_split, split_channels, why_not
from vmamba.ops.operator import operator

_MOST_CHANNELS = 15  # of the image: with more, one product a tap is the better cut


def takes_first_layer(x: Tensor, dtype: torch.dtype, channels: int) -> bool:
    """Whether `first_layer` can run on images brought to a dtype, with so many channels of the result."""
    if x.requires_grad or x.shape[1] > _MOST_CHANNELS or why_not(x.new_empty(0, dtype=dtype)) is not None:
        return False
    return channels <= 128 and can_split(channels)


def first_layer(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Compute gelu(norm(conv(x))), with gradients for all but the image.

    Args:
        x: (B, C, H, W) in any memory layout, float16 or bfloat16, C < 16.
        weight: (N, C, 3, 3), of stride 2 and padding 1; N as `vmamba.ops.linear.api.split_channels` takes it.
        bias: (N), of the convolution.
        gamma: (N), scale of the norm.
        beta: (N), shift of the norm.
        eps: added to the variance of a position.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), N) of x's dtype, rounded once.

    Raises:
        ValueError: shapes do not agree, the image asks for a gradient, or the kernels cannot run; says why.
    """
    N, C = weight.shape[:2]
    if x.dim() != 4 or tuple(weight.shape) != (N, x.shape[1], 3, 3) or C > _MOST_CHANNELS:
        raise ValueError(
            f"first_layer: x (B, C, H, W) and weight (N, C, 3, 3) do not agree, or C is over {_MOST_CHANNELS}: "
            f"{tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if x.requires_grad:
        raise ValueError("first_layer gives no gradient of the image")
    split_channels(N)
    for name, tensor in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if tuple(tensor.shape) != (N,):
            raise ValueError(f"first_layer: {name} must be {(N,)}, got {tuple(tensor.shape)}")
    filters = weight.to(x.dtype).permute(2, 3, 1, 0).reshape(9 * C, N)
    y: Tensor = _first_layer(x, filters, bias.float(), gamma.float(), beta.float(), eps)
    return y


def _check(x: Tensor) -> None:
    if reason := why_not(x):
        raise ValueError(f"first_layer cannot run: {reason}")


@operator("vmamba::stem_first_layer")
def _first_layer(x: Tensor, filters: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    _check(x)
    from vmamba.ops.convolution import triton_kernels

    return triton_kernels.conv_norm(x, filters.contiguous(), bias, gamma, beta, eps, True)


@_first_layer.register_fake
def _(x: Tensor, filters: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    B, _, H, W = x.shape
    return x.new_empty(B, (H + 1) // 2, (W + 1) // 2, filters.shape[1])


@operator("vmamba::stem_first_layer_backward", gives_gradients=True)
def _first_layer_backward(
    dy: Tensor, x: Tensor, filters: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x)
    from vmamba.ops.stem import triton_kernels

    return triton_kernels.backward(dy.contiguous(), x, filters.contiguous(), bias, gamma, beta, eps)


@_first_layer_backward.register_fake
def _(
    dy: Tensor, x: Tensor, filters: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two, three = (bias.new_empty(bias.shape) for _ in range(3))
    return bias.new_empty(filters.shape), one, two, three


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, filters, *rest = ctx.saved_tensors
    dfilters, dbias, dgamma, dbeta = _first_layer_backward(dy.to(x.dtype), x, filters, *rest, ctx.eps)
    return None, dfilters.to(filters.dtype), dbias, dgamma, dbeta, None


_first_layer.register_autograd(_backward, _setup_context)
