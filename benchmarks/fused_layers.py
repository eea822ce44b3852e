"""Time the fused layers' tiles on a GPU against each other and against the operations they replace.

    python benchmarks/fused_layers.py                     # everything, about two minutes
    python benchmarks/fused_layers.py --layers mlp stem

One line a layer and shape: what the parts cost one by one, then every tile with its milliseconds (median over replays
of a CUDA graph) and its relative error against float64, fastest first. Shapes are those of VMamba-T and VMamba-B at
224², batch 128, bfloat16. What is fastest goes into the functions that choose tiles.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench_cudagraph

from vmamba.ops.convolution import triton_kernels as convolution
from vmamba.ops.layer_norm import triton_kernels as layer_norm
from vmamba.ops.linear import triton_kernels as linear
from vmamba.ops.linear.triton_kernels import Tile
from vmamba.ops.mlp import triton_kernels as mlp
from vmamba.ops.mlp.reference import mlp_reference
from vmamba.ops.stem import triton_kernels as stem
from vmamba.ops.stem.reference import first_layer_reference

LOW, BATCH, CHECKED = torch.bfloat16, 128, 2048


def milliseconds(run: Callable[[], Any]) -> float:
    run()
    return float(do_bench_cudagraph(run, rep=25, return_mode="median"))


def error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error of some results over the rows that exact ones were computed for."""
    pairs = ((o[: len(e)].double(), e.double()) for o, e in zip(ours, exact, strict=True))
    return max(float((o - e).norm() / e.norm()) for o, e in pairs)


