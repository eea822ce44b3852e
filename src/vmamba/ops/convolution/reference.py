"""The convolutions in plain torch: the specification that the kernels are tested against."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Specify `depthwise_silu`."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.unsqueeze(1), bias, padding=1, groups=x.shape[-1])
    return F.silu(y).permute(0, 2, 3, 1)


def conv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, gelu: bool = False
) -> Tensor:
    """Specify `conv_norm`."""
    filters = weight.view(3, 3, x.shape[1], -1).permute(3, 2, 0, 1)
    y = F.conv2d(x, filters, bias.to(x.dtype), stride=2, padding=1).permute(0, 2, 3, 1)
    y = F.layer_norm(y, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)
    return F.gelu(y) if gelu else y
