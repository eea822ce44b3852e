"""The stem's first layer with its gradients: the kernel in Triton's interpreter, and on a GPU against float64."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vmamba
from vmamba.ops.linear.api import split_channels
from vmamba.ops.stem import api
from vmamba.ops.stem.reference import first_layer_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
NAMES = ("y", "weight", "bias", "gamma", "beta")


@outside
def test_kernel_in_the_interpreter(pass_interpreted: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    pass_interpreted(__file__)


def draw(
    shape: tuple[int, int, int, int], N: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return x, weight, bias, gamma, beta and dy."""
    torch.manual_seed(0)
    B, C, H, W = shape
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(N, C, 3, 3, device=device) * (9 * C) ** -0.5).to(dtype).float()
    vectors = [torch.randn(N, device=device) for _ in range(3)]
    return [x, weight, *vectors, torch.randn(B, (H + 1) // 2, (W + 1) // 2, N, device=device).to(dtype)]


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Give the result and the gradients of all but the image, computed in a dtype or in that of each tensor."""
    x, *parameters, dy = [(t if dtype is None else t.to(dtype)).detach() for t in tensors]
    leaves = [t.requires_grad_() for t in parameters]
    y = function(x, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@inside
@pytest.mark.parametrize(
    ("shape", "N", "programs"), [((2, 3, 7, 6), 48, 3), ((1, 1, 5, 9), 32, 1), ((2, 1, 8, 8), 24 * 2, 2)]
)
def test_kernel(shape: tuple[int, int, int, int], N: int, programs: int, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.stem.triton_kernels import stem_bwd_kernel

    x, weight, bias, gamma, beta, dy = tensors = draw(shape, N)
    _, C, H, W = shape
    _, OH, OW, _ = dy.shape
    step, M = 32 if C == 3 else 16, dy.numel() // N
    filters = weight.permute(2, 3, 1, 0).reshape(9 * C, N).contiguous()
    partial = torch.full((programs, step + 2, N), torch.nan)
    stem_bwd_kernel[(programs,)](
        dy, x, filters, bias, gamma, beta, partial, M, H, W, OH, OW, *x.stride(), 1e-5, C, *split_channels(N), 16, step
    )
    total = partial.sum(0)
    dweight = total[: 9 * C].view(3, 3, C, N).permute(3, 2, 0, 1)
    ours = [dweight, total[9 * C], total[step], total[step + 1]]
    results = [gradients(first_layer_reference, tensors, dtype)[1:] for dtype in (torch.float64, torch.float32)]
    for name, actual, exact, plain in zip(NAMES[1:], ours, *results, strict=True):
        assert_accurate(actual, plain, exact, name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put plain torch in the kernels' place, so that what is around them is tested here; note the channels of calls."""
    pytest.importorskip("triton")
    from vmamba.ops.convolution import triton_kernels as forward_kernels
    from vmamba.ops.stem import triton_kernels

    noted: list[int] = []

    def unrolled(x: Tensor, filters: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        weight = filters.view(3, 3, x.shape[1], -1).permute(3, 2, 0, 1)
        return first_layer_reference(x, weight, bias, gamma, beta, eps)

    def forward(*args: object) -> Tensor:
        noted.append(args[1].shape[1])  # type: ignore[attr-defined]
        return unrolled(*args[:6])  # type: ignore[arg-type]

    def backward(dy: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        *parameters, eps = rest
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in parameters]  # type: ignore[attr-defined]
            y = unrolled(x, *leaves, eps)
        return torch.autograd.grad(y, leaves, dy)

    for module in (api, forward_kernels):
        monkeypatch.setattr(module, "why_not", lambda x: None, raising=False)
    monkeypatch.setattr(forward_kernels, "conv_norm", forward)
    monkeypatch.setattr(triton_kernels, "backward", backward)
    return noted


@outside
def test_gradients_around_the_kernel(calls: list[int]) -> None:
    tensors = draw((2, 3, 10, 12), 48)
    for name, ours, expected in zip(
        NAMES,
        gradients(api.first_layer, tensors, None),
        gradients(first_layer_reference, tensors, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    assert calls == [48]


@outside
def test_the_stem_takes_it_where_it_can(calls: list[int]) -> None:
    torch.manual_seed(0)
    stem = vmamba.create_model("vmamba_tiny", depths=(1,), dims=64).patch_embed
    plain = copy.deepcopy(stem)
    plain[4].register_forward_hook(lambda *_: None)  # a hook inside, so the layers run one by one
    x = torch.randn(2, 3, 32, 40).contiguous(memory_format=torch.channels_last)
    results = []
    for layers in (stem, plain):
        y = layers(x)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in layers.parameters())])
    assert calls == [32]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    image = x.clone().requires_grad_()
    stem(image).sum().backward()  # the gradient of the image is for the layers one by one
    assert len(calls) == 1
    assert image.grad is not None
    wide = vmamba.create_model("vmamba_tiny", depths=(1,), dims=64, in_chans=16).patch_embed
    wide(torch.randn(1, 16, 32, 32))
    assert len(calls) == 1


@outside
def test_what_cannot_run_is_said() -> None:
    x, weight, bias, gamma, beta, _ = draw((1, 3, 8, 8), 32)
    with pytest.raises(ValueError, match=r"first_layer cannot run: .*(CUDA|Triton)"):
        api.first_layer(x, weight, bias, gamma, beta)
    with pytest.raises(ValueError, match="do not agree"):
        api.first_layer(x[:, :2], weight, bias, gamma, beta)
    with pytest.raises(ValueError, match="gamma must be"):
        api.first_layer(x, weight, bias, gamma[:3], beta)
    with pytest.raises(ValueError, match="no gradient of the image"):
        api.first_layer(x.requires_grad_(), weight, bias, gamma, beta)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "N"), [((4, 3, 224, 224), 48), ((1, 1, 5, 8), 32), ((3, 4, 33, 47), 128), ((2, 3, 64, 64), 64)]
)
def test_gradients_on_the_gpu(
    shape: tuple[int, int, int, int], N: int, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    tensors = draw(shape, N, "cuda", dtype)
    ours = gradients(api.first_layer, tensors, None)
    results = [gradients(first_layer_reference, tensors, kind) for kind in (torch.float64, dtype)]
    for name, actual, exact, plain in zip(NAMES, ours, *results, strict=True):
        assert_accurate(actual, plain.to(actual.dtype), exact, name)


@pytest.mark.gpu
def test_the_operator_keeps_its_promises() -> None:
    x, weight, *vectors, _ = draw((2, 3, 16, 16), 48, "cuda", torch.bfloat16)
    filters = weight.to(x.dtype).permute(2, 3, 1, 0).reshape(27, 48)
    leaves = [t.requires_grad_() for t in (filters, *vectors)]
    found = torch.library.opcheck(
        torch.ops.vmamba.stem_first_layer.default,
        (x, *leaves, 1e-5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(found.values()) == {"SUCCESS"}
