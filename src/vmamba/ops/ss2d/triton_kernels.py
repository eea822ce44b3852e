"""SS2D's core on the GPU in Triton: for any d_state, dtype, pattern of routes and map size.

The routes are read from the map itself, Δ is made from its low-rank form inside the scan, and the routes are merged by
adding to one float32 map: no scanned copy exists. The kernels are in `vmamba.ops.scan_triton_kernels`.
"""

import torch
from torch import Tensor

from vmamba.ops.launch_table import Launch
from vmamba.ops.scan_triton_launch import (
    Gradients,
    Operands,
    Plan,
    Problem,
    make_plan,
    scan_backward,
    scan_forward,
    shares_projections,
    why_not_here,
)
from vmamba.ops.ss2d import cuda_states


def why_not(
    x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str, height: int, width: int
) -> str | None:
    """Say why these kernels cannot run on such inputs; None if they can."""
    return why_not_here({"x": x, "projected": projected, "dt_weight": dt_weight, "A": A})


def _unit_channels(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _prepare(
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
) -> tuple[Problem, Operands]:
    x, projected, A = _unit_channels(x), _unit_channels(projected), A.contiguous()
    K, E, N = A.shape
    problem = Problem(
        on_map=True,
        images=x.shape[0],
        K=K,
        E=E,
        N=N,
        R=dt_weight.shape[-1],
        height=height,
        width=width,
        routes=routes,
        flip_back=flip_back,
        softplus=True,
        x_strides=x.stride()[:2],
        d_strides=projected.stride()[:2],
        exact=x.dtype == torch.float32,
        native=dt_weight.dtype == x.dtype != torch.float32,
    )
    weights = (dt_weight.contiguous(), dt_bias.contiguous(), A)
    return problem, Operands(x, projected, *weights, projected, projected, D.contiguous())


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
    launch: Launch | None = None,
) -> Tensor:
    """Compute `ss2d_scan`. `launch` stands in for the entry of the launch table."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if y.numel():
        problem, operands = _prepare(x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back)
        fast = out_dtype in (torch.float16, torch.bfloat16)
        scan_forward(make_plan(problem, "forward", x.device, launch), operands, y, fast)
    return y.to(out_dtype)


def _images_at_once(plan: Plan, x: Tensor, projected: Tensor) -> int:
    """Choose how many images to take at once, so that what is held besides the gradients stays below the inputs."""
    p = plan.problem
    length = p.sequences * p.length
    carries = 4 * p.K * p.sequences * plan.chunks * p.E * (2 * p.N + 1) if plan.chunks > 1 else 0
    sums = 0 if p.exact else 4 * length * (p.E + p.K * (p.R + 2 * p.N))
    inputs = length * (p.E + p.K * (p.R + 2 * p.N)) * x.element_size()
    return min(p.images, max(1, int(0.9 * p.images * inputs) // max(1, carries + sums)))


def _some_gradients(plan: Plan, operands: Operands, dy: Tensor, dx: Tensor, dprojected: Tensor) -> tuple[Tensor, ...]:
    """Fill the gradients of x and the projections of some images; return those of the weights."""
    # Sums of several contributors are float32 until they are complete.
    dx_sum, dp_sum = dx.float(), dprojected.float() if shares_projections(plan) else dprojected
    parts = scan_backward(plan, operands, dy, Gradients(dx_sum, dp_sum, dp_sum, dp_sum))
    for target, total in ((dx, dx_sum), (dprojected, dp_sum)):
        if total.dtype != target.dtype:
            target.copy_(total)
    return parts


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
    launch: Launch | None = None,
) -> tuple[Tensor, ...]:
    """Compute the gradients of x, projected, dt_weight, dt_bias, A and D, each in the dtype of its input.

    Of 2 to 16 states in 16 bits `cuda_states` computes them, where `cuda_states.why_not` has nothing against it.
    """
    if launch is None and cuda_states.why_not(x, projected, dt_weight, A, routes) is None:
        return cuda_states.backward(dy, x, projected, dt_weight, dt_bias, A, D, height, width, routes)
    dx, dprojected = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, projected))
    weights = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (dt_weight, dt_bias, A, D)]
    if x.numel():
        problem, operands = _prepare(x, projected, dt_weight, dt_bias, A, D, height, width, routes, flip_back)
        plan = make_plan(problem, "backward", x.device, launch)
        dy, step = dy.contiguous(), _images_at_once(plan, x, projected)
        for start in range(0, problem.images, step):
            images = slice(start, start + step)
            parts = _some_gradients(plan, operands.part(images), dy[images], dx[images], dprojected[images])
            for weight, part in zip(weights, parts, strict=True):
                weight += part
    ddt_weight, ddt_bias, dA, dD = (g.to(t.dtype) for g, t in zip(weights, (dt_weight, dt_bias, A, D), strict=True))
    return dx, dprojected, ddt_weight, ddt_bias, dA, dD
