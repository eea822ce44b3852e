"""Inputs for the operations of `vmamba.ops`, and one way to run them with gradients."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vmamba.ops.routes import ROUTES


class Result(NamedTuple):
    """Output and gradients of one run."""

    y: Tensor
    grads: list[Tensor]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture
def pass_interpreted() -> Callable[..., None]:
    """Run files of tests in Triton's interpreter, which must be chosen before Triton is imported, and see them pass."""

    def check(*files: str) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert " passed" in run.stdout

    return check


@pytest.fixture
def s6_inputs() -> Callable[..., list[Tensor]]:
    """Make the seven inputs of `selective_scan`; delta is meant to go through softplus."""

    def make(
        batch: int,
        groups: int,
        channels: int,
        N: int,
        L: int,
        *,
        spread: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        KE, wide = groups * channels, torch.float64 if dtype == torch.float64 else torch.float32
        A = -torch.rand(KE, N, dtype=torch.float64).add(0.1).to(wide)
        return [
            random(batch, KE, L, dtype=dtype),
            random(batch, KE, L).mul(spread).to(dtype),
            A,
            random(batch, groups, N, L, dtype=dtype),
            random(batch, groups, N, L, dtype=dtype),
            random(KE, dtype=wide),
            random(KE, dtype=wide),
        ]

    return make


@pytest.fixture
def ss2d_inputs() -> Callable[..., list[Tensor]]:
    """Make the six tensors of `ss2d_scan`."""

    def make(
        batch: int,
        height: int,
        width: int,
        channels: int,
        N: int,
        R: int,
        routes: str = "cross2d",
        *,
        spread: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        K, L, wide = len(ROUTES[routes]), height * width, torch.float64 if dtype == torch.float64 else torch.float32
        return [
            random(batch, L, channels, dtype=dtype),
            random(batch, L, K * (R + 2 * N)).mul(spread).to(dtype),
            random(K, channels, R, dtype=dtype),
            random(K, channels, dtype=wide),
            -torch.rand(K, channels, N, dtype=torch.float64).add(0.1).to(wide),
            random(K, channels, dtype=wide),
        ]

    return make


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run an operation and the gradients of a fixed random functional of its result."""

    def call(op: Callable[..., Tensor], inputs: Sequence[Tensor], **options: Any) -> Result:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        y = op(*leaves, **options)
        weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return Result(y.detach(), list(torch.autograd.grad((y * weights.to(y.dtype)).sum(), leaves)))

    return call
