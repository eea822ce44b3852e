"""Inputs of the scan as they are at initialisation: steps from 0.001 to 0.1."""

import torch


def inputs(batch, height, width, channels, rank, dtype, weight_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    step = torch.exp(torch.rand((4, channels), generator=generator) * 4.6 - 6.9)
    tensors = (
        normal(batch, height * width, channels).to(dtype),
        normal(batch, height * width, 4 * (rank + 2)).to(dtype),
        (normal(4, channels, rank) * rank**-0.5).to(weight_dtype),
        step + torch.log(-torch.expm1(-step)),
        -torch.exp(0.3 * normal(4, channels, 1)),
        1 + 0.1 * normal(4, channels),
    )
    return [tensor.cuda() for tensor in tensors]
