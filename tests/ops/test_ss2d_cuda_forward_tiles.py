"""The forward of SS2D over tiles: compiled for every architecture, checked against float64 where there is a GPU."""

import itertools

import pytest
import torch
from scan_inputs import inputs

from vmamba.ops import nvrtc
from vmamba.ops.ss2d import cuda_kernels
from vmamba.ops.ss2d.chunked import forward as chunked_forward
from vmamba.ops.ss2d.cuda_plans import LinePlan, find_launches, plan_forward
from vmamba.ops.ss2d.cuda_problem import Device, Problem
from vmamba.ops.ss2d.cuda_tiles import TilePlan, fit_tiles, plan_tiles

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
H200 = Device(132, 232448, 233472, True)
A100 = Device(108, 166912, 167936, False)
SMALL = Device(84, 101376, 102400, False)  # 99 KiB of shared memory a block

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)

PLANS = {
    "rank 6": (6, 96, bf16, f32, bf16, TilePlan(8, 32, 32, 8)),
    "rank 12, x ahead": (12, 192, bf16, bf16, bf16, TilePlan(8, 32, 32, 8, 2, 2, ahead=2)),
    "rank 24, spans of 10": (24, 384, f16, f16, f16, TilePlan(10, 20, 40, 5, 3, 2)),
    "float32 result": (6, 96, bf16, f32, f32, TilePlan(8, 32, 32, 8, 2, 2, ahead=2)),
    "ragged, odd channels, folded": (7, 33, f16, f32, f32, TilePlan(8, 32, 32, 8, 2, 2, columns=False, ragged=True)),
}


@needs_compiler
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", PLANS)
def test_compiles_for_every_architecture(name, capability):
    *of_inputs, plan = PLANS[name]
    defines = cuda_kernels.forward_defines(*of_inputs, plan)
    cubin = nvrtc.compile_cubin(cuda_kernels.forward_source(plan), capability, defines, use_cache=False)
    for launch in plan.launches(Problem(64, 64, of_inputs[0], 6, 1)):
        assert launch.kernel.encode() in cubin


