"""The MLP of narrow maps with its gradients: the kernel in Triton's interpreter, and on a GPU against float64."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vmamba
from vmamba.ops.mlp import api
from vmamba.ops.mlp.reference import mlp_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
NAMES = ("x", "w1", "b1", "w2", "b2")


@outside
def test_kernels_in_the_interpreter(pass_interpreted: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    pass_interpreted(__file__)


def draw(M: int, D: int, hidden: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x, w1, b1, w2, b2 and dy."""
    torch.manual_seed(0)
    shapes = ((M, D), (hidden, D), (hidden,), (D, hidden), (D,), (M, D))
    scales = (1.0, D**-0.5, 1.0, hidden**-0.5, 1.0, 1.0)
    drawn = [scale * torch.randn(shape, device=device) for shape, scale in zip(shapes, scales, strict=True)]
    return [t if t.ndim == 1 else t.to(dtype) for t in drawn]


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Give the result and the gradients of the five arguments, computed in a dtype or in that of each tensor."""
    *leaves, dy = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.detach().to(y.dtype))]


@inside
@pytest.mark.parametrize(("M", "D", "hidden"), [(37, 48, 128), (16, 64, 64), (5, 96, 64)])
def test_kernels(M: int, D: int, hidden: int, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.linear.api import split_channels
    from vmamba.ops.linear.triton_kernels import norm_mlp_kernel
    from vmamba.ops.mlp.triton_kernels import mlp_bwd_kernel

    x, w1, b1, w2, b2, dy = tensors = draw(M, D, hidden)
    parts, programs = split_channels(D), -(-M // 16)
    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    h, dpre = torch.full((M, hidden), torch.nan), torch.full((M, hidden), torch.nan)
    partial = torch.full((programs, hidden), torch.nan)
    norm_mlp_kernel[(programs,)](x, w1, b1, w2, b2, y, M, 0.0, *parts, hidden, False, 16, 32)
    mlp_bwd_kernel[(programs,)](dy, x, w1, b1, w2, dx, h, dpre, partial, M, *parts, hidden, 16, 32)
    ours = [y, dx, dpre.T @ x, partial.sum(0), dy.T @ h, dy.sum(0)]
    results = [gradients(mlp_reference, tensors, dtype) for dtype in (torch.float64, torch.float32)]
    for name, actual, exact, plain in zip(("y", *NAMES), ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name)
    assert_accurate(h, F.gelu(F.linear(x, w1, b1)), F.gelu(F.linear(x.double(), w1.double(), b1.double())), "hidden")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put plain torch in the kernels' place, so that what is around them is tested here; note the widths of calls."""
    pytest.importorskip("triton")
    from vmamba.ops.mlp import triton_kernels

    noted: list[int] = []

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        noted.append(x.shape[-1])
        return mlp_reference(x, *weights)

    def backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            pre = F.linear(x, w1, b1.to(x.dtype)).detach().requires_grad_()
            hidden = F.gelu(pre)
            (dpre,) = torch.autograd.grad(hidden, pre, dy @ w2)
        return dpre @ w1, hidden.detach(), dpre, dpre.sum(0, dtype=b1.dtype)

    monkeypatch.setattr(api, "why_not", lambda x: None)
    monkeypatch.setattr(triton_kernels, "forward", forward)
    monkeypatch.setattr(triton_kernels, "backward", backward)
    return noted


@outside
def test_gradients_around_the_kernels(calls: list[int]) -> None:
    tensors = draw(2 * 3 * 5, 48, 64)
    tensors[0], tensors[-1] = tensors[0].view(2, 3, 5, 48), tensors[-1].view(2, 3, 5, 48)
    for ours, expected in zip(
        gradients(api.mlp, tensors, None), gradients(mlp_reference, tensors, torch.float64), strict=True
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    assert calls == [48]


@outside
def test_a_model_trains_alike_with_it(calls: list[int]) -> None:
    model = vmamba.create_model("vmamba_test", dims=(32, 64, 192, 384), depths=(1, 1, 1, 1), drop_path_rate=0.0)
    model = model.train().bfloat16()
    x = torch.randn(2, 3, 64, 64).bfloat16()

    def differentiate() -> list[Tensor]:
        model.zero_grad()
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        return [p.grad.float() for p in model.parameters()]

    ours = differentiate()
    assert calls == [32, 64, 192]  # 384 channels are no narrow map
    handles = [
        block.mlp.act.register_forward_hook(lambda *_: None) for stage in model.stages() for block in stage.blocks
    ]
    plain = differentiate()
    assert len(calls) == 3  # with a hook inside, the layers run one by one
    for handle in handles:
        handle.remove()
    model.float()
    exact = differentiate()
    distance = [sum((a - b).square().sum() for a, b in zip(grads, exact, strict=True)) for grads in (ours, plain)]
    assert distance[0] <= 2 * distance[1]  # no further from float32 than the plain form in bfloat16


@outside
def test_what_cannot_run_is_said() -> None:
    x, w1, b1, w2, b2, _ = draw(4, 32, 64)
    assert not api.takes_mlp(x, 64)
    with pytest.raises(ValueError, match=r"mlp cannot run: .*(CUDA|Triton)"):
        api.mlp(x, w1, b1, w2, b2)
    with pytest.raises(ValueError, match="w2 must be"):
        api.mlp(x, w1, b1, w2.T, b2)
    with pytest.raises(ValueError, match="one dtype"):
        api.mlp(x.bfloat16(), w1, b1, w2, b2)
    with pytest.raises(ValueError, match="multiple of 64, got 60"):
        api.mlp(x, w1[:60], b1[:60], w2[:, :60], b2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 77, 40001])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 192])
def test_gradients_on_the_gpu(M: int, D: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    tensors = draw(M, D, 4 * D, "cuda", dtype)
    ours = gradients(api.mlp, tensors, None)
    results = [gradients(mlp_reference, tensors, kind) for kind in (torch.float64, dtype)]
    for name, actual, exact, plain in zip(("y", *NAMES), ours, *results, strict=True):
        assert_accurate(actual, plain.to(actual.dtype), exact, name)


@pytest.mark.gpu
def test_the_operator_keeps_its_promises() -> None:
    x, w1, b1, w2, b2, _ = draw(9, 96, 384, "cuda", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]
    found = torch.library.opcheck(
        torch.ops.vmamba.mlp.default,
        leaves,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(found.values()) == {"SUCCESS"}
