"""The CPU kernel of ss2d_scan: accuracy on every route, its own functions, threads, what it refuses."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from vmamba.ops import ss2d_scan
from vmamba.ops.routes import ROUTES
from vmamba.ops.ss2d import cpu_kernels

llvm = pytest.importorskip("vmamba.ops.llvm", reason="the CPU kernel needs llvmlite (pip install 'vmamba[cpu]')")

PATTERNS = [(routes, True) for routes in ROUTES] + [("rows", False), ("columns", False)]
WIDTHS = sorted({4, 8, llvm.float_lanes()})


def check(assert_accurate, inputs, **options):
    same = ss2d_scan(*inputs, backend="reference", **options)
    exact = ss2d_scan(*[t.double() for t in inputs], backend="reference", **options)
    assert_accurate(ss2d_scan(*inputs, backend="cpu", **options), same, exact)


@pytest.mark.parametrize(("routes", "flip_back"), PATTERNS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (9, 8), (1, 20), (20, 1)])
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_every_route_and_shape(ss2d_inputs, assert_accurate, routes, flip_back, height, width, channels):
    inputs = ss2d_inputs(2, height, width, channels, 2, 3, routes, dtype=torch.float32)
    check(assert_accurate, inputs, height=height, width=width, routes=routes, flip_back=flip_back)


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("N", [1, 16])
def test_every_register_width(ss2d_inputs, assert_accurate, monkeypatch, lanes, N):
    # LLVM splits vectors that this processor does not have, so that code for any width runs.
    monkeypatch.setattr(cpu_kernels, "float_lanes", lambda: lanes)
    inputs = ss2d_inputs(2, 7, 6, 20, N, 5, dtype=torch.float32)
    check(assert_accurate, inputs, height=7, width=6)


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("channels", [16, 37])
@pytest.mark.parametrize("routes", ["cross2d", "unidi", "columns"])
def test_bfloat16_is_read_and_rounded_as_torch_does(ss2d_inputs, monkeypatch, lanes, channels, routes):
    monkeypatch.setattr(cpu_kernels, "float_lanes", lambda: lanes)
    x, projected, *weights = ss2d_inputs(2, 5, 6, channels, 2, 3, routes, dtype=torch.float32)
    narrow, options = (x.bfloat16(), projected.bfloat16()), {"height": 5, "width": 6, "routes": routes}
    narrow[0][0, 0, 1], narrow[0][1, 0, 2] = float("nan"), float("inf")
    wide = ss2d_scan(*(t.float() for t in narrow), *weights, backend="cpu", **options)
    assert wide.isnan().any()
    for out_dtype in (torch.float32, torch.bfloat16):
        y = ss2d_scan(*narrow, *weights, backend="cpu", out_dtype=out_dtype, **options)
        torch.testing.assert_close(y, wide.to(out_dtype), rtol=0, atol=0, equal_nan=True)
    rounded = ss2d_scan(x, projected, *weights, backend="cpu", out_dtype=torch.bfloat16, **options)
    assert torch.equal(rounded, ss2d_scan(x, projected, *weights, backend="cpu", **options).bfloat16())


def test_rounding_to_bfloat16_is_to_the_nearest_and_even():
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)  # of every sign and exponent
    ties = torch.arange(0, 2**31, 2**16, dtype=torch.int64).to(torch.int32) + 0x8000
    x = torch.cat([bits, ties]).view(torch.float32)
    x = x[: len(x) // 16 * 16]
    rounded = torch.empty(len(x), dtype=torch.bfloat16)
    apply(lambda code, value: value, x, rounded)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spread", [1e-6, 30.0, 1e3])
def test_extreme_delta(ss2d_inputs, assert_accurate, spread):
    check(assert_accurate, ss2d_inputs(1, 9, 9, 4, 2, 2, spread=spread, dtype=torch.float32), height=9, width=9)


def apply(function, x, out=None):
    """Run one of the vector functions over a tensor; into `out` in bfloat16, if it is given."""
    lanes = llvm.float_lanes()
    code = llvm.Code("apply", ("count", "x", "y"), lanes)
    x_at, y_at = code.pointer("x"), code.pointer("y")
    with code.tasks(code.word("count")) as task:
        start = code.build.mul(task, llvm.I64(lanes))
        store = code.store_vector if out is None else code.store_bfloat16_vector
        store(function(code, code.load_vector(x_at, start)), y_at, start)
    kernel, padded = code.compile(), torch.cat([x, x.new_zeros(-len(x) % lanes)])
    y = torch.empty_like(padded) if out is None else out
    kernel.run([len(padded) // lanes, padded, y], 1)
    return y[: len(x)]


def units_in_the_last_place(actual, exact):
    rounded = exact.float()
    unit = (torch.nextafter(rounded.abs(), torch.tensor(float("inf"))) - rounded.abs()).double()
    return ((actual.double() - exact).abs() / unit).max().item()


def test_exponential_to_two_units_in_the_last_place():
    x = torch.linspace(-86.9, 88.0, 200_001)
    assert units_in_the_last_place(apply(llvm.Code.exp, x), x.double().exp()) <= 2


def test_softplus_to_three_units_in_the_last_place():
    x = torch.cat([torch.linspace(-86.9, 100.0, 200_001), torch.linspace(-1, 1, 50_001)])
    exact = x.double().clamp_min(0) + (-x.double().abs()).exp().log1p()
    assert units_in_the_last_place(apply(llvm.Code.softplus, x), exact) <= 3


def test_functions_at_the_edges():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, -inf, inf, nan, -1e4, 1e4])
    exp, softplus = apply(llvm.Code.exp, x), apply(llvm.Code.softplus, x)
    assert exp[:2].eq(1).all()
    assert exp[3].item() == exp[6].item() == inf
    assert exp[[2, 5]].le(2e-38).all()
    assert softplus[3] == inf
    assert softplus[6] == 1e4
    assert softplus[[2, 5]].le(2e-38).all()
    assert exp[4].isnan()
    assert softplus[4].isnan()


def test_vector_code_and_fused_multiply_add_are_what_the_processor_runs():
    features = llvm.llvm.get_host_cpu_features()
    if not features.get("avx512f"):
        pytest.skip("looks for AVX-512's registers")
    assembly = cpu_kernels.forward_kernel(1, False, 16).assembly
    assert assembly.count("vfmadd") > 100
    assert "zmm" in assembly
    assert not any(name in assembly for name in ("expf", "log1pf", "callq"))


def test_each_task_is_done_once_however_many_threads():
    code = llvm.Code("count_up", ("tasks", "counts"), llvm.float_lanes())
    counts_at = code.pointer("counts")
    with code.tasks(code.word("tasks")) as task:
        place = code.at(counts_at, task, llvm.I64)
        code.build.store(code.build.add(code.build.load(place, typ=llvm.I64), llvm.I64(1)), place)
    kernel = code.compile()
    for threads in (1, 2, 5):
        counts = torch.zeros(1000, dtype=torch.int64)
        kernel.run([1000, counts], threads)
        assert counts.eq(1).all()


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_work_and_change_nothing(ss2d_inputs, monkeypatch, openmp):
    if not openmp:
        monkeypatch.setattr(llvm, "_openmp_parallel", lambda: None)
    inputs = ss2d_inputs(3, 5, 5, 70, 2, 2, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ss2d_scan(*inputs, height=5, width=5, backend="cpu")
        torch.set_num_threads(3)
        actual = ss2d_scan(*inputs, height=5, width=5, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, expected)


def test_callers_on_several_threads(ss2d_inputs):
    inputs = ss2d_inputs(2, 6, 6, 40, 1, 2, dtype=torch.float32)
    expected, results = ss2d_scan(*inputs, height=6, width=6, backend="cpu"), []

    def call():
        for _ in range(20):
            results.append(ss2d_scan(*inputs, height=6, width=6, backend="cpu"))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as data loaders' workers do")
def test_a_forked_worker_scans_on_one_thread():
    # In a process of its own: forking this one, with all its threads, is what Python warns about.
    program = """
