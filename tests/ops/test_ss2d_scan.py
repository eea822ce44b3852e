"""ss2d_scan: the reference against the published composition, the chunked backend against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba.ops import cross_merge, cross_scan, selective_scan, ss2d_scan
from vmamba.ops.routes import ROUTES
from vmamba.ops.s6 import chunked

NAMES = ("x", "projected", "dt_weight", "dt_bias", "A", "D")
PATTERNS = [(routes, True) for routes in ROUTES] + [("rows", False), ("columns", False)]
SIZES = [(1, 1), (4, 4), (3, 7), (7, 3), (1, 20), (20, 1)]


def compare(results, relative_error, bound):
    """Check value and gradients of the second result against the first."""
    expected, actual = results
    assert relative_error(actual.y, expected.y) <= bound
    for name, grad, reference in zip(NAMES, actual.grads, expected.grads, strict=True):
        assert relative_error(grad, reference) <= bound, name


def both(run, inputs, **options):
    return [run(ss2d_scan, inputs, backend=backend, **options) for backend in ("reference", "chunked")]


def test_projecting_before_the_scan_is_projecting_after_it(relative_error):
    # As the published code composes it: scan the map four times, then project each copy with its own matrix.
    B, H, W, E, N, R = 2, 3, 4, 5, 2, 3
    x = torch.randn(B, E, H, W, dtype=torch.float64)
    x_proj, dt_weight = torch.randn(4, R + 2 * N, E).double(), torch.randn(4, E, R).double()
    dt_bias, A, D = torch.randn(4, E).double(), -torch.rand(4, E, N).double(), torch.randn(4, E).double()
    xs = cross_scan(x)
    rank, Bs, Cs = torch.einsum("bkel,kce->bkcl", xs, x_proj).split([R, N, N], dim=2)
    delta = torch.einsum("bkrl,ker->bkel", rank, dt_weight)
    ys = selective_scan(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        A.flatten(0, 1),
        Bs,
        Cs,
        D.flatten(),
        dt_bias.flatten(),
        True,
        backend="reference",
    )
    expected = cross_merge(ys.view(B, 4, E, -1), height=H, width=W).flatten(2).transpose(1, 2)
    tokens = x.flatten(2).transpose(1, 2)
    projected = F.linear(tokens, x_proj.flatten(0, 1))
    for backend in ("reference", "chunked"):
        y = ss2d_scan(tokens, projected, dt_weight, dt_bias, A, D, height=H, width=W, backend=backend)
        assert relative_error(y, expected) <= 1e-14


@pytest.mark.parametrize(("routes", "flip_back"), PATTERNS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_chunked_equals_the_reference_in_float64(ss2d_inputs, run, relative_error, routes, flip_back, height, width):
    inputs = ss2d_inputs(2, height, width, 5, 2, 3, routes)
    options = {"height": height, "width": width, "routes": routes, "flip_back": flip_back}
    compare(both(run, inputs, **options), relative_error, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(70, 70), (50, 100)])
def test_large_maps(ss2d_inputs, run, relative_error, height, width):
    inputs = ss2d_inputs(1, height, width, 3, 1, 2)
    compare(both(run, inputs, height=height, width=width), relative_error, 1e-10)


@pytest.mark.parametrize("spread", [1e-6, 30.0, 1e3])
def test_extreme_delta(ss2d_inputs, run, relative_error, spread):
    inputs = ss2d_inputs(1, 9, 9, 4, 2, 2, spread=spread)
    compare(both(run, inputs, height=9, width=9), relative_error, 1e-10)


@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(PATTERNS),
)
@settings(max_examples=25)
def test_any_shape(ss2d_inputs, run, relative_error, batch, height, width, channels, N, R, pattern):
    routes, flip_back = pattern
    inputs = ss2d_inputs(batch, height, width, channels, N, R, routes)
    options = {"height": height, "width": width, "routes": routes, "flip_back": flip_back}
    compare(both(run, inputs, **options), relative_error, 1e-10)


@pytest.mark.parametrize("elements", [200, 60, 1])
def test_work_in_slabs_gives_the_same(ss2d_inputs, run, relative_error, monkeypatch, elements):
    inputs = ss2d_inputs(3, 4, 4, 3, 2, 2)
    whole = run(ss2d_scan, inputs, height=4, width=4)
    monkeypatch.setattr(chunked, "SLAB_ELEMENTS", elements)
    compare([whole, run(ss2d_scan, inputs, height=4, width=4)], relative_error, 1e-14)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 4])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (6, 14)])
def test_accuracy_in_lower_precision(ss2d_inputs, run, assert_accurate, backend, dtype, N, height, width):
    inputs = ss2d_inputs(2, height, width, 8, N, 3, dtype=dtype)
    options = {"height": height, "width": width}
    same = run(ss2d_scan, inputs, backend="reference", **options)
    exact = run(ss2d_scan, [t.double() for t in inputs], backend="reference", **options)
    actual = run(ss2d_scan, inputs, backend=backend, **options)
    assert actual.y.dtype == torch.float32
    assert_accurate(actual.y, same.y, exact.y)
    for name, *grads in zip(NAMES, actual.grads, same.grads, exact.grads, strict=True):
        assert_accurate(*grads, name)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_out_dtype_rounds_the_float32_result_once(ss2d_inputs, backend):
    inputs = ss2d_inputs(2, 5, 5, 4, 1, 2, dtype=torch.bfloat16)
    full = ss2d_scan(*inputs, height=5, width=5, backend=backend)
    rounded = ss2d_scan(*inputs, height=5, width=5, backend=backend, out_dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, full.bfloat16())


def test_dt_weight_may_be_float32(ss2d_inputs, run):
    inputs = ss2d_inputs(1, 4, 4, 4, 1, 2, dtype=torch.bfloat16)
    expected = run(ss2d_scan, inputs, height=4, width=4)
    inputs[2] = inputs[2].float()
    actual = run(ss2d_scan, inputs, height=4, width=4)
    assert torch.equal(actual.y, expected.y)
    assert actual.grads[2].dtype == torch.float32
    assert torch.equal(actual.grads[2].bfloat16(), expected.grads[2])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 6), (5, 8)])
@pytest.mark.parametrize(("routes", "flip_back"), PATTERNS)
def test_unwritten_memory_does_not_show(ss2d_inputs, run, nan_filled_memory, height, width, routes, flip_back):
    inputs = ss2d_inputs(2, height, width, 3, 2, 2, routes)
    result = run(ss2d_scan, inputs, height=height, width=width, routes=routes, flip_back=flip_back)
    assert torch.isfinite(result.y).all()
    assert all(torch.isfinite(grad).all() for grad in result.grads)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(5, 5), (4, 6)])
def test_non_finite_values_keep_to_their_channel_and_image(ss2d_inputs, backend, bad, size):
    height, width = size
    inputs = ss2d_inputs(2, height, width, 4, 2, 2, dtype=torch.float32)
    clean = ss2d_scan(*inputs, height=height, width=width, backend=backend)
    inputs[0][1, 7, 2] = bad
    y = ss2d_scan(*inputs, height=height, width=width, backend=backend)
    assert not torch.isfinite(y[1, 7, 2])
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, :, 2] = True
    assert torch.equal(y[~touched], clean[~touched])


def test_empty_batch(ss2d_inputs, run):
    result = run(ss2d_scan, ss2d_inputs(0, 3, 3, 4, 1, 2), height=3, width=3)
    assert result.y.shape == (0, 9, 4)
    assert not any(grad.any() for grad in result.grads)


def test_non_contiguous_inputs(ss2d_inputs, run, relative_error):
    inputs = ss2d_inputs(2, 4, 5, 3, 2, 2)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    results = [run(ss2d_scan, tensors, height=4, width=5) for tensors in (inputs, strided)]
    compare(results, relative_error, 1e-14)  # matrix products of other strides may round otherwise


def test_mistakes_are_explained(ss2d_inputs):
    inputs = ss2d_inputs(2, 3, 4, 5, 2, 3)

    def call(position=None, replacement=None, **options):
        changed = list(inputs)
        if position is not None:
            changed[position] = replacement
        return ss2d_scan(*changed, **{"height": 3, "width": 4, **options})

    with pytest.raises(ValueError, match="x has 12 positions, which is not height·width = 3·5"):
        call(width=5)
    with pytest.raises(ValueError, match=r"projected must be \(B, L, K·\(R\+2N\)\) = \(2, 12, 28\), got \(2, 12, 27\)"):
        call(1, inputs[1][..., :27])
    with pytest.raises(ValueError, match=r"dt_weight must be \(K, E, R\) = \(2, 5, 3\), got \(4, 5, 3\)"):
        call(routes="rows")
    with pytest.raises(ValueError, match="flip_back=False is defined for the routes 'rows' and 'columns'"):
        call(flip_back=False)
    with pytest.raises(ValueError, match="routes must be one of"):
        call(routes="diagonal")
    with pytest.raises(TypeError, match=r"out_dtype must be a floating-point dtype, got torch.int8"):
        call(out_dtype=torch.int8)
    with pytest.raises(TypeError, match="out_dtype must be a floating-point dtype, got 'float32'"):
        call(out_dtype="float32")
    with pytest.raises(TypeError, match="projected must be a tensor, got NoneType"):
        call(1, None)
    with pytest.raises(ValueError, match=r"x has no channels; its shape is \(2, 12, 0\)"):
        call(0, inputs[0][..., :0])
    for backend in ("cpu", "chunked"):  # the operator itself, as a traced program calls it at another size
        with pytest.raises(ValueError, match="x has 12 positions, which is not height·width = 3·5"):
            torch.ops.vmamba.ss2d_scan(*inputs, 3, 5, "cross2d", True, torch.float32, backend)
    with pytest.raises(TypeError, match="A must be a floating-point tensor"):
        call(4, inputs[4].long())
    with pytest.raises(ValueError, match="ss2d_scan: backend must be one of"):
        call(backend="numba")
