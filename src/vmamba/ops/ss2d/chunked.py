"""SS2D's core in plain PyTorch for any device: the blocked scan of `vmamba.ops.s6.chunked` fed straight from the map.

On a square map the chunks of a row-major route are the rows and those of a column-major route the columns, so all four
routes are strided views of the map and of its copy turned by 180°. Other maps are copied once per distinct order. Δ is
one small matrix product per route, in scan order, from the low-rank part.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.routes import Route, get_routes, scan_route, unscan_route, without_flip_back
from vmamba.ops.s6.chunked import (
    chunk_grid,
    images_per_slab,
    keep_freed_memory,
    scan_gradients,
    scan_outputs,
    softplus_,
    softplus_gradient_,
)


def why_not(
    x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str, height: int, width: int
) -> str | None:
    """Say why this backend cannot run: it always can."""
    return None


class _Orders:
    """Maps in the orders of the routes, as grids [T, B', G, C] of G chunks of T steps; B' counts sequences.

    A map is stored once for each key: each order that is not a mere view of another.
    """

    def __init__(self, pattern: tuple[Route, ...], height: int, width: int) -> None:
        self.pattern, self.height, self.width = pattern, height, width
        _, self.length = pattern[0].sequences(height, width)
        self.square = height == width and not pattern[0].per_line
        self.G, self.T = (height, width) if self.square else chunk_grid(self.length)

    def key(self, route: Route) -> Route:
        """Name the stored order that a route is a view of."""
        return Route(False, route.reverse) if self.square else route

    def store(self, maps: Tensor, key: Route) -> Tensor:
        """Bring maps (B, L, C) into an order, (B', G·T, C); a view where that is the order they have."""
        grid = maps.unflatten(1, (self.height, self.width))
        sequences = scan_route(grid, key).reshape(-1, self.length, maps.shape[2])
        padding = self.G * self.T - self.length
        return F.pad(sequences, (0, 0, 0, padding)) if padding else sequences

    def stores(self, maps: Tensor) -> dict[Route, Tensor]:
        """Bring maps (B, L, C) into every order that the routes need."""
        return {key: self.store(maps, key) for key in dict.fromkeys(self.key(route) for route in self.pattern)}

    def view(self, stored: Tensor, route: Route) -> Tensor:
        """See a stored order as the grid [T, B', G, C] of a route."""
        lines = stored.unflatten(1, (self.G, self.T))
        return lines.permute(1, 0, 2, 3) if self.square and route.column_major else lines.permute(2, 0, 1, 3)

    def views(self, stores: dict[Route, Tensor], pattern: Sequence[Route]) -> list[Tensor]:
        """See stored orders as the grid of each route."""
        return [self.view(stores[self.key(route)], route) for route in pattern]

    def restore(self, stored: Tensor, key: Route) -> Tensor:
        """Bring a stored order back to the map, (B, L, C): the inverse of `store`."""
        sequences = stored[:, : self.length].reshape(-1, self.height * self.width, stored.shape[2])
        return unscan_route(sequences, key, self.height, self.width).flatten(1, 2)

    def merge(self, stores: dict[Route, Tensor], back: tuple[Route, ...]) -> Tensor:
        """Add stored orders up on the map, (B, L, C), each put back along the route in `back` of its route."""
        back_keys = {self.key(route): self.key(other) for route, other in zip(self.pattern, back, strict=True)}
        return reduce(torch.add, (self.restore(stored, back_keys[key]) for key, stored in stores.items()))

    def sum_by_key(self, per_route: Tensor, key: Route) -> Tensor:
        """Add up the rows (K, E) of the routes with a key."""
        rows = [per_route[k] for k, route in enumerate(self.pattern) if self.key(route) == key]
        return reduce(torch.add, rows)

    def projections(self, projected: Tensor, ks: slice, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Read Δ-rank, B and C of some routes in scan order: [K, T, B', G, R or N]."""
        parts = projected.unflatten(2, (len(self.pattern), -1))[:, :, ks].unbind(2)
        routes = self.pattern[ks]
        grids = [self.view(self.store(part, self.key(r)), r) for part, r in zip(parts, routes, strict=True)]
        stacked = torch.stack(grids).to(dtype)
        N = (stacked.shape[-1] - R) // 2
        rank, B, C = stacked.split([R, N, N], dim=-1)
        return rank, B, C

    def write_projections(self, projected: Tensor, grids: Tensor, ks: slice) -> None:
        """Write what is in scan order, [K, T, B', G, R+2N], to the routes' parts of (B, L, K·(R+2N))."""
        parts = projected.unflatten(2, (len(self.pattern), -1))[:, :, ks].unbind(2)
        for part, grid, route in zip(parts, grids, self.pattern[ks], strict=True):
            stored = part.new_empty(grid.shape[1], self.G * self.T, grid.shape[3])
            self.view(stored, route).copy_(grid)
            part.copy_(self.restore(stored, self.key(route)))


def _slabs(batch: int, elements: int, routes: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the work into slabs: batch entries, and for each the routes taken at a time."""
    images = images_per_slab(batch, elements * routes)
    at_a_time = images_per_slab(routes, elements * images)
    for first in range(0, batch, images):
        ks = [slice(k, min(k + at_a_time, routes)) for k in range(0, routes, at_a_time)]
        yield slice(first, min(first + images, batch)), ks


def _project_dt(rank: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute W_dt r + b, [K, T, B, G, E], from the Δ-rank [K, T, B, G, R]."""
    raw = torch.baddbmm(dt_bias[:, None], rank.flatten(1, 3), dt_weight.transpose(1, 2))
    return raw.view(*rank.shape[:-1], dt_weight.shape[1])


def _times(grids: Tensor, views: list[Tensor]) -> Tensor:
    """Multiply [K, T, B, G, E] by one view [T, B, G, E] for each route."""
    product = torch.empty_like(grids)
    for k, view in enumerate(views):
        torch.mul(grids[k], view, out=product[k])
    return product


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute `ss2d_scan`."""
    keep_freed_memory()
    pattern, dtype = get_routes(routes), A.dtype
    orders = _Orders(pattern, height, width)
    back = pattern if flip_back else without_flip_back(pattern)
    batch, length, channels = x.shape
    dt_weight = dt_weight.to(dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    for part, route_slabs in _slabs(batch, length * channels, len(pattern)):
        xs = orders.stores(x[part].to(dtype))
        ys = {key: store * orders.sum_by_key(D, key) for key, store in xs.items()}
        for ks in route_slabs:
            rank, B, C = orders.projections(projected[part], ks, dt_weight.shape[2], dtype)
            dt = softplus_(_project_dt(rank, dt_weight[ks], dt_bias[ks]))
            drive = _times(dt, orders.views(xs, pattern[ks]))
            scan_outputs(dt, drive, A[ks], B, C, orders.views(ys, pattern[ks]))
        y[part] = orders.merge(ys, back)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, projected, dt_weight, dt_bias, A and D, each in the dtype of its input."""
    keep_freed_memory()
    pattern, dtype = get_routes(routes), A.dtype
    orders = _Orders(pattern, height, width)
    back = _Orders(pattern if flip_back else without_flip_back(pattern), height, width)
    batch, length, channels = x.shape
    R, weight = dt_weight.shape[2], dt_weight.to(dtype)
    dx, dprojected = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, projected))
    ddt_weight, ddt_bias, dA, dD = (torch.zeros_like(t) for t in (weight, dt_bias, A, D))
    for part, route_slabs in _slabs(batch, length * channels, len(pattern)):
        xs, dys = orders.stores(x[part].to(dtype)), back.stores(dy[part].to(dtype))
        dxs = {key: torch.zeros_like(store) for key, store in xs.items()}
        for ks in route_slabs:
            rank, B, C = orders.projections(projected[part], ks, R, dtype)
            raw = _project_dt(rank, weight[ks], dt_bias[ks])
            dt = softplus_(raw.clone())
            x_views, dy_views = orders.views(xs, pattern[ks]), back.views(dys, back.pattern[ks])
            ddt, ddrive, dA_part, dB, dC = scan_gradients(dt, _times(dt, x_views), A[ks], B, C, dy_views)
            for i, dx_view in enumerate(orders.views(dxs, pattern[ks])):
                k = ks.start + i
                ddt[i].addcmul_(ddrive[i], x_views[i])
                dx_view.addcmul_(ddrive[i], dt[i]).addcmul_(dy_views[i], D[k])
                dD[k] += (x_views[i] * dy_views[i]).sum((0, 1, 2))
            draw = softplus_gradient_(ddt, raw).flatten(1, 3)  # [K, T·B·G, E]
            dA[ks] += dA_part
            ddt_bias[ks] += draw.sum(1)
            ddt_weight[ks] += draw.transpose(1, 2) @ rank.flatten(1, 3)
            drank = (draw @ weight[ks]).view_as(rank)
            orders.write_projections(dprojected[part], torch.cat([drank, dB, dC], dim=-1), ks)
        dx[part] = orders.merge(dxs, pattern)
    return dx, dprojected, ddt_weight.to(dt_weight.dtype), ddt_bias, dA, dD
