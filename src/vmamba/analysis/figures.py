"""The figures of the analyses, each as PNG and SVG; made to be read at a width of 800 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vmamba.analysis.ladder import LadderRow
from vmamba.analysis.scaling import ScalingRow
from vmamba.ops.routes import Route, get_routes, route_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_COLOURS = ("#1f6fb2", "#d1662a", "#3a8f4d", "#8a5aa8", "#a33c4a", "#6b6b6b", "#b09020", "#2a9d9d")
_MARKERS = "os^DvPX*"


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return an empty figure 8 inches wide and its axes, without a window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as PNG and as SVG beside it; return both paths.

    Args:
        figure: from one of the functions below.
        path: with or without a suffix; folders are made.

    Raises:
        ValueError: the suffix is neither .png nor .svg.
    """
    target = Path(path).expanduser()
    if target.suffix not in ("", ".png", ".svg"):
        raise ValueError(f"figures are written as .png and .svg; {target.name} asks for {target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # By hand and not by with_suffix: "vmamba_0.5" has no suffix that could be replaced.
    stem = target.with_suffix("") if target.suffix in (".png", ".svg") else target
    written = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def draw_growth(rows: Sequence[ScalingRow]) -> Figure:
    """Draw FLOPs over the number of pixels: a straight line where the cost is linear."""
    figure, axes = new_figure(4.6)
    for i, (name, own) in enumerate(_by_model(rows).items()):
        pixels = [row.size**2 / 1e6 for row in own]
        axes.plot(pixels, [row.gflops for row in own], **_style(i), label=name)
    axes.set(xlabel="image size, megapixels", ylabel="GFLOPs (multiply-accumulates)", xlim=(0, None), ylim=(0, None))
    sizes = sorted({row.size for row in rows})
    top = axes.secondary_xaxis("top")
    top.set_xticks([size**2 / 1e6 for size in _spaced(sizes)], [f"{size}²" for size in _spaced(sizes)])
    top.set_xlabel("pixels")
    _finish(axes)
    axes.legend(frameon=False)
    return figure


def _spaced(sizes: Sequence[int]) -> list[int]:
    """Leave out sizes whose labels would touch the one before on a scale of pixels."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size**2 - kept[-1] ** 2 > 0.055 * sizes[-1] ** 2:
            kept.append(size)
    return kept


def draw_stages(parts: Sequence[tuple[str, float]], title: str) -> Figure:
    """Draw GFLOPs by part of a model as bars."""
    figure, axes = new_figure(1.2 + 0.32 * len(parts))
    bars = axes.barh([name for name, _ in parts], [gflops for _, gflops in parts], color=_COLOURS[0])
    axes.bar_label(bars, [f"{gflops:.3g}" for _, gflops in parts], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="GFLOPs (multiply-accumulates)", title=title)
    _finish(axes)
    return figure


def draw_ladder(rows: Sequence[LadderRow], machine: str) -> Figure:
    """Draw the staircase: every step's speed over the first one's, measured beside published; numbers are images/s.

    A panel for inference and one for training; where only one of them was measured, that one.
    """
    modes = [mode for mode in ("inference", "training") if any(row.measured[mode] for row in rows)]
    modes = modes or ["inference", "training"]
    figure, grid = new_figure(0.6 + 3.3 * len(modes), len(modes), 1, sharex=True, squeeze=False)
    panels = list(grid.flat)
    labels = [row.step.label.replace(", ", ",\n") for row in rows]
    places = np.arange(len(rows))
    for axes, mode in zip(panels, modes, strict=True):
        paper = [row.step.throughput if mode == "inference" else row.step.train_throughput for row in rows]
        here = [row.measured[mode] for row in rows]  # type: ignore[index]
        highest = 1.0
        for speeds, colour, label in ((paper, _COLOURS[1], "published: A100"), (here, _COLOURS[0], machine)):
            base = speeds[0] or next((speed for speed in speeds if speed), 1.0)
            values = [speed / base if speed else np.nan for speed in speeds]
            highest = max([highest, *(value for value in values if value == value)])
            _staircase(axes, places, values, colour, f"{label} (images/s)" if speeds is here else label)
        base = here[0] or next((speed for speed in here if speed), 1.0)
        for place, speed in zip(places, here, strict=True):
            if speed:
                text = {"ha": "center", "fontsize": 8, "color": _COLOURS[0]}
                axes.text(place, speed / base + 0.02 * highest, f"{speed:,.0f}", **text)
        axes.set(ylabel=f"{mode} speed over Vanilla's", ylim=(0, 1.13 * highest))
        _finish(axes)
    panels[0].legend(frameon=False, loc="upper left")
    panels[-1].set_xticks(places, labels, fontsize=7.5)
    panels[-1].set_xlabel("step of the ladder")
    return figure


def _staircase(axes: Axes, places: np.ndarray, values: Sequence[float], colour: str, label: str) -> None:
    if not np.isfinite(values).any():
        return
    edges = np.append(places - 0.5, places[-1] + 0.5)
    axes.stairs(values, edges, color=colour, linewidth=2, label=label, baseline=None)


def draw_scaling(rows: Sequence[ScalingRow], machine: str) -> Figure:
    """Draw speed, memory and FLOPs by resolution, and accuracy where it was measured."""
    panels: list[tuple[str, Any]] = [("GFLOPs an image", lambda row: row.gflops)]
    if any(row.speed for row in rows):
        panels.insert(0, ("images/s", lambda row: row.speed and row.speed.images_per_second))
    if any(row.speed and row.speed.peak_memory_mib for row in rows):
        panels.append(("memory, GiB", lambda row: row.speed and (row.speed.peak_memory_mib or np.nan) / 1024))
    if any(row.top1 is not None for row in rows):
        panels.append(("top-1 accuracy, %", lambda row: np.nan if row.top1 is None else 100 * row.top1))
    height = -(-len(panels) // 2)
    figure, grid = new_figure(0.6 + 3.0 * height, height, min(2, len(panels)), squeeze=False)
    axes_list = list(grid.flat)
    for axes, (label, value) in zip(axes_list, panels, strict=False):
        for i, (name, own) in enumerate(_by_model(rows).items()):
            axes.plot([row.size for row in own], [value(row) for row in own], **_style(i), label=name)
            tuned = [np.nan if row.top1_tuned is None else 100 * row.top1_tuned for row in own]
            if label.startswith("top-1") and np.isfinite(tuned).any():
                style = _style(i) | {"linestyle": "--"}
                axes.plot([row.size for row in own], tuned, **style, label=f"{name}, head tuned")
                axes.legend(frameon=False, fontsize=8)
        if label in ("images/s", "GFLOPs an image"):
            axes.set_yscale("log")
        axes.set(xlabel="side of the image, pixels", ylabel=label)
        _finish(axes)
    for unused in axes_list[len(panels) :]:
        unused.remove()
    handles, labels = axes_list[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, title=machine or None)
    return figure


def draw_fields(fields: Mapping[str, Tensor], squares: Mapping[str, int]) -> Figure:
    """Draw effective receptive fields beside each other on one colour scale, with the square that holds half.

    Args:
        fields: contributions (H, W) by name.
        squares: side in pixels of the central square that holds half of them, by name.
    """
    from matplotlib.patches import Rectangle

    columns = 2 if len(fields) == 4 else min(3, len(fields))
    rows = -(-len(fields) // columns)
    shape = max(field.shape[0] / field.shape[1] for field in fields.values())
    figure, grid = new_figure(1.3 + rows * (7.0 / columns * shape + 0.65), rows, columns, squeeze=False)
    image: Any = None
    for axes, (name, field) in zip(grid.flat, fields.items(), strict=False):
        height, width = field.shape
        values = np.log10(field.numpy() / max(float(field.max()), 1e-300) + 1e-4)
        image = axes.imshow(values, cmap="viridis", vmin=-4, vmax=0)
        side = squares[name]
        corner = (width // 2 - side / 2, height // 2 - side / 2)
        axes.add_patch(Rectangle(corner, side, side, fill=False, color="white", linewidth=1.2, clip_on=True))
        axes.set_title(f"{name}\nhalf within {side} px", fontsize=9)
        axes.set_xticks([0, width // 2, width - 1], ["0", f"{width // 2}", f"{width - 1}"], fontsize=8)
        axes.set_yticks([0, height // 2, height - 1], ["0", f"{height // 2}", f"{height - 1}"], fontsize=8)
    for unused in grid.flat[len(fields) :]:
        unused.remove()
    for axes in list(grid.flat[: len(fields)])[-columns:]:
        axes.set_xlabel("pixels", fontsize=8)
    bar = figure.colorbar(image, ax=list(grid.flat[: len(fields)]), location="bottom", shrink=0.6, aspect=40)
    bar.set_ticks([-4, -3, -2, -1, 0], labels=["$10^{-4}$", "$10^{-3}$", "$10^{-2}$", "$10^{-1}$", "1"])
    bar.set_label("contribution, share of the largest")
    return figure


def draw_maps(image: Image, maps: Mapping[str, Tensor], query: tuple[int, int] | None, label: str) -> Figure:
    """Draw maps over an image.

    Args:
        image: what the model saw.
        maps: (h, w) by name, brought to the image's size.
        query: pixel (row, column) marked, or None.
        label: of the colours, such as "influence on the query".
    """
    columns = min(3, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    shape = image.height / image.width
    figure, grid = new_figure(0.9 + rows * (7.2 / columns * shape + 0.35), rows, columns, squeeze=False)
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    first, *others = grid.flat
    first.imshow(image)
    first.set_title(f"image, {image.width} × {image.height} px", fontsize=10)
    # One bright position, often the query itself, must not leave the rest black.
    highest = float(torch.cat([values.abs().flatten() for values in maps.values()]).quantile(0.995)) or 1.0
    signed = any(float(values.min()) < 0 for values in maps.values())
    drawn: Any = None
    for axes, (name, values) in zip(others, maps.items(), strict=False):
        axes.imshow(image.convert("L"), cmap="gray", alpha=0.55)
        drawn = axes.imshow(
            values.numpy() / highest,
            extent=extent,
            alpha=0.7,
            cmap="RdBu_r" if signed else "inferno",
            vmin=-1 if signed else 0,
            vmax=1,
        )
        axes.set_title(name, fontsize=10)
    for axes in grid.flat[: len(maps) + 1]:
        axes.set_xticks([])
        axes.set_yticks([])
        if query is not None:
            axes.plot(query[1], query[0], marker="P", markersize=9, color="#39ff7a", markeredgecolor="black")
    for unused in grid.flat[len(maps) + 1 :]:
        unused.remove()
    bar = figure.colorbar(drawn, ax=list(grid.flat[: len(maps) + 1]), location="bottom", shrink=0.6, aspect=40)
    bar.set_label(f"{label}; 1 is the 99.5th percentile, {highest:.3g}", fontsize=9)
    return figure


def draw_routes(image: Image, grid: tuple[int, int], routes: str = "cross2d") -> Figure:
    """Draw the routes of a pattern over an image cut into patches, from dark to light in the order of reading.

    Args:
        image: any image.
        grid: rows and columns of patches.
        routes: name of the pattern; a route that repeats is drawn once.

    Raises:
        ValueError: an unknown pattern, or a grid too fine to be read.
    """
    height, width = grid
    if not (2 <= height <= 24 and 2 <= width <= 24):
        raise ValueError(f"a picture of routes needs 2 to 24 rows and columns of patches; got {height}×{width}")
    distinct = list(dict.fromkeys(get_routes(routes)))
    columns = 2 if len(distinct) > 1 else 1
    rows = -(-len(distinct) // columns)
    panel = 7.6 / columns * image.height / image.width
    figure, axes_grid = new_figure(rows * (panel + 0.4) + 0.7, rows, columns, squeeze=False)
    lines: Any = None
    for axes, route in zip(axes_grid.flat, distinct, strict=False):
        lines = _draw_route(axes, image, route, height, width)
    for unused in axes_grid.flat[len(distinct) :]:
        unused.remove()
    bar = figure.colorbar(lines, ax=list(axes_grid.flat[: len(distinct)]), location="bottom", shrink=0.6, aspect=40)
    bar.set_label("order of reading", fontsize=9)
    bar.set_ticks([lines.norm.vmin, lines.norm.vmax], labels=["first", "last"])
    return figure


def _draw_route(axes: Axes, image: Image, route: Route, height: int, width: int) -> Any:
    """Draw one route over an image cut into patches; return the lines, which carry the colours."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    positions = route_index(route, height, width).numpy()
    x = (positions % width + 0.5) * image.width / width
    y = (positions // width + 0.5) * image.height / height
    axes.imshow(image.convert("L"), cmap="gray", alpha=0.5, extent=(0, image.width, image.height, 0))
    for line in range(1, width):
        axes.axvline(line * image.width / width, color="white", linewidth=0.6)
    for line in range(1, height):
        axes.axhline(line * image.height / height, color="white", linewidth=0.6)
    points = np.stack([x, y], axis=1)
    _, steps = route.sequences(height, width)
    inside = np.arange(len(points) - 1) % steps != steps - 1  # a line of its own is not joined to the next
    segments = np.stack([points[:-1], points[1:]], axis=1)[inside]
    order = np.flatnonzero(inside) / len(points)
    lines = LineCollection(list(segments), cmap="plasma", linewidths=2.2, array=order)
    lines.set_clim(0, order.max())
    axes.add_collection(lines)
    _arrows(axes, segments, colormaps["plasma"])
    if len(points) <= 100:
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        for step, (px, py) in enumerate(points):
            axes.text(px, py, str(step + 1), ha="center", va="center", fontsize=7, bbox=box)
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    axes.set_title(_route_name(route), fontsize=10)
    return lines


def _arrows(axes: Axes, segments: np.ndarray, colours: Any) -> None:
    """Put an arrow head on every line of patches, so that the direction shows without colours."""
    for i in range(0, len(segments), max(1, len(segments) // 12)):
        (x0, y0), (x1, y1) = segments[i]
        middle, ahead = ((x0 + x1) / 2, (y0 + y1) / 2), (x0 + (x1 - x0) * 0.62, y0 + (y1 - y0) * 0.62)
        style = {"arrowstyle": "-|>", "color": colours(i / len(segments)), "mutation_scale": 14}
        axes.annotate("", xy=ahead, xytext=middle, arrowprops=style)


def _route_name(route: Route) -> str:
    lines = "columns" if route.column_major else "rows"
    if route.per_line:
        return f"each of the {lines}, {'backwards' if route.reverse else 'forwards'}"
    return f"{lines}, {'from last to first' if route.reverse else 'from first to last'}"


def _by_model(rows: Sequence[ScalingRow]) -> dict[str, list[ScalingRow]]:
    names = dict.fromkeys(row.model for row in rows)
    return {name: sorted((row for row in rows if row.model == name), key=lambda row: row.size) for name in names}


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
