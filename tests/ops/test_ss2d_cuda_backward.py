"""The CUDA backward of SS2D: compiled for every architecture here, checked against float64 where there is a GPU."""

import pytest
import torch

from vmamba.ops import nvrtc, ss2d_scan
from vmamba.ops.ss2d import cuda_backward

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
SHARED = {"H200": 232448, "A100": 166912, "RTX 4090": 101376}
NAMES = ("x", "projected", "dt_weight", "dt_bias", "A", "D")

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)

VARIANTS = {  # rank, dtype, dtype of dt_weight, of dy, channels, positions, routes
    "large map": (6, bf16, bf16, bf16, 96, 56 * 56, "cross2d"),
    "small map, high rank, float32 weights": (48, bf16, f32, f32, 768, 7 * 7, "cross2d"),
    "workspace, odd channels, rank 7, float16": (7, f16, f16, f32, 33, 70 * 66, "unidi"),
}


def compiled(rank, dtype, weight_dtype, dy_dtype, channels, length, routes, capability, **replaced):
    items = cuda_backward.operand_items(rank, dtype, weight_dtype)
    plan = cuda_backward.plan_backward(length, rank, items, SHARED["H200"], dy_dtype)
    defines = dict(cuda_backward.backward_defines(rank, dtype, weight_dtype, dy_dtype, channels, routes, plan))
    return nvrtc.compile_cubin(cuda_backward.source(), capability, tuple((defines | replaced).items()), use_cache=False)


@needs_compiler
@pytest.mark.parametrize(("name", "capability"), [*zip(VARIANTS, [(8, 0), (9, 0), (10, 0)], strict=True)], ids=str)
def test_compiles_for_every_architecture(name, capability):
    cubin = compiled(*VARIANTS[name], capability)
    for kernel in (b"ss2d_backward_prepare", b"ss2d_backward", b"ss2d_backward_finish"):
        assert kernel + b"\0" in cubin


@needs_compiler
def test_compiles_with_sums_in_a_fixed_order():
    assert compiled(*VARIANTS["large map"], (9, 0), ORDERED=1) != compiled(*VARIANTS["large map"], (9, 0), ORDERED=0)


@needs_compiler
def test_compiles_with_blocks_that_share_a_map():
    plan = {"CLUSTER": 16, "DY32": 0}
    assert compiled(*VARIANTS["large map"], (9, 0), **plan) != compiled(*VARIANTS["large map"], (9, 0))


@needs_compiler
@pytest.mark.parametrize("rank", [1, 6, 7, 24, 48])
@pytest.mark.parametrize("length", [49, 56 * 56])
def test_both_sides_count_the_same_bytes(rank, length):
    items = cuda_backward.operand_items(rank, bf16, f32)
    plan = cuda_backward.plan_backward(length, rank, items, SHARED["H200"], f32)
    size = cuda_backward.stage_bytes(rank, plan.span, plan.spill, f32)
    with pytest.raises(nvrtc.CompilationError, match="static assertion"):
        compiled(rank, bf16, f32, f32, 32, length, "cross2d", (9, 0), STAGE_BYTES=size + 16)


@needs_compiler
def test_both_sides_count_the_same_operands():
    items = cuda_backward.operand_items(15, bf16, f32)
    with pytest.raises(nvrtc.CompilationError, match="static assertion"):
        compiled(15, bf16, f32, bf16, 16, 49, "bidi", (9, 0), OPERAND_ITEMS=items + 1)
    assert compiled(15, bf16, f32, bf16, 16, 49, "bidi", (9, 0))