@needs_compiler
@pytest.mark.parametrize("name", PLANS)
def test_plan_knows_the_size_of_the_shared_structure(name):
    rank, channels, dtype, weight_dtype, out_dtype, plan = PLANS[name]
    problem = Problem(64, 64, rank, 6, 1, float32_result=out_dtype == f32)
    declarations = cuda_kernels.forward_source(plan).partition('extern "C"')[0]
    defines = cuda_kernels.forward_defines(rank, channels, dtype, weight_dtype, out_dtype, plan)
    # A float16 map with a float32 result needs less than the plan, which does not know the map's dtype, sets aside.
    compare = "<=" if dtype == f16 and out_dtype == f32 else "=="
    check = 'static_assert(sizeof(Shared) {} {}, "");'
    right = check.format(compare, plan.fixed_bytes(problem))
    nvrtc.compile_cubin(declarations + right, (9, 0), defines, use_cache=False)
    wrong = check.format(compare, plan.fixed_bytes(problem) // 2)
    with pytest.raises(nvrtc.CompilationError, match="static assertion"):
        nvrtc.compile_cubin(declarations + wrong, (9, 0), defines, use_cache=False)


def check_plan(problem, plan, device):
    assert plan.shared_bytes(problem) <= device.block_shared
    assert plan.high % plan.span == plan.wide % plan.span == plan.high % 4 == plan.wide % 4 == 0
    assert plan.columns == problem.columns
    if not plan.ragged:
        height, width = plan.fold(problem)
        assert height * width == problem.length
        assert width % plan.span == 0
        assert height % plan.span == 0 or not plan.columns
    for launch in plan.launches(problem):
        assert 32 <= launch.threads <= 1024
        assert launch.threads % 32 == 0
        assert launch.blocks < 2**31


SIDES = [(64, 64), (65, 97), (300, 20), (20, 300), (200, 320), (50, 80), (1, 30000), (1000, 1000), (4096, 4096)]


@pytest.mark.parametrize("device", [H200, A100, SMALL], ids=["H200", "A100", "99 KiB"])
@pytest.mark.parametrize("float32_result", [False, True], ids=["16-bit", "float32"])
def test_every_large_map_has_a_plan_that_fits(device, float32_result):
    for (height, width), rank, groups, batch in itertools.product(SIDES, (1, 6, 24, 64), (1, 6, 48), (1, 500)):
        for columns in (True, False):
            problem = Problem(height, width, rank, groups, batch, columns and height > 1, float32_result)
            plan = plan_forward(problem, device)
            assert isinstance(plan, TilePlan)
            check_plan(problem, plan, device)


def test_tiles_are_for_what_one_block_does_not_hold():
    for device in (H200, A100):
        assert isinstance(plan_forward(Problem(64, 64, 6, 6, 128), device), TilePlan)
        assert isinstance(plan_forward(Problem(200, 320, 6, 6, 2), device), TilePlan)
    assert isinstance(plan_forward(Problem(56, 56, 6, 6, 128), H200), LinePlan)
    assert plan_forward(Problem(2, 10**7, 6, 48, 1), H200) is None  # one step down is more than 2 GiB


def test_spans_that_divide_the_sides_are_preferred():
    def chosen(height, width, columns=True):
        plan = plan_forward(Problem(height, width, 6, 6, 8, columns), H200)
        return plan.span, plan.ragged

    assert chosen(128, 64) == (8, False)
    assert chosen(50, 80) == (10, False)
    assert chosen(100, 160) == (10, False)
    assert chosen(1, 5000, columns=False) == (10, False)
    assert chosen(67, 61)[1]


def test_workspace_is_what_the_runs_need():
    plan = TilePlan(8, 32, 32, 8)
    assert plan.runs(Problem(64, 96, 6, 6, 2)) == (64 * 3, 96 * 2)
    assert plan.runs(Problem(65, 97, 6, 6, 2)) == (65 * 4, 97 * 3)
    assert plan._replace(columns=False).runs(Problem(65, 97, 6, 6, 2, columns=False)) == (198, 198)
    problem = Problem(64, 64, 6, 6, 2)
    x_bytes, taken = 2 * 64 * 64 * 96 * 2, 4 * plan.workspace_floats(problem)
    assert taken == x_bytes // 2


def test_images_at_once_fill_the_device_twice():
    plan = TilePlan(8, 32, 32, 8)
    for batch in (1, 2, 5, 24, 128):
        problem = Problem(128, 128, 6, 6, batch)
        images = plan.images_at_once(problem, H200)
        assert 1 <= images <= batch
        assert images == batch or images * problem.groups * plan.tiles(problem) >= 2 * 132 * plan.blocks * 0.8
    assert plan.images_at_once(Problem(128, 128, 6, 6, 128), H200) < 12
    assert plan.images_at_once(Problem(1024, 1024, 6, 6, 3), H200) == 1


def test_a_plan_of_one_kernel_has_one_launch():
    problem = Problem(56, 56, 6, 6, 128)
    (launch,) = find_launches(plan_forward(problem, H200), problem)
    assert launch == ("ss2d_forward_lines", 768, 512, LinePlan(8, 8).shared_bytes(problem), 1)


@pytest.mark.parametrize(("high", "wide", "span"), [(32, 32, 8), (20, 40, 10), (28, 28, 4), (8, 12, 2)])
def test_sums_of_a_position_are_in_one_place_and_four_lines_in_different_banks(high, wide, span):
    # What struct Slots computes for every route, in the same steps.
    def address(line, place, columns, backwards, g):
        pitch, sign = wide | 1, -1 if backwards else 1
        step = 64 * sign * (pitch if columns else 1)
        length = high if columns else wide
        begin = length - 1 if backwards else 0
        row, column = (begin, line) if columns else (line, begin)
        even = (row * pitch + column) * 64 + ((g * 8) ^ ((((row >> 1) + (column >> 1)) & 1) * 32))
        odd = even ^ 32
        walked = (begin - place) if backwards else place
        for _ in range(walked // span):
            even, odd = (odd, even) if span & 2 else (even, odd)
            even, odd = even + span * step, odd + span * step
        i = walked % span
        return (odd if i & 2 else even) + i * step

    for g in (0, 3, 5):
        found = {(r, c): address(r, c, False, False, g) for r in range(high) for c in range(wide)}
        assert len(set(found.values())) == high * wide
        assert max(found.values()) < high * (wide | 1) * 64
        for r, c in found:
            assert address(r, c, False, True, g) == found[r, c]
            assert address(c, r, True, False, g) == address(c, r, True, True, g) == found[r, c]
    for first, place, columns in itertools.product((0, 4), range(8), (False, True)):
        lanes = {address(first + t, place, columns, False, g) % 128 for t in range(4) for g in range(4)}
        assert len(lanes) == 16


def exact_and_plain(tensors, height, width, routes):
    # The specification takes minutes on maps of this size; the blocked scan is checked against it elsewhere.
    return (
        chunked_forward(*(tensor.to(t) for tensor in tensors), height, width, routes, True, t)
        for t in (torch.float64, f32)
    )


@pytest.fixture
def tiles(monkeypatch):
    """Cut every map into tiles, also those that other kernels hold."""
    monkeypatch.setattr(cuda_kernels, "plan_forward", plan_tiles)


def check(tensors, height, width, out_dtype, assert_accurate, routes):
    y = cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype)
    exact, plain = exact_and_plain(tensors, height, width, routes)
    assert_accurate(y, plain.to(out_dtype), exact, routes)
    assert torch.equal(y, cuda_kernels.forward(*tensors, height, width, routes, True, out_dtype))


SHAPES = [
    (2, 1, 1, 1, 1),
    (1, 1, 57, 2, 3),
    (3, 57, 1, 100, 7),
    (5, 7, 7, 40, 48),
    (2, 31, 33, 33, 15),
    (2, 50, 80, 40, 24),
    (1, 200, 200, 16, 6),
    (2, 64, 64, 33, 12),
    (3, 65, 97, 18, 6),
    (4, 300, 20, 20, 7),
    (1, 100, 167, 16, 64),
    (1, 4001, 1, 2, 6),
    (1, 256, 320, 32, 6),
]
DTYPES = [(bf16, f32, f32), (f16, f16, f32), (bf16, bf16, bf16), (f16, f32, f16)]


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_memory", "tiles")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtypes, assert_accurate):
    batch, height, width, channels, rank = shape
    dtype, weight_dtype, out_dtype = dtypes
    tensors = inputs(batch, height, width, channels, rank, dtype, weight_dtype)
    for routes in ("cross2d", "bidi"):
        check(tensors, height, width, out_dtype, assert_accurate, routes)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("plan", [
    TilePlan(8, 32, 32, 8, ahead=2),
    TilePlan(8, 32, 32, 8, 2),
    TilePlan(4, 28, 28, 7, segments=16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 96), (61, 67)], ids=str)
def test_steps_of_any_size(plan, size, assert_accurate, monkeypatch):
    height, width = size
    monkeypatch.setattr(cuda_kernels, "plan_forward", lambda p, d: fit_tiles(plan, p))
    tensors = inputs(2, height, width, 24, 6, bf16, f32)
    check(tensors, height, width, bf16, assert_accurate, "cross2d")
    tensors[3][:, ::3] += 100  # softplus there is 2^7 and more in base 2
    check(tensors, height, width, bf16, assert_accurate, "cross2d")


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("size", [(40, 48), (37, 45)], ids=str)
def test_takes_views_and_keeps_non_finite_values_in_their_channel_and_image(size):
    height, width = size
    length = height * width
    tensors = inputs(3, height, width, 40, 6, bf16, f32)
    y = cuda_kernels.forward(*tensors, height, width, "cross2d", True, f32)
    wide = torch.zeros(3, length, 43, dtype=bf16, device="cuda")
    wide[..., 1:41] = tensors[0]
    assert torch.equal(y, cuda_kernels.forward(wide[..., 1:41], *tensors[1:], height, width, "cross2d", True, f32))
    tensors[0][1, length // 2, 7] = float("nan")
    spoilt = cuda_kernels.forward(*tensors, height, width, "cross2d", True, f32)
    others = [channel for channel in range(40) if channel != 7]
    assert torch.equal(y[..., others], spoilt[..., others])
    assert torch.equal(y[::2], spoilt[::2])
    assert spoilt[1, :, 7].isnan().all()  # by one direction of a layout or the other it reaches everything
    tensors[1][1, 50] = float("inf")
    spoilt = cuda_kernels.forward(*tensors, height, width, "cross2d", True, f32)
    assert torch.equal(y[::2], spoilt[::2])


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
def test_a_value_that_is_not_finite_stays_on_its_route():
    height, width = 37, 45
    tensors = inputs(1, height, width, 16, 6, bf16, f32)
    clean = cuda_kernels.forward(*tensors, height, width, "cross2d", True, f32)
    for route, position in itertools.product(range(4), (0, 700, 1300)):
        changed = [tensor.clone() for tensor in tensors]
        changed[1][0, position, route * 8] = float("nan")
        spoilt = cuda_kernels.forward(*changed, height, width, "cross2d", True, f32)[0].isnan().any(dim=1)
        order = torch.arange(height * width, device="cuda")
        if route % 2:
            order = order % width * height + order // width
        reached = order <= order[position] if route >= 2 else order >= order[position]
        assert torch.equal(spoilt, reached)
    assert clean.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
def test_cuda_graphs_capture_it():
    tensors = inputs(2, 64, 40, 48, 24, bf16, f32)
    eager = cuda_kernels.forward(*tensors, 64, 40, "cross2d", True, bf16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_kernels.forward(*tensors, 64, 40, "cross2d", True, bf16)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiles")
def test_an_image_of_more_than_two_billion_bytes(assert_accurate):
    batch, height, width, channels = 1, 1600, 1600, 512
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    x = torch.randn(batch, height * width, channels, device="cuda", dtype=bf16)
    tensors = inputs(1, 1, 1, channels, 2, bf16, f32)
    tensors[0], tensors[1] = x, torch.randn(batch, height * width, 16, device="cuda", dtype=bf16)
    y = cuda_kernels.forward(*tensors, height, width, "cross2d", True, bf16)
    last = slice(channels - 8, channels)
    part = [x[..., last], tensors[1], *(tensor[:, last] for tensor in tensors[2:])]
    exact, plain = exact_and_plain(part, height, width, "cross2d")
    assert_accurate(y[..., last].contiguous(), plain.to(bf16), exact)
