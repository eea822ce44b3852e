"""The sum with its norm in plain torch: the specification that the kernel is tested against."""

import torch.nn.functional as F
from torch import Tensor


def add_norm_reference(x: Tensor, branch: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Specify `add_norm`."""
    total = x + (branch + bias.to(x.dtype))
    return total, F.layer_norm(total, total.shape[-1:], eps=eps)
