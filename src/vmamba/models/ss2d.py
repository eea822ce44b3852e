"""SS2D: the selective scan of Mamba along four routes over an image (section 4.2 of the paper)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.models.config import Activation, OutNorm, resolve_dt_rank
from vmamba.models.initialization import init_dt_A_D
from vmamba.models.layers import ACTIVATIONS, DepthwiseConv2d, LayerNorm, SpatialSoftmax, convolve_activate
from vmamba.ops import cross_merge, cross_scan, selective_scan, ss2d_scan
from vmamba.ops.capabilities import check_backend


class SS2D(nn.Module):
    """2D selective scan: in_proj → depthwise convolution → SiLU → scan along the routes, merge → norm → out_proj.

    Maps are channels-last, (B, H, W, D) in and out. Parameters have the names and shapes of the published checkpoints.

    Args:
        d_model: D, channels of the map.
        d_state: N, size of the state.
        ssm_ratio: E = ssm_ratio · D channels inside.
        dt_rank: R, rank of Δ; "auto" is ceil(D / 16).
        act: activation after the convolution and of the gate.
        d_conv: kernel of the depthwise convolution, odd; 0 for none.
        conv_bias: whether the convolution has a bias.
        gated: multiply by a second branch of the input projection (the vanilla block).
        gate_act: whether that branch passes through `act`.
        out_norm: what follows the merge; see VMambaConfig.
        out_act: GELU after `out_norm`.
        routes: "cross2d", "unidi", "bidi", or "cascade2d" (rows first, then columns over the result).
        sequential_routes: scan the routes one after the other; equal results.
        force_fp32: give the scan float32 inputs whatever autocast says.
        dropout: after the output projection.
        ssm_init, dt_init, dt_min, dt_max: see `initialization.init_dt_A_D`.
        backend: see `vmamba.ops.ss2d_scan`.
    """

    k_group = 4

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | Literal["auto"] = "auto",
        act: Activation = "silu",
        d_conv: int = 3,
        conv_bias: bool = False,
        gated: bool = False,
        gate_act: bool = True,
        out_norm: OutNorm = "norm",
        out_act: bool = False,
        routes: Literal["cross2d", "unidi", "bidi", "cascade2d"] = "cross2d",
        sequential_routes: bool = False,
        force_fp32: bool = False,
        dropout: float = 0.0,
        ssm_init: Literal["mamba", "random", "zero"] = "mamba",
        dt_init: Literal["random", "constant"] = "random",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        d_inner = int(ssm_ratio * d_model)
        if d_inner < 1:
            raise ValueError(f"ssm_ratio {ssm_ratio} of {d_model} channels leaves none for SS2D; raise one of them")
        rank = resolve_dt_rank(dt_rank, d_model)
        if sequential_routes and routes == "cascade2d":
            raise ValueError("sequential_routes scans four whole-map routes; it does not go with routes='cascade2d'")
        check_backend("selective_scan" if sequential_routes else "ss2d_scan", backend)
        self.d_model, self.d_inner, self.d_state, self.dt_rank = d_model, d_inner, d_state, rank
        self.gated, self.routes, self.backend = gated, routes, backend
        self.sequential_routes, self.force_fp32 = sequential_routes, force_fp32

        self.in_proj = nn.Linear(d_model, 2 * d_inner if gated else d_inner, bias=False)
        self.conv2d = DepthwiseConv2d(d_inner, d_conv, bias=conv_bias) if d_conv > 1 else None
        self.act = ACTIVATIONS[act]()
        self.gate_act = ACTIVATIONS[act]() if gate_act else nn.Identity()
        # One matrix for all routes: the projections act on a position, so they commute with the cross-scan.
        x_proj = [nn.Linear(d_inner, rank + 2 * d_state, bias=False).weight.detach() for _ in range(self.k_group)]
        self.x_proj_weight = nn.Parameter(torch.stack(x_proj))  # (K, R + 2N, E)
        self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias = init_dt_A_D(
            d_state,
            rank,
            d_inner,
            k_group=self.k_group,
            scheme=ssm_init,
            dt_init_mode=dt_init,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        self.out_norm = _out_norm(out_norm, d_inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            z = self.gate_act(z)
        x = convolve_activate(x, self.conv2d, self.act)
        y = self._cascade(x) if self.routes == "cascade2d" else self._scan(x)
        norm = self.out_norm
        y = self.out_act(norm(y, x.dtype) if isinstance(norm, LayerNorm) else norm(y).to(x.dtype))
        if z is not None:
            y = y * z
        return self.dropout(self.out_proj(y))

    def _scan(self, x: Tensor) -> Tensor:
        B, H, W, E = x.shape
        x = x.reshape(B, H * W, E)
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1))  # (B, L, K·(R + 2N))
        if self.sequential_routes:
            return self._one_route_after_the_other(x, projected, H, W)
        return self._fused(x, projected, None, H, W, self.routes)

    def _fused(
        self, x: Tensor, projected: Tensor, k: slice | None, H: int, W: int, routes: str, flip_back: bool = True
    ) -> Tensor:
        if self.force_fp32:
            x, projected = x.float(), projected.float()
        A, D, dt_bias = self._scan_parameters()
        dt_weight: Tensor = self.dt_projs_weight
        if k is not None:  # not a slice of all: its gradient would be copied into zeros
            A, D, dt_bias, dt_weight = A[k], D[k], dt_bias[k], dt_weight[k]
        y = ss2d_scan(
            x,
            projected.to(x.dtype),
            dt_weight.to(x.dtype),  # as autocast does with the weights of any product
            dt_bias,
            A,
            D,
            height=H,
            width=W,
            routes=routes,
            flip_back=flip_back,
            # What comes next is a norm that rounds to the same dtype: half the bytes, and the sum was in float32.
            out_dtype=x.dtype,
            backend=self.backend,
        )
        return y.view(x.shape[0], H, W, self.d_inner)

    def _scan_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (K, E, N), D (K, E) and Δ's bias (K, E): float32 at least, whatever the weights are kept in."""
        K, E = self.k_group, self.d_inner
        at_least = torch.promote_types(self.A_logs.dtype, torch.float32)
        A = -torch.exp(self.A_logs.to(at_least)).view(K, E, self.d_state)
        return A, self.Ds.to(at_least).view(K, E), self.dt_projs_bias.to(at_least)

    def _cascade(self, x: Tensor) -> Tensor:
        """Scan every row both ways, then every column of the result, normalised before each (the paper's ablation)."""
        B, H, W, E = x.shape
        y = x
        for routes, k in (("rows", slice(0, 2)), ("columns", slice(2, 4))):
            y = F.layer_norm(y, (E,)).to(x.dtype)
            projected = F.linear(y, self.x_proj_weight[k].flatten(0, 1)).flatten(1, 2)
            # As published: the reversed half is added without being flipped back.
            y = self._fused(y.reshape(B, H * W, E), projected, k, H, W, routes, flip_back=False)
        return y

    def _one_route_after_the_other(self, x: Tensor, projected: Tensor, H: int, W: int) -> Tensor:
        B, L, E = x.shape
        K, N, R = self.k_group, self.d_state, self.dt_rank
        if self.force_fp32:
            x, projected = x.float(), projected.float()
        u = cross_scan(x.transpose(1, 2).reshape(B, E, H, W), routes=self.routes)  # (B, K, E, L)
        per_route = projected.view(B, H, W, K, R + 2 * N)
        A, D, dt_bias = self._scan_parameters()
        ys = []
        for k in range(K):
            map_k = per_route[:, :, :, k].permute(0, 3, 1, 2)
            r, Bs, Cs = cross_scan(map_k, routes=self.routes)[:, k].split([R, N, N], dim=1)
            delta = self.dt_projs_weight[k].to(r.dtype) @ r
            scan = selective_scan(
                u[:, k], delta, A[k], Bs[:, None], Cs[:, None], D[k], dt_bias[k], True, backend=self.backend
            )
            ys.append(scan)
        y = cross_merge(torch.stack(ys, dim=1).view(B, K, E, L), height=H, width=W, routes=self.routes)
        return y.view(B, E, H, W).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Tell what the submodules do not."""
        return f"d_inner={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}, routes={self.routes!r}"


def _out_norm(kind: OutNorm, channels: int) -> nn.Module:
    """Return what follows the merge, its parameters named as in the published checkpoints."""
    if kind == "norm":
        return LayerNorm(channels)
    if kind == "none":
        return nn.Identity()
    if kind == "softmax":
        return SpatialSoftmax()
    if kind == "sigmoid":
        return nn.Sigmoid()
    conv = DepthwiseConv2d(channels, 3, bias=False)
    if kind == "cnorm":
        return nn.Sequential(LayerNorm(channels), nn.Identity(), conv)  # the published indices: norm 0, convolution 2
    return nn.Sequential(nn.Identity(), conv)
