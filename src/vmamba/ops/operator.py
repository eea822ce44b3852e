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

    Args:
        name: "vmamba::…".
        compute: what it does, with annotations from which torch infers the operator's schema; mutates nothing.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.compute = compute
        self.registered = torch.library.custom_op(name, compute, mutates_args=())
        self._differentiable: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Compute; positional arguments only."""
        if torch.compiler.is_compiling() or _is_watched(args):
            return self.registered(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            # Without a backward of its own the registered operator says so when one is asked for.
            return self._differentiable.apply(*args) if self._differentiable else self.registered(*args)
        return self.compute(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Tell shapes and dtypes of the results; a decorator."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Tell the gradients, as `torch.library.register_autograd` takes them."""
        self.registered.register_autograd(backward, setup_context=setup_context)
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
