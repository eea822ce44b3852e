"""The depthwise convolution with SiLU in CUDA: compiled for every architecture here, against float64 on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vmamba.ops import nvrtc
from vmamba.ops.convolution import cuda_kernels
from vmamba.ops.convolution.api import depthwise_silu, takes_depthwise
from vmamba.ops.convolution.reference import depthwise_silu_reference

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)
SHAPES = [(1, 1, 1, 32), (2, 57, 3, 96), (64, 56, 56, 96), (4, 14, 14, 384), (3, 70, 9, 1000), (2, 25, 41, 6)]


@needs_compiler
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("channels", "dtype", "weight_dtype", "bias", "capability"),
    [
        (96, torch.bfloat16, torch.float32, False, (9, 0)),
        (6, torch.float16, torch.float16, True, (8, 0)),
        (768, torch.bfloat16, torch.bfloat16, True, (10, 0)),
    ],
)
def test_compiles_for_every_architecture(
    channels: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias: bool,
    capability: tuple[int, int],
    backward: bool,
) -> None:
    plan = cuda_kernels.plan_depthwise((2, 20, 20, channels), 132, backward)
    defines = cuda_kernels.depthwise_defines(channels, dtype, weight_dtype, bias, plan)
    cubin = nvrtc.compile_cubin(cuda_kernels.source(backward), capability, defines, use_cache=False)
    assert (b"depthwise_silu_backward\0" if backward else b"depthwise_silu\0") in cubin


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 56, 56, 96), (2, 200, 320, 96), (128, 7, 7, 768)])
def test_plans_cover_the_map_and_fill_the_device(shape: tuple[int, int, int, int], backward: bool) -> None:
    batch, height, width, channels = shape
    plan = cuda_kernels.plan_depthwise(shape, 132, backward)
    tiles = -(-height // plan.rows)
    assert 1 <= plan.rows <= height
    slots = plan.threads // 16
    items = batch * tiles * -(-width // plan.columns)
    groups = -(-channels // 32)
    if backward:  # each row of blocks writes ten sums a channel
        assert plan.grid * groups <= max(132 * plan.blocks, groups)
    else:
        assert plan.grid * slots >= items
    if batch * height * width * channels > 2**22:
        assert min(plan.grid * slots, items) * groups * 16 >= 0.7 * 132 * plan.threads
    assert plan.rows >= 4 or height < 8


def test_only_16_bits_and_even_channels() -> None:
    assert "bfloat16 or float16" in str(cuda_kernels.why_not_map(torch.zeros(1, 1, 4)))
    assert "even number of channels" in str(cuda_kernels.why_not_map(torch.zeros(1, 1, 3, dtype=torch.float16)))
    assert "need CUDA tensors" in str(cuda_kernels.why_not_map(torch.zeros(1, 1, 4, dtype=torch.float16)))
    assert not takes_depthwise(torch.zeros(1, 2, 2, 4, dtype=torch.float16))


def test_a_block_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmamba.models import layers

    calls: list[int] = []

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape[-1])
        return depthwise_silu_reference(x, weight, bias)

    monkeypatch.setattr(layers, "takes_depthwise", lambda x: True)
    monkeypatch.setattr(layers, "depthwise_silu", plain)
    torch.manual_seed(0)
    x, act = torch.randn(2, 5, 6, 8, requires_grad=True), torch.nn.SiLU()
    for bias in (True, False):
        conv = layers.DepthwiseConv2d(8, 3, bias=bias)
        results = []
        for step in (lambda c=conv: layers.convolve_activate(x, c, act), lambda c=conv: act(c(x))):
            y = step()
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert calls == [8, 8]
    heard = []
    act.register_forward_hook(lambda *_: heard.append(True))
    layers.convolve_activate(x, conv, act)  # a hook wants to hear the activation
    layers.convolve_activate(x, layers.DepthwiseConv2d(8, 5, bias=False), torch.nn.SiLU())
    layers.convolve_activate(x, conv, torch.nn.GELU())
    assert len(calls) == 2
    assert heard == [True]
    torch.testing.assert_close(layers.convolve_activate(x, None, torch.nn.SiLU()), torch.nn.functional.silu(x))


# ---- on a GPU ----


def gradients(
    function: Callable[..., torch.Tensor], operands: Sequence[torch.Tensor], dtype: torch.dtype | None
) -> tuple[torch.Tensor, ...]:
    """Compute y and differentiate by all operands but the last, dy; in a dtype, or in that of each operand."""
    *leaves, dy = [(t if dtype is None else t.to(dtype)).detach() for t in operands]
    y = function(*(t.requires_grad_() for t in leaves))
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions(
    shape: tuple[int, ...],
    bias: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    assert_accurate: Callable[..., None],
    nan_filled_memory: Any,
) -> None:
    torch.manual_seed(0)
    dtype, weight_dtype = dtypes
    x, dy = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    parameters = [torch.randn(shape[-1], 3, 3, device="cuda"), torch.randn(shape[-1], device="cuda")][: 1 + bias]
    parameters = [t.to(weight_dtype) for t in parameters]
    operands = [x, *parameters, dy]
    ours = gradients(depthwise_silu, operands, None)
    results = [gradients(depthwise_silu_reference, operands, kind) for kind in (torch.float64, torch.float32)]
    for name, actual, exact, plain in zip(["y", "x", "weight", "bias"], ours, *results, strict=False):
        assert_accurate(actual, plain.to(actual.dtype), exact, name)
    again = gradients(depthwise_silu, operands, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.gpu
def test_a_map_that_is_not_contiguous(assert_accurate: Callable[..., None]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 9, 33, device="cuda").bfloat16()[..., 1:]
    w = torch.randn(32, 3, 3, device="cuda")
    y = depthwise_silu(x, w)
    exact, plain = (depthwise_silu_reference(x.to(kind), w.to(kind)) for kind in (torch.float64, torch.float32))
    assert_accurate(y, plain.to(y.dtype), exact, "y")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch's advice when it compiles float32
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler of torch 2.11 uses what torch deprecates
def test_operators_keep_their_contract_in_compiled_graphs() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 9 * 14, 64, device="cuda").bfloat16().requires_grad_()
    x = rows.detach().view(2, 9, 14, 64).requires_grad_()
    w, b = torch.randn(64, 3, 3, device="cuda", requires_grad=True), torch.randn(64, device="cuda", requires_grad=True)
    found = torch.library.opcheck(
        torch.ops.vmamba.depthwise_silu.default,
        (rows, w, b, 9, 14),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )
    assert set(found.values()) == {"SUCCESS"}

    def run(x: torch.Tensor) -> torch.Tensor:
        return depthwise_silu(x, w, b) if takes_depthwise(x) else x

    expected = torch.autograd.grad(run(x).float().square().sum(), [x, w, b])
    actual = torch.autograd.grad(torch.compile(run, fullgraph=True)(x).float().square().sum(), [x, w, b])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not torch.equal(run(x.detach()), x.detach())
