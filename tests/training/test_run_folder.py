from pathlib import Path

import pytest

from vmamba.training.run_folder import RunFolder, new_run_folder, newest_checkpoint


def test_numbered_folders_count_on(tmp_path):
    names = [new_run_folder(None, "tiny", tmp_path).path.name for _ in range(2)]
    (tmp_path / "tiny-041").mkdir()
    (tmp_path / "tiny-backup").mkdir()
    names.append(new_run_folder(None, "tiny", tmp_path).path.name)
    assert names == ["tiny-001", "tiny-002", "tiny-042"]
    assert new_run_folder(None, "base", tmp_path).path.name == "base-001"


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    fresh = new_run_folder(str(tmp_path / "a" / "b"), "tiny")
    assert fresh.path.is_dir()
    assert new_run_folder(str(fresh.path), "tiny").path == fresh.path  # still empty
    (fresh.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; name another folder, or go on with --resume"):
        new_run_folder(str(fresh.path), "tiny")
    with pytest.raises(ValueError, match="is a file"):
        new_run_folder(str(fresh.path / "notes.txt"), "tiny")


def test_config_and_metrics_round_trip(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it holds no config\.yaml"):
        folder.read_config()
    folder.write_config({"model": "vmamba_test", "optimizer": {"lr": 1e-3}})
    assert folder.read_config() == {"model": "vmamba_test", "optimizer": {"lr": 1e-3}}
    for step in (10, 20, 30):
        folder.append_metrics({"kind": "step", "step": step})
    with folder.metrics.open("a") as stream:
        stream.write('{"kind": "st')  # a crash in the middle of a line
    assert [record["step"] for record in folder.read_metrics()] == [10, 20, 30]
    folder.forget_metrics_after(20)
    assert [record["step"] for record in folder.read_metrics()] == [10, 20]


@pytest.mark.parametrize("content", [b"", b"epochs: [", b"- 3", b"\xff\xfe"])
def test_a_damaged_recipe_is_told(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        folder.read_config()


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_config({"epochs": 3})

    def full(self, *words, **options):
        with self.open("w") as stream:
            stream.write("epo")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises((OSError, ValueError), match="No space left"):
        folder.write_config({"epochs": 4})
    assert folder.read_config() == {"epochs": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_newest_checkpoint_prefers_the_best_of_the_latest_run(tmp_path):
    import os

    with pytest.raises(FileNotFoundError, match="train a model with"):
        newest_checkpoint(tmp_path)
    for time, name in enumerate(["old/best", "old/last", "new/best", "new/last", "newest/last"]):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    assert newest_checkpoint(tmp_path) == tmp_path / "newest" / "last.safetensors"
    (tmp_path / "newest" / "last.safetensors").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "new" / "best.safetensors"
