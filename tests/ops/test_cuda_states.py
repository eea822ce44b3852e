"""The CUDA backward for several states: compiled for every architecture here, checked against float64 on a GPU."""

import pytest
import torch

from vmamba.ops import nvrtc, selective_scan, ss2d_scan
from vmamba.ops.s6 import cuda_sequences
from vmamba.ops.ss2d import cuda_states

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32

needs_compiler = pytest.mark.skipif(
    nvrtc.compiler_unavailable() is not None, reason=f"no run-time compiler: {nvrtc.compiler_unavailable()}"
)


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "rank", "states", "dtype", "dy_dtype", "routes"),
    [
        ((8, 0), 6, 16, bf16, bf16, "cross2d"),
        ((9, 0), 48, 3, f16, f32, "bidi"),
        ((10, 0), 7, 2, bf16, f32, "unidi"),
        ((9, 0), 1, 16, bf16, f32, None),
    ],
    ids=str,
)
def test_compiles_for_every_architecture(capability, rank, states, dtype, dy_dtype, routes):
    defines = cuda_states.states_defines(rank, states, dtype, dy_dtype, routes)
    names = cuda_states.SEQUENCE_KERNELS if routes is None else cuda_states.MAP_KERNELS
    cubin = nvrtc.compile_cubin(cuda_states.source(names), capability, defines, use_cache=False)
    assert all(f"ss2d_states_{name}\0".encode() in cubin for name in names)


@pytest.mark.parametrize(("length", "channels", "rank"), [(3136, 192, 6), (196, 768, 24), (49, 1536, 48)])
@pytest.mark.parametrize("states", [2, 16])
@pytest.mark.parametrize("batch", [1, 4, 16, 128, 1000])
def test_what_is_held_stays_below_the_inputs(batch, length, channels, rank, states):
    cut = cuda_states.find_cut(batch, length, channels, rank, states)
    inputs = batch * length * (channels + 4 * (rank + 2 * states)) * 2

    def held(images, routes):
        tensors = cuda_states.allocate(images * routes, images, length, channels, states, torch.device("meta"))
        return sum(t.nbytes for t in tensors)

    if cut is None:
        assert held(1, 1) > 0.9 * inputs
    else:
        assert held(*cut) <= 0.9 * inputs
        assert 1 <= cut.images <= batch


def test_small_batches_and_tensors_elsewhere_are_refused():
    assert cuda_states.find_cut(1, 3136, 192, 6, 16) is None
    assert cuda_sequences.find_images(1, 4, 3136, 192, 16) == 0
    x, projected = torch.zeros(2, 16, 32, dtype=bf16), torch.zeros(2, 16, 4 * 12, dtype=bf16)
    weight, A = torch.zeros(4, 32, 4), -torch.ones(4, 32, 4)
    if nvrtc.compiler_unavailable() is None:
        assert "CUDA tensors" in cuda_states.why_not(x, projected, weight, A, "cross2d")
        u, B = torch.zeros(2, 128, 16, dtype=bf16), torch.zeros(2, 4, 4, 16, dtype=bf16)
        assert "CUDA tensors" in cuda_sequences.why_not(u, u, A.flatten(0, 1), B, True)


def test_the_triton_backward_hands_over_where_nothing_speaks_against_it(monkeypatch):
    from vmamba.ops.s6 import triton_kernels as of_sequences
    from vmamba.ops.ss2d import triton_kernels as of_maps

    asked = []
    for module in (cuda_states, cuda_sequences):
        monkeypatch.setattr(module, "why_not", lambda *args: asked.append(args))
        monkeypatch.setattr(module, "backward", lambda *args: len(args))
    x, weight, bias, A = torch.zeros(1, 4, 8), torch.zeros(4, 8, 2), torch.zeros(4, 8), -torch.ones(4, 8, 3)
    projected = torch.zeros(1, 4, 4 * 8)
    assert of_maps.backward(x, x, projected, weight, bias, A, bias, 2, 2, "cross2d", True) == 10
    u, B = torch.zeros(1, 8, 4), torch.zeros(1, 1, 3, 4)
    assert of_sequences.backward(u, u, u, A[0], B, B, None, None, True) == 8
    assert [len(args) for args in asked] == [5, 5]


