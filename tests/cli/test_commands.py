import csv
import json
import shutil
from io import StringIO

import numpy as np
import pytest
from PIL import Image

from vmamba.data.sources import open_source


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Six held-out digits as files, named by their label."""
    folder = tmp_path_factory.mktemp("digits")
    images = open_source("digits").held_out
    for index in range(6):
        images.read(index).save(folder / f"{index}_is_{images.targets[index]}.png")
    return folder


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_train_says_where_things_are_and_what_comes_next(vmamba, tmp_path):
    words = ["train", "--model", "vmamba_test", "--epochs", "1", "--trackers", "[]"]
    outcome = vmamba(*words, "--batch-size", 128)
    assert outcome.status == 0, outcome.err
    assert "held-out images right" in outcome.out
    assert "vmamba eval --checkpoint runs/vmamba_test-001/best.safetensors" in outcome.out
    config = (tmp_path / "runs" / "vmamba_test-001" / "config.yaml").read_text()
    assert "batch_size: 128" in config
    assert vmamba(*words, "--batch-size", 128).status == 0
    assert (tmp_path / "runs" / "vmamba_test-002" / "last.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vmamba_tny"], "did you mean"),
        (["--data", "/no/such/place"], "no folder of that name"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--resume", "/no/such/run"], "is not the folder of a run"),
        (["--device", "tpu"], "device"),
        (["--weights", "/no/such/weights.pth"], "/no/such/weights.pth"),
        (["--model_options", "{depht: 3}"], "depth"),
        (["--model_options", "3"], "model_options"),
        (["--output", "taken"], "is not empty"),
    ],
)
def test_train_refuses_what_it_cannot_do(vmamba, tmp_path, words, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "work.txt").write_text("mine")
    outcome = vmamba("train", "--model", "vmamba_test", *words)
    assert outcome.status == 2
    assert message in outcome.err
    assert 1 <= len(outcome.err.splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


def test_train_goes_on_from_the_recipe_of_a_run(vmamba, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    outcome = vmamba("train", "--resume", tmp_path / "run", "--epochs", 4)
    assert outcome.status == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3, 4]
    outcome = vmamba("train", "--resume", tmp_path / "run", "--seed", 5)
    assert outcome.status == 2
    assert "a resumed run keeps its seed: it was 0, 5 was asked for" in outcome.err
    outcome = vmamba("train", "--resume", tmp_path / "run", "--optimizer.lr", 3)
    assert "a resumed run keeps its optimizer.lr: it was 0.005, 3.0 was asked for" in outcome.err
    outcome = vmamba("train", "--resume", tmp_path / "run", "--epochs", 4)
    assert "all 4 epochs were made already; a larger --epochs goes on" in outcome.out
    assert "going on" not in outcome.out


def test_eval_reports_what_training_reported(vmamba, trained):
    epochs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in epochs if record["kind"] == "epoch"][-1]
    outcome = vmamba("eval", "--checkpoint", trained / "last.safetensors", "--format", "json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["count"] == 359
    assert report["top1"] == pytest.approx(last["top1"])
    assert report["top5"] == pytest.approx(last["top5"])
    assert report["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert np.array(report["confusion"]).sum() == 359
    assert np.trace(report["confusion"]) / 359 == pytest.approx(last["top1"])


def test_eval_prints_a_table_and_writes_files(vmamba, trained, tmp_path):
    words = ["--split", "all", "--output", "out/report.json", "--picture", "confusion.png", "--batch_size", 256]
    outcome = vmamba("eval", "--checkpoint", trained, "--data", "digits", *words)
    assert outcome.status == 0, outcome.err
    assert "top-1" in outcome.out
    assert "most often taken for" in outcome.out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["count"] == 1797
    assert size_of(tmp_path / "confusion.png")[0] > 300


def test_eval_of_a_folder_goes_by_class_names_and_skips_damaged_images(vmamba, trained, tmp_path):
    images = open_source("digits").held_out
    for index in range(40):
        label = images.targets[index]
        if label in (3, 7):
            (tmp_path / "data" / "val" / str(label)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "train" / str(label)).mkdir(parents=True, exist_ok=True)
            images.read(index).save(tmp_path / "data" / "val" / str(label) / f"{index}.png")
            images.read(index).save(tmp_path / "data" / "train" / str(label) / f"{index}.png")
    outcome = vmamba("eval", "--checkpoint", trained, "--data", tmp_path / "data", "--format", "json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    confusion = np.array(report["confusion"])
    assert confusion.shape == (10, 10)
    assert set(np.flatnonzero(confusion.sum(1))) == {3, 7}
    assert report["top1"] > 0.5
    (tmp_path / "data" / "val" / "3" / "broken.png").write_bytes(b"")
    outcome = vmamba("eval", "--checkpoint", trained, "--data", tmp_path / "data")
    assert outcome.status == 1
    assert "broken.png: the file is empty" in outcome.err


def test_eval_of_foreign_classes_is_refused(vmamba, trained, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{index}.png")
    outcome = vmamba("eval", "--checkpoint", trained, "--data", tmp_path / "data")
    assert outcome.status == 2
    assert "does not know the class 'cat'" in outcome.err


def test_predict_as_json_from_folder_and_glob(vmamba, trained, digits):
    outcome = vmamba("predict", "--checkpoint", trained, digits, "--format", "json", "--top", 2)
    assert outcome.status == 0, outcome.err
    records = json.loads(outcome.out)
    assert [record["file"] for record in records] == sorted(str(path) for path in digits.iterdir())
    right = [record["predictions"][0]["label"] == record["file"][-5] for record in records]
    assert sum(right) >= 4
    for record in records:
        first, second = record["predictions"]
        assert 1 >= first["confidence"] >= second["confidence"] >= 0
    again = vmamba("predict", "--checkpoint", trained, f"{digits}/*_is_*.png", "--format", "json", "--top", 2)
    assert json.loads(again.out) == records


def test_predict_goes_on_after_damaged_images(vmamba, trained, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "images")
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    (tmp_path / "images" / "text.jpg").write_text("no picture")
    whole = (tmp_path / "images" / sorted(p.name for p in digits.iterdir())[0]).read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    words = ["predict", "--checkpoint", trained, "images", "--format", "csv", "--output", "out.csv", "--batch_size", 2]
    outcome = vmamba(*words)
    assert outcome.status == 1
    assert "3 of 9 images could not be read" in outcome.err
    assert "skipped images/empty.png: the file is empty" in outcome.err
    rows = list(csv.DictReader(StringIO((tmp_path / "out.csv").read_text())))
    assert len(rows) == 9
    assert sum(bool(row["label_1"]) for row in rows) == 6
    assert {row["file"] for row in rows if row["error"]} == {
        f"images/{n}" for n in ("empty.png", "text.jpg", "cut.png")
    }
    assert "unreadable" in vmamba("predict", "--checkpoint", trained, "images").out


def test_predict_does_not_depend_on_the_batch(vmamba, trained, digits):
    outcomes = [
        vmamba("predict", "--checkpoint", trained, digits, "--format", "json", "--batch_size", n) for n in (1, 6)
    ]
    for one, other in zip(*(json.loads(outcome.out) for outcome in outcomes), strict=True):
        assert one["predictions"][0]["label"] == other["predictions"][0]["label"]
        assert one["predictions"][0]["confidence"] == pytest.approx(other["predictions"][0]["confidence"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name images: files"),
        (["/no/such.png"], "there is no file, folder or match for /no/such.png"),
        (["*.nothing"], "match for *.nothing"),
        (["."], "there are no images in ."),
        ([".", "--top", "0"], "top must be 1 or more"),
        ([__file__, "--img_size", "7"], "img_size must be 32 or more, not 7"),
    ],
)
def test_predict_refuses_what_it_cannot_do(vmamba, trained, words, message):
    outcome = vmamba("predict", "--checkpoint", trained, *words)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x80\x02}q\x00."], ids=["empty", "text", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_rubbish_as_weights_is_one_clear_error(vmamba, digits, tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    for words in (
        ["predict", digits, "--checkpoint", path],
        ["eval", "--checkpoint", path],
        ["convert", path, "o.pth"],
    ):
        outcome = vmamba(*words)
        assert outcome.status == 2
        assert str(path) in outcome.err
        assert len(outcome.err.splitlines()) <= 2
    assert vmamba("convert", path, "out.pth").status == 2


def test_the_newest_run_is_the_default_checkpoint(vmamba, trained, digits, tmp_path):
    outcome = vmamba("predict", digits)
    assert outcome.status == 2
    assert "no weights in runs/" in outcome.err
    shutil.copytree(trained, tmp_path / "runs" / "mine")
    outcome = vmamba("predict", digits)
    assert outcome.status == 0
    assert "using the newest run: runs/mine/best.safetensors" in outcome.err


def test_convert_there_and_back_keeps_the_predictions(vmamba, trained, digits):
    source = trained / "last.safetensors"
    for words in ((source, "weights.pth"), ("weights.pth", "again.safetensors")):
        outcome = vmamba("convert", *words)
        assert outcome.status == 0, outcome.err
        assert f"wrote {words[1]}" in outcome.out
        assert ("labels, image size and normalisation are not in it" in outcome.out) == (words[1] == "weights.pth")
    records = []
    for path in (source, "weights.pth", "again.safetensors"):
        outcome = vmamba("predict", digits, "--checkpoint", path, "--format", "json", "--img_size", 32)
        assert outcome.status == 0, outcome.err
        records.append([record["predictions"][0]["label"] for record in json.loads(outcome.out)])
        assert ("does not say how its images were prepared" in outcome.err) == (path != source)
    # The published layout has no place for the normalisation, so only the weights, not the labels, must agree.
    assert records[1] == records[2]
    from vmamba.models.checkpoint import read_checkpoint

    first, last = (read_checkpoint(path).state_dict for path in (source, "again.safetensors"))
    assert first.keys() == last.keys()
    assert all(first[name].equal(last[name]) for name in first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name two files: vmamba convert IN OUT"),
        (["{run}"], "name two files"),
        (["{run}", "out.bin"], ".safetensors"),
        (["{run}", "taken.pth"], "exists already; --overwrite true replaces it"),
        (["{run}", "no/such/folder/out.pth"], "there is no folder no/such/folder"),
        (["missing.pth", "out.pth"], "missing.pth"),
    ],
)
def test_convert_refuses_what_it_cannot_do(vmamba, trained, tmp_path, words, message):
    (tmp_path / "taken.pth").write_text("precious")
    outcome = vmamba("convert", *(word.format(run=trained / "last.safetensors") for word in words))
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) <= 2
    assert (tmp_path / "taken.pth").read_text() == "precious"


def test_models_as_table_json_and_markdown(vmamba):
    records = {record["name"]: record for record in json.loads(vmamba("models", "--format", "json").out)}
    assert records["vmamba_tiny"]["params"] == 30_249_064
    assert records["vmamba_tiny"]["top1"] == 82.6
    assert 1e6 < records["vmamba_nano"]["params"] < 5e6
    table = vmamba("models").out
    markdown = vmamba("models", "--format", "markdown").out
    assert all(name in table and f"`{name}`" in markdown for name in records)
    everything = json.loads(vmamba("models", "--published", "true", "--format", "json").out)
    assert len(everything) == len(records) + 42


def test_models_can_be_picked_by_name(vmamba):
    assert [r["name"] for r in json.loads(vmamba("models", "nano", "--format", "json").out)] == ["vmamba_nano"]
    assert len(json.loads(vmamba("models", "vanilla_*", "--format", "json").out)) == 3
    outcome = vmamba("models", "vmaba_tiny")
    assert outcome.status == 2
    assert "did you mean vmamba_tiny" in outcome.err


def test_doctor_shows_versions_and_explains_every_backend(vmamba):
    import torch

    findings = json.loads(vmamba("doctor", "--format", "json").out)
    assert findings["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    rows = {(row["device"], row["op"], row["backend"]): row for row in findings["backends"]}
    assert rows["cpu", "ss2d_scan", "chunked"]["can_run"]
    assert not rows["cpu", "ss2d_scan", "triton"]["can_run"]
    assert all(row["reason"] for row in rows.values())
    assert [cache["kind"].split()[0] for cache in findings["caches"]] == ["CUDA", "Triton", "torch.compile"]
    table = vmamba("doctor").out
    assert "selective_scan" in table
    assert "python" in table


def test_quickstart_from_end_to_end(vmamba, tmp_path):
    outcome = vmamba("quickstart", "--model", "vmamba_test", "--epochs", 1)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "runs" / "quickstart-001"
    for name in ("predictions.png", "curves.png", "confusion_matrix.png"):
        assert str(folder.relative_to(tmp_path) / name) in outcome.out
        assert min(size_of(folder / name)) > 200
    command = next(line for line in outcome.out.splitlines() if "predict --checkpoint" in line)
    words = command.partition(" predict ")[2].split()
    suggested = vmamba("predict", *words, "--format", "json")
    assert suggested.status == 0
    assert len(json.loads(suggested.out)) == 10
