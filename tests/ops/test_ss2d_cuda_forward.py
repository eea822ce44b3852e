"""The CUDA forward of SS2D: compiled for every architecture here, checked against float64 where there is a GPU."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from vmamba.ops import nvrtc
from vmamba.ops.ss2d import cuda_kernels
from vmamba.ops.ss2d.cuda_kernels import Device, Plan
from vmamba.ops.ss2d.reference import ss2d_scan_reference

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
H200 = Device(132, 232448, 233472, True)
A100 = Device(108, 166912, 167936, False)

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)

PLANS = {
    "large map": (6, 96, bf16, f32, bf16, Plan(8, 8)),
    "small map, high rank": (48, 768, bf16, bf16, bf16, Plan(8, 1, images=2, teams=8, staged=True)),
    "odd channels, rank 7, float16": (7, 33, f16, f32, f32, Plan(8, 2, blocks=4)),
}
APART = (6, 96, bf16, f32, f32, Plan(8, 16, apart=True))


def compiled(rank, channels, dtype, weight_dtype, out_dtype, plan, capability, epilogue=""):
    defines = cuda_kernels.forward_defines(rank, channels, dtype, weight_dtype, out_dtype, plan)
    source = cuda_kernels.read_source("common.cuh", "forward.cu") + epilogue
    return nvrtc.compile_cubin(source, capability, defines, use_cache=False)


@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", PLANS)
def test_compiles_for_every_architecture(name, capability):
    assert b"ss2d_forward" in compiled(*PLANS[name], capability)


@needs_compiler
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_routes_apart_compile_where_there_are_clusters(capability):
    assert b"ss2d_forward" in compiled(*APART, capability)


@needs_compiler
@pytest.mark.parametrize("arguments", [*PLANS.values(), APART], ids=[*PLANS, "apart"])
def test_plan_knows_the_size_of_the_shared_structure(arguments):
    rank, plan = arguments[0], arguments[-1]
    expected = plan._replace(staged=False).shared_bytes(0, 0, rank)
    check = f'static_assert((sizeof(Shared) + 127) / 128 * 128 == {expected}, "");'
    compiled(*arguments, (9, 0), epilogue=check)
    with pytest.raises(nvrtc.CompilationError, match="static assertion"):
        compiled(*arguments, (9, 0), epilogue=check.replace(str(expected), str(expected + 128)))


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_every_map_that_is_admitted_fits(device):
    longest = cuda_kernels._longest_map(device)
    assert longest >= 56 * 56 or device is A100
    root = math.isqrt(longest)
    for height, width in [
        (1, longest),
        (longest, 1),
        (root, root),
        (root | 1, root - 1 | 1),
        (7, 7),
        (14, 14),
        (20, 21),
    ]:
        slots = cuda_kernels._slots(height, width)
        for rank, groups, batch in itertools.product((1, 6, 24, 48, 64), (1, 6, 48), (1, 10**6)):
            plan = cuda_kernels.plan_forward(height * width, slots.total, rank, groups, batch, device)
            assert plan.shared_bytes(height * width, slots.total, rank) <= device.block_shared
            assert plan.threads <= 1024
            assert device.clusters or not plan.apart


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 6), (5, 7), (7, 5), (3, 8), (8, 3), (1, 9), (9, 1)])
def test_slots_of_a_map_are_distinct_also_when_permuted(height, width):
    row, column, total = cuda_kernels._slots(height, width)
    seen = set()
    for y, x in itertools.product(range(height), range(width)):
        seen.add((y * row + x * column) ^ ((y // 8 + x // 8) & 1))
    assert len(seen) == height * width
    assert max(seen) < total


def test_says_why_it_cannot_run():
    def reason(x, N=1, R=6, routes="cross2d"):
        return cuda_kernels.why_not(x, x, torch.zeros(4, 8, R), torch.zeros(4, 8, N), routes)

    assert "CUDA" in reason(torch.zeros(1, 4, 8, dtype=bf16))
    on_gpu = SimpleNamespace(is_cuda=True, dtype=f32, device="cuda")
    if nvrtc.compiler_unavailable() is None:
        assert "float32" in reason(on_gpu)
        on_gpu.dtype = bf16
        assert "N = 16" in reason(on_gpu, N=16)
        assert "'rows'" in reason(on_gpu, routes="rows")
        assert "65" in reason(on_gpu, R=65)


@needs_compiler
def test_compilation_is_cached_and_errors_carry_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_CACHE_DIR", str(tmp_path))
    source = 'extern "C" __global__ void f(float* p) { p[0] = VALUE; }'
    first = nvrtc.compile_cubin(source, (9, 0), (("VALUE", 1),))
    (stored,) = (tmp_path / "cubin").iterdir()
    stored.write_bytes(b"from the cache")
    assert nvrtc.compile_cubin(source, (9, 0), (("VALUE", 1),)) == b"from the cache"
    assert nvrtc.compile_cubin(source, (9, 0), (("VALUE", 1),), use_cache=False) == first
    assert nvrtc.compile_cubin(source, (9, 0), (("VALUE", 2),)) != b"from the cache"
    with pytest.raises(nvrtc.CompilationError, match=r"undefined"):
        nvrtc.compile_cubin(source, (9, 0))


def inputs(batch, height, width, channels, rank, dtype, weight_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    step = torch.exp(torch.rand((4, channels), generator=generator) * 4.6 - 6.9)
    tensors = (
        normal(batch, height * width, channels).to(dtype),
        normal(batch, height * width, 4 * (rank + 2)).to(dtype),
        (normal(4, channels, rank) * rank**-0.5).to(weight_dtype),
        step + torch.log(-torch.expm1(-step)),
        -torch.exp(0.3 * normal(4, channels, 1)),
        1 + 0.1 * normal(4, channels),
    )
    return [tensor.cuda() for tensor in tensors]


def reference(tensors, height, width, routes, dtype):
    wide = [tensor.to(dtype) for tensor in tensors]
    return ss2d_scan_reference(*wide, height=height, width=width, routes=routes)


SHAPES = [
    (2, 1, 1, 1, 1),
    (1, 1, 57, 2, 3),
    (3, 57, 1, 100, 7),
    (5, 7, 7, 40, 48),
    (2, 13, 9, 17, 5),
    (2, 14, 14, 144, 24),
    (2, 28, 28, 32, 12),
    (1, 31, 33, 33, 15),
    (1, 56, 56, 24, 6),
    (1, 20, 20, 6, 64),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtypes", [(bf16, f32, f32), (f16, f16, f32), (bf16, bf16, bf16), (f16, f32, f16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtypes, apart, assert_accurate, monkeypatch):
    batch, height, width, channels, rank = shape
    dtype, weight_dtype, out_dtype = dtypes
    device = cuda_kernels._device(0)
    if apart and not device.clusters:
        pytest.skip("needs thread-block clusters")
    plan = cuda_kernels.plan_forward
    monkeypatch.setattr(
        cuda_kernels, "plan_forward", lambda L, s, R, g, b, d: plan(L, s, R, *((1, 1) if apart else (g, 10**6)), d)
    )
    for routes in ("cross2d", "bidi"):
        tensors = inputs(batch, height, width, channels, rank, dtype, weight_dtype)
        y = cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype)
        exact = reference(tensors, height, width, routes, torch.float64)
        assert_accurate(y, reference(tensors, height, width, routes, f32).to(out_dtype), exact, routes)
        assert torch.equal(y, cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype))


@pytest.mark.gpu
def test_takes_views_and_keeps_non_finite_values_in_their_image():
    tensors = inputs(3, 9, 12, 40, 6, bf16, f32)
    y = cuda_kernels.forward(*tensors, 9, 12, "cross2d", True, f32)
    wide = torch.zeros(3, 108, 43, dtype=bf16, device="cuda")
    wide[..., 1:41] = tensors[0]
    assert torch.equal(y, cuda_kernels.forward(wide[..., 1:41], *tensors[1:], 9, 12, "cross2d", True, f32))
    tensors[0][1, 5, 7] = float("nan")
    tensors[1][1, 50] = float("inf")
    spoilt = cuda_kernels.forward(*tensors, 9, 12, "cross2d", True, f32)
    assert torch.equal(y[::2], spoilt[::2])
    assert not torch.isfinite(spoilt[1]).all()


@pytest.mark.gpu
def test_cuda_graphs_capture_it():
    tensors = inputs(2, 14, 14, 48, 24, bf16, f32)
    eager = cuda_kernels.forward(*tensors, 14, 14, "cross2d", True, bf16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_kernels.forward(*tensors, 14, 14, "cross2d", True, bf16)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager)
