"""Counting, timing and accuracy over image sizes."""

import numpy as np
import pytest
import torch
from torch import nn

import vmamba
from vmamba.analysis.scaling import accuracy_by_size, count_scaling, measure_scaling, scaling_table, tune_head
from vmamba.data.sources import ImageSet
from vmamba.data.transforms import Preprocessing


def test_flops_of_vmamba_grow_with_the_pixels_and_those_of_a_vit_faster() -> None:
    rows = count_scaling(["vmamba_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224"], [224, 448, 896])
    assert [(row.model, row.size) for row in rows[:3]] == [
        ("vmamba_tiny", 224),
        ("swin_tiny_patch4_window7_224", 224),
        ("deit_small_patch16_224", 224),
    ]
    ours, swin, vit = (
        [row.gflops for row in rows if row.model == name] for name in dict.fromkeys(r.model for r in rows)
    )
    for one in (ours, swin):
        assert one[1] == pytest.approx(4 * one[0], rel=0.01)
        assert one[2] == pytest.approx(16 * one[0], rel=0.01)
    assert vit[2] > 30 * vit[0]


def test_batches_keep_the_number_of_pixels() -> None:
    rows = measure_scaling(
        ["vmamba_test", "convnext_atto"], [32, 64], "cpu", batch_size=8, base_size=32, precision="float32", rounds=1,
        seconds_a_round=0.01,
    )  # fmt: skip
    assert [row.speed.workload.batch_size for row in rows if row.speed] == [8, 8, 2, 2]
    table = scaling_table(rows, "cpu")
    assert [row["size"] for row in table] == [32, 32, 64, 64]
    assert all(row["images_per_second"] > 0 and row["top1"] is None for row in table)


def test_unknown_models_and_unfit_sizes_are_sentences() -> None:
    with pytest.raises(ValueError, match="did you mean vmamba_tiny"):
        count_scaling(["vmamba_tinny"], [224])
    with pytest.raises(ValueError, match="8×8"):
        count_scaling(["deit_small_patch16_224"], [8])


def images_of_two_kinds(number: int, seed: int) -> ImageSet:
    """Dark images and bright ones."""
    generator = np.random.default_rng(seed)
    targets = np.arange(number) % 2
    pixels = generator.integers(0, 60, (number, 32, 32)) + 190 * targets[:, None, None]
    return ImageSet(targets, [f"image/{i}" for i in range(number)], pixels.astype(np.uint8))


def test_tuning_the_head_learns_and_leaves_the_model_alone() -> None:
    model = vmamba.create_model("vmamba_test", num_classes=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train, held_out = images_of_two_kinds(64, 0), images_of_two_kinds(32, 1)
    found = accuracy_by_size(
        model, Preprocessing.for_style("glyphs", 32), train, held_out, ["dark", "bright"], [32, 40], epochs=60, lr=0.05
    )
    assert list(found) == [32, 40]
    for plain, tuned in found.values():
        assert plain < 0.95
        assert tuned > max(plain, 0.95)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    untuned = accuracy_by_size(model, Preprocessing.for_style("glyphs", 32), None, held_out, ["a", "b"], [32])
    assert untuned[32] == (found[32][0], None)


def test_a_tuned_head_starts_from_the_one_given() -> None:
    head = nn.Linear(4, 3)
    same = tune_head(head, torch.randn(10, 4), torch.randint(3, (10,)), epochs=0)
    assert torch.equal(same.weight, head.weight)
    assert same is not head
