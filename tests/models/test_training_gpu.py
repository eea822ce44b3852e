"""A branch as one node of autograd gives what its modules give, and leaves to them what it does not know."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vmamba.models import training_gpu
from vmamba.models.config import get_config
from vmamba.models.layers import DropPath
from vmamba.models.vmamba import Blocks, VSSBlock
from vmamba.ops.convolution.reference import depthwise_silu_reference


def make_block(dim: int, rate: float = 0.0, **overrides: Any) -> VSSBlock:
    torch.manual_seed(0)
    block = VSSBlock(dim, get_config("vmamba_tiny").replace(**overrides), rate).train()
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "norm" in name or p.ndim == 1:  # not what they are at initialisation
                p.add_(0.2 * torch.randn_like(p))
    return block


@contextmanager
def by_modules(block: nn.Module) -> Iterator[None]:
    """Let somebody listen to a module of each branch, which is then called."""
    handles = [module.register_forward_hook(lambda *_: None) for module in (block.op.out_proj, block.mlp.fc2)]
    yield
    for handle in handles:
        handle.remove()


def differentiate(block: nn.Module, x: Tensor, dy: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """Give the result, the gradient of x and those of the parameters, with the same images dropped every time."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = (run or block)(x)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def drop_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the first branch of every second image and the second of every third; modules draw other numbers."""

    def factors(x: Tensor, every: int) -> Tensor:
        drawn = torch.where(torch.arange(len(x), device=x.device) % every == 0, 0.0, 2.0)
        return drawn.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    turns = itertools.cycle((2, 3))
    monkeypatch.setattr(DropPath, "draw", lambda self, x: factors(x, next(turns)) if self.rate else None)
    monkeypatch.setattr(
        training_gpu,
        "_draw",
        lambda rates, x: [(factors(x, 2), factors(x, 3)) if rate else (None, None) for rate in rates],
    )


def count_nodes(y: Tensor) -> dict[str, int]:
    found: dict[str, int] = {}
    queue, seen = [y.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[node.name()] = found.get(node.name(), 0) + 1
            queue += [following for following, _ in node.next_functions]
    return found


def gradients_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, dy)


