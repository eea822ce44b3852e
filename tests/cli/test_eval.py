import json
import shutil

import pytest


def measured(vmamba, *words):
    outcome = vmamba("eval", *words, "--format", "json")
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_each_of_a_runs_weights_can_be_measured(vmamba, trained):
    best = measured(vmamba, "--checkpoint", trained)
    last, raw = (measured(vmamba, "--checkpoint", trained, "--weights", name) for name in ("last", "raw"))
    assert best["checkpoint"].endswith("best.safetensors")
    assert raw["checkpoint"].endswith("model.safetensors")
    assert raw["loss"] == last["loss"]  # this run keeps no moving average
    assert best["count"] == 359


def test_resolution_and_crop_can_be_chosen(vmamba, trained):
    plain = measured(vmamba, "--checkpoint", trained)
    larger = measured(vmamba, "--checkpoint", trained, "--img_size", "64")
    cropped = measured(vmamba, "--checkpoint", trained, "--crop_pct", "0.8", "--crop_mode", "center")
    assert len({plain["loss"], larger["loss"], cropped["loss"]}) == 3
    assert larger["count"] == cropped["count"] == 359


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "ema"], "holds no ema.safetensors"),
        (["--crop_pct", "1.5"], "crop_pct must lie in (0, 1]"),
        (["--weights", "worst"], "--weights"),
        (["--picture", "confusion.qqq"], "--picture confusion.qqq cannot be drawn as qqq; .png can"),
        (["--picture", "confusion"], "cannot be drawn as a file without ending"),
        (["--output", "."], "--output . is a folder"),
    ],
)
def test_what_cannot_be_measured_is_said(vmamba, trained, words, message):
    outcome = vmamba("eval", "--checkpoint", trained, *words)
    assert outcome.status == 2
    assert message in outcome.err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", ". is not the folder of a run: it holds neither config.yaml nor weights"),
        ("vmamba_tinny", "no published variant of that name; did you mean vmamba_tiny?"),
        ("run/best.safetensor", "there is no file 'run/best.safetensor'"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_what_would_be(vmamba, place, message):
    outcome = vmamba("eval", "--checkpoint", place)
    assert outcome.status == 2
    assert message in outcome.err


@pytest.mark.parametrize("words", [["eval", "--picture", "closed/a.png"], ["predict", "a.png", "--output", "closed/a"]])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(vmamba, trained, tmp_path, monkeypatch, words):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp1234")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("vmamba.cli.opening.load_model", lambda place: pytest.fail("the work has begun"))
    shutil.copy(trained / "curves.png", tmp_path / "a.png")
    outcome = vmamba(*words, "--checkpoint", trained)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.endswith(f"{words[-1]}: Permission denied\n")


def test_weights_of_a_file_cannot_be_chosen(vmamba, trained):
    outcome = vmamba("eval", "--checkpoint", trained / "best.safetensors", "--weights", "raw")
    assert outcome.status == 2
    assert "must be its folder" in outcome.err
