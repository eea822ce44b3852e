import pytest
import torch

from vmamba.ops.linear.whole import whole_linear


@pytest.mark.parametrize("bias", [True, False])
def test_whole_linear(bias):
    x = torch.randn(2, 7, 3, 5).permute(0, 2, 3, 1)
    weight, b = torch.randn(4, 7), torch.randn(4) if bias else None
    y = whole_linear(x, weight, b)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, b))
    assert y.is_contiguous()
    torch.library.opcheck(whole_linear.registered, (x, weight, b))