def norm_gradients(dy: Tensor, skip: Tensor | None, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    mean, rstd, gamma = rest
    normed = (x - mean[:, None]) * rstd[:, None]
    scaled = dy * gamma
    dx = (scaled - scaled.mean(1, keepdim=True) - normed * (scaled * normed).mean(1, keepdim=True)) * rstd[:, None]
    return dx if skip is None else dx + skip, (dy * normed).sum(0), dy.sum(0)


def normalise_rows(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, eps)
    return y, mean.view(-1), rstd.view(-1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    return depthwise_silu_reference(x.view(len(x), height, width, -1), weight, bias).view(x.shape)


def convolve_back(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *size: int) -> tuple[Tensor, Tensor]:
    filled = torch.zeros_like(weight[:, 0, 0]) if bias is None else bias
    dx, dweight, dbias = gradients_of(lambda *leaves: convolve(*leaves, *size), (x, weight, filled), dy)
    return dx, torch.cat([dweight.flatten(), dbias])


def compute_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def compute_mlp_back(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    before = F.linear(x, w1, b1)
    (d_before,) = gradients_of(F.gelu, (before,), dy @ w2)
    return d_before @ w1, F.gelu(before), d_before, d_before.sum(0)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what the kernels are specified to do in their place: order and formulas are tested here, kernels on a GPU."""
    for name in ("takes_rows", "takes_depthwise"):
        monkeypatch.setattr(training_gpu, name, lambda *_: True)
    monkeypatch.setattr(training_gpu, "takes_mlp", lambda *_: False)
    monkeypatch.setattr(training_gpu, "normalise_rows", normalise_rows)
    for name, compute in (
        ("norm_gradients", norm_gradients),
        ("depthwise_operator", convolve),
        ("depthwise_gradients", convolve_back),
        ("mlp_operator", compute_mlp),
        ("mlp_gradients", compute_mlp_back),
    ):
        monkeypatch.setattr(training_gpu, name, SimpleNamespace(compute=compute))


BLOCKS = [
    {},
    {"rate": 0.5},
    {"conv_bias": True, "d_state": 3, "ssm_ratio": 2.0, "rate": 0.5},
    {"routes": "bidi", "mlp_ratio": 1.5},
]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("overrides", BLOCKS, ids=str)
def test_formulas(
    overrides: dict[str, Any], narrow: bool, without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_gpu, "takes_mlp", lambda *_: narrow)
    drop_always_the_same(monkeypatch)
    block = make_block(16, **overrides).double()
    x, dy = torch.randn(2, 8, 4, 5, 16, dtype=torch.float64)
    nodes = count_nodes(block(x.clone().requires_grad_()))
    assert (nodes["_ScanBranchBackward"], nodes["_MlpBranchBackward"]) == (1, 1)
    actual = differentiate(block, x, dy)
    with by_modules(block):
        expected = differentiate(block, x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    dropped = (actual[0] == x).flatten(1).all(1)
    assert dropped.tolist() == [block.drop_path.rate > 0 and i % 6 == 0 for i in range(8)]


def test_drawing() -> None:
    x = torch.zeros(4000, 2, 3, 8, dtype=torch.bfloat16)
    (nothing, nothing_too), (first, second), (gone, _) = training_gpu._draw([0.0, 0.2, 1.0], x)
    assert nothing is nothing_too is None
    assert first.shape == second.shape == (4000, 1, 1, 1)
    assert first.dtype == x.dtype
    for factors in (first, second):
        assert set(factors.flatten().tolist()) == {0.0, 1.25}
        assert 0.77 < (factors > 0).double().mean() < 0.83
    assert not torch.equal(first, second)
    assert not gone.any()
    assert training_gpu._draw([0.0, 0.0], x) == [(None, None)] * 2


def test_a_stage_at_once_is_its_blocks_one_by_one(without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_always_the_same(monkeypatch)
    stage = Blocks(make_block(16), make_block(16, 0.5, conv_bias=True), make_block(16, 0.2)).double()
    x, dy = torch.randn(2, 8, 4, 5, 16, dtype=torch.float64)
    calls = []
    for block in stage:
        block.register_forward_hook(lambda *_: calls.append(1))
    one_by_one = differentiate(stage, x, dy)
    assert len(calls) == 3
    for block in stage:
        block._forward_hooks.clear()
    at_once = differentiate(stage, x, dy)
    assert len(calls) == 3
    for a, b in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    stage.grad_checkpointing = True
    for a, b in zip(differentiate(stage, x, dy), one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_frozen_gets_no_gradient(without_kernels: None) -> None:
    block = make_block(16).double()
    x, dy = torch.randn(2, 1, 3, 4, 16, dtype=torch.float64)
    for name, p in block.named_parameters():
        p.requires_grad_(name in ("norm.weight", "op.x_proj_weight", "mlp.fc2.bias"))
    actual = differentiate(block, x, dy)
    with by_modules(block):
        expected = differentiate(block, x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    block.requires_grad_(False)
    assert not block(x).requires_grad


def test_modules_are_called_where_somebody_waits_for_it(without_kernels: None) -> None:
    block = make_block(16).double()
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)

    def runs(block: nn.Module) -> set[str]:
        return {name for name in count_nodes(block(x)) if "Branch" in name}

    both = {"_ScanBranchBackward", "_MlpBranchBackward"}
    assert runs(block) == both
    with by_modules(block):
        assert runs(block) == set()
    with FlopCounterMode(display=False):
        assert runs(block) == set()
    assert runs(block) == both
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1)  # as an adapter wraps it
    assert runs(block) == set()
    block = make_block(16).double()
    nn.utils.parametrizations.weight_norm(block.op.in_proj)
    assert runs(block) == set()


@pytest.mark.parametrize(
    "overrides",
    [
        *({"gated": True}, {"out_norm": "softmax"}, {"ssm_drop_rate": 0.1}, {"routes": "cascade2d"}),
        *({"gated_mlp": True}, {"mlp_act": "relu"}, {"mlp_drop_rate": 0.1}, {"mlp_ratio": 0.0}),
        *({"post_norm": True}, {"norm_layer": "bn"}, {"d_conv": 5}, {"sequential_routes": True}),
    ],
    ids=str,
)
def test_modules_are_called_in_other_blocks(overrides: dict[str, Any], without_kernels: None) -> None:
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    assert not any("Branch" in name for name in count_nodes(make_block(16, **overrides).double()(x)))


def test_weights_of_another_dtype_are_refused_as_by_the_modules(without_kernels: None) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        make_block(16)(torch.randn(1, 3, 4, 16, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("dim", [96, 256])
@pytest.mark.parametrize("overrides", BLOCKS, ids=str)
def test_as_accurate_as_the_modules(
    overrides: dict[str, Any],
    dim: int,
    kind: str,
    assert_accurate: Callable[..., None],
    nan_filled_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    block = make_block(dim, **overrides).cuda()
    drop_always_the_same(monkeypatch)
    if kind != "autocast":
        block.to(dtype)
    x, dy = torch.randn(2, 3, 14, 11, dim, device="cuda").to(dtype)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype, enabled=kind == "autocast"):
            return block(x)

    assert {"_ScanBranchBackward", "_MlpBranchBackward"} <= set(count_nodes(run(x)))
    actual = differentiate(block, x, dy, run)
    with by_modules(block):
        plain = differentiate(block, x, dy, run)
    exact = differentiate(block.double(), x.double(), dy.double())
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, *values in zip(names, actual, plain, exact, strict=True):
        assert_accurate(*values, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [96, 256])
def test_checkpointing_and_second_derivatives(dim: int) -> None:
    block = make_block(dim, 0.5).cuda()
    x, dy = torch.randn(2, 4, 7, 9, dim, device="cuda").bfloat16()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(x)

    plain = differentiate(block, x, dy, run)
    again = differentiate(block, x, dy, lambda x: checkpoint(run, x, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm()  # sums of scans come in any order
    x.requires_grad_()
    (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
