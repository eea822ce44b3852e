"""A linear layer that compilers see whole, for exported programs whose sizes are open."""

import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.operator import operator


@operator("vmamba::whole_linear")
def whole_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b; for inference.

    Inductor takes `aten.linear` apart into a product of matrices between two views, and cannot see that the views of a
    map whose height and width are expressions such as (H - 1) // 16 + 1 are the map itself: it copies the map for each.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N), or None.

    Returns:
        (..., N), contiguous.
    """
    return F.linear(x, weight, bias).contiguous()


@whole_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
