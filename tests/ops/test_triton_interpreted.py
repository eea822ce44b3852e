"""The Triton kernels on tiny inputs in Triton's interpreter, which needs no GPU but a process of its own."""

import os
from collections.abc import Callable

import pytest
import torch

from vmamba.ops import cross_merge, cross_scan
from vmamba.ops.launch_table import Launch
from vmamba.ops.s6.reference import selective_scan_reference
from vmamba.ops.ss2d.reference import ss2d_scan_reference

pytest.importorskip("triton")

# Triton 3.6's interpreter itself does what NumPy from 1.25 on warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
SMALL = Launch(positions=8, channels=32, states=2, chunk=16, registers=0)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter(pass_interpreted: Callable[..., None]) -> None:
    pass_interpreted(__file__)


def _ss2d_inputs(B: int, L: int, E: int, K: int, R: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    x, projected, weight = normal(B, L, E).to(dtype), normal(B, L, K * (R + 2 * N)).to(dtype), normal(K, E, R).to(dtype)
    return [x, projected, weight / R**0.5, normal(K, E) - 2, -torch.rand(K, E, N) * 4 - 0.1, normal(K, E)]


@inside
@pytest.mark.parametrize(
    ("routes", "flip_back", "height", "width", "E", "R", "N", "deterministic"),
    [
        ("cross2d", True, 5, 7, 20, 2, 1, False),  # several chunks, and a ragged last tile
        ("cross2d", True, 3, 2, 33, 3, 1, True),  # two blocks of channels, lines shorter than a tile
        ("columns", False, 9, 1, 20, 1, 1, False),
        ("rows", True, 1, 1, 20, 1, 1, False),
        ("bidi", True, 2, 4, 20, 2, 3, False),  # two blocks of states
    ],
)
def test_ss2d(
    routes: str,
    flip_back: bool,
    height: int,
    width: int,
    E: int,
    R: int,
    N: int,
    deterministic: bool,
    assert_accurate: Callable[..., None],
) -> None:
    from vmamba.ops.ss2d import triton_kernels

    K = 2 if routes in ("rows", "columns") else 4
    inputs = _ss2d_inputs(1, height * width, E, K, R, N, torch.float32)
    geometry = {"height": height, "width": width, "routes": routes, "flip_back": flip_back}
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = ss2d_scan_reference(*leaves, **geometry)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).sin()
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))))
    torch.use_deterministic_algorithms(deterministic)
    try:
        y = triton_kernels.forward(*inputs, height, width, routes, flip_back, torch.float32, SMALL)
        gradients = triton_kernels.backward(dy, *inputs, height, width, routes, flip_back, SMALL)
    finally:
        torch.use_deterministic_algorithms(False)
    names = ("y", "x", "projected", "dt_weight", "dt_bias", "A", "D")
    for name, ours, exact, plain in zip(names, (y, *gradients), *results, strict=True):
        assert_accurate(ours, plain, exact, name)


@inside
@pytest.mark.parametrize(("B", "K", "E", "L", "N", "optional"), [(1, 2, 20, 11, 2, True), (1, 1, 34, 3, 3, False)])
def test_s6(B: int, K: int, E: int, L: int, N: int, optional: bool, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.s6 import triton_kernels

    u, delta = torch.randn(B, K * E, L), torch.randn(B, K * E, L)
    delta = delta if optional else delta.abs() / 10
    A, states = -torch.rand(K * E, N) * 4 - 0.1, (torch.randn(B, K, N, L), torch.randn(B, K, N, L))
    inputs = [u, delta, A, *states, *((torch.randn(K * E), torch.randn(K * E) - 1) if optional else (None, None))]
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        y = selective_scan_reference(*leaves, optional)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).sin()
        present = [t for t in leaves if t is not None]
        results.append((y.detach(), *torch.autograd.grad(y, present, dy.to(dtype))))
    y = triton_kernels.forward(*inputs, optional, SMALL)
    gradients = triton_kernels.backward(dy, *inputs, optional, SMALL)
    assert [g is None for g in gradients] == [t is None for t in inputs]
    names = ("y", "u", "delta", "A", "B", "C", "D", "delta_bias")
    for name, ours, exact, plain in zip(names, (y, *[g for g in gradients if g is not None]), *results, strict=False):
        assert_accurate(ours, plain, exact, name)


@inside
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("routes", "flip_back"), [("cross2d", True), ("bidi", True), ("unidi", True), ("rows", False), ("columns", True)]
)
def test_cross_scan_and_merge(routes: str, flip_back: bool, channels_last: bool) -> None:
    from vmamba.ops import routes_triton_kernels as kernels

    shape = (1, 3, 5, 4) if channels_last else (1, 4, 3, 5)
    x = torch.arange(3 * 5 * 4).view(shape).float().requires_grad_()
    ours, plain = (f(x, routes, channels_last=channels_last) for f in (kernels.cross_scan, cross_scan))
    assert torch.equal(ours, plain)
    dy = torch.arange(plain.numel()).view(plain.shape).float()
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, plain)))

    y = dy.clone().requires_grad_()
    size = {"height": 3, "width": 5, "channels_last": channels_last, "flip_back": flip_back}
    ours, plain = (f(y, routes, **size) for f in (kernels.cross_merge, cross_merge))
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(m, y, x.detach())[0] for m in (ours, plain)))


@inside
def test_a_non_finite_input_stays_in_its_own_image() -> None:
    from vmamba.ops.ss2d import triton_kernels

    inputs = _ss2d_inputs(2, 6, 3, 4, 1, 1, torch.float32)
    clean = triton_kernels.forward(*inputs, 2, 3, "cross2d", True, torch.float32, SMALL)
    inputs[0][0, 2, 1] = float("nan")
    spoilt = triton_kernels.forward(*inputs, 2, 3, "cross2d", True, torch.float32, SMALL)
    assert spoilt[0, :, 1].isnan().all()
    assert torch.equal(spoilt[0, :, 0], clean[0, :, 0])
    assert torch.equal(spoilt[1], clean[1])
