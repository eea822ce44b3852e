"""The attention hidden in the selective scan (section 4.4 and appendix of the paper): maps, exact, of any block.

Along a route, y_t = Σ_{s ≤ t} C_t · (w_ts ⊙ B_s) (Δ_s u_s) + D u_t with w_ts = exp(A Σ_{r = s+1..t} Δ_r): attention
with queries Q = C, keys K = B, values V = Δ ⊙ u, decayed by w and causal along the route. Every channel has maps of its
own.

All positions here are row-major positions of the map, whatever the route; rows are queries, columns what they look at.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba.models.vmamba import VMamba
from vmamba.ops import selective_scan
from vmamba.ops.routes import get_routes, route_index

Mode = Literal["attention", "similarity", "decay", "influence"]
Normalization = Literal["none", "minmax", "absolute", "rows"]
Reduction = Literal["mean", "absolute"]
EXACT_MODES: tuple[Mode, ...] = ("attention", "influence")


@dataclass(frozen=True)
class ScanRecord:
    """What went into the scan of one SS2D, and what came out, for one image.

    Attributes:
        u: (E, L) input of the scan, row-major.
        delta: (K, E, L) Δ after softplus, by map position.
        A: (K, E, N).
        B: (K, N, L) by map position.
        C: (K, N, L).
        D: (K, E).
        height: H, where L = H·W.
        width: W.
        routes: name of the pattern.
        output: (E, L), the merged output of the scan.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    height: int
    width: int
    routes: str
    output: Tensor

    @property
    def route_count(self) -> int:
        """K."""
        return self.A.shape[0]

    def order(self, route: int) -> Tensor:
        """Return the map position that a route reads at each step, (L,)."""
        return route_index(get_routes(self.routes)[route], self.height, self.width, self.u.device)


def record_scan(model: nn.Module, image: Tensor, stage: int, block: int) -> ScanRecord:
    """Run an image through a model and keep what one block's scan read and gave.

    Args:
        model: a VMamba; it is left as it is.
        image: (in_chans, H, W) or (1, in_chans, H, W), any size, square or not.
        stage: from 0.
        block: within the stage, from 0.

    Raises:
        ValueError: there is no such stage or block, or it does not scan whole maps in one operator.
    """
    module = _find(model, stage, block)
    tap = _Tap()
    inside: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        inside.append(tap.__enter__())

    def leave(*_: Any) -> None:
        inside.pop()
        tap.__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(image if image.dim() == 4 else image[None])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if len(tap.calls) != 1:
        raise ValueError(
            f"stage {stage} block {block} called the fused scan {len(tap.calls)} times; maps need a block that calls "
            "it once: no cascade, no sequential_routes, and not backend='reference'"
        )
    return _as_record(*tap.calls[0])


def _find(model: nn.Module, stage: int, block: int) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, VMamba):
        raise ValueError(f"attention maps are of a VMamba's scan; this is a {type(model).__name__}")
    stages = model.stages()
    if not 0 <= stage < len(stages):
        raise ValueError(f"there is no stage {stage}; the model has stages 0 to {len(stages) - 1}")
    blocks = list(stages[stage].blocks)
    if not 0 <= block < len(blocks):
        raise ValueError(f"there is no block {block} in stage {stage}; it has blocks 0 to {len(blocks) - 1}")
    op = getattr(blocks[block], "op", None)
    if not isinstance(op, nn.Module):
        raise ValueError(f"stage {stage} block {block} has no SS2D, so it has no maps; ssm_ratio is 0")
    return op


