"""Counting multiply-accumulates as the authors do."""

import json
from pathlib import Path

import pytest
import timm
import torch

import vmamba
from vmamba.analysis.flops import count_flops
from vmamba.models.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_flops(name: str) -> None:
    with torch.device("meta"):
        model = vmamba.create_model(name)
    assert count_flops(model).total / 1e9 == pytest.approx(PUBLISHED[name].gflops, rel=1e-3)


def test_larger_images_have_the_published_flops(shared: Path) -> None:
    checked = 0
    for name, facts in json.loads((shared / "reference" / "published.json").read_text())["models"].items():
        sizes = {int(size): count for size, count in facts["gflops_exact_official_counter"].items() if size != "224"}
        if sizes:
            with torch.device("meta"):
                model = vmamba.create_model(name)
            for size, gflops in sizes.items():
                assert count_flops(model, (size, size)).total / 1e9 == pytest.approx(gflops, rel=1e-3)
                checked += 1
    assert checked >= 15


def test_modules_add_up_and_the_model_is_left_alone() -> None:
    model = vmamba.create_model("vmamba_test").train()
    count = count_flops(model, (64, 96), batch_size=2)
    assert count.total == sum(count.by_operator.values())
    stages = sum(count.by_module[f"layers.{i}"] for i in range(4))
    assert count.total == count.by_module["patch_embed"] + stages + count.by_module["classifier.norm"] + (
        count.by_module["classifier.head"] + 2 * 24 * 2 * 3  # and the pooling
    )
    assert count_flops(model, (64, 96)).total * 2 == count.total
    assert model.training
    assert next(model.parameters()).device.type == "cpu"


def test_sequential_routes_count_the_same_and_peers_can_be_counted() -> None:
    plain, sequential = (vmamba.create_model("vmamba_test", sequential_routes=way) for way in (False, True))
    assert count_flops(plain).total == count_flops(sequential).total
    swin = count_flops(timm.create_model("swin_tiny_patch4_window7_224"))
    assert swin.total / 1e9 == pytest.approx(4.5, rel=0.03)
