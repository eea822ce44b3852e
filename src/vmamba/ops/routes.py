"""The routes of SS2D as data, and the cross-scan and cross-merge they define (section 4.2 of the paper, figure 3).

A route is an order in which the positions of an `H × W` map are read as a sequence. The kernels need only the facts in
`Route`; the functions here are the plain definition they are tested against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """One order of reading a map.

    Attributes:
        column_major: Whether the lines that are read one after another are the columns rather than the rows.
        reverse: Whether the reading runs backwards.
        per_line: Whether each line is a sequence of its own. Lines then keep their place, and `reverse` runs backwards
            inside each; otherwise the whole map is one sequence and `reverse` starts at its last position.
    """

    column_major: bool
    reverse: bool
    per_line: bool = False

    def sequences(self, height: int, width: int) -> tuple[int, int]:
        """Return how many sequences the map is read as, and how long each is."""
        if not self.per_line:
            return 1, height * width
        return (width, height) if self.column_major else (height, width)


_ROW, _COLUMN = Route(False, False), Route(True, False)
_ROW_BACK, _COLUMN_BACK = Route(False, True), Route(True, True)

ROUTES: dict[str, tuple[Route, ...]] = {
    "cross2d": (_ROW, _COLUMN, _ROW_BACK, _COLUMN_BACK),
    "unidi": (_ROW,) * 4,
    "bidi": (_ROW, _ROW, _ROW_BACK, _ROW_BACK),
    "rows": (Route(False, False, True), Route(False, True, True)),
    "columns": (Route(True, False, True), Route(True, True, True)),
}


def get_routes(name: str) -> tuple[Route, ...]:
    """Look up a pattern of routes by name; `ValueError` names the known ones."""
    if name not in ROUTES:
        raise ValueError(f"routes must be one of {', '.join(map(repr, ROUTES))}, got {name!r}")
    return ROUTES[name]


def route_index(route: Route, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Give the row-major map position that a route reads at each step: int64, shape (H·W,)."""
    positions = torch.arange(height * width, device=device).view(1, height, width, 1)
    return scan_route(positions, route).flatten()


def scan_route(x: Tensor, route: Route) -> Tensor:
    """Read a map (B, H, W, C) along one route: (B, H·W, C)."""
    if route.column_major:
        x = x.transpose(1, 2)
    if route.reverse:
        x = x.flip(2 if route.per_line else (1, 2))
    return x.flatten(1, 2)


def unscan_route(y: Tensor, route: Route, height: int, width: int) -> Tensor:
    """Put a sequence (B, H·W, C) back on the map (B, H, W, C): the inverse of `scan_route`."""
    y = y.unflatten(1, (width, height) if route.column_major else (height, width))
    if route.reverse:
        y = y.flip(2 if route.per_line else (1, 2))
    return y.transpose(1, 2) if route.column_major else y


def without_flip_back(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    """Return the routes along which results are put back when reversed lines are not turned round again.

    The published code of the cascade ablation adds the reversed half of each line scan in the order it was read.
    """
    return tuple(Route(route.column_major, False, route.per_line) for route in routes)


def cross_scan(x: Tensor, routes: str = "cross2d", *, channels_last: bool = False) -> Tensor:
    """Read a map along every route of a pattern (the cross-scan of section 4.2).

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channels_last`; any strides.
        routes: A key of `ROUTES`.
        channels_last: Where the channels are, in the input and in the result.

    Returns:
        (B, K, C, L), or (B, K, L, C) with `channels_last`, where L = H·W.

    Raises:
        ValueError: For an unknown pattern or an input that is not 4-dimensional.
    """
    pattern = get_routes(routes)
    if x.dim() != 4:
        layout = "(B, H, W, C)" if channels_last else "(B, C, H, W)"
        raise ValueError(f"cross_scan reads a map of shape {layout}, got {tuple(x.shape)}")
    grid = x if channels_last else x.permute(0, 2, 3, 1)
    sequences = [scan_route(grid, route) for route in pattern]
    if not channels_last:
        sequences = [sequence.transpose(1, 2) for sequence in sequences]
    return torch.stack(sequences, dim=1)


def cross_merge(
    y: Tensor,
    routes: str = "cross2d",
    *,
    height: int,
    width: int,
    channels_last: bool = False,
    flip_back: bool = True,
) -> Tensor:
    """Put the sequences of a pattern back on the map and add them up: the exact adjoint of `cross_scan`.

    Args:
        y: (B, K, C, L), or (B, K, L, C) with `channels_last`, where L = H·W.
        routes: A key of `ROUTES`.
        height: H.
        width: W.
        channels_last: Where the channels are, in the input and in the result.
        flip_back: False adds reversed lines in the order they were read, as the published cascade does; it is then not
            the adjoint. Only for the routes "rows" and "columns".

    Returns:
        (B, C, H, W), or (B, H, W, C) with `channels_last`, in the dtype of `y`.

    Raises:
        ValueError: For an unknown pattern or a shape that does not fit it.
    """
    pattern = get_routes(routes)
    check_flip_back(routes, flip_back)
    length_dim = 2 if channels_last else 3
    if y.dim() != 4 or y.shape[1] != len(pattern) or y.shape[length_dim] != height * width:
        layout = "(B, K, L, C)" if channels_last else "(B, K, C, L)"
        raise ValueError(
            f"cross_merge of {routes!r} on a {height}×{width} map needs {layout} with K = {len(pattern)} and "
            f"L = {height * width}, got {tuple(y.shape)}"
        )
    back = pattern if flip_back else without_flip_back(pattern)
    sequences = y if channels_last else y.transpose(2, 3)
    maps = [unscan_route(sequences[:, k], route, height, width) for k, route in enumerate(back)]
    merged = torch.stack(maps).sum(0)
    return merged if channels_last else merged.permute(0, 3, 1, 2).contiguous()


def check_flip_back(routes: str, flip_back: bool) -> None:
    """Raise `ValueError` where `flip_back=False` has no meaning: on routes that read the map as one sequence."""
    if not flip_back and not get_routes(routes)[0].per_line:
        raise ValueError(f"flip_back=False is defined for the routes 'rows' and 'columns', not for {routes!r}")
