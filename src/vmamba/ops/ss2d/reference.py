"""SS2D's core as the paper composes it: cross-scan, Δ from its low-rank form, S6 on each route, cross-merge."""

import torch
from torch import Tensor

from vmamba.ops.routes import cross_merge, cross_scan, get_routes, scan_route
from vmamba.ops.s6.reference import selective_scan_reference


def ss2d_scan_reference(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    height: int,
    width: int,
    routes: str = "cross2d",
    flip_back: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the merged map of SS2D literally (section 4.2 of the paper); differentiable by autograd.

    Args:
        x: (B, L, E) map in row-major order, L = H·W.
        projected: (B, L, K·(R+2N)) for each route its Δ-rank, B and C, at the map position they belong to.
        dt_weight: (K, E, R).
        dt_bias: (K, E).
        A: (K, E, N), negative.
        D: (K, E).
        height: H.
        width: W.
        routes: A key of `vmamba.ops.routes.ROUTES`.
        flip_back: See `vmamba.ops.cross_merge`.
        out_dtype: Of the result; by default float64 for float64 input and float32 for any other.

    Returns:
        (B, L, E).
    """
    pattern = get_routes(routes)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, channels = x.shape
    K, N, R = len(pattern), A.shape[-1], dt_weight.shape[-1]
    count, steps = pattern[0].sequences(height, width)

    xs = cross_scan(x.to(dtype).view(batch, height, width, channels), routes, channels_last=True)  # (B, K, L, E)
    grids = projected.to(dtype).view(batch, height, width, K, R + 2 * N).unbind(3)
    ps = torch.stack([scan_route(grid, route) for grid, route in zip(grids, pattern, strict=True)], dim=1)
    rank, Bs, Cs = ps.split([R, N, N], dim=-1)  # (B, K, L, ·)
    deltas = torch.einsum("bklr,ker->bkle", rank, dt_weight.to(dtype))

    def as_sequences(t: Tensor) -> Tensor:  # (B, K, L, C) -> (B·count, K, C, steps)
        return t.unflatten(2, (count, steps)).permute(0, 2, 1, 4, 3).flatten(0, 1)

    ys = selective_scan_reference(
        as_sequences(xs).flatten(1, 2),
        as_sequences(deltas).flatten(1, 2),
        A.flatten(0, 1),
        as_sequences(Bs),
        as_sequences(Cs),
        D.flatten(),
        dt_bias.flatten(),
        delta_softplus=True,
    )
    ys = ys.view(batch, count, K, channels, steps).permute(0, 2, 1, 4, 3).reshape(batch, K, length, channels)
    merged = cross_merge(ys, routes, height=height, width=width, channels_last=True, flip_back=flip_back)
    return merged.reshape(batch, length, channels).to(out_dtype or dtype)
