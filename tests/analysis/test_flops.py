"""Counting multiply-accumulates as the authors do."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vmamba
from vmamba.analysis.flops import count_flops
from vmamba.models.fused_cpu import unavailable
from vmamba.models.fused_gpu import FusedVMamba
from vmamba.models.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_flops(name: str) -> None:
    with torch.device("meta"):
        model = vmamba.create_model(name)
    assert count_flops(model).total / 1e9 == pytest.approx(PUBLISHED[name].gflops, rel=1e-3)


def test_larger_images_and_the_naive_convention_have_the_published_flops(shared: Path) -> None:
    checked = naive = 0
    for name, facts in json.loads((shared / "reference" / "published.json").read_text())["models"].items():
        sizes = {int(size): count for size, count in facts["gflops_exact_official_counter"].items() if size != "224"}
        older = facts.get("gflops_naive_224")
        if sizes or older:
            with torch.device("meta"):
                model = vmamba.create_model(name)
        for size, gflops in sizes.items():
            assert count_flops(model, (size, size)).total / 1e9 == pytest.approx(gflops, rel=1e-3)
            checked += 1
        if older:
            assert count_flops(model, convention="naive").total / 1e9 == pytest.approx(older, rel=1e-3)
            naive += 1
    assert checked >= 15
    assert naive == 3


def test_modules_and_stages_add_up_and_the_model_is_left_alone() -> None:
    model = vmamba.create_model("vmamba_test", pos_embed=True).train()
    count = count_flops(model, (64, 96), batch_size=2)
    assert count.total == sum(count.by_operator.values())
    stages = sum(count.by_module[f"layers.{i}"] for i in range(4))
    assert count.total == count.by_module["patch_embed"] + stages + count.by_module["classifier.norm"] + (
        count.by_module["classifier.head"] + 2 * 24 * 2 * 3  # and the pooling
    )
    assert sum(part.flops for part in count.stages) == count.total
    assert sum(part.params for part in count.stages) == sum(p.numel() for p in model.parameters())
    assert [part.part for part in count.stages[1:5]] == [f"layers.{i}" for i in range(4)]
    assert count_flops(model, (64, 96)).total * 2 == count.total
    assert model.training
    assert next(model.parameters()).device.type == "cpu"


def test_sequential_routes_count_the_same() -> None:
    plain, sequential = (vmamba.create_model("vmamba_test", sequential_routes=way) for way in (False, True))
    for convention in ("authors", "naive"):
        assert count_flops(plain, convention=convention).total == count_flops(sequential, convention=convention).total


def test_compiled_models_and_modules_count_as_what_they_were_made_from() -> None:
    model = vmamba.create_model("vmamba_test")
    plain = count_flops(model, (64, 64))
    assert count_flops(torch.compile(model), (64, 64)) == plain
    model.layers[1] = torch.compile(model.layers[1])
    model.layers[2].blocks[0] = torch.compile(model.layers[2].blocks[0])
    model.layers[2] = torch.compile(model.layers[2])  # a compiled module inside a compiled one
    assert count_flops(model, (64, 64)) == plain
    model.compile()
    assert count_flops(model, (64, 64)).total == plain.total


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_fused_or_not(fused: bool) -> None:
    depth, dim, tokens, classes = 12, 384, 197, 1000
    model = timm.create_model("deit_small_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn = fused
    products = depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + 196 * 768 * dim + classes * dim
    norms = (2 * depth + 1) * 5 * tokens * dim  # timm normalises every token at the end
    assert count_flops(model).total == products + norms


def test_peers_have_their_published_flops() -> None:
    for name, gflops in (("swin_tiny_patch4_window7_224", 4.5), ("convnext_tiny", 4.5), ("resnet50", 4.1)):
        assert count_flops(timm.create_model(name)).total / 1e9 == pytest.approx(gflops, rel=0.02)


def test_a_fused_model_counts_as_the_model_it_came_from_less_the_folded_norms() -> None:
    model = vmamba.create_model("vmamba_test", depths=(1, 1, 1), dims=(64, 128, 256), d_state=2).eval()
    plain = count_flops(model, (64, 96))
    fused = count_flops(FusedVMamba(model, torch.bfloat16), (64, 96))
    # Three norms of a block lose their scale and shift to the product after them: one operation of five an element.
    positions = [16 * 24, 8 * 12, 4 * 6]
    folded = sum(3 * length * dim for length, dim in zip(positions, (64, 128, 256), strict=True))
    assert fused.total == plain.total - folded
    if unavailable() is None:
        on_cpu = count_flops(vmamba.fuse(model), (64, 96))
        assert on_cpu.total == plain.total
        assert on_cpu.by_module["layers.1"] == plain.by_module["layers.1"]


def test_an_operator_without_a_formula_is_an_error_not_a_zero() -> None:
    @torch.library.custom_op("vmamba::uncounted_for_a_test", mutates_args=())
    def uncounted(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    uncounted.register_fake(torch.empty_like)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return uncounted(self.stem(x))

    with pytest.raises(ValueError, match="no formula"):
        count_flops(Model())
    with pytest.raises(ValueError, match="authors"):
        count_flops(Model(), convention="guess")
