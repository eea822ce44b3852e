import json
import re

import pytest
from PIL import Image

from coco_samples import make_coco
from vmamba.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("detection")
    make_coco(root / "data", 8)
    words = [
        "--task",
        "detection",
        "--data",
        str(root / "data"),
        "--output",
        str(root / "run"),
        "--model",
        "vmamba_test",
    ]
    words += ["--epochs", "1", "--batch_size", "4", "--channels", "8", "--min_sizes", "[64]", "--max_size", "96"]
    assert main(["train", *words, "--device", "cpu", "--workers", "0", "--trackers", "[]", "--held_out", "0.25"]) == 0
    return root


def test_eval_measures_on_what_the_run_held_out(run, capsys):
    words = ["--task", "detection", "--checkpoint", str(run / "run"), "--device", "cpu"]
    assert main(["eval", *words, "--format", "json", "--output", str(run / "report.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((run / "report.json").read_text())
    assert (report["images"], report["classes"]) == (2, ["disc", "square", "triangle"])
    recorded = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    assert report["box"]["totals"]["AP"] == recorded[-1]["box_AP"]
    assert main(["eval", *words, "--split", "all"]) == 0
    out = capsys.readouterr().out
    assert "8 images, 16 objects" in out
    assert "triangle" in out


def test_eval_names_records_it_skips(run, tmp_path, capsys):
    content = make_coco(tmp_path, 3)
    content["annotations"][1]["bbox"] = [0, 0, 0, 0]
    x, y, width, height = content["annotations"][0]["bbox"]
    content["annotations"][0]["bbox"] = [x, y, width + 500, height]
    (tmp_path / "train.json").write_text(json.dumps(content))
    words = ["--task", "detection", "--checkpoint", str(run / "run"), "--data", str(tmp_path), "--device", "cpu"]
    assert main(["eval", *words]) == 1
    errors = capsys.readouterr().err
    assert "skipped" in errors
    assert "annotation 2 of train-0.png: box of no area" in errors
    assert re.search("vmamba eval: mended .*annotation 1 of train-0.png: box .* and was cut", errors)


def test_a_detector_is_told_apart_and_targets_are_looked_at_before_the_work(run, tmp_path, capsys):
    weights = str(run / "run")
    for words in (["eval", "--checkpoint", weights], ["predict", "--checkpoint", weights, weights + "/curves.png"]):
        assert main(words) == 2
        assert "holds a detection model; `vmamba eval` and `vmamba predict` take --task" in capsys.readouterr().err
    assert main(["eval", "--task", "detection", "--checkpoint", weights, "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_predict_draws_and_tells_what_it_found(run, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"rubbish")
    words = [str(run / "data" / "images" / "train-0.png"), str(tmp_path / "a.png"), "--checkpoint", str(run / "run")]
    words += [
        "--task",
        "detection",
        "--score",
        "0",
        "--format",
        "json",
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(["predict", *words]) == 1
    captured = capsys.readouterr()
    good, bad = json.loads(captured.out)
    assert good["objects"][0].keys() == {"label", "confidence", "box"}
    with Image.open(good["picture"]) as drawn:
        assert drawn.size == (112 * 5, 80 * 5)  # enlarged, so that captions can be read
    assert bad["error"] == "not an image in a known format"
    assert "1 of 2 images could not be read" in captured.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--task", "detection", "--data", "/nowhere"], "no folder or annotation file /nowhere"),
        (["train", "--task", "detection", "--min-size", "3"], "did you mean --min_sizes?"),
        (["train", "--task", "detektion"], "did you mean detection?"),
        (["eval", "--task", "detection", "--checkpoint", "/nowhere.safetensors"], "there is no file"),
        (["predict", "--task", "detection", "--score", "2", "a.png"], "score must lie in [0, 1]"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, sentence, capsys):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
