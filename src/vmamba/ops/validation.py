"""Checks of what callers pass in, with messages that name the argument, what it is and what it should be."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, letters: str, sizes: Mapping[str, int]) -> None:
    """Raise `ValueError` unless the tensor has the sizes that the letters stand for.

    Args:
        op: The public function, for the message.
        name: The argument, for the message.
        tensor: The argument.
        letters: Dimensions separated by blanks, each a key of `sizes` ("B K N L").
        sizes: The size of each letter.
    """
    expected = [sizes[letter] for letter in letters.split()]
    if list(tensor.shape) != expected:
        legend = ", ".join(letters.split())
        raise ValueError(f"{op}: {name} must be ({legend}) = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_kind(op: str, tensors: Mapping[str, Tensor], optional: Mapping[str, Tensor | None] | None = None) -> None:
    """Raise unless every tensor is floating point (`TypeError`) and on the device of the first (`ValueError`).

    Args:
        op: The public function, for the message.
        tensors: The arguments by name.
        optional: Those that may be None.
    """
    first, device = None, None
    for name, tensor in (*tensors.items(), *((n, t) for n, t in (optional or {}).items() if t is not None)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}; they must share a device")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the state is kept for inputs of a dtype: never less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
