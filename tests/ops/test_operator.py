"""Operators give the same whether the dispatcher sees them or not, and are seen by whoever watches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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

    monkeypatch.setattr(api._ss2d_scan, "registered", refuse)
    monkeypatch.setattr(api._ss2d_scan_backward, "registered", refuse)
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


def test_a_second_derivative_is_refused() -> None:
    tensors = inputs()
    (grad,) = torch.autograd.grad(scan(tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
