"""The stem's first layer in plain torch: the specification that the kernels are tested against."""

import torch.nn.functional as F
from torch import Tensor


def first_layer_reference(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5
) -> Tensor:
    """Specify `first_layer`."""
    y = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride=2, padding=1).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(y, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps))
