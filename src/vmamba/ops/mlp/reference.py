"""The MLP in plain torch: the specification that the kernels are tested against."""

import torch.nn.functional as F
from torch import Tensor


def mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Specify `mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1.to(w1.dtype))), w2, b2.to(w2.dtype))
