"""selective_scan: the reference against published numbers, the chunked backend against the reference."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba.ops import selective_scan
from vmamba.ops.s6 import chunked
from vmamba.ops.s6.reference import selective_scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def compare(results, relative_error, bound):
    """Check value and gradients of the second result against the first."""
    expected, actual = results
    assert relative_error(actual.y, expected.y) <= bound
    for name, grad, reference in zip(NAMES, actual.grads, expected.grads, strict=False):
        assert relative_error(grad, reference) <= bound, name


def test_recurrence_by_hand():
    # One channel, A = -1, Δ = ln 2: the state halves at each step.
    u = torch.tensor([[[1.0, 0.0, 2.0]]], dtype=torch.float64)
    dt = torch.full_like(u, 2.0).log()
    ones = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    y = selective_scan_reference(u, dt, -ones.new_ones(1, 1), ones, 3 * ones, ones.new_full((1,), 10.0))
    h = dt[0, 0, 0] * torch.tensor([1.0, 0.5, 2.25], dtype=torch.float64)
    torch.testing.assert_close(y[0, 0], 3 * h + 10 * u[0, 0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_published_numbers(shared, backend):
    golden = json.loads((shared / "reference" / "formula_golden.json").read_text())["cases"]["selective_scan_unit"]
    B, K, C, N, L = (golden["dims"][letter] for letter in "BKCNL")

    def formula(shape, phase, scale=1.0, offset=0.0):
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return (offset + scale * torch.sin(n * 0.37 + phase)).view(shape).requires_grad_()

    inputs = {
        "u": formula((B, K * C, L), 0),
        "delta": formula((B, K * C, L), 1, 0.5),
        "A": formula((K * C, N), 2, 0.4, -0.7),
        "B": formula((B, K, N, L), 3),
        "C": formula((B, K, N, L), 4),
        "D": formula((K * C,), 5),
        "delta_bias": formula((K * C,), 6, 0.3, -0.5),
    }
    y = selective_scan(*inputs.values(), delta_softplus=True, backend=backend)
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.float64) * 0.13).view_as(y)).sum().backward()
    # The published sums were taken in float32: their error is a few parts in a million of the sum of magnitudes.
    assert y.sum().item() == pytest.approx(golden["y_sum"], abs=2e-6 * golden["y_abs"])
    assert y.abs().sum().item() == pytest.approx(golden["y_abs"], rel=2e-6)
    assert y.flatten()[: len(golden["y_first"])].tolist() == pytest.approx(golden["y_first"], abs=2e-6)
    for name, sums in golden["grads"].items():
        grad = inputs[name].grad
        assert grad.sum().item() == pytest.approx(sums["sum"], abs=2e-6 * sums["abs"]), name
        assert grad.abs().sum().item() == pytest.approx(sums["abs"], rel=2e-6), name


LENGTHS = [
    1,
    2,
    3,
    5,
    16,
    37,
    100,
    pytest.param(1000, marks=pytest.mark.slow),
    pytest.param(5000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("N", [1, 3])
def test_chunked_equals_the_reference_in_float64(s6_inputs, run, relative_error, L, N):
    inputs = s6_inputs(2, 2, 3, N, L)
    results = [run(selective_scan, inputs, delta_softplus=True, backend=name) for name in ("reference", "chunked")]
    compare(results, relative_error, 1e-10)


@pytest.mark.parametrize("spread", [1e-6, 30.0, 1e3, 1e6])
def test_extreme_delta(s6_inputs, run, relative_error, spread):
    inputs = s6_inputs(1, 2, 3, 2, 150, spread=spread)
    results = [run(selective_scan, inputs, delta_softplus=True, backend=name) for name in ("reference", "chunked")]
    compare(results, relative_error, 1e-10)


@pytest.mark.parametrize("optional", [0, 1, 2])
def test_without_softplus_and_optional_inputs(s6_inputs, run, relative_error, optional):
    inputs = s6_inputs(2, 2, 3, 2, 20)[: 5 + optional]
    inputs[1] = inputs[1].abs()
    results = [run(selective_scan, inputs, backend=name) for name in ("reference", "chunked")]
    compare(results, relative_error, 1e-10)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=25)
def test_any_shape(s6_inputs, run, relative_error, batch, groups, channels, N, L):
    inputs = s6_inputs(batch, groups, channels, N, L)
    results = [run(selective_scan, inputs, delta_softplus=True, backend=name) for name in ("reference", "chunked")]
    compare(results, relative_error, 1e-10)


def test_work_in_slabs_gives_the_same(s6_inputs, run, relative_error, monkeypatch):
    inputs = s6_inputs(5, 2, 3, 2, 30)
    whole = run(selective_scan, inputs, delta_softplus=True)
    monkeypatch.setattr(chunked, "SLAB_ELEMENTS", 400)
    compare([whole, run(selective_scan, inputs, delta_softplus=True)], relative_error, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 4])
def test_accuracy_in_lower_precision(s6_inputs, run, assert_accurate, dtype, N):
    inputs = s6_inputs(2, 2, 8, N, 120, dtype=dtype)
    same = run(selective_scan, inputs, delta_softplus=True, backend="reference")
    exact = run(selective_scan, [t.double() for t in inputs], delta_softplus=True, backend="reference")
    actual = run(selective_scan, inputs, delta_softplus=True, backend="chunked")
    assert actual.y.dtype == torch.float32
    assert_accurate(actual.y, same.y, exact.y)
    for name, *grads in zip(NAMES, actual.grads, same.grads, exact.grads, strict=True):
        assert_accurate(*grads, name)


def test_unwritten_memory_does_not_show(s6_inputs, run, nan_filled_memory):
    for L in (1, 7, 50):
        result = run(selective_scan, s6_inputs(2, 2, 3, 2, L), delta_softplus=True)
        assert torch.isfinite(result.y).all()
        assert all(torch.isfinite(grad).all() for grad in result.grads)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_belong(s6_inputs, backend, bad):
    inputs = s6_inputs(2, 2, 3, 2, 50)
    clean = selective_scan(*inputs, delta_softplus=True, backend=backend)
    inputs[0][1, 4, 23] = bad
    y = selective_scan(*inputs, delta_softplus=True, backend=backend)
    assert not torch.isfinite(y[1, 4, 23:30]).any()
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 4, 23:] = True
    assert torch.equal(y[~touched], clean[~touched])


def test_one_group_may_come_without_its_dimension(s6_inputs):
    u, delta, A, B, C, *_ = s6_inputs(2, 1, 3, 2, 20)
    assert torch.equal(selective_scan(u, delta, A, B[:, 0], C[:, 0]), selective_scan(u, delta, A, B, C))


def test_mixed_dtypes_take_the_wider(s6_inputs):
    inputs = s6_inputs(1, 2, 3, 2, 20, dtype=torch.float32)
    rounded = [inputs[0].bfloat16(), *inputs[1:]]
    assert torch.equal(selective_scan(*rounded), selective_scan(inputs[0].bfloat16().float(), *inputs[1:]))


def test_non_contiguous_inputs(s6_inputs, run):
    inputs = s6_inputs(2, 2, 3, 2, 20)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    expected, actual = run(selective_scan, inputs), run(selective_scan, strided)
    assert torch.equal(actual.y, expected.y)
    assert all(map(torch.equal, actual.grads, expected.grads))


def test_mistakes_are_explained(s6_inputs):
    u, delta, A, B, C, D, bias = s6_inputs(2, 2, 3, 2, 20)
    with pytest.raises(ValueError, match=r"delta must be \(B, K·E, L\) = \(2, 6, 20\), got \(2, 6, 19\)"):
        selective_scan(u, delta[..., :19], A, B, C)
    with pytest.raises(ValueError, match=r"A must be \(K·E, N\)"):
        selective_scan(u, delta, A[:, 0], B, C)
    with pytest.raises(ValueError, match=r"6 channels, which B's 4 groups do not divide"):
        selective_scan(u, delta, A, B.repeat(1, 2, 1, 1), C)
    with pytest.raises(ValueError, match=r"D must be \(K·E\) = \(6,\), got \(5,\)"):
        selective_scan(u, delta, A, B, C, D[:5], bias)
    with pytest.raises(TypeError, match=r"u must be a floating-point tensor, got torch.int64"):
        selective_scan(u.long(), delta, A, B, C)
    with pytest.raises(TypeError, match="D must be a tensor, got float"):
        selective_scan(u, delta, A, B, C, 1.0)
    with pytest.raises(TypeError, match="C must be a tensor, got NoneType"):
        selective_scan(u, delta, A, B, None)
    with pytest.raises(ValueError, match=r"there must be a position and a state; u is \(2, 6, 0\), A \(6, 2\)"):
        selective_scan(u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0])
    with pytest.raises(ValueError, match=r"6 channels, which B's 0 groups do not divide"):
        selective_scan(u, delta, A, B[:, :0], C[:, :0])
    with pytest.raises(ValueError, match="delta is on meta, u on cpu"):
        selective_scan(u, delta.to("meta"), A, B, C)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'chunked', 'reference', got 'fast'"):
        selective_scan(u, delta, A, B, C, backend="fast")
