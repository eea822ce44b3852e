"""The CUDA forward of SS2D: compiled for every architecture here, checked against float64 where there is a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from scan_inputs import inputs

from vmamba.ops import nvrtc
from vmamba.ops.ss2d import cuda_kernels, cuda_plans
from vmamba.ops.ss2d.chunked import forward as chunked_forward
from vmamba.ops.ss2d.cuda_plans import LinePlan, TablePlan, plan_forward
from vmamba.ops.ss2d.cuda_problem import Device, Problem, find_device
from vmamba.ops.ss2d.cuda_tiles import TilePlan
from vmamba.ops.ss2d.reference import ss2d_scan_reference

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
H200 = Device(132, 232448, 233472, True)
A100 = Device(108, 166912, 167936, False)

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)

PLANS = {
    "table, large map": (6, 96, bf16, f32, bf16, TablePlan(8, 8)),
    "table, small map, high rank": (48, 768, bf16, bf16, bf16, TablePlan(8, 1, images=2, teams=8, staged=True)),
    "table, odd channels, rank 7, float16": (7, 33, f16, f32, f32, TablePlan(8, 2, blocks=4)),
    "lines": (12, 192, bf16, f32, bf16, LinePlan(8, 8)),
    "lines, piped": (12, 192, bf16, f32, bf16, LinePlan(14, 2, blocks=3, piped=True)),
    "lines, high rank": (24, 384, bf16, f32, bf16, LinePlan(14, 1, quad=2, teams=2, blocks=3, ahead=0)),
    "lines, two images, odd span": (6, 96, bf16, f32, bf16, LinePlan(7, 1, quad=2, teams=2, blocks=4, piped=True)),
    "lines, four images, odd span": (48, 768, bf16, f32, f32, LinePlan(7, 1, quad=4, teams=2, blocks=3)),
}
CLUSTERS = {
    "routes apart": (6, 96, bf16, f32, f32, TablePlan(8, 16, apart=True)),
}


def compiled(rank, channels, dtype, weight_dtype, out_dtype, plan, capability):
    defines = cuda_kernels.forward_defines(rank, channels, dtype, weight_dtype, out_dtype, plan)
    return nvrtc.compile_cubin(cuda_kernels.forward_source(plan), capability, defines, use_cache=False)


@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", PLANS)
def test_compiles_for_every_architecture(name, capability):
    assert b"ss2d_forward" in compiled(*PLANS[name], capability)


@needs_compiler
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_compile_where_there_are_any(name, capability):
    assert b"ss2d_forward" in compiled(*CLUSTERS[name], capability)


@needs_compiler
@pytest.mark.parametrize("arguments", [*PLANS.values(), *CLUSTERS.values()], ids=[*PLANS, *CLUSTERS])
def test_plan_knows_the_size_of_the_shared_structure(arguments):
    plan = arguments[-1]
    expected, defines = plan.fixed_bytes(), cuda_kernels.forward_defines(*arguments)
    declarations = cuda_kernels.forward_source(plan).partition('extern "C"')[0]
    check = f'static_assert((sizeof(Shared) + 127) / 128 * 128 == {expected}, "");'
    nvrtc.compile_cubin(declarations + check, (9, 0), defines, use_cache=False)
    wrong = check.replace(str(expected), str(expected + 128))
    with pytest.raises(nvrtc.CompilationError, match="static assertion"):
        nvrtc.compile_cubin(declarations + wrong, (9, 0), defines, use_cache=False)


def check_plan(problem, plan, device):
    assert plan.shared_bytes(problem) <= device.block_shared
    assert plan.threads <= 1024
    assert device.clusters or plan.cluster == 1
    if isinstance(plan, LinePlan):
        assert problem.height % plan.span == problem.width % plan.span == 0


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_every_map_that_one_block_holds_has_a_plan_that_fits(device):
    for height, width in [(1, 2200), (2200, 1), (46, 46), (47, 45), (56, 42), (7, 7), (14, 14), (20, 21), (28, 28)]:
        for rank, groups, batch in itertools.product((1, 6, 24, 48, 64), (1, 6, 48), (1, 10**6)):
            problem = Problem(height, width, rank, groups, batch)
            plan = plan_forward(problem, device)
            check_plan(problem, plan, device)
            assert not isinstance(plan, TilePlan)


def test_lines_are_taken_only_where_they_were_measured_to_win():
    def chosen(height, width, rank, channels, batch=128):
        return plan_forward(Problem(height, width, rank, channels // 16, batch), H200)

    assert chosen(7, 7, 48, 768) == LinePlan(7, 1, quad=4, teams=2, blocks=3)
    assert chosen(14, 14, 6, 96, 2675) == LinePlan(7, 1, quad=2, teams=2, blocks=4, piped=True)
    assert chosen(14, 14, 24, 384) == LinePlan(14, 1, quad=2, teams=2, blocks=3, ahead=0)
    assert chosen(28, 28, 12, 192) == LinePlan(14, 2, blocks=3, piped=True)
    assert chosen(28, 28, 16, 256) == LinePlan(14, 2, blocks=3, piped=True)
    assert chosen(28, 28, 24, 192) == LinePlan(14, 2, blocks=3)
    assert chosen(14, 14, 32, 512) == LinePlan(7, 1, quad=2, teams=2, blocks=4, ahead=0)
    assert chosen(56, 56, 6, 96) == LinePlan(8, 8)
    assert chosen(20, 20, 12, 192) == TablePlan(8, 2, blocks=4)
    for side in (8, 10, 13, 16, 24, 40, 42):
        assert isinstance(chosen(side, side, 12, 192), TablePlan)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 6), (5, 7), (7, 5), (3, 8), (8, 3), (1, 9), (9, 1)])
def test_slots_of_a_map_are_distinct_also_when_permuted(height, width):
    row, column, total = cuda_plans.find_slots(height, width)
    seen = set()
    for y, x in itertools.product(range(height), range(width)):
        seen.add((y * row + x * column) ^ ((y // 8 + x // 8) & 1))
    assert len(seen) == height * width
    assert max(seen) < total


@pytest.mark.parametrize(("height", "width", "span"), [(7, 7, 7), (14, 14, 7), (28, 56, 14), (8, 24, 8), (20, 10, 10)])
def test_lines_keep_the_sums_of_a_position_in_one_place(height, width, span):
    # What struct Slots computes for every route, in the same steps.
    def addresses(columns, backwards, g):
        pitch, lines, length = width | 1, *((width, height) if columns else (height, width))
        found = {}
        for line, block in itertools.product(range(lines), range(length // span)):
            entered = block * span + (span - 1 if backwards else 0)
            row, column = (entered, line) if columns else (line, entered)
            permutation = line // span + block
            swap = 0 if span % 2 else (permutation & 2) * 32
            there = -swap if column & 1 else swap
            half = ((permutation >> 1 if span % 2 else permutation) & 1) * 32
            address = (row * pitch + column) * 64 + ((g * 8) ^ half)
            step = (-64 if backwards else 64) * (pitch if columns else 1)
            for i in range(span):
                place = entered - i if backwards else entered + i
                offset = there if columns or i % 2 == 0 else -there
                found[(place, line) if columns else (line, place)] = address + offset + i * step
        return found

    for g in (0, 5):
        first = addresses(False, False, g)
        assert len(set(first.values())) == height * width
        assert 0 <= min(first.values()) <= max(first.values()) < height * (width | 1) * 64
        assert all(addresses(*route, g) == first for route in [(False, True), (True, False), (True, True)])


def test_says_why_it_cannot_run():
    def reason(x, N=1, R=6, routes="cross2d"):
        return cuda_kernels.why_not(x, x, torch.zeros(4, 8, R), torch.zeros(4, 8, N), routes, 2, 2)

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
    (3, 14, 14, 40, 6),
    (3, 28, 28, 32, 12),
    (2, 28, 28, 17, 24),
    (1, 31, 33, 33, 15),
    (1, 56, 56, 24, 6),
    (1, 20, 20, 6, 64),
    (3, 10, 20, 50, 10),
]
LARGE = [
    (1, 200, 200, 16, 6),
    (2, 64, 64, 33, 12),
    (3, 65, 97, 18, 6),
    (4, 300, 20, 20, 7),
    (1, 100, 167, 16, 24),
    (1, 1, 5000, 4, 3),
    (1, 4001, 1, 2, 6),
]
DTYPES = [(bf16, f32, f32), (f16, f16, f32), (bf16, bf16, bf16), (f16, f32, f16)]


def check(tensors, height, width, out_dtype, exact, plain, assert_accurate, routes):
    y = cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype)
    assert_accurate(y, plain.to(out_dtype), exact, routes)
    assert torch.equal(y, cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtypes, apart, assert_accurate, monkeypatch):
    batch, height, width, channels, rank = shape
    dtype, weight_dtype, out_dtype = dtypes
    device = find_device(0)
    if apart and not device.clusters:
        pytest.skip("needs thread-block clusters")
    few = {"groups": 1, "batch": 1}
    monkeypatch.setattr(
        cuda_kernels,
        "plan_forward",
        lambda p, d: plan_forward(p._replace(**few) if apart else p._replace(batch=10**6), d),
    )
    for routes in ("cross2d", "bidi"):
        tensors = inputs(batch, height, width, channels, rank, dtype, weight_dtype)
        exact, plain = (reference(tensors, height, width, routes, t) for t in (torch.float64, f32))
        check(tensors, height, width, out_dtype, exact, plain, assert_accurate, routes)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_maps_match_float64(shape, dtypes, assert_accurate):
    batch, height, width, channels, rank = shape
    dtype, weight_dtype, out_dtype = dtypes
    tensors = inputs(batch, height, width, channels, rank, dtype, weight_dtype)
    for routes in ("cross2d", "bidi"):
        # The specification takes minutes on the shortest of these; the blocked scan is checked against it elsewhere.
        exact, plain = (
            chunked_forward(*(tensor.to(t) for tensor in tensors), height, width, routes, True, t)
            for t in (torch.float64, f32)
        )
        check(tensors, height, width, out_dtype, exact, plain, assert_accurate, routes)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(28, 28), (13, 9), (64, 64)], ids=str)
def test_steps_past_what_the_fast_logarithm_takes(size, assert_accurate):
    height, width = size
    tensors = inputs(2, height, width, 24, 6, bf16, f32)
    tensors[3][:, ::3] += 100  # softplus there is 2^7 and more in base 2
    exact, plain = (
        chunked_forward(*(tensor.to(t) for tensor in tensors), height, width, "cross2d", True, t)
        for t in (torch.float64, f32)
    )
    check(tensors, height, width, bf16, exact, plain, assert_accurate, "cross2d")


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
@pytest.mark.parametrize("side", [14, 64])
def test_cuda_graphs_capture_it(side):
    tensors = inputs(2, side, side, 48, 24, bf16, f32)
    eager = cuda_kernels.forward(*tensors, side, side, "cross2d", True, bf16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_kernels.forward(*tensors, side, side, "cross2d", True, bf16)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager)