def compare(
    title: str, parts: str, run: Callable[[Any], Sequence[Tensor]], tiles: Iterable[Any], exact: Sequence[Tensor]
) -> None:
    """Check and time every tile, and print them."""
    found = []
    for tile in tiles:
        try:
            wrong = error(run(tile), exact)
            found.append((milliseconds(lambda tile=tile: run(tile)), f"{tuple(tile)} {wrong:.1e}"))  # type: ignore[misc]
        except Exception as problem:  # a tile that does not fit is an answer too
            found.append((float("inf"), f"{tuple(tile)} {str(problem)[:60]}"))
    print(f"{title}: {parts}; " + " | ".join(f"{ms:.4f} {what}" for ms, what in sorted(found)), flush=True)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return random vectors in float32, and all else in bfloat16."""
    torch.manual_seed(0)
    return [
        torch.randn(shape, device="cuda") if len(shape) == 1 else torch.randn(shape, device="cuda").to(LOW)
        for shape in shapes
    ]


def mlp_both_ways(M: int, D: int) -> None:
    H = 4 * D
    x, dy, w1, w2, b1, b2 = draw((M, D), (M, D), (H, D), (D, H), (H,), (D,))
    w1, w2 = w1 * D**-0.5, w2 * H**-0.5
    pre, wide = F.linear(x, w1, b1.to(LOW)), [t[:CHECKED].double() for t in (x, dy)]
    parts = {
        "linear": lambda: F.linear(x, w1, b1.to(LOW)),
        "gelu": lambda: F.gelu(pre),
        "linear again": lambda: F.linear(pre, w2),
    }
    exact = mlp_reference(wide[0], *(t.double() for t in (w1, b1, w2, b2)))
    tiles = [(128, 64, 0, 4, 2), (128, 64, 0, 8, 3), (128, 64, 0, 8, 2), (64, 64, 0, 4, 2), (128, 32, 0, 8, 3)]
    compare(
        f"mlp forward, {M} x {D}",
        named(parts),
        lambda tile: [mlp.forward(x, w1, b1, w2, b2, Tile(*tile))],
        tiles,
        [exact],
    )
    with torch.enable_grad():
        before = F.linear(wide[0], w1.double(), b1.double()).requires_grad_()
        (dpre,) = torch.autograd.grad(F.gelu(before), before, wide[1] @ w2.double())
    dh = dy @ w2
    parts = {
        "dh": lambda: dy @ w2,
        "gelu's": lambda: torch.ops.aten.gelu_backward(dh, pre),
        "dx": lambda: dh @ w1,
    }
    tiles = [
        (128, 32, 0, 8, 2), (128, 32, 0, 8, 1), (64, 32, 0, 4, 2), (64, 32, 0, 4, 1), (64, 64, 0, 4, 2),
        (64, 64, 0, 8, 2), (64, 32, 0, 8, 2), (128, 64, 0, 8, 2), (128, 16, 0, 8, 2),
    ]  # fmt: skip
    compare(
        f"mlp backward, {M} x {D}",
        named(parts),
        lambda tile: mlp.backward(dy, x, w1, b1, w2, Tile(*tile))[:3:2],
        tiles,
        [dpre @ w1.double(), dpre],
    )


def first_layer() -> None:
    x, w, dy = draw((BATCH, 3, 224, 224), (27, 48), (BATCH, 112, 112, 48))
    bias, gamma, beta = draw((48,), (48,), (48,))
    x, w, images = x.contiguous(memory_format=torch.channels_last), w * 27**-0.5, 8
    leaves = [t.double().requires_grad_() for t in (w, bias, gamma, beta)]
    with torch.enable_grad():
        filters = leaves[0].view(3, 3, 3, 48).permute(3, 2, 0, 1)
        y = first_layer_reference(x[:images].double(), filters, *leaves[1:])
        exact = torch.autograd.grad(y, leaves, dy[:images].double())
    forward = milliseconds(lambda: convolution.conv_norm(x, w, bias, gamma, beta, 1e-5, True))
    arguments = (w, bias, gamma, beta, 1e-5)
    tiles = [(64, 4, 4), (32, 4, 4), (128, 8, 2), (128, 8, 4), (64, 4, 8), (64, 8, 4), (32, 4, 8), (64, 4, 2)]
    for tile in tiles:
        print(f"  {tile}: error {error(stem.backward(dy[:images], x[:images], *arguments, tile), exact):.1e}")
    whole = stem.backward(dy, x, *arguments)  # sums over more images: compared among themselves
    compare(
        "stem's first layer, backward",
        f"forward {forward:.4f}",
        lambda tile: stem.backward(dy, x, *arguments, tile),
        tiles,
        whole,
    )


def activated(M: int, K: int) -> None:
    x, w, bias = draw((M, K), (4 * K, K), (4 * K,))
    w, low = w * K**-0.5, bias.to(LOW)
    exact = F.gelu(F.linear(x[:CHECKED].double(), w.double(), bias.double()))

    def run(tile: Any) -> list[Tensor]:
        if tile == ("cuBLAS",):
            return [torch._addmm_activation(low, x, w.t(), use_gelu=True)]
        return [linear.linear_gelu(x, w, bias, Tile(*tile))]

    tiles = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 4), ("cuBLAS",)]
    parts = {"linear": lambda: F.linear(x, w, low), "and gelu": lambda: F.gelu(F.linear(x, w, low))}
    compare(f"linear_gelu, {M} x {K}", named(parts), run, tiles, [exact])


def whole_branch(M: int, D: int) -> None:
    H = 4 * D
    x, w1, w2, b1, b2 = draw((M, D), (H, D), (D, H), (H,), (D,))
    w1, w2, low = w1 * D**-0.5, w2 * H**-0.5, b1.to(LOW)
    wide, hidden = x[:CHECKED].double(), F.linear(x, w1)
    exact = wide + mlp_reference(F.layer_norm(wide, (D,)), *(t.double() for t in (w1, b1, w2, b2)))
    parts = {
        "add and norm": lambda: layer_norm.add_norm(x, x, b2, None, 1e-5, 1e-5),
        "cuBLAS with gelu": lambda: torch._addmm_activation(low, x, w1.t(), use_gelu=True),
        "linear": lambda: F.linear(hidden, w2),
    }
    tiles = [
        (128, 64, 0, 4, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 3), (64, 64, 0, 4, 2), (64, 32, 0, 4, 3),
        (128, 32, 0, 8, 3),
    ]  # fmt: skip
    compare(
        f"norm_mlp, {M} x {D}",
        named(parts),
        lambda tile: [linear.norm_mlp(x, w1, b1, w2, b2, 1e-5, Tile(*tile))],
        tiles,
        [exact],
    )


def norms(M: int, D: int) -> None:
    x, dy, gamma = draw((M, D), (M, D), (D,))
    mean, rstd = x.float().mean(1), x.float().var(1, unbiased=False).add(1e-5).rsqrt()
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "backward, residual": (lambda: layer_norm.backward(dy, dy, x, mean, rstd, gamma), 8),
        "backward": (lambda: layer_norm.backward(dy, None, x, mean, rstd, gamma), 6),
        "add_norm": (lambda: layer_norm.add_norm(x, dy, gamma, None, 1e-5, 1e-5), 8),
        "add_norm, source": (lambda: layer_norm.add_norm(x, dy, gamma, dy, 1e-5, 1e-5), 10),
    }
    for name, (run, width) in runs.items():
        ms = milliseconds(run)
        print(f"norm {name}, {M} x {D}: {ms:.4f} ms, {width * M * D / ms / 1e9:.2f} TB/s", flush=True)
    most = max(1, 2048 // triton.next_power_of_2(D))
    tiles = [(most, 4, 4), (most, 4, 8), (most, 4, 16), (max(1, most // 2), 4, 8), (max(1, most // 4), 1, 16)]
    tiles += [(max(1, most // 4), 1, 32), (max(1, most // 2), 2, 16), (2 * most, 8, 4), (2 * most, 4, 4)]
    for skip in (dy, None):
        exact = layer_norm.backward(dy, skip, x, mean, rstd, gamma)
        run = lambda tile, skip=skip: layer_norm.backward(dy, skip, x, mean, rstd, gamma, tile)  # noqa: E731
        compare(f"norm's backward, {M} x {D}", "residual" if skip is not None else "", run, tiles, exact)


def named(parts: dict[str, Callable[[], Any]]) -> str:
    return ", ".join(f"{name} {milliseconds(run):.4f}" for name, run in parts.items())


Shapes = tuple[tuple[int, ...], ...]
# Rows are positions of 128 images: 56², 28², 14² and 7² of each.
LAYERS: dict[str, tuple[Callable[..., None], Shapes]] = {
    "mlp": (mlp_both_ways, ((401408, 96), (100352, 192), (401408, 128))),
    "stem": (first_layer, ((),)),
    "linear_gelu": (activated, ((25088, 384), (25088, 512), (6272, 768), (6272, 1024))),
    "norm_mlp": (whole_branch, ((401408, 128), (100352, 256))),
    "norms": (norms, ((401408, 96), (100352, 192), (25088, 384), (6272, 768))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=tuple(LAYERS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here; these figures are measured on one")
    with torch.no_grad():
        for name in arguments.layers:
            measure, shapes = LAYERS[name]
            for shape in shapes:
                measure(*shape)


if __name__ == "__main__":
    main()
