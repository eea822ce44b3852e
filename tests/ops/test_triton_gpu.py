"""The Triton kernels on a GPU: every dtype, pattern of routes and odd shape against the reference in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vmamba.ops.s6.reference import selective_scan_reference
from vmamba.ops.ss2d.reference import ss2d_scan_reference

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("y", "x", "projected", "dt_weight", "dt_bias", "A", "D")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    B: int, L: int, E: int, R: int, N: int, K: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    A = -torch.rand(K, E, N, device="cuda") * N - 0.3
    x, projected = normal(B, L, E).to(dtype), normal(B, L, K * (R + 2 * N)).to(dtype)
    return [x, projected, (normal(K, E, R) / R**0.5).to(weight_dtype or dtype), normal(K, E) - 3, A, normal(K, E)]


def run(inputs: list[Tensor], dy: Tensor, *geometry: object, out: torch.dtype = FP32) -> tuple[Tensor, ...]:
    from vmamba.ops.ss2d import triton_kernels

    return triton_kernels.forward(*inputs, *geometry, out), *triton_kernels.backward(dy, *inputs, *geometry)


@pytest.mark.parametrize("out", [FP32, BF16])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize(
    ("B", "H", "W", "E", "R", "N", "routes", "flip_back"),
    [
        (2, 14, 14, 192, 12, 1, "cross2d", True),
        (2, 14, 14, 96, 6, 16, "cross2d", True),
        (3, 13, 9, 45, 5, 3, "cross2d", True),
        (2, 1, 37, 70, 3, 20, "cross2d", True),
        (2, 11, 17, 70, 48, 1, "bidi", True),
        (2, 11, 17, 70, 7, 4, "unidi", True),
        (2, 11, 17, 72, 7, 1, "rows", False),
        (2, 11, 17, 72, 7, 5, "columns", True),
    ],
)
def test_ss2d_is_accurate(
    B: int,
    H: int,
    W: int,
    E: int,
    R: int,
    N: int,
    routes: str,
    flip_back: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out: torch.dtype,
    assert_accurate: Callable[..., None],
) -> None:
    inputs = make_inputs(B, H * W, E, R, N, 2 if routes in ("rows", "columns") else 4, dtype, weight_dtype)
    geometry = {"height": H, "width": W, "routes": routes, "flip_back": flip_back}
    dy = torch.randn(B, H * W, E, device="cuda").to(out)
    results = []
    for exact in (True, False):
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in inputs]
        y = ss2d_scan_reference(*leaves, **geometry, out_dtype=None if exact else out)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    ours = run(inputs, dy, H, W, routes, flip_back, out=out)
    for name, actual, exact, plain in zip(NAMES, ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("B", "K", "E", "L", "N"), [(2, 4, 24, 197, 1), (2, 2, 33, 100, 16), (1, 1, 40, 1000, 5)])
def test_selective_scan_is_accurate(
    B: int, K: int, E: int, L: int, N: int, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    from vmamba.ops.s6 import triton_kernels

    sequences = [torch.randn(s, device="cuda").to(dtype) for s in ((B, K * E, L),) * 2 + ((B, K, N, L),) * 2]
    A = -torch.rand(K * E, N, device="cuda") * N - 0.3
    inputs = [
        *sequences[:2],
        A,
        *sequences[2:],
        torch.randn(K * E, device="cuda"),
        torch.randn(K * E, device="cuda") - 2,
    ]
    dy = torch.randn(B, K * E, L, device="cuda")
    results = []
    for exact in (True, False):
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in inputs]
        y = selective_scan_reference(*leaves, True)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    ours = (triton_kernels.forward(*inputs, True), *triton_kernels.backward(dy, *inputs, True))
    for name, actual, exact, plain in zip(("y", "u", "delta", "A", "B", "C", "D", "bias"), ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name)


@pytest.mark.parametrize(("E", "N"), [(64, 1), (200, 20)])
def test_deterministic_mode_repeats_to_the_bit(E: int, N: int, deterministic: None) -> None:
    inputs, dy = make_inputs(2, 56 * 30, E, 6, N, 4, BF16), torch.randn(2, 56 * 30, E, device="cuda")
    first = run(inputs, dy, 56, 30, "cross2d", True)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, dy, 56, 30, "cross2d", True), strict=True))
    torch.use_deterministic_algorithms(False)
    for a, b in zip(first, run(inputs, dy, 56, 30, "cross2d", True), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_strided_inputs_give_the_same() -> None:
    inputs, dy = make_inputs(2, 63, 40, 5, 2, 4, BF16), torch.randn(2, 63, 40, device="cuda")
    wide = torch.zeros(2, 63, 61, device="cuda", dtype=BF16)
    wide[..., 7:47] = inputs[0]
    strided = [wide[..., 7:47], inputs[1].transpose(0, 1).contiguous().transpose(0, 1), *inputs[2:]]
    for a, b in zip(run(inputs, dy, 9, 7, "cross2d", True), run(strided, dy, 9, 7, "cross2d", True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_more_than_2_to_the_31_elements() -> None:
    from vmamba.ops.ss2d import triton_kernels

    batch, side, E = 9, 1024, 256
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x, projected, *weights = make_inputs(batch, side * side, E, 4, 1, 4, BF16)
    assert x.numel() > 2**31
    y = triton_kernels.forward(x, projected, *weights, side, side, "cross2d", True, FP32)
    last = triton_kernels.forward(x[-1:], projected[-1:], *weights, side, side, "cross2d", True, FP32)
    torch.testing.assert_close(y[-1:], last, rtol=1e-4, atol=1e-4)


def test_image_size_compiles_nothing_new() -> None:
    from vmamba.ops import scan_triton_kernels

    device = torch.cuda.current_device()
    counts = []
    for H, W in ((40, 48), (41, 47), (64, 33), (57, 96)):
        inputs = make_inputs(4, H * W, 64, 4, 1, 4, BF16)
        run(inputs, torch.randn(4, H * W, 64, device="cuda"), H, W, "cross2d", True)
        counts.append(len(scan_triton_kernels.scan_bwd_kernel.device_caches[device][0]))
    assert len(set(counts)) == 1
