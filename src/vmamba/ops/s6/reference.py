"""The S6 recurrence, one step at a time: the specification that every other implementation is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Compute the selective scan step by step (equations 1–4 of the paper; section 3 of Mamba, arXiv 2312.00752).

    With Δ_t = softplus(delta_t + delta_bias), zero-order hold on A and Euler's rule on B:
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t · h_t + D u_t, from h_0 = 0, for each channel on its own.
    Built of differentiable operations only: its gradients come from autograd.

    Args:
        u: (B, K·E, L) input.
        delta: (B, K·E, L) time step, before bias and softplus.
        A: (K·E, N).
        B: (B, K, N, L); a group of E channels shares one.
        C: (B, K, N, L).
        D: (K·E) or None.
        delta_bias: (K·E) or None.
        delta_softplus: Whether Δ goes through softplus.

    Returns:
        (B, K·E, L), float64 for float64 input and float32 for any other.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    channels = u.shape[1]
    per_group = channels // B.shape[1]

    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = B.repeat_interleave(per_group, dim=1), C.repeat_interleave(per_group, dim=1)  # (B, K·E, N, L)

    h = u.new_zeros(u.shape[0], channels, A.shape[1])  # (B, K·E, N)
    ys = []
    for t in range(u.shape[2]):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[..., t] * u[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1))
    y = torch.stack(ys, dim=2)
    return y if D is None else y + D.to(dtype)[:, None] * u
