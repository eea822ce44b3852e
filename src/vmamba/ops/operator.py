"""Operators of the package: seen by compilers, exporters and counters, called straight where nothing else watches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """A function registered as a custom operator, whose eager calls do without the dispatcher.

    A custom operator costs the host 20 to 150 µs a call, more than many of our kernels take: that is paid only where a
    compiler, an exporter, a functorch transform, a dispatch mode (such as a FLOP counter), a tensor subclass (such as a
    fake tensor) or a meta tensor has to see the operator. Results and gradients are the same either way.

    Registered without `torch.library.custom_op`, whose own wrappers cost as much again in compiled graphs.

    Args:
        name: "vmamba::…".
        compute: what it does, with annotations from which torch infers the operator's schema; mutates nothing, and what
            it returns shares no memory with what it is given.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.name, self.compute = name, compute
        torch.library.define(
            name, torch.library.infer_schema(compute, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(name, "CompositeExplicitAutograd", compute)
        namespace, _, local = name.partition("::")
        self.registered: Callable[..., Any] = getattr(getattr(torch.ops, namespace), local).default
        self._differentiable: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Compute; positional arguments only.

        Raises:
            RuntimeError: the operator has no gradients, and an argument asks for one.
        """
        differentiates = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if differentiates and self._differentiable is None:
            raise RuntimeError(f"{self.name} is for inference and has no gradients; call it under torch.no_grad()")
        if torch.compiler.is_compiling() or _is_watched(args):
            return self.registered(*args)
        return self._differentiable.apply(*args) if differentiates and self._differentiable else self.compute(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Tell shapes and dtypes of the results; a decorator."""
        torch.library.register_fake(self.name, fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Tell the gradients, as `torch.library.register_autograd` takes them."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        compute = self.compute

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = compute(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._differentiable = Differentiable


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as an operator; a decorator."""
    return lambda compute: Operator(name, compute)


def _is_watched(args: tuple[Any, ...]) -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(isinstance(a, Tensor) and (a.is_meta or type(a) not in (Tensor, torch.nn.Parameter)) for a in args)
    )
