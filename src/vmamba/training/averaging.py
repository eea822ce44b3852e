"""Gradients of several processes, averaged in one piece.

DistributedDataParallel cuts gradients into buckets, and a compiled model with them, so as to send the first while the
last are computed. A backward pass that is one CUDA graph has no such in-between: it is launched whole, after which the
gradients lie there all at once. They are then copied together by a few kernels, where DistributedDataParallel takes one
for each parameter, and sent as one message.
"""

import torch
from torch import Tensor, distributed, nn


class GradientAverage:
    """Makes the weights of all processes those of the first, and, when called, their gradients one average.

    Every process must make and call it, and have the same model.

    Args:
        model: On its device; parameters of one dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), 0)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first = self._parameters[0]
        self._whole = first.new_zeros(sum(parameter.numel() for parameter in self._parameters))
        pieces = self._whole.split([parameter.numel() for parameter in self._parameters])
        self._parts = [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]

    def __call__(self) -> None:
        """Replace the gradients by their mean over all processes; where there is none, it counts as zero."""
        even: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            grad = parameter.grad
            if grad is None:
                part.zero_()
            elif grad.stride() == part.stride():
                even[0].append(part)
                even[1].append(grad)
            else:  # one of these among the others would have every tensor copied by a kernel of its own
                part.copy_(grad)
            parameter.grad = part
        torch._foreach_copy_(*even)
        self._whole /= distributed.get_world_size()
        distributed.all_reduce(self._whole)
