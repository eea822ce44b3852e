"""`--task segmentation` from the shell: train, eval, predict, and what is said about mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mask_samples import CLASSES, write_pairs
from vmamba.cli import main
from vmamba.cli.tasks import TASKS, part, task_of
from vmamba.models.config import get_config
from vmamba.tasks.segmentation_checkpoint import load_segmentation_model

SMALL = ["--model", "vmamba_test", "--hidden", "16", "--auxiliary", "8", "--crop", "32", "--short_side", "48"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set and the folder of a run on it."""
    root = tmp_path_factory.mktemp("segmentation")
    write_pairs(root / "set", 10)
    words = ["train", "--task", "segmentation", "--data", str(root / "set"), "--output", str(root / "run"), *SMALL]
    assert main([*words, "--epochs", "1", "--batch_size", "4", "--device", "cpu", "--trackers", "[]"]) == 0
    return root


def test_a_run_names_its_task_and_its_figures(trained, capsys):
    assert "task: segmentation" in (trained / "run" / "config.yaml").read_text()
    # A finished run has nothing left to do; the task comes from its configuration.
    assert main(["train", "--resume", str(trained / "run"), "--epochs", "1"]) == 0
    output = capsys.readouterr().out
    assert "mIoU" in output
    assert "next     vmamba eval --task segmentation --checkpoint" in output


def test_evaluation_gives_a_table_or_json_and_names_damaged_pairs(trained, capsys, tmp_path):
    words = ["eval", "--task", "segmentation", "--checkpoint", str(trained / "run"), "--device", "cpu"]
    assert main([*words, "--mode", "slide", "--window", "32", "--flip", "true", "--scales", "0.75", "1.0"]) == 0
    table = capsys.readouterr().out
    assert "mIoU" in table
    assert all(name in table for name in CLASSES)
    assert main([*words, "--format", "json", "--split", "all", "--output", str(tmp_path / "report.json")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert (content["count"], content["pixels"]) == (10, 10 * 72 * 64)
    assert content["pixel_accuracy"] == sum(content["confusion"][i][i] for i in range(4)) / content["pixels"]

    broken = write_pairs(tmp_path / "broken", 4)
    (broken / "masks" / "001.png").write_bytes(b"")
    assert main([*words, "--data", str(broken), "--split", "all"]) == 1
    assert "skipped" in (text := capsys.readouterr().err)
    assert "001.png: the file is empty" in text
    (broken / "classes.txt").write_text("a\nb\nc\nd\n")
    assert main([*words, "--data", str(broken)]) == 2
    assert "class 0 is 'background'" in capsys.readouterr().err


def test_prediction_writes_overlays_and_masks(trained, capsys, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    image = trained / "set" / "images" / "000.jpg"
    words = ["predict", "--task", "segmentation", "--checkpoint", str(trained / "run"), "--device", "cpu"]
    out = tmp_path / "found"
    status = main([*words, "--output", str(out), "--format", "json", str(image), str(tmp_path / "empty.jpg")])
    assert status == 1
    captured = capsys.readouterr()
    assert "empty.jpg: the file is empty" in captured.err
    good, bad = json.loads(captured.out)
    assert bad["error"] == "the file is empty"
    assert sum(good["classes"].values()) == pytest.approx(1, abs=1e-5)
    with Image.open(good["mask"]) as mask, Image.open(good["overlay"]) as overlay:
        assert mask.mode == "P"
        pixels = np.asarray(mask)
        assert pixels.shape == (64, 72)
        assert overlay.height == 64
        assert overlay.width > 72
    values, counts = np.unique(pixels, return_counts=True)
    shares = dict(zip((CLASSES[value] for value in values), counts / counts.sum(), strict=True))
    assert good["classes"] == pytest.approx(shares, abs=1e-5)
    assert main([*words, "--output", str(out), str(image)]) == 0  # as a table


def test_files_of_mmsegmentation_are_taken_as_they_are(trained, capsys, tmp_path):
    model, _ = load_segmentation_model(trained / "run" / "best.safetensors")
    names = {n: n.replace(".batch_norm.", ".bn.").replace(".classifier.", ".conv_seg.") for n in model.state_dict()}
    path = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {names[name]: value for name, value in model.state_dict().items()}}, path)
    words = ["eval", "--task", "segmentation", "--checkpoint", str(path), "--device", "cpu", "--short_side", "48"]
    assert main(words) == 2
    assert "--data" in capsys.readouterr().err
    assert main([*words, "--data", str(trained / "set"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == list(CLASSES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--task", "segmantation"], "did you mean segmentation?"),
        (["train", "--task", "segmentation", "--data", "/no/such"], "there is no folder /no/such"),
        (["train", "--task", "segmentation", "--crp", "64"], "did you mean --crop"),
        (["train", "--task", "segmentation", "--crop", "31"], "multiple of 4"),
        (["train", "--task", "segmentation", "--config", "recipes/tune_head.yaml"], "is of --task classification"),
        (["train", "--task", "segmentation", "--augmentation.mixup", "1"], "there is no option --augmentation.mixup"),
        (["eval", "--task", "segmentation", "--top", "3"], "there is no option --top"),
        (["eval", "--task", "segmentation", "--checkpoint", "/no.pth"], "no file"),
        (["predict", "--task", "segmentation"], "name images"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_default_backbone_has_the_four_stages_and_another_is_told_so(trained, capsys):
    words = ["train", "--task", "segmentation", "--data", str(trained / "set"), "--device", "cpu"]
    assert main([*words, "--model", "vmamba_nano"]) == 2
    assert "four stages; vmamba_nano has 3: take vmamba_tiny" in capsys.readouterr().err
    assert len(get_config(part("segmentation", "recipe")().model).depths) == 4


def test_models_of_another_task_are_told_apart(trained, capsys, tmp_path):
    run = str(trained / "run")
    assert main(["eval", "--checkpoint", run]) == 2
    assert "holds a segmentation model" in capsys.readouterr().err
    from vmamba.models import create_model
    from vmamba.models.checkpoint import save_checkpoint

    save_checkpoint(create_model("vmamba_test", num_classes=3), tmp_path / "c.safetensors")
    assert main(["eval", "--task", "segmentation", "--checkpoint", str(tmp_path / "c.safetensors")]) == 2
    assert "holds no decode_head" in capsys.readouterr().err


def test_the_task_comes_from_the_flag_else_from_the_last_file_that_names_one(tmp_path):
    (tmp_path / "a.yaml").write_text("task: segmentation\n")
    (tmp_path / "b.yaml").write_text("epochs: 3\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    assert task_of([]) == "classification"
    assert task_of(files) == "segmentation"
    assert task_of([*files, "--task=classification"]) == "classification"
    assert task_of(["--config", str(tmp_path / "none.yaml")]) == "classification"
    assert part("segmentation", "recipe")().task == "segmentation"
    assert all(part(task, "recipe")().task == task for task in TASKS)
