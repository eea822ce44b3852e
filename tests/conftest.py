"""What all tests share: the tolerance rule, NaN-filled memory, reference data, markers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

settings.register_profile(
    "vmamba", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("vmamba")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data (a folder 'shared' beside the checkout) is not here")
    return folder


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact values."""
    difference = (actual.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


@pytest.fixture(name="relative_error")
def _relative_error() -> Callable[[Tensor, Tensor], float]:
    return relative_error


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """The tolerance rule of design.md, the only one for backends.

    `assert_accurate(actual, same_precision, exact, name)`: the error of `actual` against `exact`, which the reference
    computed in float64 from the same inputs, is at most twice the error of `same_precision`, which the reference
    computed in the precision of `actual`. Rounding exact results once to the dtype is allowed in any case.
    """

    def check(actual: Tensor, same_precision: Tensor, exact: Tensor, name: str = "result") -> None:
        assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
        assert actual.dtype == same_precision.dtype, f"{name}: {actual.dtype}, not {same_precision.dtype}"
        assert exact.dtype == torch.float64, f"{name}: the exact values must be float64"
        assert torch.isfinite(exact).all(), f"{name}: the exact values must be finite"
        error = relative_error(actual.cpu(), exact.cpu())
        rounding = torch.finfo(actual.dtype).eps / 2
        bound = 2 * max(relative_error(same_precision.cpu(), exact.cpu()), rounding)
        assert error <= bound, f"{name}: relative error {error:.3e}, twice the reference's is {bound:.3e}"

    return check


@pytest.fixture
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty, empty_like and new_empty give with NaN, so that unwritten memory shows."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
