"""Bias and spread of the GPU's special functions against float64, by range of the argument.

    PYTHONPATH=src python benchmarks/special_functions.py

The scan multiplies thousands of decays ex2(Δ·A): a mean error in one of them does not average out. Needs a CUDA device.
"""

import itertools

import torch

from vmamba.ops import nvrtc

SOURCE = """
extern "C" __global__ void special(const float* x, float* power, float* inverse, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x[i]));
    power[i] = r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + r));
    inverse[i] = r;
}
"""
EDGES = (0.0, -1e-3, -1e-2, -0.1, -0.25, -0.5, -1.0, -2.0, -4.0, -8.0, -16.0)


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = nvrtc.get_kernel(SOURCE, "special", (), device)
    n = 1 << 24
    print("argument            ex2: bias, rms, largest relative error     rcp(1 + ex2): bias, rms")
    for high, low in itertools.pairwise(EDGES):
        x = (torch.rand(n, device=device, dtype=torch.float64) * (high - low) + low).float()
        power, inverse = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        kernel.launch((n // 256, 1, 1), 256, [x, power, inverse, n])
        of_power = power.double() / torch.exp2(x.double()) - 1
        of_inverse = inverse.double() * (1 + power.double()) - 1
        print(
            f"[{low:7.3f}, {high:7.3f}]  {of_power.mean():9.2e} {of_power.square().mean().sqrt():9.2e} "
            f"{of_power.abs().max():9.2e}     {of_inverse.mean():9.2e} {of_inverse.square().mean().sqrt():9.2e}"
        )


if __name__ == "__main__":
    main()
