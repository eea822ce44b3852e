"""The fused products: in Triton's interpreter on tiny inputs, and on a GPU against float64."""

import os
from collections.abc import Callable

import pytest
import torch

from vmamba.ops.linear import reference
from vmamba.ops.linear.api import linear_gelu, norm_linear, norm_mlp, split_channels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@outside
def test_kernels_in_the_interpreter(pass_interpreted: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    pass_interpreted(__file__, __file__.replace("linear", "convolution"))


def check(
    actual: torch.Tensor,
    function: Callable[..., torch.Tensor],
    operands: tuple[torch.Tensor | None, ...],
    assert_accurate: Callable[..., None],
) -> None:
    """Hold a result against the specification in float64 and in its own precision."""
    wide = [None if t is None else t.double() for t in operands]
    assert_accurate(actual, function(*operands), function(*wide), function.__name__)


def draw(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    scale = {2: lambda s: s[1] ** -0.5, 1: lambda _: 1.0}
    return [(torch.randn(s, device=device) * scale[len(s)](s)).to(dtype) for s in shapes]


@inside
@pytest.mark.parametrize(("M", "parts", "N"), [(37, (32, 16), 40), (20, (64, 0), 70)])
@pytest.mark.parametrize("extras", [True, False])
def test_norm_linear(
    M: int, parts: tuple[int, int], N: int, extras: bool, assert_accurate: Callable[..., None]
) -> None:
    from vmamba.ops.linear.triton_kernels import norm_linear_kernel

    K = sum(parts)
    x, w, b, r = draw(torch.float32, "cpu", (M, K), (N, K), (N,), (M, N))
    x = x * K**0.5 + 1
    y = torch.full((M, N), torch.nan)
    norm_linear_kernel[(-(-M // 16),)](x, w, b, r, y, M, 1e-5, *parts, N, extras, extras, 16, 32)
    operands = (x, w, b, r) if extras else (x, w, None, None)
    check(y, reference.norm_linear_reference, operands, assert_accurate)


@inside
@pytest.mark.parametrize(("M", "K", "N"), [(20, 48, 40), (33, 64, 70)])
def test_linear_gelu(M: int, K: int, N: int, assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.linear.triton_kernels import linear_gelu_kernel

    x, w, b = draw(torch.float32, "cpu", (M, K), (N, K), (N,))
    x, y = x * K**0.5, torch.full((M, N), torch.nan)
    linear_gelu_kernel[(-(-M // 16) * -(-N // 32),)](x, w, b, y, M, K, N, 16, 32, 32)
    check(y, reference.linear_gelu_reference, (x, w, b), assert_accurate)


@inside
@pytest.mark.parametrize("parts", [(32, 16), (64, 0)])
def test_norm_mlp(parts: tuple[int, int], assert_accurate: Callable[..., None]) -> None:
    from vmamba.ops.linear.triton_kernels import norm_mlp_kernel

    M, D, hidden = 37, sum(parts), 96
    x, w1, b1, w2, b2 = draw(torch.float32, "cpu", (M, D), (hidden, D), (hidden,), (D, hidden), (D,))
    x, y = x * D**0.5 + 1, torch.full((M, D), torch.nan)
    norm_mlp_kernel[(3,)](x, w1, b1, w2, b2, y, M, 1e-5, *parts, hidden, True, 16, 32)
    check(y, reference.norm_mlp_reference, (x, w1, b1, w2, b2), assert_accurate)


@outside
def test_widths_split_into_powers_of_two() -> None:
    for width in (32, 48, 64, 96, 128, 192, 256, 384, 768):
        high, low = split_channels(width)
        assert high + low == width
        assert high & (high - 1) == 0
        assert low & (low - 1) == 0
    for width in (8, 24, 224):
        with pytest.raises(ValueError, match=f"{width} channels are not a power of two"):
            split_channels(width)


@outside
def test_what_cannot_run_is_said() -> None:
    x, w, b = draw(torch.float32, "cpu", (4, 32), (16, 32), (16,))
    with pytest.raises(ValueError, match=r"cannot run: .*(CUDA|Triton)"):
        norm_linear(x, w, b)
    with pytest.raises(ValueError, match="do not agree"):
        linear_gelu(x, w[:, :8], b)
    with pytest.raises(TypeError, match="one dtype"):
        linear_gelu(x.bfloat16(), w, b)
    with pytest.raises(ValueError, match="residual must be"):
        norm_linear(x, w, b, x)
    with pytest.raises(ValueError, match="w2 and b2"):
        norm_mlp(x, w, b, w, b)
    with pytest.raises(ValueError, match="multiple of 64, got 16"):
        norm_mlp(x, w, b, w.T, x[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 77, 40000])
@pytest.mark.parametrize("D", [32, 96, 128, 192, 256])
def test_narrow_maps(M: int, D: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    x, w, r = draw(dtype, "cuda", (M, D), (D, D), (M, D))
    w1, w2 = draw(dtype, "cuda", (4 * D, D), (D, 4 * D))
    b, b1 = draw(torch.float32, "cuda", (D,), (4 * D,))
    x = x * D**0.5 + 0.3
    check(norm_linear(x, w), reference.norm_linear_reference, (x, w), assert_accurate)
    check(norm_linear(x, w, b, r), reference.norm_linear_reference, (x, w, b, r), assert_accurate)
    check(norm_mlp(x, w1, b1, w2, b), reference.norm_mlp_reference, (x, w1, b1, w2, b), assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "K"), [(1, 384), (77, 768), (25088, 384), (6272, 768), (1000, 1024)])
def test_wide_maps(M: int, K: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    x, w = draw(dtype, "cuda", (M, K), (4 * K, K))
    (b,) = draw(torch.float32, "cuda", (4 * K,))
    x = x * K**0.5
    check(linear_gelu(x, w, b), reference.linear_gelu_reference, (x, w, b), assert_accurate)
    opchecked = torch.library.opcheck(
        torch.ops.vmamba.linear_gelu, (x[:8], w, b), test_utils=("test_schema", "test_faketensor")
    )
    assert set(opchecked.values()) == {"SUCCESS"}
