"""`vmamba analyze` as its users meet it: tables, figures, and sentences for what cannot be."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    """A picture of no special shape."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_text("no image")
    return tmp_path / "photo.png"


def read(folder, name):
    """Read a table twice: what the CSV says must be what the JSON says."""
    records = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [list(row.values()) for row in rows] == [
        ["" if value is None else str(value) for value in record.values()] for record in records
    ]
    return records


def assert_drawn(folder, name):
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width == 1200
        colours = np.unique(np.asarray(picture.convert("L")))
    assert len(colours) > 10
    assert "<svg" in (folder / f"{name}.svg").read_text()[:1000]


def test_flops_by_part_and_their_growth(vmamba, tmp_path):
    words = ["--models", "vmamba_test", "--compare", "convnext_atto", "--sizes", 32, 64, "--img_size", "64x96"]
    outcome = vmamba("analyze", "flops", *words, "--output", "out")
    assert outcome.status == 0, outcome.err
    assert "layers.2" in outcome.out
    stages = read(tmp_path / "out", "flops_stages")
    assert stages[-1]["part"] == "total"
    assert stages[-1]["flops"] == sum(row["flops"] for row in stages[:-1])
    assert {"classifier.head", "layers.2.blocks.1.op.in_proj"} <= {
        row["module"] for row in read(tmp_path / "out", "flops_modules")
    }
    growth = read(tmp_path / "out", "flops_growth")
    assert [(row["model"], row["size"]) for row in growth][:2] == [("vmamba_test", 32), ("convnext_atto", 32)]
    assert_drawn(tmp_path / "out", "flops_growth")
    assert_drawn(tmp_path / "out", "flops_vmamba_test")
    naive = vmamba("analyze", "flops", *words, "--sizes", "[]", "--convention", "naive", "--output", "naive")
    assert naive.status == 0, naive.err
    assert read(tmp_path / "naive", "flops_stages")[-1]["flops"] < stages[-1]["flops"]


def test_ladder_counts_without_timing(vmamba, tmp_path):
    outcome = vmamba("analyze", "ladder", "--count_only", "true", "--img_size", 64, "--output", "out")
    assert outcome.status == 0, outcome.err
    table = read(tmp_path / "out", "ladder")
    assert [row["step"] for row in table][:4] == ["Vanilla", "(a)", "(b)", "(c)"]
    assert table[0]["published_inference"] == 426
    assert table[0]["params"] == 22893448
    assert "cross-scan in PyTorch" in outcome.out


