"""The products in plain torch: the specification that the kernels are tested against."""

import torch.nn.functional as F
from torch import Tensor


def norm_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Specify `norm_linear`."""
    y = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight, None if bias is None else bias.to(weight.dtype))
    return y if residual is None else y + residual


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Specify `linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias.to(weight.dtype)))


def norm_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5) -> Tensor:
    """Specify `norm_mlp`."""
    hidden = linear_gelu_reference(F.layer_norm(x, x.shape[-1:], eps=eps), w1, b1)
    return x + F.linear(hidden, w2, b2.to(w2.dtype))