def assert_as_right_as_plain(got, plain, exact, inputs):
    for grad, rounded, truth, tensor in zip(got, plain, exact, inputs, strict=True):
        assert grad.dtype == tensor.dtype
        assert grad.shape == tensor.shape

        def error(t, truth=truth):
            return ((t.double() - truth).norm() / truth.norm()).item()

        assert error(grad) <= 2 * max(error(rounded.to(tensor.dtype)), torch.finfo(tensor.dtype).eps / 2)


def gradients(function, tensors, dy, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy.to(dtype))


CASES = {  # batch, height, width, channels, rank, states, x, dt_weight, dy, routes, cut
    "stage 1": (2, 56, 56, 96, 6, 16, bf16, f32, bf16, "cross2d", (1, 4)),
    "stage 3, weights of 16 bits": (5, 14, 14, 64, 24, 16, bf16, bf16, bf16, "cross2d", (2, 2)),
    "stage 4, float16": (3, 7, 7, 96, 48, 4, f16, f32, f32, "cross2d", (3, 1)),
    "odd sizes": (3, 9, 5, 33, 7, 3, f16, f16, f16, "bidi", (2, 4)),
    "one row": (2, 1, 40, 40, 1, 2, bf16, f32, f32, "unidi", (2, 4)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_map_gradients_are_as_right_as_plain_ones(case):
    batch, height, width, E, R, N, dtype, weight_dtype, dy_dtype, routes, cut = case
    torch.manual_seed(0)
    L = height * width
    step = torch.exp(torch.rand(4, E, device="cuda") * 4.6 - 6.9)
    inputs = [
        torch.randn(batch, L, E, device="cuda").to(dtype),
        torch.randn(batch, L, 4 * (R + 2 * N), device="cuda").to(dtype),
        (torch.randn(4, E, R, device="cuda") * R**-0.5).to(weight_dtype),
        torch.log(torch.expm1(step)),
        -(1 + torch.arange(N, device="cuda")) * torch.exp(0.3 * torch.randn(4, E, N, device="cuda")),
        torch.randn(4, E, device="cuda"),
    ]
    dy = torch.randn(batch, L, E, device="cuda").to(dy_dtype)

    def plain(*leaves):
        options = {"height": height, "width": width, "routes": routes, "out_dtype": leaves[0].dtype}
        return ss2d_scan(*leaves, **options, backend="chunked")

    exact, rounded = (gradients(plain, inputs, dy, t) for t in (torch.float64, f32))
    got = cuda_states.backward(dy, *inputs, height, width, routes, cuda_states.Cut(*cut))
    assert_as_right_as_plain(got, rounded, exact, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "E", "L", "N", "dtype"), [(4, 96, 196, 16, bf16), (1, 33, 50, 3, f16)])
def test_sequence_gradients_are_as_right_as_plain_ones(groups, E, L, N, dtype):
    torch.manual_seed(1)
    shapes = [(3, groups * E, L), (3, groups * E, L), (groups * E, N), (3, groups, N, L), (3, groups, N, L)]
    inputs = [torch.randn(*shape, device="cuda") for shape in shapes]
    inputs = [inputs[0].to(dtype), inputs[1].to(dtype), -inputs[2].abs() - 0.1, *(t.to(dtype) for t in inputs[3:])]
    inputs += [torch.randn(groups * E, device="cuda") for _ in range(2)]
    dy = torch.randn(3, groups * E, L, device="cuda")

    def plain(*leaves):
        return selective_scan(*leaves, True, backend="chunked")

    exact, rounded = (gradients(plain, inputs, dy, t) for t in (torch.float64, f32))
    got = cuda_sequences.backward(dy, *inputs, 2)
    assert_as_right_as_plain(got, rounded, exact, inputs)


@pytest.mark.gpu
def test_auto_takes_it_and_deterministic_mode_does_not():
    x = torch.zeros(128, 49, 64, device="cuda", dtype=bf16)
    arguments = (x, torch.zeros(128, 49, 4 * 12, device="cuda", dtype=bf16), torch.zeros(4, 64, 4, device="cuda"))
    A = -torch.ones(4, 64, 4, device="cuda")
    assert cuda_states.why_not(*arguments, A, "cross2d") is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "order" in cuda_states.why_not(*arguments, A, "cross2d")
    finally:
        torch.use_deterministic_algorithms(False)
