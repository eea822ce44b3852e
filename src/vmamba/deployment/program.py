"""A model as a `torch.export` program whose batch, height and width stay open."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.utils._sympy.value_ranges import ValueRanges

from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VMamba
from vmamba.ops.linear.whole import whole_linear

# Neither is 1, which tracing would take for a constant, nor alike, which it would take for one and the same size.
_EXAMPLE = (2, 96, 128)


class Exportable(nn.Module):
    """A model that takes one tensor and returns a tuple of them, whatever it returned before.

    Args:
        model: Maps images (B, C, H, W) to a tensor, tensors in a list, tuple or dictionary, or to what transformers
            returns, whose `logits` or `feature_maps` are taken.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, C, H, W) to the outputs."""
        return tuple(flat_outputs(self.model(images)))


class FeatureMaps(nn.Module):
    """The maps of all stages of a VMamba, each before its downsampling.

    Args:
        model: A VMamba.
    """

    def __init__(self, model: VMamba) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, C, H, W) to the maps (B, C_i, H_i, W_i)."""
        maps = self.model.forward_intermediates(images, intermediates_only=True)
        assert isinstance(maps, list)
        return maps


class OpenPooling(nn.AdaptiveAvgPool2d):
    """PyTorch's adaptive average pooling as two products with matrices made from the size of the map.

    ONNX has pooling into a grid for maps of known size only. The cells are those of PyTorch: cell i of n begins at
    ⌊i·size/n⌋ and ends before ⌈(i + 1)·size/n⌉.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, rows, columns)."""
        height, width = input.shape[2:]
        given = self.output_size
        rows, columns = given if isinstance(given, tuple) else (given, given)
        rows, columns = rows or height, columns or width
        return _cells(height, rows, input) @ input @ _cells(width, columns, input).transpose(0, 1)


def _cells(size: int, count: int, like: Tensor) -> Tensor:
    """Say what share each position has in each cell: (count, size)."""
    cells = torch.arange(count, device=like.device)[:, None]
    begin, end = cells * size // count, ((cells + 1) * size + count - 1) // count
    position = torch.arange(size, device=like.device)[None]
    inside = (position >= begin) & (position < end)
    return inside.to(like.dtype) / (end - begin).to(like.dtype)


def flat_outputs(value: Any) -> Iterable[Tensor]:
    """Yield the tensors that a model returned.

    Raises:
        TypeError: There is something else among them.
    """
    if isinstance(value, Tensor):
        yield value
        return
    for name in ("logits", "feature_maps"):
        if (found := getattr(value, name, None)) is not None:
            value = found
            break
    if isinstance(value, Tensor):
        yield value
        return
    if not isinstance(value, (list, tuple, dict)):
        raise TypeError(f"a model to export must return tensors, not {type(value).__name__}")
    for item in value.values() if isinstance(value, dict) else value:
        yield from flat_outputs(item)


def prepared(model: nn.Module) -> Exportable:
    """Copy a model into the form that is traced: evaluation, no gradients, the routes of SS2D scanned together."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SS2D):
            module.sequential_routes = False  # equal results, and one operator in place of four
    return Exportable(model)


def trace(model: nn.Module, in_chans: int = 3, img_size: tuple[int, int] | None = None) -> ExportedProgram:
    """Trace a model with `torch.export`, for any batch, height and width.

    Args:
        model: See Exportable. It is copied, in evaluation mode.
        in_chans: Channels of the images.
        img_size: Height and width to fix, for models whose layers depend on them; None leaves both open.
    """
    wrapped = prepared(model)
    if img_size is None:
        for module in wrapped.modules():
            if type(module) is nn.AdaptiveAvgPool2d:
                module.__class__ = OpenPooling
    weight = next(wrapped.parameters())
    batch, height, width = (_EXAMPLE[0], *(img_size or _EXAMPLE[1:]))
    example = torch.zeros(batch, in_chans, height, width, dtype=weight.dtype, device=weight.device)
    dynamic: dict[int, Any] = {0: Dim.DYNAMIC}
    if img_size is None:
        dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with warnings.catch_warnings(), shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # torch's own, about its internals
        program = torch.export.export(wrapped, (example,), dynamic_shapes=(dynamic,))
    _admit_single(program)
    return program


def keep_linear_whole(program: ExportedProgram) -> None:
    """Replace the linear layers of a program by `vmamba.ops.linear.whole`, in place."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            node.target = whole_linear.registered
            node.args = (*node.args, None) if len(node.args) == 2 else node.args
    program.graph_module.recompile()


def _admit_single(program: ExportedProgram) -> None:
    """Let sizes be 1 again.

    Tracing chooses memory layouts and notes that it took sizes to be above 1 for that. Values do not depend on the
    layout, so the notes only shut out batches of one image and images below 33 pixels; `verify` runs such ones.
    """
    for symbol, values in list(program.range_constraints.items()):
        program.range_constraints[symbol] = ValueRanges(1, values.upper)
    program._guards_code = []