def test_scaling_times_models_and_measures_a_checkpoint(vmamba, tmp_path, trained):
    words = ["--sizes", 32, 64, "--rounds", 1, "--seconds_a_round", 0.01, "--device", "cpu"]
    outcome = vmamba("analyze", "scaling", "--models", "vmamba_test", "--compare", "convnext_atto", *words)
    assert outcome.status == 0, outcome.err
    table = read(tmp_path / "analysis", "scaling")
    assert [row["model"] for row in table] == ["vmamba_test", "convnext_atto"] * 2
    assert all(row["images_per_second"] > 0 for row in table)
    assert_drawn(tmp_path / "analysis", "scaling")
    tuned = ["--checkpoint", trained, "--data", "digits", "--tune", "true", "--epochs", 2, "--output", "accuracy"]
    outcome = vmamba("analyze", "scaling", *tuned, "--sizes", 32, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    (row,) = read(tmp_path / "accuracy", "scaling")
    epochs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert row["top1"] == pytest.approx(max(epoch["top1"] for epoch in epochs if epoch["kind"] == "epoch"))
    assert 0 < row["top1_tuned"] <= 1


def test_erf_of_models_stages_patterns_and_training(vmamba, tmp_path, photo, trained):
    words = ["--models", "vmamba_test", "convnext_atto", "--img_size", 64, "--count", 2, "--output", "out"]
    outcome = vmamba("analyze", "erf", *words, "--stages", 0, 1, "--routes", "unidi", "cross2d")
    assert outcome.status == 0, outcome.err
    fields = list(dict.fromkeys(row["field"] for row in read(tmp_path / "out", "erf")))
    assert fields == [
        f"{name}, map {stage}"
        for name in ("vmamba_test, unidi, untrained", "vmamba_test, cross2d, untrained", "convnext_atto, untrained")
        for stage in (0, 1)
    ]
    assert_drawn(tmp_path / "out", "erf")
    outcome = vmamba(
        "analyze", "erf", "--checkpoints", trained, "--before", "true", "--images", photo, "--img_size", 64
    )
    assert outcome.status == 0, outcome.err
    table = read(tmp_path / "analysis", "erf")
    assert {row["images"] for row in table} == {1}
    assert len({row["field"] for row in table}) == 2


@pytest.mark.parametrize(
    ("words", "maps"),
    [
        (["--query", "10,90"], 5),
        (["--kind", "diagonal", "--mode", "influence"], 5),
        (["--kind", "rollout"], 1),
        (["--mode", "similarity", "--normalization", "minmax", "--normalize_routes", "true", "--stage", "0"], 5),
    ],
)
def test_attention_maps_of_a_trained_model(vmamba, tmp_path, photo, trained, words, maps):
    outcome = vmamba("analyze", "attention", photo, "--checkpoint", trained, "--img_size", "64x96", *words)
    assert outcome.status == 0, outcome.err
    table = read(tmp_path / "analysis", "attention")
    height, width = (16, 24) if "--stage" in words else (4, 6)
    assert f"a map of {height}×{width}" in outcome.out
    assert len(table) == maps * height * width
    assert_drawn(tmp_path / "analysis", "attention")


def test_attention_of_an_untrained_variant_says_so(vmamba, photo):
    outcome = vmamba("analyze", "attention", photo, "--model", "vmamba_test")
    assert outcome.status == 0, outcome.err
    assert "random weights" in outcome.out
    assert "off by" in outcome.out


def test_routes_are_drawn_in_the_order_they_read(vmamba, tmp_path, photo):
    outcome = vmamba("analyze", "routes", photo, "--grid", "2x3")
    assert outcome.status == 0, outcome.err
    table = read(tmp_path / "analysis", "routes")
    second = [(row["row"], row["column"]) for row in table if row["route"] == 1]
    assert second == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert_drawn(tmp_path / "analysis", "routes")


def test_overview_lists_the_analyses(vmamba):
    outcome = vmamba("analyze")
    assert outcome.status == 0
    assert "attention" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flps"], "did you mean flops"),
        (["flops", "--models", "vmamba_tinny"], "did you mean vmamba_tiny"),
        (["flops", "--img_size", "big"], "HEIGHTxWIDTH"),
        (["flops", "--convention", "mine"], "authors"),
        (["ladder", "--modes", "resting"], "inference"),
        (["ladder", "--precision", "int4"], "autocast-bfloat16"),
        (["ladder", "--rounds", "0"], "more than 0"),
        (["scaling", "--sizes", "3"], "at least 32"),
        (["scaling", "--data", "digits"], "--checkpoint and --data"),
        (["scaling", "--compiled", "fast"], "reduce-overhead"),
        (["erf"], "--models NAME"),
        (["erf", "--models", "vmamba_test", "--stages", "12", "--img_size", "64"], "maps 0 to 3"),
        (["erf", "--models", "vmamba_test", "--images", "bad.png", "--img_size", "64"], "not an image"),
        (["erf", "--models", "vmamba_test", "--routes", "snake", "--img_size", "64"], "cross2d"),
        (["attention"], "name an image"),
        (["attention", "bad.png", "--model", "vmamba_test"], "not an image"),
        (["attention", "nowhere.png", "--model", "vmamba_test"], "No such file"),
        (["attention", "photo.png", "--model", "vmamba_test", "--stage", "9"], "stages 0 to 3"),
        (["attention", "photo.png", "--model", "vmamba_test", "--stage", "2", "--block", "2"], "blocks 0 to 1"),
        (["attention", "photo.png", "--model", "vmamba_test", "--query", "64,0"], "rows go from 0 to 63"),
        (["attention", "photo.png", "--model", "vmamba_test", "--query", "centre"], "ROW,COLUMN"),
        (["attention", "photo.png", "--model", "vmamba_test", "--checkpoint", "x"], "not both"),
        (["routes", "bad.png"], "not an image"),
        (["routes", "photo.png", "--grid", "99x2"], "2 to 24"),
        (["routes", "photo.png", "--routes", "snake"], "'cross2d'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(vmamba, photo, words, message):
    outcome = vmamba("analyze", *words)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_told(vmamba):
    outcome = vmamba("analyze", "ladder", "--device", "cuda")
    assert outcome.status == 2
    assert "no usable NVIDIA GPU" in outcome.err