class _Tap(TorchDispatchMode):
    """Keep the arguments and results of `ss2d_scan`, as they are after all that a model does before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.vmamba.ss2d_scan.default:
            self.calls.append((args, result))
        return result


def _as_record(args: tuple[Any, ...], output: Tensor) -> ScanRecord:
    x, projected, dt_weight, dt_bias, A, D = (tensor.detach() for tensor in args[:6])
    height, width, routes = args[6:9]
    if x.shape[0] != 1:
        raise ValueError(f"maps are of one image; got a batch of {x.shape[0]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    K, R, N = dt_weight.shape[0], dt_weight.shape[2], A.shape[2]
    parts = projected[0].to(dtype).view(height * width, K, R + 2 * N).permute(1, 2, 0)  # (K, R + 2N, L)
    rank, Bs, Cs = parts.split([R, N, N], dim=1)
    delta = F.softplus(dt_weight.to(dtype) @ rank + dt_bias.to(dtype)[..., None])
    u = x[0].to(dtype).transpose(0, 1)
    return ScanRecord(u, delta, A.to(dtype), Bs, Cs, D.to(dtype), height, width, routes, output[0].transpose(0, 1))


def route_maps(
    record: ScanRecord, route: int, queries: Tensor, mode: Mode = "attention", channels: slice = slice(None)
) -> Tensor:
    """Give every channel's map of one route, for some queries.

    Args:
        record: from `record_scan`.
        route: from 0 to K - 1.
        queries: (Q,) positions.
        mode: "attention" is C_t · (w ⊙ B_s), (Q ⊙ w)(K / w)ᵀ in the paper, exact on the values Δ ⊙ u; "similarity" is
            C_t · B_s, QKᵀ, without the decay; "decay" is w, averaged over the N states; "influence" is "attention"
            times Δ_s, with D on the diagonal, exact on u itself.
        channels: which of the E channels.

    Returns:
        (channels, Q, L); zero where a route has not been yet. Memory: as many numbers, and the same again a few times.

    Raises:
        ValueError: there is no such route, mode or position.
    """
    _check_choice("mode", mode, Mode)
    _check_route(record, route)
    _check_queries(record, queries)
    order = record.order(route)
    step = torch.empty_like(order)
    step[order] = torch.arange(len(order), device=order.device)
    A, delta = record.A[route, channels], record.delta[route, channels]  # (E, N), (E, L)
    Bs, Cs = record.B[route], record.C[route]  # (N, L)
    # Sums over thousands of steps: in float64, and their small differences exact before they are rounded.
    elapsed = torch.empty_like(delta, dtype=torch.float64)
    elapsed[:, order] = delta[:, order].double().cumsum(1)
    earlier = step[None, :] <= step[queries][:, None]  # (Q, L)
    between = (elapsed[:, queries, None] - elapsed[:, None, :]).to(delta.dtype)  # (E, Q, L)
    between.masked_fill_(~earlier, 0.0)

    maps = torch.zeros_like(between)
    N = A.shape[1]
    for n in range(N):
        decay = torch.exp(A[:, n, None, None] * between) if mode != "similarity" else 1.0
        pair = 1.0 / N if mode == "decay" else Cs[n, queries, None] * Bs[n, None, :]
        maps += decay * pair
    if mode == "influence":
        maps *= delta[:, None, :]
    maps.masked_fill_(~earlier, 0.0)
    if mode == "influence":
        maps[:, torch.arange(len(queries)), queries] += record.D[route, channels, None]
    return maps


def route_values(record: ScanRecord, route: int, mode: Mode = "attention") -> Tensor:
    """Return what the maps of an exact mode weigh: (E, L), Δ ⊙ u for "attention", u for "influence".

    Raises:
        ValueError: the mode's maps do not give the scan's output.
    """
    if mode not in EXACT_MODES:
        raise ValueError(
            f"maps of mode {mode!r} do not give the scan's output; those of {' and '.join(EXACT_MODES)} do"
        )
    return record.u if mode == "influence" else record.delta[route] * record.u


def scan_from_maps(record: ScanRecord, mode: Mode = "attention", *, max_elements: int = 2**18) -> Tensor:
    """Compute the scan's output by its maps alone: every channel's map times its values.

    Args:
        record: from `record_scan`.
        mode: "attention" or "influence".
        max_elements: numbers a chunk of maps may have.

    Returns:
        (K, E, L), the output of every route; their sum is the merged output.
    """
    outputs = torch.stack([_apply(record, k, mode, max_elements) for k in range(record.route_count)])
    return outputs if mode == "influence" else outputs + record.D[..., None] * record.u


def _apply(record: ScanRecord, route: int, mode: Mode, max_elements: int) -> Tensor:
    """Weigh the values of a route by its maps, (E, L)."""
    values = route_values(record, route, mode)
    output = torch.zeros_like(values)
    for channels, queries, maps in _chunks(record, route, mode, max_elements):
        output[channels, queries] = torch.einsum("eqs,es->eq", maps, values[channels])
    return output


def exactness(record: ScanRecord, *, max_elements: int = 2**18) -> float:
    """Return how far the maps' output is from the scan's: the worst of all routes and merged, relative to its norm.

    The skip connection, D ⊙ u, is left out of both, or it would hide the rest where the state says little.
    """
    orders = [record.order(k) for k in range(record.route_count)]
    u = torch.cat([record.u[:, order] for order in orders])
    delta = torch.cat([record.delta[k][:, order] for k, order in enumerate(orders)])
    Bs, Cs = (torch.stack([t[k][:, order] for k, order in enumerate(orders)]) for t in (record.B, record.C))
    scanned = selective_scan(u[None], delta[None], record.A.flatten(0, 1), Bs[None], Cs[None])
    exact = torch.zeros_like(record.delta)
    for k, order in enumerate(orders):
        exact[k][:, order] = scanned[0].view(exact.shape)[k]
    ours = torch.stack([_apply(record, k, "attention", max_elements) for k in range(record.route_count)])
    pairs = [*zip(ours, exact, strict=True), (ours.sum(0), exact.sum(0))]
    tiny = torch.finfo(exact.dtype).tiny
    return max(float((mine - theirs).norm() / theirs.norm().clamp_min(tiny)) for mine, theirs in pairs)


def attention_map(
    record: ScanRecord,
    route: int | None = None,
    mode: Mode = "attention",
    *,
    queries: Tensor | None = None,
    normalization: Normalization = "none",
    normalize_routes: bool = False,
    reduction: Reduction = "mean",
    max_elements: int = 2**18,
) -> Tensor:
    """Give the map of a block, its channels reduced to one.

    Args:
        record: from `record_scan`.
        route: one route, or None for all of them merged (added up).
        mode: see `route_maps`.
        queries: (Q,) positions wanted; None for all, a full L × L map.
        normalization: "none"; "minmax" to [0, 1] over the map; "absolute", magnitudes over the largest; "rows",
            magnitudes that add up to one for each query.
        normalize_routes: normalise each route before the merge instead of the merged map.
        reduction: "mean" of the channels, or "absolute", the mean of their magnitudes.
        max_elements: numbers a chunk may have; bounds the memory beside the result.

    Returns:
        (Q, L) or (L, L).

    Raises:
        ValueError: an argument is none of those.
    """
    _check_choice("normalization", normalization, Normalization)
    _check_choice("reduction", reduction, Reduction)
    wanted = torch.arange(record.u.shape[1], device=record.u.device) if queries is None else queries
    merged = record.u.new_zeros(len(wanted), record.u.shape[1])
    routes = range(record.route_count) if route is None else [route]
    for k in routes:
        single = torch.zeros_like(merged)
        for channels, rows, maps in _chunks(record, k, mode, max_elements, wanted):
            maps = maps.abs() if reduction == "absolute" else maps
            # A map that is the same for all channels comes once.
            single[rows] += maps.sum(0) * ((channels.stop - channels.start) / (record.u.shape[0] * len(maps)))
        merged += normalize(single, normalization) / len(routes) if normalize_routes else single
    return merged if normalize_routes else normalize(merged, normalization)


def diagonal_map(record: ScanRecord, route: int | None = None, mode: Mode = "attention") -> Tensor:
    """Return how much every position looks at itself, (H, W): the diagonal of `attention_map`, channels averaged."""
    L = record.u.shape[1]
    total = record.u.new_zeros(L)
    for k in range(record.route_count) if route is None else [route]:
        _check_route(record, k)
        _check_choice("mode", mode, Mode)
        own = (record.B[k] * record.C[k]).sum(0)  # no step lies between, so w = 1
        if mode == "decay":
            own = torch.ones_like(own)
        if mode == "influence":
            own = (own * record.delta[k]).mean(0) + record.D[k].mean()
        total += own
    return total.view(record.height, record.width)


def normalize(scores: Tensor, normalization: Normalization) -> Tensor:
    """Normalise a map (Q, L); see `attention_map`. A map of zeros stays one."""
    tiny = torch.finfo(scores.dtype).tiny
    if normalization == "minmax":
        low, high = scores.aminmax()
        return (scores - low) / (high - low).clamp_min(tiny)
    if normalization == "absolute":
        return scores.abs() / scores.abs().amax().clamp_min(tiny)
    if normalization == "rows":
        return scores.abs() / scores.abs().sum(1, keepdim=True).clamp_min(tiny)
    return scores


def rollout(
    model: nn.Module, image: Tensor, stage: int, block: int, *, keep: float = 0.5, max_elements: int = 2**18
) -> tuple[Tensor, ScanRecord]:
    """Follow the maps through the blocks of a stage (attention rollout, arXiv 2005.00928).

    Each block counts as `keep` of the identity, for its residual connection, and the rest of its merged "influence"
    map, magnitudes averaged over channels and normalised to rows that add up to one.

    Args:
        model: a VMamba.
        image: (in_chans, H, W).
        stage: from 0; maps of one stage have one resolution.
        block: the last block followed, from 0.
        keep: share of the residual connection.
        max_elements: see `attention_map`.

    Returns:
        (L, L), and the record of the last block.
    """
    _find(model, stage, block)
    total, record = None, None
    for i in range(block + 1):
        record = record_scan(model, image, stage, i)
        single = attention_map(
            record, mode="influence", normalization="rows", reduction="absolute", max_elements=max_elements
        )
        single = single * (1 - keep) + keep * torch.eye(len(single), dtype=single.dtype, device=single.device)
        total = single if total is None else single @ total
    assert total is not None
    assert record is not None
    return total, record


def query_position(record: ScanRecord, pixel: tuple[int, int], image_size: tuple[int, int]) -> int:
    """Return the position of the map that covers a pixel of the image.

    Args:
        record: from `record_scan`.
        pixel: (row, column) of the image, from 0.
        image_size: (height, width) of the image the model saw.

    Raises:
        ValueError: the pixel lies outside.
    """
    (row, column), (height, width) = pixel, image_size
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"the query pixel {row},{column} lies outside the image; rows go from 0 to {height - 1}, columns from 0 to "
            f"{width - 1}"
        )
    return (row * record.height // height) * record.width + column * record.width // width


def _chunks(
    record: ScanRecord, route: int, mode: Mode, max_elements: int, queries: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield maps of a route a chunk at a time: which channels, which of the queries, (channels, queries, L)."""
    E, L = record.u.shape
    wanted = torch.arange(L, device=record.u.device) if queries is None else queries
    rows = max(1, min(len(wanted), max_elements // L))
    channels = max(1, max_elements // (rows * L))
    for first in range(0, len(wanted), rows):
        some = wanted[first : first + rows]
        for start in range(0, E, channels):
            chosen = slice(start, min(start + channels, E))
            computed = slice(start, start + 1) if mode == "similarity" else chosen  # the same for every channel
            yield chosen, slice(first, first + len(some)), route_maps(record, route, some, mode, computed)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def _check_route(record: ScanRecord, route: int) -> None:
    if not 0 <= route < record.route_count:
        raise ValueError(f"there is no route {route}; {record.routes} has routes 0 to {record.route_count - 1}")


def _check_queries(record: ScanRecord, queries: Tensor) -> None:
    L = record.u.shape[1]
    if queries.numel() and (int(queries.min()) < 0 or int(queries.max()) >= L):
        raise ValueError(f"query positions go from 0 to {L - 1} on a {record.height}×{record.width} map")
