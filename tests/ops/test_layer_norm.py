"""LayerNorm with its backward pass in one kernel, against float64."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import vmamba
from vmamba.ops import nvrtc
from vmamba.ops.layer_norm import cuda_kernels
from vmamba.ops.layer_norm.api import add_norm, layer_norm, skip_norm
from vmamba.ops.layer_norm.reference import add_norm_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [((37, 20), True), ((5, 32), False), ((2, 3, 7, 96), True)]


def gradients(
    dtype: torch.dtype, x: torch.Tensor, parameters: list[torch.Tensor], grads: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Differentiate the plain composition: the norm, and x going round it."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    y = F.layer_norm(leaves[0], leaves[1].shape, leaves[1], leaves[2])
    return torch.autograd.grad([y, leaves[0] * 1], leaves, [g.to(dtype) for g in grads])


def make(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) + 0.5
    return x, [torch.randn(shape[-1], device=device) for _ in range(2)], [torch.randn_like(x) for _ in range(2)]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernel_in_the_interpreter(pass_interpreted: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    pass_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test above starts")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize(("shape", "skip"), SHAPES)
def test_kernel(shape: tuple[int, ...], skip: bool, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.layer_norm.triton_kernels import layer_norm_bwd_kernel, layer_norm_sums_kernel

    x, (gamma, beta), (dy, dskip) = make(shape, "cpu")
    _, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, 1e-5)
    M, D, programs = x.numel() // x.shape[-1], x.shape[-1], 3
    dx, partial = torch.full_like(x, torch.nan), torch.full((programs, 2, D), torch.nan)
    pointers = (dy, dskip if skip else None, x, mean, rstd, gamma, dx, partial)
    layer_norm_bwd_kernel[(programs,)](*pointers, M, D, skip, 4, 128 if D > 32 else 32)
    sums = [torch.full((D,), torch.nan) for _ in range(2)]
    layer_norm_sums_kernel[(2 * -(-D // 16),)](partial, *sums, programs, D, 2, 16)
    grads = [dy, dskip if skip else torch.zeros_like(dy)]
    results = [gradients(dtype, x, [gamma, beta], grads) for dtype in (torch.float64, torch.float32)]
    for name, ours, exact, plain in zip(["x", "gamma", "beta"], (dx, *sums), *results, strict=True):
        assert_accurate(ours, plain, exact, name)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test above starts")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize(("M", "D", "E"), [(37, 20, 0), (5, 32, 0), (9, 20, 40)])
def test_add_norm_kernel(M: int, D: int, E: int, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.layer_norm.triton_kernels import add_norm_kernel

    x, (bias, _), (branch, _) = make((M, D), "cpu")
    total, y = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    tensors = [x, branch, bias, *([2 * torch.randn(M, E) + 1] if E else [])]
    add_norm_kernel[(-(-M // 4),)](*tensors[:3], tensors[-1], total, y, M, 1e-5, 1e-5, D, E, 4, 32, 64)
    results = [add_norm_reference(*(t.to(kind) for t in tensors)) for kind in (torch.float64, torch.float32)]
    for name, ours, exact, plain in zip(["sum", "norm"], (total, y), *results, strict=True):
        assert_accurate(ours, plain, exact, name)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_add_norm_says_what_is_wrong() -> None:
    x, (bias, _), (branch, _) = make((3, 8), "cpu")
    with pytest.raises(ValueError, match="runs on GPUs"):
        add_norm(x, branch, bias)
    with pytest.raises(ValueError, match="branch and bias must be"):
        add_norm(x, branch[:2], bias)
    with pytest.raises(ValueError, match="source must be"):
        add_norm(x, branch, bias, branch[:2])


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.skipif(nvrtc.compiler_unavailable() is not None, reason=f"{nvrtc.compiler_unavailable()}")
@pytest.mark.parametrize(("channels", "capability"), [(96, (9, 0)), (40, (8, 0)), (1024, (10, 0))], ids=str)
@pytest.mark.parametrize("skip", [True, False, None])
def test_the_kernels_compile_for_every_architecture(
    channels: int, capability: tuple[int, int], skip: bool | None
) -> None:
    direction = "forward" if skip is None else "backward"
    plan = cuda_kernels.plan_rows(channels, skip is not None)
    defines = cuda_kernels.row_defines(channels, torch.bfloat16, plan)
    defines += () if skip is None else (("SKIP", int(skip)),)
    cubin = nvrtc.compile_cubin(cuda_kernels.source(direction), capability, defines, use_cache=False)
    assert f"layer_norm_{direction}\0".encode() in cubin
    assert (b"layer_norm_sums\0" in cubin) == (skip is not None)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_plans_cover_a_row_and_leave_no_lane_idle_at_usual_widths() -> None:
    for channels in range(8, 1537, 8):
        lanes, chunks, blocks = cuda_kernels.plan_rows(channels)
        assert lanes * chunks * 8 >= channels
        assert 32 % lanes == 0
        assert chunks <= 6
        assert 2 <= blocks <= 6
    for n in range(6):
        for width in (64, 96):
            lanes, chunks, _ = cuda_kernels.plan_rows(width * 2**n if n < 5 else width * 16)
            assert lanes * chunks * 8 == (width * 2**n if n < 5 else width * 16)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_what_the_backward_does_not_take() -> None:
    low = torch.zeros(3, 16, dtype=torch.bfloat16)
    assert "x is torch.float32" in str(cuda_kernels.why_not(low, None, low.float()))
    assert "gradients of x's dtype" in str(cuda_kernels.why_not(low.float(), None, low))
    assert "multiple of 8 channels" in str(cuda_kernels.why_not(low[:, :4], None, low[:, :4]))
    assert "needs CUDA tensors" in str(cuda_kernels.why_not(low, low, low))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(37, 8), (401408, 96), (70001, 40), (3, 57, 192), (25088, 384), (1025, 768), (9, 1024), (300, 1536)],
    ids=str,
)
def test_gradients_of_16_bit_rows(
    shape: tuple[int, ...],
    skip: bool,
    dtype: torch.dtype,
    assert_accurate: Callable[..., None],
    nan_filled_memory: None,
) -> None:
    x, parameters, grads = make(shape, "cuda")
    x, grads = x.to(dtype), [g.to(dtype) for g in grads]
    if not skip:
        grads[1].zero_()

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        if not skip:
            return torch.autograd.grad(layer_norm(*leaves, 1e-5, dtype), leaves, grads[0])
        around, y = skip_norm(*leaves, 1e-5, dtype)
        return torch.autograd.grad((y, around * 1), leaves, grads)

    ours = run()
    assert cuda_kernels.why_not(grads[0], grads[1], x) is None
    results = [gradients(kind, x, parameters, grads) for kind in (torch.float64, torch.float32)]
    for name, actual, exact, plain in zip(["x", "gamma", "beta"], ours, *results, strict=True):
        assert_accurate(actual, plain.to(actual.dtype), exact, name)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("differentiates", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (37, 40), (2, 57, 3, 192), (401408, 96), (9, 1024), (300, 1536)])
def test_eager_forward_of_16_bit_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    differentiates: bool,
    assert_accurate: Callable[..., None],
    nan_filled_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, (gamma, beta), _ = make(shape, "cuda")
    x = (3 * x + 5).to(dtype)  # far from zero
    launched, forward = [], cuda_kernels.forward
    monkeypatch.setattr(cuda_kernels, "forward", lambda *rest: launched.append(rest) or forward(*rest))
    with torch.set_grad_enabled(differentiates):
        y = layer_norm(x, gamma.requires_grad_(differentiates), beta, 1e-5, dtype)
    assert launched
    assert y.requires_grad == differentiates
    exact, plain = (F.layer_norm(x.to(t), shape[-1:], gamma.to(t), beta.to(t)) for t in (torch.float64, torch.float32))
    assert_accurate(y.detach(), plain.detach().to(dtype), exact.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (2, 7, 7, 384), (1025, 768), (3, 1000), (25088, 512), (9, 3000)])
def test_add_norm_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    x, (bias, _), (branch, _) = make(shape, "cuda")
    wide = 2 * torch.randn(*shape[:-1], 2 * shape[-1], device="cuda") + 1
    for source in ([], [wide.to(dtype)]):
        tensors = [x.to(dtype), branch.to(dtype), bias, *source]
        ours = add_norm(*tensors)
        results = [add_norm_reference(*(t.to(kind) for t in tensors)) for kind in (torch.float64, dtype)]
        for name, actual, exact, plain in zip(["sum", "norm"], ours, *results, strict=True):
            assert_accurate(actual, plain, exact, name)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_off_the_gpu_it_is_torchs() -> None:
    x, (gamma, beta), _ = make((2, 5, 24), "cpu")
    skip, y = skip_norm(x, gamma, beta, 1e-5, torch.float32)
    assert skip is x
    torch.testing.assert_close(y, F.layer_norm(x, (24,), gamma, beta), rtol=0, atol=0)
    low = layer_norm(x.bfloat16(), gamma, beta, 1e-5, torch.bfloat16)
    torch.testing.assert_close(low, F.layer_norm(x.bfloat16().float(), (24,), gamma, beta).bfloat16(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch's advice when it compiles float32
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler of torch 2.11 uses what torch deprecates
@pytest.mark.parametrize("shape", [(1, 2), (7, 96), (2, 57, 3, 192), (3, 1000), (1025, 768), (4, 1536), (70001, 33)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(shape: tuple[int, ...], compiled: bool, assert_accurate: Callable[..., None]) -> None:
    x, parameters, grads = make(shape, "cuda")
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]

    def run(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        skip, y = skip_norm(x, gamma, beta, 1e-5, torch.float32)
        return y, skip * 1

    step = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    ours = torch.autograd.grad(step(*leaves), leaves, grads)
    results = [gradients(dtype, x, parameters, grads) for dtype in (torch.float64, torch.float32)]
    for name, actual, exact, plain in zip(["x", "gamma", "beta"], ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name)


@pytest.mark.gpu
def test_a_model_trains_alike_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else the convolutions err by 7e-4
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_test").cuda().double()
    single = copy.deepcopy(model).float()
    x = torch.randn(4, 3, 64, 64, device="cuda")
    model(x.double()).square().mean().backward()  # float64 takes torch's own backward pass
    single(x).square().mean().backward()
    for (name, exact), ours in zip(model.named_parameters(), single.parameters(), strict=True):
        assert exact.grad is not None
        assert ours.grad is not None
        error = (ours.grad - exact.grad).norm() / exact.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)
