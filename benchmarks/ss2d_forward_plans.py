"""Time the plans of the CUDA forward of SS2D against each other, after checking each against float64.

    python benchmarks/ss2d_forward_plans.py                      # every case
    python benchmarks/ss2d_forward_plans.py --cases detection

One line a plan: milliseconds (median over replays of a graph), nanoseconds a position, error as a multiple of what
rounding the exact result alone gives. A plan whose error is more than twice that is not timed. "chosen" is what
`plan_forward` picks.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from ss2d_kernels import Case, error, exact, make_inputs, time_ms
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.ss2d import cuda_kernels
from vmamba.ops.ss2d.cuda_plans import LinePlan, Plan, plan_forward
from vmamba.ops.ss2d.cuda_problem import Problem, find_device
from vmamba.ops.ss2d.cuda_tiles import TilePlan, fit_tiles

DTYPE = torch.bfloat16
_TILES = (
    TilePlan(8, 32, 32, 8),
    TilePlan(8, 32, 32, 8, 2, 2, ahead=2),
    TilePlan(10, 20, 40, 5, 3, 2),
    TilePlan(4, 32, 32, 8, 2, 2),
)
PLANS: tuple[tuple[Case, tuple[Plan, ...]], ...] = (
    (Case("detection", 4, 200, 200, 192, 6), _TILES),
    (Case("64x64", 128, 64, 64, 96, 6), _TILES),
    (Case("64x64, rank 12", 24, 64, 64, 192, 12), _TILES),
    (Case("64x64, rank 24", 6, 64, 64, 384, 24), _TILES),
    (Case("128x128", 24, 128, 128, 96, 6), _TILES),
    (Case("256x256", 6, 256, 256, 96, 6), _TILES),
    (Case("200x320", 2, 200, 320, 96, 6), _TILES),
    (Case("100x160", 2, 100, 160, 192, 12), _TILES),
    (Case("50x80", 2, 50, 80, 384, 24), _TILES),
    (Case("65x97", 8, 65, 97, 192, 6), ()),
    (Case("300x20", 8, 300, 20, 192, 6), ()),
    (
        Case("stage 1", 128, 56, 56, 96, 6),
        (LinePlan(8, 8), LinePlan(8, 7), LinePlan(7, 8), LinePlan(14, 6), LinePlan(14, 6, ahead=0)),
    ),
    (
        Case("stage 2", 128, 28, 28, 192, 12),
        (
            LinePlan(14, 2, blocks=3),
            LinePlan(14, 2, blocks=3, ahead=0),
            LinePlan(7, 2, blocks=4),
            LinePlan(7, 4, blocks=2),
        ),
    ),
    (
        Case("stage 3", 128, 14, 14, 384, 24),
        (
            LinePlan(14, 1, 2, 2, 3, 0),
            LinePlan(14, 1, 2, 1, 6, 0),
            LinePlan(7, 1, 2, 2, 4, 0),
            LinePlan(7, 1, 2, 2, 4, 1),
        ),
    ),
    (
        Case("stage 4", 128, 7, 7, 768, 48),
        (LinePlan(7, 1, 4, 2, 3), LinePlan(7, 1, 4, 1, 6)),
    ),
    (
        Case("VMamba-B, stage 1", 128, 56, 56, 128, 8),
        (LinePlan(8, 8), LinePlan(8, 8, piped=True), LinePlan(8, 7), LinePlan(14, 6, ahead=0)),
    ),
    (
        Case("VMamba-B, stage 2", 128, 28, 28, 256, 16),
        (
            LinePlan(14, 2, blocks=3),
            LinePlan(14, 2, blocks=3, piped=True),
            LinePlan(14, 2, blocks=3, ahead=0),
            LinePlan(7, 2, blocks=4),
        ),
    ),
    (
        Case("VMamba-B, stage 3", 128, 14, 14, 512, 32),
        (
            LinePlan(14, 1, 2, 2, 3, 0),
            LinePlan(14, 1, 2, 1, 6, 0),
            LinePlan(14, 1, 2, 2, 3, 0, piped=True),
            LinePlan(7, 1, 2, 2, 4, 0),
            LinePlan(7, 1, 2, 2, 4, 0, piped=True),
            LinePlan(7, 1, 2, 2, 3),
        ),
    ),
    (
        Case("VMamba-B, stage 4", 128, 7, 7, 1024, 64),
        (LinePlan(7, 1, 4, 2, 3), LinePlan(7, 1, 4, 2, 2), LinePlan(7, 1, 4, 1, 6), LinePlan(7, 1, 4, 1, 4)),
    ),
    (Case("14x14, E 96", 2675, 14, 14, 96, 6), (LinePlan(14, 1, 2, 2, 3, 0), LinePlan(14, 1, 2, 2, 3))),
    (Case("28x28, E 96", 668, 28, 28, 96, 6), (LinePlan(14, 2, blocks=3), LinePlan(7, 2, blocks=4))),
    (Case("one image", 1, 56, 56, 96, 6), ()),
)


def run(case: Case, tensors: list[Tensor], plan: Plan) -> Tensor:
    """Carry out one forward by a plan of ours."""
    cuda_kernels.plan_forward = lambda problem, device: plan
    return cuda_kernels.forward(*tensors, case.height, case.width, "cross2d", True, DTYPE)


def candidates(case: Case, plans: tuple[Plan, ...]) -> list[Plan]:
    """Give the chosen plan, then the others that fit."""
    device = find_device(0)
    problem = Problem(case.height, case.width, case.rank, -(-case.channels // 16), case.batch)
    chosen = plan_forward(problem, device)
    fitted = (fit_tiles(plan, problem) if isinstance(plan, TilePlan) else plan for plan in plans)
    fitting = [plan for plan in fitted if plan.shared_bytes(problem) <= device.block_shared]
    return list(dict.fromkeys([*([chosen] if chosen else []), *fitting]))


def compile_all(cases: list[tuple[Case, list[Plan]]]) -> None:
    """Fill the cache of compiled kernels, many at a time."""
    capability = torch.cuda.get_device_capability()
    jobs = [
        (
            cuda_kernels.forward_source(plan),
            cuda_kernels.forward_defines(case.rank, case.channels, DTYPE, torch.float32, DTYPE, plan),
        )
        for case, plans in cases
        for plan in plans
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: nvrtc.compile_cubin(job[0], capability, job[1]), jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case, _ in PLANS], help="by default all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; these figures are measured on one")
    cases = [(c, candidates(c, plans)) for c, plans in PLANS if not arguments.cases or c.name in arguments.cases]
    compile_all(cases)
    failed = False
    for case, plans in cases:
        sets = [make_inputs(case, DTYPE, seed) for seed in range(3)]
        truth = exact(case, sets[0])
        rounding = error(truth.to(DTYPE), truth)
        for i, plan in enumerate(plans):
            ratio = error(run(case, sets[0], plan), truth) / rounding
            label = f"{case.name:12} {'chosen' if i == 0 else '      '} {plan}"
            if not ratio <= 2:
                failed = True
                print(f"{label}  WRONG: {ratio:.2f} times the error of rounding", flush=True)
                continue
            ms = time_ms(lambda tensors, plan=plan, case=case: run(case, tensors, plan), sets)
            position = ms / (case.batch * case.height * case.width) * 1e6
            print(f"{label}  {ms:.4f} ms  {position:.3f} ns a position  {ratio:.2f}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
