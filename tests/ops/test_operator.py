"""Operators give the same whether the dispatcher sees them or not, and are seen by whoever watches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba.ops import ss2d_scan
from vmamba.ops.operator import Operator


def inputs(requires_grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    B, L, E, R = 2, 12, 8, 2
    tensors = [
        torch.randn(B, L, E), torch.randn(B, L, 4 * (R + 2)), torch.randn(4, E, R), torch.randn(4, E),
        -torch.rand(4, E, 1), torch.randn(4, E),
    ]  # fmt: skip
    return [t.requires_grad_(requires_grad) for t in tensors]


def scan(tensors: list[Tensor]) -> Tensor:
    return ss2d_scan(*tensors, height=3, width=4, backend="chunked")


class Watcher(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_values_and_gradients_do_not_depend_on_who_watches() -> None:
    plain, watched = inputs(), inputs()
    y = scan(plain)
    y.square().sum().backward()
    with Watcher() as watcher:
        seen = scan(watched)
        seen.square().sum().backward()
    assert {"vmamba::ss2d_scan", "vmamba::ss2d_scan_backward"} <= set(watcher.names)
    torch.testing.assert_close(y, seen, rtol=0, atol=0)
    for one, other in zip(plain, watched, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_an_eager_call_does_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmamba.ops.ss2d import api

    def refuse(*_: Any) -> None:
        raise AssertionError("the registered operator was called")

    monkeypatch.setattr(api.scan_operator, "registered", refuse)
    monkeypatch.setattr(api.scan_gradients, "registered", refuse)
    scan(inputs()).sum().backward()
    with torch.inference_mode():
        scan(inputs(requires_grad=False))


def test_only_the_gradients_that_are_wanted_are_given() -> None:
    tensors = inputs(requires_grad=False)
    tensors[1].requires_grad_()
    scan(tensors).sum().backward()
    assert [t.grad is None for t in tensors] == [True, False, True, True, True, True]


def test_fake_tensors_and_the_compiler_see_it() -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t.detach()) for t in inputs()]
        assert scan(fake).shape == (2, 12, 8)
    targets: list[str] = []

    def note(module: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(scan, backend=note, fullgraph=True)(inputs(requires_grad=False))
    assert any("vmamba.ss2d_scan" in target for target in targets)


NO_SUCH_DERIVATIVE = "neither second derivatives nor derivatives in forward mode.*backend='reference'"


def test_a_second_derivative_is_refused_and_not_left_out() -> None:
    tensors = inputs()
    (grad,) = torch.autograd.grad(scan(tensors).square().sum(), tensors[:1], create_graph=True)
    for wanted in (tensors[:1], tensors[1:]):  # each alone: none of them is reached without the scan
        with pytest.raises(RuntimeError, match=NO_SUCH_DERIVATIVE):
            torch.autograd.grad(grad.sum(), wanted, allow_unused=True, retain_graph=True)
    vector = torch.ones_like(tensors[0])
    with pytest.raises(RuntimeError, match=NO_SUCH_DERIVATIVE):
        torch.autograd.functional.hvp(lambda x: scan([x, *tensors[1:]]).square().sum(), tensors[0], vector)
    with pytest.raises(RuntimeError, match=NO_SUCH_DERIVATIVE):
        torch.func.grad(lambda x: torch.func.grad(lambda t: scan([t, *tensors[1:]]).sum())(x).sum())(tensors[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_and_not_left_out(requires_grad: bool) -> None:
    x, *others = inputs(requires_grad)
    tangent = torch.ones_like(x)
    with pytest.raises(RuntimeError, match=NO_SUCH_DERIVATIVE):
        torch.func.jvp(lambda x: scan([x, *others]), (x,), (tangent,))
    with forward_ad.dual_level():
        scan([x, *others])
        with pytest.raises(RuntimeError, match=NO_SUCH_DERIVATIVE):
            scan([forward_ad.make_dual(x, tangent), *others])


def test_functional_transforms() -> None:
    tensors = inputs()

    def loss(*tensors: Tensor) -> Tensor:
        return scan(list(tensors)).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    everything = tuple(range(6))
    for one, other in zip(expected, torch.func.grad(loss, everything)(*tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    samples = [torch.stack([t, 2 * t], dim=1).detach() for t in tensors[:2]]
    by_sample = torch.func.vmap(torch.func.grad(loss, everything), in_dims=(1, 1, None, None, None, None))
    for i in range(2):
        alone = torch.func.grad(loss, everything)(samples[0][:, i], samples[1][:, i], *tensors[2:])
        for one, other in zip(alone, by_sample(*samples, *tensors[2:]), strict=True):
            torch.testing.assert_close(one, other[i], rtol=0, atol=0)


def test_without_a_backward_a_gradient_is_refused() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    op = Operator("vmamba_test::double", double)
    op.register_fake(torch.empty_like)
    x = torch.ones(3, requires_grad=True)
    torch.testing.assert_close(op(x.detach()), torch.full((3,), 2.0))
    with torch.no_grad():
        torch.testing.assert_close(op(x), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="double is for inference"):
        op(x)
