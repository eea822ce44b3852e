"""The fastest form of a model for inference, made from it once."""

import torch
from torch import nn

from vmamba.models.vmamba import VMamba


def fuse(model: VMamba, dtype: torch.dtype | None = None) -> nn.Module:
    """Make the inference form of a model for the device it is on.

    On a GPU norms, activations and residuals go into the matrix products (`fused_gpu`), in 16 bits; compile it with
    `torch.compile`. On the CPU weights are put in the order that oneDNN computes in (`fused_cpu`). One way:
    train, save and change the model it came from, which stays as it is.

    Args:
        model: in any mode, on a CUDA device or the CPU.
        dtype: on a GPU bfloat16 (the default) or float16; on the CPU float32 (the default, but for a model in bfloat16)
            or, where the processor computes in it, bfloat16, which is about twice as fast.

    Returns:
        A module in evaluation mode, without gradients, with `forward`, `forward_features` and `forward_head`. Its
        results are as near to those of the model in float64 as the model's own in that dtype.

    Raises:
        TypeError: what is given is not a VMamba.
        ValueError: the model, its device or the dtype has no such form; says which and why.
    """
    if not isinstance(model, VMamba):
        raise TypeError(f"fuse takes a VMamba, out of any wrapper; got {type(model).__name__}")
    device = next(model.parameters()).device
    if device.type == "cpu":
        from vmamba.models.fused_cpu import fuse_for_cpu

        own = next(model.parameters()).dtype
        return fuse_for_cpu(model, dtype or (own if own == torch.bfloat16 else torch.float32))
    from vmamba.models.fused_gpu import fuse_for_gpu

    return fuse_for_gpu(model, dtype or torch.bfloat16)
