"""The MLP of a block as one operator in both directions, for training on narrow maps: GPUs only, by Triton.

The hidden activations, four times the map, are not kept: the backward pass computes them anew in the kernel that needs
them. On narrow maps all of this is bound by memory, and what is not written is won.
"""

from typing import Any

import torch
from torch import Tensor

from vmamba.ops.linear.api import HIDDEN_STEP, can_split, split_channels, why_not
from vmamba.ops.operator import operator

_WIDEST = 192  # channels; wider products are bound by arithmetic, where cuBLAS is faster


def takes_mlp(x: Tensor, hidden: int) -> bool:
    """Whether `mlp` can run on (..., D) and pays there."""
    D = x.shape[-1]
    return D <= _WIDEST and hidden % HIDDEN_STEP == 0 and why_not(x) is None and can_split(D)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute gelu(x W1ᵀ + b1) W2ᵀ + b2, with gradients for every argument.

    Args:
        x: (..., D), float16 or bfloat16; D as `vmamba.ops.linear.api.split_channels` takes it.
        w1: (hidden, D), of x's dtype; hidden a multiple of `HIDDEN_STEP`.
        b1: (hidden), float32.
        w2: (D, hidden), of x's dtype.
        b2: (D), float32.

    Returns:
        (..., D) of x's dtype, rounded once; hidden activations are rounded to it as well.

    Raises:
        ValueError: shapes or dtypes do not agree, or the kernels cannot run on these tensors; says why.
    """
    D, hidden = x.shape[-1], w1.shape[0]
    for name, tensor, shape in (
        ("w1", w1, (hidden, D)),
        ("b1", b1, (hidden,)),
        ("w2", w2, (D, hidden)),
        ("b2", b2, (D,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"mlp: {name} must be {shape} beside x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if hidden % HIDDEN_STEP:
        raise ValueError(f"mlp: the hidden channels must be a multiple of {HIDDEN_STEP}, got {hidden}")
    if not x.dtype == w1.dtype == w2.dtype:
        raise ValueError(f"mlp: x, w1 and w2 must have one dtype, got {x.dtype}, {w1.dtype} and {w2.dtype}")
    split_channels(D)
    # Rows, not maps: inductor writes what it keeps of four dimensions beside a convolution in the order (B, W, C, H).
    y: Tensor = mlp_operator(x.reshape(-1, D), w1, b1.float(), w2, b2.float())
    return y.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    if reason := why_not(x):
        raise ValueError(f"mlp cannot run: {reason}")
    return x.reshape(-1, x.shape[-1]).contiguous()


@operator("vmamba::mlp")
def mlp_operator(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """See `mlp`, of which this is the operator: nothing is checked or converted."""
    rows = _rows(x)
    from vmamba.ops.mlp import triton_kernels

    return triton_kernels.forward(rows, w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()).view(
        x.shape
    )


@mlp_operator.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operator("vmamba::mlp_backward", gives_gradients=True)
def mlp_gradients(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradient of x, the hidden activations, the gradient before GELU (M, hidden) and its sums (hidden)."""
    rows = _rows(x)
    from vmamba.ops.mlp import triton_kernels

    return triton_kernels.backward(_rows(dy), rows, w1.contiguous(), b1.contiguous(), w2.contiguous())


@mlp_gradients.register_fake
def _(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, hidden = x.numel() // x.shape[-1], w1.shape[0]
    wide = x.new_empty(M, hidden)
    return x.new_empty(M, x.shape[-1]), wide, torch.empty_like(wide), b1.new_empty(b1.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, w1, b1, w2 = ctx.saved_tensors  # once: gradient checkpointing gives them out a single time
    shape, dy = x.shape, dy.to(x.dtype)
    dx, hidden, dpre, db1 = mlp_gradients(dy, x, w1, b1, w2)
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # What is left are two products over all positions, which cuBLAS does best.
    return dx.view(shape), dpre.T @ x, db1, dy.T @ hidden, dy.sum(0, dtype=torch.float32)


mlp_operator.register_autograd(_backward, _setup_context)
