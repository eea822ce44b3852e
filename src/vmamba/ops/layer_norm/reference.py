"""The sum with its norm in plain torch: the specification that the kernel is tested against."""

import torch.nn.functional as F
from torch import Tensor


def add_norm_reference(
    x: Tensor, branch: Tensor, bias: Tensor, source: Tensor | None = None, eps: float = 1e-5, source_eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Specify `add_norm`."""
    if source is not None:
        branch = branch / (source.var(-1, keepdim=True, unbiased=False) + source_eps).sqrt()
    total = x + (branch + bias.to(x.dtype))
    return total, F.layer_norm(total, total.shape[-1:], eps=eps)
