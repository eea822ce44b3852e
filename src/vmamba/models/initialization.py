"""How the selective scan's parameters start: Mamba's rule, and the two alternatives of the paper's ablation."""

import math
from typing import Literal

import torch
from torch import nn

# Parameters of SS2D that weight decay should spare: it would pull the time scales and the skip weights to one value.
WITHOUT_DECAY = ("A_logs", "Ds", "dt_projs_bias")


def dt_init(
    dt_rank: int,
    d_inner: int,
    *,
    dt_scale: float = 1.0,
    dt_init: Literal["random", "constant"] = "random",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
) -> nn.Linear:
    """Return Δ's projection, its bias such that softplus(bias) is log-uniform between `dt_min` and `dt_max`.

    Source: Mamba (arXiv 2312.00752), section 3.6 and appendix C: the range of Δ sets the initial time scales, and the
    weights' spread dt_rank^-1/2 keeps the variance of Δ from depending on the rank.

    Returns:
        A linear layer, weight (d_inner, dt_rank), bias (d_inner).

    Raises:
        ValueError: `dt_init` is neither "random" nor "constant".
    """
    projection = nn.Linear(dt_rank, d_inner)
    bound = dt_rank**-0.5 * dt_scale
    if dt_init == "random":
        nn.init.uniform_(projection.weight, -bound, bound)
    elif dt_init == "constant":
        nn.init.constant_(projection.weight, bound)
    else:
        raise ValueError(f"dt_init must be 'random' or 'constant'; got {dt_init!r}")
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(d_inner) * (high - low) + low).clamp(min=dt_init_floor)
    with torch.no_grad():
        projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return projection


def A_log_init(d_state: int, d_inner: int, copies: int = 1) -> nn.Parameter:
    """Return log(1..d_state) for every channel and route, so that A = -exp(A_log) is S4D's real initialisation.

    Returns:
        Parameter (copies · d_inner, d_state), float32, or float64 where that is torch's default dtype.
    """
    at_least = torch.promote_types(torch.get_default_dtype(), torch.float32)
    A = torch.arange(1, d_state + 1, dtype=at_least).repeat(copies * d_inner, 1)
    return nn.Parameter(torch.log(A))


def D_init(d_inner: int, copies: int = 1) -> nn.Parameter:
    """Return the skip weights, all one: Parameter (copies · d_inner)."""
    return nn.Parameter(torch.ones(copies * d_inner))


def init_dt_A_D(
    d_state: int,
    dt_rank: int,
    d_inner: int,
    *,
    k_group: int = 4,
    scheme: Literal["mamba", "random", "zero"] = "mamba",
    dt_scale: float = 1.0,
    dt_init_mode: Literal["random", "constant"] = "random",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
    """Return A_logs (K·E, N), Ds (K·E), dt_projs_weight (K, E, R) and dt_projs_bias (K, E) for all K routes.

    `scheme` is Mamba's rule, or one of the two that the paper's ablation shows to train as well: "random" (all normal)
    and "zero" (A_logs zero, Δ's projection uniform).

    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme == "mamba":
        projections = [
            dt_init(
                dt_rank,
                d_inner,
                dt_scale=dt_scale,
                dt_init=dt_init_mode,
                dt_min=dt_min,
                dt_max=dt_max,
                dt_init_floor=dt_init_floor,
            )
            for _ in range(k_group)
        ]
        weight = torch.stack([p.weight.detach() for p in projections])
        bias = torch.stack([p.bias.detach() for p in projections])
        A_logs = A_log_init(d_state, d_inner, copies=k_group)
    elif scheme == "random":
        weight = 0.1 * torch.randn(k_group, d_inner, dt_rank)
        bias = 0.1 * torch.randn(k_group, d_inner)
        A_logs = nn.Parameter(torch.randn(k_group * d_inner, d_state))
    elif scheme == "zero":
        weight = 0.1 * torch.rand(k_group, d_inner, dt_rank)
        bias = 0.1 * torch.rand(k_group, d_inner)
        A_logs = nn.Parameter(torch.zeros(k_group * d_inner, d_state))
    else:
        raise ValueError(f"scheme must be 'mamba', 'random' or 'zero'; got {scheme!r}")
    return A_logs, D_init(d_inner, copies=k_group), nn.Parameter(weight), nn.Parameter(bias)
