"""The operations as PyTorch operators: gradients, tracing, export, meta tensors, autocast, backends by name."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vmamba.ops import capabilities, selective_scan, ss2d_scan


def scan(*inputs, **options):
    return selective_scan(*inputs, delta_softplus=True, **options)


def scan_map(*inputs, **options):
    return ss2d_scan(*inputs, height=3, width=4, **options)


@pytest.fixture(params=["selective_scan", "ss2d_scan"])
def case(request, s6_inputs, ss2d_inputs):
    """One of the two operations, and a maker of small inputs for it."""
    if request.param == "selective_scan":
        return SimpleNamespace(name=request.param, op=scan, inputs=lambda **kw: s6_inputs(2, 2, 2, 2, 7, **kw))
    return SimpleNamespace(name=request.param, op=scan_map, inputs=lambda **kw: ss2d_inputs(2, 3, 4, 3, 2, 2, **kw))


def with_grad(inputs):
    return [tensor.clone().requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(case, backend):
    assert torch.autograd.gradcheck(lambda *t: case.op(*t, backend=backend), with_grad(case.inputs()))


@pytest.mark.parametrize(
    ("routes", "flip_back"),
    [("unidi", True), ("bidi", True), ("rows", True), ("columns", True), ("rows", False), ("columns", False)],
)
def test_gradcheck_of_other_routes(ss2d_inputs, routes, flip_back):
    inputs = with_grad(ss2d_inputs(1, 3, 4, 2, 1, 2, routes))
    assert torch.autograd.gradcheck(lambda *t: scan_map(*t, routes=routes, flip_back=flip_back), inputs)


# opcheck looks at .grad of tensors it made itself, and torch warns it about that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    inputs = with_grad(case.inputs(dtype=dtype))
    if case.name == "selective_scan":
        args, op = (*inputs, True, "auto"), torch.ops.vmamba.selective_scan
        bare = (*inputs[:5], None, None, False, "auto")
        torch.library.opcheck(op.default, bare)
    else:
        args, op = (*inputs, 3, 4, "cross2d", True, torch.float32, "auto"), torch.ops.vmamba.ss2d_scan
    torch.library.opcheck(op.default, args)


def test_opcheck_of_the_backward_operators(s6_inputs, ss2d_inputs):
    inputs = s6_inputs(2, 2, 3, 2, 12)
    dy = torch.randn_like(inputs[0])
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.vmamba.selective_scan_backward.default
    torch.library.opcheck(op, (dy, *inputs, True, "auto"), test_utils=checks)
    torch.library.opcheck(op, (dy, *inputs[:5], None, None, False, "auto"), test_utils=checks)
    inputs = ss2d_inputs(2, 3, 4, 3, 2, 2)
    dy = torch.randn_like(inputs[0])
    op = torch.ops.vmamba.ss2d_scan_backward.default
    torch.library.opcheck(op, (dy, *inputs, 3, 4, "cross2d", True, "auto"), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(case, run, relative_error, dynamic):
    inputs = case.inputs(dtype=torch.float32)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, actual = run(case.op, inputs), run(compiled, inputs)
    assert relative_error(actual.y, expected.y) <= 1e-6
    for grad, reference in zip(actual.grads, expected.grads, strict=True):
        assert relative_error(grad, reference) <= 1e-6


def test_image_sizes_share_one_compiled_graph(ss2d_inputs):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(*inputs, height, width):
        return ss2d_scan(*inputs, height=height, width=width)

    for height, width in ((3, 4), (6, 5), (8, 9), (7, 3)):
        inputs = ss2d_inputs(2, height, width, 3, 2, 2)
        assert torch.equal(
            compiled(*inputs, height=height, width=width), ss2d_scan(*inputs, height=height, width=width)
        )
    assert len(graphs) == 1


def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return case.op(*inputs)

    inputs = tuple(case.inputs(dtype=torch.float32))
    program = torch.export.export(Module(), inputs)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"vmamba.{case.name}.default" in operators
    assert torch.equal(program.module()(*inputs), case.op(*inputs))


def test_meta_tensors(case):
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        inputs = [tensor.to("meta").requires_grad_() for tensor in case.inputs(dtype=dtype)]
        y = case.op(*inputs)
        assert (y.device.type, y.dtype, y.shape) == ("meta", expected, inputs[0].shape)
        grads = torch.autograd.grad(y.sum(), inputs)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in inputs]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_changes_nothing(case, run, backend):
    inputs = case.inputs(dtype=torch.float32)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.op(*tensors, backend=backend)

    expected, actual = run(case.op, inputs, backend=backend), run(under_autocast, inputs)
    assert actual.y.dtype == torch.float32
    assert torch.equal(actual.y, expected.y)
    assert all(map(torch.equal, actual.grads, expected.grads))


def test_a_backward_under_autocast_changes_nothing(case, run):
    inputs = case.inputs(dtype=torch.float32)
    expected = run(case.op, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case.op, inputs)
    assert all(map(torch.equal, actual.grads, expected.grads))


def test_autocast_mixes_a_float32_map_with_rounded_projections(ss2d_inputs):
    x, projected, *rest = ss2d_inputs(2, 3, 4, 3, 2, 2, dtype=torch.float32)
    y = scan_map(x, projected.bfloat16(), *rest)
    assert torch.equal(y, scan_map(x, projected.bfloat16().float(), *rest))


def test_inference_mode(case):
    inputs = case.inputs(dtype=torch.float32)
    with torch.inference_mode():
        inside = case.op(*inputs)
    assert torch.equal(inside, case.op(*inputs))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("lone", [True, False])
def test_inputs_are_left_as_they_were(s6_inputs, ss2d_inputs, size, lone):
    # Where a dimension is 1, what looks like a rearranged copy can be the input itself.
    batch, groups, channels, N = (1, 1, 1, 1) if lone else (2, 2, 3, 2)
    for op, inputs, options in (
        (selective_scan, s6_inputs(batch, groups, channels, N, size), {"delta_softplus": True}),
        (selective_scan, s6_inputs(batch, groups, channels, N, size)[:5], {}),
        (ss2d_scan, ss2d_inputs(batch, size, size, channels, N, 1), {"height": size, "width": size}),
        (
            ss2d_scan,
            ss2d_inputs(batch, 1, size, channels, N, 1, "unidi"),
            {"height": 1, "width": size, "routes": "unidi"},
        ),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = op(*leaves, **options)
        dy = torch.ones_like(y)
        torch.autograd.grad(y, leaves, dy)
        assert all(map(torch.equal, leaves, inputs))
        assert torch.equal(dy, torch.ones_like(y))


def test_only_the_inputs_are_kept_for_the_backward(case):
    kept = []
    inputs = with_grad(case.inputs())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        case.op(*inputs)
    assert set(kept) <= {tensor.data_ptr() for tensor in inputs}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels may run here")
def test_a_backend_asked_for_by_name_never_falls_back(case):
    with pytest.raises(ValueError, match=f"{case.name}: backend 'triton' cannot run: .*`vmamba doctor`"):
        case.op(*case.inputs(), backend="triton")


def test_a_missing_kernel_module_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setitem(capabilities.BACKEND_MODULES["ss2d_scan"], "triton", "vmamba.ops.ss2d.not_there")
    rows = {(row.op, row.backend): row for row in capabilities.explain_backends("cpu")}
    row = rows["ss2d_scan", "triton"]
    assert not row.can_run
    assert "vmamba.ops.ss2d.not_there cannot be imported" in row.reason


def test_auto_prefers_the_first_backend_that_can_run_on_a_gpu(monkeypatch):
    for name, reason in (("kernels.refusing", "it wants d_state 1."), ("kernels.willing", None)):
        module = ModuleType(name)
        module.why_not = lambda *args, reason=reason: reason
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(
        capabilities.BACKEND_MODULES,
        "ss2d_scan",
        {"cuda": "kernels.refusing", "triton": "kernels.willing", "chunked": "vmamba.ops.ss2d.chunked"},
    )
    on_gpu = (SimpleNamespace(is_cuda=True),)
    assert capabilities.select_backend("ss2d_scan", "auto", on_gpu).__name__ == "kernels.willing"
    with pytest.raises(ValueError, match="'cuda' cannot run: it wants d_state 1"):
        capabilities.select_backend("ss2d_scan", "cuda", on_gpu)


def test_explain_backends_names_what_auto_picks():
    rows = capabilities.explain_backends("cpu")
    picked = [(row.op, row.backend) for row in rows if "picks it" in row.reason]
    assert picked == [("selective_scan", "chunked"), ("ss2d_scan", "cpu")]
    assert {row.backend for row in rows if row.op == "ss2d_scan"} == {"cuda", "triton", "cpu", "chunked", "reference"}
    assert all(row.reason for row in rows)


def test_the_operations_need_torch_alone():
    # In a process of its own, with every other dependency made impossible to import.
    program = """
import sys
others = "timm triton llvmlite torchvision numpy safetensors huggingface_hub jsonargparse rich"
sys.modules.update(dict.fromkeys(others.split()))
import torch
from vmamba.ops import cross_scan, ss2d_scan
from vmamba.ops.capabilities import explain_backends
t = torch.ones
y = ss2d_scan(t(1, 6, 2), t(1, 6, 16), t(4, 2, 2), t(4, 2), -t(4, 2, 1), t(4, 2), height=2, width=3)
assert y.isfinite().all() and cross_scan(t(1, 1, 2, 3)).shape == (1, 4, 1, 6)
rows = explain_backends("cpu")
assert [row.backend for row in rows if "picks it" in row.reason] == ["chunked", "chunked"]
assert any(row.backend == "cpu" and "pip install 'vmamba[cpu]'" in row.reason for row in rows)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