@pytest.mark.parametrize("limit", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("rank", [1, 6, 15, 48, 64])
def test_plans_fit_the_multiprocessor(limit, rank):
    items = cuda_backward.operand_items(rank, f16, f32)
    for length in (1, 31, 49, 196, 256, 257, 784, 3136, 4096, 256 * 256):
        plan = cuda_backward.plan_backward(length, rank, items, limit)
        assert plan.blocks * (plan.shared_bytes + 1024) <= limit + 1024
        assert 1 <= plan.warps * plan.blocks <= 12  # at 168 registers a thread
        assert plan.cluster == 1
        assert plan.chunks * 4 * plan.span >= length
        assert plan.spill <= plan.team
        if not plan.spill:
            assert plan.shared_bytes >= (1 if plan.team else plan.warps) * length * 64


@pytest.mark.parametrize(
    ("shape", "cluster"),
    [
        ((128, 56 * 56, 96, 6), 1),
        ((1, 56 * 56, 96, 6), 16),
        ((4, 200 * 200, 192, 6), 16),
        ((42, 112 * 112, 96, 6), 4),
        ((1, 28 * 28, 192, 12), 1),
        # measured: 0.248 and 0.151 ms for 0.327 and 0.316 in clusters of 16, 0.299 for 0.367 in 8s
        ((2, 100 * 160, 192, 12), 4),
        ((2, 50 * 80, 384, 24), 2),
        ((24, 64 * 64, 96, 6), 2),
    ],
    ids=str,
)
def test_blocks_share_a_map_where_maps_are_large_and_few(shape, cluster):
    batch, length, channels, rank = shape
    items, maps = cuda_backward.operand_items(rank, bf16, f32), batch * channels // 16
    plan = cuda_backward.plan_backward(length, rank, items, SHARED["H200"], bf16, maps, 132)
    assert plan.cluster == cluster
    assert plan.blocks * (plan.shared_bytes + 1024) <= SHARED["H200"] + 1024
    assert plan.chunks * 4 * plan.span >= length
    assert cuda_backward.plan_backward(length, rank, items, SHARED["A100"], bf16, maps, 0).cluster == 1


def test_few_maps_have_eight_warps_each():
    items = cuda_backward.operand_items(48, bf16, f32)
    few = cuda_backward.plan_backward(25 * 40, 48, items, SHARED["H200"], bf16, 96, 132)
    assert (few.warps, few.blocks, few.cluster) == (8, 1, 1)
    items = cuda_backward.operand_items(12, bf16, f32)
    for maps, warps in ((12, 8), (1536, 4)):
        assert cuda_backward.plan_backward(28 * 28, 12, items, SHARED["H200"], bf16, maps, 132).warps == warps


def test_pieces_cover_a_map_of_14_by_14_exactly():
    plan = cuda_backward.plan_backward(14 * 14, 12, cuda_backward.operand_items(12, bf16, f32), SHARED["H200"])
    assert plan.chunks * 4 * plan.span == 14 * 14


def test_twelve_warps_take_maps_of_28_by_28_up_to_rank_16():
    def cut(length, rank, limit=SHARED["H200"]):
        plan = cuda_backward.plan_backward(length, rank, cuda_backward.operand_items(rank, bf16, f32), limit)
        return plan.span, plan.warps, plan.blocks, plan.spill, plan.stages

    assert cut(28 * 28, 12) == (4, 4, 3, False, 1)
    assert cut(28 * 28, 24) == (4, 8, 1, False, 1)
    assert cut(28 * 28, 12, SHARED["A100"])[1:3] == (8, 1)  # three maps do not fit
    assert cut(56 * 56, 6) == (8, 8, 1, True, 2)


def test_says_why_not():
    x, weight = torch.empty(1, 4, 2, dtype=bf16), torch.empty(4, 2, 3)
    assert cuda_backward.why_not(x, weight, "cross2d") is None
    assert "not 'rows'" in cuda_backward.why_not(x, weight, "rows")
    assert "at most 64, and dt_weight has 65" in cuda_backward.why_not(x, torch.empty(4, 2, 65), "bidi")


# ---- on a GPU ----

SHAPES = [  # B, H, W, E, R
    (1, 1, 1, 16, 6),
    (2, 7, 7, 64, 48),
    (1, 14, 14, 48, 24),
    (2, 28, 28, 32, 12),
    (1, 56, 56, 16, 6),
    (2, 5, 3, 1, 1),
    (3, 9, 13, 17, 3),
    (1, 57, 1, 6, 16),
    (2, 1, 40, 20, 15),
    (1, 2, 57, 100, 7),
    (1, 20, 21, 96, 33),
    (1, 9, 9, 30, 64),
    (1, 70, 66, 18, 5),
]


def gpu_inputs(ss2d_inputs, shape, dtype, weight_dtype, dy_dtype):
    batch, height, width, channels, rank = shape
    inputs = [t.cuda() for t in ss2d_inputs(batch, height, width, channels, 1, rank, dtype=dtype)]
    inputs[2] = inputs[2].to(weight_dtype)
    return inputs, torch.randn(batch, height * width, channels).to(dy_dtype).cuda()


def reference_grads(inputs, dy, shape, routes, dtype, backend):
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    y = ss2d_scan(*leaves, height=shape[1], width=shape[2], routes=routes, out_dtype=dtype, backend=backend)
    return torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check(assert_accurate, inputs, dy, shape, routes, backend="reference"):
    grads = cuda_backward.backward(dy, *inputs, shape[1], shape[2], routes, True)
    exact = reference_grads(inputs, dy, shape, routes, torch.float64, backend)
    plain = reference_grads(inputs, dy, shape, routes, torch.float32, backend)
    for name, grad, same, truth, tensor in zip(NAMES, grads, plain, exact, inputs, strict=True):
        assert grad.dtype == tensor.dtype
        assert_accurate(grad, same.to(tensor.dtype), truth, name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, ss2d_inputs, assert_accurate, nan_filled_memory):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, bf16, bf16, bf16)
    check(assert_accurate, inputs, dy, shape, "cross2d")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 56, 56, 96, 6), (64, 28, 28, 16, 12), (128, 7, 7, 64, 48)], ids=str)
def test_sums_over_many_images(shape, ss2d_inputs, assert_accurate, nan_filled_memory):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, bf16, f32, bf16)
    check(assert_accurate, inputs, dy, shape, "cross2d", "chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 200, 200, 32, 6), (1, 56, 56, 96, 6), (3, 67, 41, 64, 5)], ids=str)
def test_maps_that_blocks_share(shape, ss2d_inputs, assert_accurate, nan_filled_memory):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, bf16, f32, bf16)
    check(assert_accurate, inputs, dy, shape, "cross2d", "chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(bf16, f32, f32), (f16, f16, f16), (f16, f32, f32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 12, 11, 32, 6), (1, 30, 11, 34, 12)], ids=str)
def test_gradients_in_every_dtype(shape, dtypes, ss2d_inputs, assert_accurate, nan_filled_memory):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, *dtypes)
    check(assert_accurate, inputs, dy, shape, "cross2d")


@pytest.mark.gpu
@pytest.mark.parametrize("routes", ["bidi", "unidi"])
@pytest.mark.parametrize("shape", [(1, 6, 30, 32, 6), (1, 12, 30, 32, 6)], ids=str)
def test_gradients_along_other_routes(shape, routes, ss2d_inputs, assert_accurate, nan_filled_memory):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, bf16, bf16, bf16)
    check(assert_accurate, inputs, dy, shape, routes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(8, 7, 7, 192, 48), (8, 14, 14, 96, 24), (4, 28, 28, 96, 12), (2, 56, 56, 64, 6)], ids=str
)
def test_deterministic_algorithms_repeat_every_bit(shape, ss2d_inputs):
    inputs, dy = gpu_inputs(ss2d_inputs, shape, bf16, bf16, bf16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [cuda_backward.backward(dy, *inputs, shape[1], shape[2], "cross2d", True) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
