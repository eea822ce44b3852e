"""The fused convolutions: in Triton's interpreter (test_linear.py starts the process), and on a GPU against float64."""

import os
from collections.abc import Callable

import pytest
import torch

from vmamba.ops.convolution import reference
from vmamba.ops.convolution.api import conv_norm, depthwise_silu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_linear.py starts")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def check(
    actual: torch.Tensor,
    function: Callable[..., torch.Tensor],
    operands: tuple[torch.Tensor, ...],
    assert_accurate: Callable[..., None],
    **options: bool,
) -> None:
    """Hold a result against the specification in float64 and in its own precision."""
    dtype = operands[0].dtype
    same, wide = [t.to(dtype) for t in operands], [t.double() for t in operands]
    assert_accurate(actual, function(*same, **options), function(*wide, **options), function.__name__)


def draw_conv(B: int, C: int, H: int, W: int, N: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(B, C, H, W, device=device).to(dtype)
    weight = (torch.randn(9 * C, N, device=device) * (9 * C) ** -0.5).to(dtype)
    return [x, weight, *(torch.randn(N, device=device) for _ in range(3))]


@inside
@pytest.mark.parametrize(("H", "W", "rows", "columns", "bias"), [(5, 7, 4, 4, True), (1, 3, 2, 8, False)])
def test_depthwise_silu(
    H: int, W: int, rows: int, columns: int, bias: bool, assert_accurate: Callable[..., None]
) -> None:
    from vmamba.ops.convolution.triton_kernels import depthwise_silu_kernel

    torch.manual_seed(0)
    x, w, b = torch.randn(2, H, W, 20), torch.randn(3, 3, 20), torch.randn(20)
    y = torch.full_like(x, torch.nan)
    grid = (2 * -(-H // rows) * -(-W // columns) * 2,)
    depthwise_silu_kernel[grid](x, w, b, y, H, W, 20, bias, rows, columns, 16)
    filters = w.permute(2, 0, 1)
    check(y, reference.depthwise_silu_reference, (x, filters, b) if bias else (x, filters), assert_accurate)


@inside
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("C", "H", "W", "parts", "gelu", "step"), [(3, 8, 9, (32, 16), True, 32), (24, 7, 6, (32, 0), False, 16)]
)
def test_conv_norm(
    C: int,
    H: int,
    W: int,
    parts: tuple[int, int],
    gelu: bool,
    step: int,
    memory_format: torch.memory_format,
    assert_accurate: Callable[..., None],
) -> None:
    from vmamba.ops.convolution.triton_kernels import conv_norm_kernel

    N, OH, OW = sum(parts), (H + 1) // 2, (W + 1) // 2
    operands = draw_conv(2, C, H, W, N, torch.float32, "cpu")
    operands[0] = operands[0].contiguous(memory_format=memory_format)
    y = torch.full((2, OH, OW, N), torch.nan)
    M = 2 * OH * OW
    sizes = (M, H, W, OH, OW, *operands[0].stride(), 1e-5, C, *parts, gelu, 16, step)
    conv_norm_kernel[(-(-M // 16),)](*operands, y, *sizes)
    check(y, reference.conv_norm_reference, tuple(operands), assert_accurate, gelu=gelu)


@outside
def test_what_cannot_run_is_said() -> None:
    x, w, b, gamma, beta = draw_conv(1, 3, 8, 8, 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"cannot run: .*(CUDA|Triton)"):
        conv_norm(x, w, b, gamma, beta)
    with pytest.raises(ValueError, match="do not agree"):
        conv_norm(x, w[:9], b, gamma, beta)
    with pytest.raises(ValueError, match="gamma must be"):
        conv_norm(x, w, b, gamma[:3], beta)
    with pytest.raises(ValueError, match="do not agree"):
        depthwise_silu(x, torch.zeros(9, 3, 3))
    with pytest.raises(ValueError, match=r"cannot run: .*(CUDA|Triton)"):
        depthwise_silu(torch.zeros(1, 2, 2, 6), torch.zeros(6, 3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("shape", "N", "gelu"),
    [
        ((2, 3, 224, 224), 48, True),
        ((1, 1, 5, 8), 32, True),
        ((8, 48, 112, 112), 96, False),
        ((1, 64, 33, 20), 128, True),
    ],
)
def test_stem_on_a_gpu(
    shape: tuple[int, int, int, int],
    N: int,
    gelu: bool,
    channels_last: bool,
    dtype: torch.dtype,
    assert_accurate: Callable[..., None],
) -> None:
    operands = draw_conv(*shape, N, dtype, "cuda")
    if channels_last:
        operands[0] = operands[0].contiguous(memory_format=torch.channels_last)
    y = conv_norm(*operands, gelu=gelu)
    check(y, reference.conv_norm_reference, tuple(operands), assert_accurate, gelu=gelu)
