"""The selective scan on the GPU in Triton, on plain sequences: any d_state, float32, float16 and bfloat16 inputs.

Step (b) of the paper's acceleration ladder: 16-bit inputs, float32 state and output. The kernels are in
`vmamba.ops.scan_triton_kernels`.
"""

import torch
from torch import Tensor

from vmamba.ops.launch_table import Launch
from vmamba.ops.s6 import cuda_sequences
from vmamba.ops.scan_triton_launch import (
    Gradients,
    Operands,
    Problem,
    make_plan,
    scan_backward,
    scan_forward,
    shares_projections,
    shares_x,
    why_not_here,
)


def why_not(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> str | None:
    """Say why these kernels cannot run on such inputs; None if they can."""
    return why_not_here({"u": u, "delta": delta, "A": A, "B": B})


def _unit_positions(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Problem, Operands]:
    u, delta, A = _unit_positions(u), _unit_positions(delta), A.contiguous()
    groups, channels = B.shape[1], u.shape[1]
    problem = Problem(
        on_map=False,
        images=u.shape[0],
        K=groups,
        E=channels // groups,
        N=A.shape[1],
        R=0,
        height=1,
        width=u.shape[2],
        routes="unidi",
        flip_back=True,
        softplus=delta_softplus,
        x_strides=u.stride()[:2],
        d_strides=delta.stride()[:2],
        exact=u.dtype == torch.float32,
        native=False,
    )
    zeros = A.new_zeros(channels) if D is None or delta_bias is None else A
    bias = zeros if delta_bias is None else delta_bias.contiguous()
    skip = zeros if D is None else D.contiguous()
    return problem, Operands(u, delta, A, bias, A, B.contiguous(), C.contiguous(), skip)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    launch: Launch | None = None,
) -> Tensor:
    """Compute `selective_scan`, with B and C of shape (B, K, N, L). `launch` stands in for the launch table's entry."""
    if not u.numel():
        return u.new_empty(u.shape, dtype=torch.float32)
    problem, operands = _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus)
    plan = make_plan(problem, "forward", u.device, launch)
    create = torch.zeros if shares_x(plan) else torch.empty
    y = create(u.shape, dtype=torch.float32, device=u.device)
    scan_forward(plan, operands, y)
    return y


def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    launch: Launch | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of u, delta, A, B, C, D and delta_bias, each in the dtype of its input.

    Of 2 to 16 states in 16 bits `cuda_sequences` computes them, where its `why_not` has nothing against it.
    """
    if not u.numel():
        return tuple(None if t is None else torch.zeros_like(t) for t in (u, delta, A, B, C, D, delta_bias))
    if launch is None and cuda_sequences.why_not(u, delta, A, B, delta_softplus) is None:
        return cuda_sequences.backward(dy, u, delta, A, B, C, D, delta_bias)
    problem, operands = _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus)
    plan = make_plan(problem, "backward", u.device, launch)

    def target(t: Tensor, shared: bool) -> Tensor:
        # Sums of several contributors are float32 until they are complete.
        if shared:
            return torch.zeros(t.shape, dtype=torch.float32, device=t.device)
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    du, ddelta = (target(t, shares_x(plan)) for t in (u, delta))
    dB, dC = (target(t, shares_projections(plan)) for t in (B, C))
    _, dbias, dA, dD = scan_backward(plan, operands, dy.contiguous(), Gradients(du, ddelta, dB, dC))
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA.view(A.shape).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD.flatten().to(D.dtype),
        None if delta_bias is None else dbias.flatten().to(delta_bias.dtype),
    )
