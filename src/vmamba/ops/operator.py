"""Operators of the package: seen by compilers, exporters and counters, called straight where nothing else watches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Operator:
    """A function registered as a custom operator, whose eager calls do without the dispatcher.

    A custom operator costs the host 20 to 150 µs a call, more than many of our kernels take: that is paid only where a
    compiler, an exporter, a functorch transform, a dispatch mode (such as a FLOP counter), a tensor subclass (such as a
    fake tensor) or a meta tensor has to see the operator. Results and gradients are the same either way.

    Its derivatives are first ones in reverse mode; all others are refused, since leaving them out would go unnoticed.
    Under `torch.func.vmap` it computes one sample after the other.

    Registered without `torch.library.custom_op`, whose own wrappers cost as much again in compiled graphs.

    Args:
        name: "vmamba::…".
        compute: what it does, with annotations from which torch infers the operator's schema; mutates nothing, and what
            it returns shares no memory with what it is given.
        gives_gradients: whether it computes gradients: it may then be asked for its own, which are refused when needed.
    """

    def __init__(self, name: str, compute: Callable[..., Any], gives_gradients: bool = False) -> None:
        self.name, self.compute = name, compute
        torch.library.define(
            name, torch.library.infer_schema(compute, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(name, "CompositeExplicitAutograd", compute)
        namespace, _, local = name.partition("::")
        self.registered: Callable[..., Any] = getattr(getattr(torch.ops, namespace), local).default
        self._differentiable: type[torch.autograd.Function] | None = None
        self._transformed = self._for_transforms(self._refuse, _nothing)
        if gives_gradients:
            self.register_autograd(self._refuse, _nothing)

    def __call__(self, *args: Any) -> Any:
        """Compute; positional arguments only.

        Raises:
            RuntimeError: an argument asks for a derivative that the operator does not have.
        """
        differentiates = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if differentiates and self._differentiable is None:
            raise RuntimeError(f"{self.name} is for inference and has no gradients; call it under torch.no_grad()")
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if _is_transformed():
            return self._transformed.apply(*args)
        if _is_watched(args):
            return self.registered(*args)
        return self._differentiable.apply(*args) if differentiates and self._differentiable else self.compute(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Tell shapes and dtypes of the results; a decorator."""
        torch.library.register_fake(self.name, fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Tell the gradients, as `torch.library.register_autograd` takes them.

        What `backward` calls must be differentiable or an operator that gives gradients.
        """
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        compute = self.compute

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = compute(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._differentiable = Differentiable
        self._transformed = self._for_transforms(backward, setup_context)

    def _for_transforms(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> type[torch.autograd.Function]:
        """Make the function that `torch.func` and forward mode see; eager calls do without what torch adds to it."""
        operator, give_context = self, setup_context

        class Transformed(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return operator.registered(*args) if _is_watched(args) else operator.compute(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                give_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                return operator._refuse(ctx, *tangents)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
                def sample(i: int) -> Any:
                    picked = (a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
                    return operator(*picked)

                results = [sample(i) for i in range(info.batch_size)]
                if isinstance(results[0], Tensor):
                    return torch.stack(results), 0
                return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

        return Transformed

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(
            f"{self.name} has neither second derivatives nor derivatives in forward mode; "
            "the scans have all of them with backend='reference'"
        )


def _nothing(*_: Any, **__: Any) -> None:
    """Keep nothing for a backward pass."""


def operator(name: str, *, gives_gradients: bool = False) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as an operator; a decorator."""
    return lambda compute: Operator(name, compute, gives_gradients)


def nothing_watches(*args: Any) -> bool:
    """Whether nothing but autograd sees what is computed: no compiler, exporter, transform, mode or subclass."""
    return not (torch.compiler.is_compiling() or _is_transformed() or _is_watched(args))


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_watched(args: tuple[Any, ...]) -> bool:
    if torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing():
        return True
    for a in args:  # not any(...), whose generator costs the host as much as an argument
        kind = type(a)
        if (kind is Tensor or kind is torch.nn.Parameter) and not a.is_meta:
            continue
        if isinstance(a, Tensor):
            return True
    return False
