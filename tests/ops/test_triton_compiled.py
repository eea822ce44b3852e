"""The Triton kernels compiled for GPUs that need not be here, in a process of its own: capability 8.0, 9.0 and 10.0."""

import subprocess
import sys

import pytest
import torch

from vmamba.ops.launch_table import TABLE_PATH, find_launch, shape_class

pytest.importorskip("triton")

PROGRAM = """
import sys
from dataclasses import replace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmamba.ops import launch_table, routes_triton_kernels, scan_triton_kernels, scan_triton_launch as launch

capability = int(sys.argv[1])
launch._capability = lambda device: capability
launch._multiprocessors = lambda device: 100


def compile_kernel(kernel, dtype, more=None, **constants):
    kinds = {**(more or {}), "x_ptr": dtype, "d_ptr": dtype, "w_ptr": dtype, "b_ptr": dtype, "c_ptr": dtype}
    kinds |= {"map_ptr": dtype, "seq_ptr": dtype}
    options = {k: v for k, v in constants.items() if k in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            pointer = "*" + kinds.get(name, "fp32")
            signature[name] = pointer if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
    aligned = [(i,) for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], kernel
    return compiled


def scan(on_map, N, dtype):
    exact = dtype == "fp32"
    problem = launch.Problem(
        on_map=on_map, images=8, K=4, E=96, N=N, R=6 if on_map else 0, height=28 if on_map else 1, width=28,
        routes="cross2d" if on_map else "unidi", flip_back=True, softplus=True, x_strides=(96 * 784, 96),
        d_strides=(784 * 32, 32), exact=exact, native=on_map and not exact,
    )
    for direction in ("forward", "backward"):
        plan = launch.make_plan(problem, direction, torch.device("cpu"))
        common = launch._constants(plan) | {"CHUNKED": True, "FAST": False, "ORDERED": False}
        precision = "ieee" if exact else "tf32x3"
        if direction == "forward":
            compile_kernel(scan_triton_kernels.scan_fwd_kernel, dtype, MODE=1, **common)
            compile_kernel(scan_triton_kernels.scan_carry_kernel, dtype, ADJOINT=True, **common)
        else:
            compile_kernel(
                scan_triton_kernels.scan_bwd_kernel, dtype, MODE_X=1, MODE_P=1, DOT_GRAD=precision, **common
            )


scan(True, 1, "bf16")
scan(False, 1, "fp16")
for reverse in (False, True):
    compile_kernel(scan_triton_kernels.scan_join_kernel, "fp32", REVERSE=reverse, CC=32, CB=32, enable_fp_fusion=True)
for merge in (False, True):
    compile_kernel(
        routes_triton_kernels.cross_kernel, "bf16", K=4, PATTERN=0, FLIP=True, MERGE=merge, LAST=False, WIDE=False,
        BH=32, BW=32, BC=1,
    )

from vmamba.ops.convolution import triton_kernels as convolution
from vmamba.ops.layer_norm import triton_kernels as layer_norm
from vmamba.ops.linear import triton_kernels as linear
from vmamba.ops.mlp import triton_kernels as mlp
from vmamba.ops.stem import triton_kernels as stem

for kernel, warps, stages, constants in (
    (linear.norm_linear_kernel, 4, 1, {"K0": 64, "K1": 32, "N": 96, "BIAS": 1, "RESIDUAL": 1, "BM": 64, "BN": 32}),
    (linear.linear_gelu_kernel, 8, 3, {"K": 384, "N": 1536, "BM": 128, "BN": 128, "BK": 64}),
    (linear.norm_mlp_kernel, 4, 2, {"D0": 64, "D1": 32, "HIDDEN": 384, "BRANCH": True, "BM": 64, "BH": 32}),
    (linear.norm_mlp_kernel, 8, 2, {"D0": 128, "D1": 64, "HIDDEN": 768, "BRANCH": False, "BM": 64, "BH": 32}),
    (stem.stem_bwd_kernel, 4, 1, {"CIN": 3, "N0": 32, "N1": 16, "BM": 64, "BK": 32}),
    (mlp.mlp_bwd_kernel, 8, 2, {"D0": 64, "D1": 32, "HIDDEN": 384, "BM": 64, "BH": 32}),
    (convolution.depthwise_silu_kernel, 1, 2, {"C": 96, "BIAS": False, "ROWS": 14, "BW": 8, "BC": 64}),
    (convolution.conv_norm_kernel, 4, 2, {"CIN": 3, "N0": 32, "N1": 16, "ACT_GELU": True, "BM": 64, "BK": 32}),
    (layer_norm.layer_norm_bwd_kernel, 4, 2, {"D": 96, "SKIP": True, "BM": 16, "BD": 128}),
    (layer_norm.add_norm_kernel, 4, 2, {"D": 384, "E": 0, "BM": 4, "BD": 512, "BE": 1}),
    (layer_norm.add_norm_kernel, 4, 2, {"D": 384, "E": 768, "BM": 4, "BD": 512, "BE": 1024}),
    (layer_norm.layer_norm_sums_kernel, 4, 2, {"D": 96, "BP": 64, "BD": 32}),
):
    kinds = {"w1_ptr": "bf16", "w2_ptr": "bf16", "y_ptr": "bf16", "residual_ptr": "bf16", "dx_ptr": "bf16"}
    kinds |= {"dy_ptr": "bf16", "hidden_ptr": "bf16", "dpre_ptr": "bf16", "b1_ptr": "fp32", "b2_ptr": "fp32"}
    kinds |= {"branch_ptr": "bf16", "sum_ptr": "bf16"}
    compile_kernel(kernel, "bf16", kinds, num_warps=warps, num_stages=stages, **constants)
print("compiled")
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(capability)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "compiled"


@pytest.mark.parametrize("op", ["ss2d", "s6"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("N", [1, 2, 4, 5, 16, 64])
@pytest.mark.parametrize("channels", [1, 64, 96, 192])
def test_every_problem_has_a_launch(op: str, direction: str, N: int, channels: int) -> None:
    entries = {find_launch(op, direction, N, channels, capability) for capability in (80, 90, 120)}
    for entry in entries:
        assert entry.positions in (8, 16, 32)
        assert entry.channels in (32, 64, 128)
        assert entry.chunk >= entry.positions
        assert entry.states & (entry.states - 1) == 0
        assert entry.registers in range(256)
    assert shape_class(op, direction, N, channels) in TABLE_PATH.read_text()


def test_reasons() -> None:
    from vmamba.ops.s6 import triton_kernels as s6
    from vmamba.ops.ss2d import triton_kernels as ss2d

    x, weight = torch.zeros(1, 4, 2), torch.zeros(4, 2, 1)
    reason = ss2d.why_not(x, torch.zeros(1, 4, 12), weight, weight, "cross2d", 1, 4)
    assert reason == "it needs a CUDA device, and the tensors are on cpu."
    reason = s6.why_not(x.double(), x.double(), weight[0], weight)
    assert reason == "it takes float32, float16 and bfloat16, and u is torch.float64."
