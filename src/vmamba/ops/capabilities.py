"""Which implementation of an operation runs where, and why not: the choice behind `backend="auto"`."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In the order in which "auto" asks them. "reference" is asked for by name only.
BACKEND_MODULES: dict[str, dict[str, str]] = {
    "selective_scan": {"triton": "vmamba.ops.s6.triton_kernels", "chunked": "vmamba.ops.s6.chunked"},
    "ss2d_scan": {
        "cuda": "vmamba.ops.ss2d.cuda_kernels",
        "triton": "vmamba.ops.ss2d.triton_kernels",
        "cpu": "vmamba.ops.ss2d.cpu_kernels",
        "chunked": "vmamba.ops.ss2d.chunked",
    },
}


_OFF_THE_GPU = ("cpu", "chunked")  # what "auto" asks there: the others would be imported only to refuse


class BackendRow(NamedTuple):
    """One line of `explain_backends`."""

    op: str
    backend: str
    can_run: bool
    reason: str


def check_backend(op: str, backend: str) -> None:
    """Raise `ValueError` for a backend the operation does not have."""
    known = ["auto", *BACKEND_MODULES[op], "reference"]
    if backend not in known:
        raise ValueError(f"{op}: backend must be one of {', '.join(map(repr, known))}, got {backend!r}")


@cache
def _load(module: str) -> ModuleType | str:
    """Import a backend, or say in a sentence why it cannot be imported."""
    try:
        return import_module(module)
    except ImportError as error:
        return f"its module {module} cannot be imported here ({error})."


def _consider(op: str, backend: str, args: tuple[Any, ...]) -> ModuleType | str:
    """Give the module of a backend that can run on these arguments of its `why_not`, or the reason why it cannot."""
    module = _load(BACKEND_MODULES[op][backend])
    if isinstance(module, str):
        return module
    reason = module.why_not(*args)
    return module if reason is None else reason


def select_backend(op: str, backend: str, args: tuple[Any, ...]) -> ModuleType:
    """Find the implementation to run.

    Args:
        op: A key of `BACKEND_MODULES`.
        backend: "auto" or the name of a backend, which is then taken or refused, never replaced.
        args: What the `why_not` of the operation's backends takes; tensors first.

    Raises:
        ValueError: When the backend asked for cannot run, with its reason.
    """
    candidates = [name for name in BACKEND_MODULES[op] if args[0].is_cuda or name in _OFF_THE_GPU]
    if backend != "auto":
        candidates = [backend]
    chosen: ModuleType | str = ""
    for candidate in candidates:
        chosen = _consider(op, candidate, args)
        if isinstance(chosen, ModuleType):
            return chosen
    raise ValueError(f"{op}: backend {candidates[-1]!r} cannot run: {chosen} `vmamba doctor` lists what can.")


def explain_backends(device: torch.device | str | None = None) -> list[BackendRow]:
    """Say for each operation which backends can run on a device, which one "auto" picks, and why others cannot.

    The question is put for a typical case: a small map, d_state 1, bfloat16 on a GPU and float32 elsewhere.

    Args:
        device: By default the first CUDA device if there is one, otherwise the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op, backends in BACKEND_MODULES.items():
        args = _typical_arguments(op, device)
        picked = select_backend(op, "auto", args)
        for backend in backends:
            found = _consider(op, backend, args)
            if isinstance(found, str):
                rows.append(BackendRow(op, backend, False, found))
            else:
                reason = f'"auto" picks it on {device.type}' if found is picked else "asked for by name"
                rows.append(BackendRow(op, backend, True, reason))
        rows.append(BackendRow(op, "reference", True, "asked for by name: the specification, one step at a time"))
    return rows


def _typical_arguments(op: str, device: torch.device) -> tuple[Any, ...]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    if op == "selective_scan":
        return zeros(1, 64, 16), zeros(1, 64, 16), zeros(64, 1).float(), zeros(1, 4, 1, 16)
    return zeros(1, 16, 32), zeros(1, 16, 4 * (2 + 2)), zeros(4, 32, 2), zeros(4, 32, 1).float(), "cross2d", 4, 4