import os, torch
from vmamba.ops import ss2d_scan
shapes = (2, 12, 40), (2, 12, 16), (4, 40, 2), (4, 40), (4, 40, 1), (4, 40)
inputs = [torch.rand(shape).neg() for shape in shapes]
expected = ss2d_scan(*inputs, height=3, width=4, backend="cpu")
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(ss2d_scan(*inputs, height=3, width=4, backend="cpu"), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_llvmlite_of_long_ago_counts_as_none():
    llvm._check_version("0.46.0")
    llvm._check_version("1.2")
    with pytest.raises(ImportError, match=r"llvmlite 0\.41\.1 is older than 0\.46"):
        llvm._check_version("0.41.1")


def test_what_it_does_not_take_is_said(ss2d_inputs):
    with pytest.raises(
        ValueError, match="backend 'cpu' cannot run: the CPU kernel computes in float32, and x is float64"
    ):
        ss2d_scan(*ss2d_inputs(1, 2, 2, 3, 1, 1), height=2, width=2, backend="cpu")
    meta = torch.empty(1, 4, 3, device="meta")
    assert "needs tensors on the CPU, and x is on meta" in cpu_kernels.why_not(meta, meta, meta, meta, "cross2d", 2, 2)


def test_the_default_device_plays_no_part(ss2d_inputs):
    inputs = ss2d_inputs(2, 5, 3, 11, 1, 2, dtype=torch.float32)
    expected = ss2d_scan(*inputs, height=5, width=3, backend="cpu")
    cpu_kernels._positions.cache_clear()
    with torch.device("meta"):
        y = ss2d_scan(*inputs, height=5, width=3, backend="cpu")
    assert torch.equal(y, expected)
