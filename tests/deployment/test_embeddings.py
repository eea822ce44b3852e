import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.deployment.embeddings import embed, plan


def mean_of_image(images):
    return images.mean(dim=(2, 3))


def transform(picture):
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    random = np.random.default_rng(0)
    for index in range(10):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{index:02d}.png")
    (made / "damaged.png").write_bytes(b"nothing")
    return made


def run(source, target, model=mean_of_image, identity="one", **options):
    options = {"batch_size": 2, "part_size": 3, **options}
    return embed(model, transform, str(source), target, identity=identity, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_vectors_and_names(folder, tmp_path, suffix):
    target = tmp_path / f"out.{suffix}"
    report = run(folder, target)
    assert (report.images, report.width, report.parts) == (10, 3, 4)
    assert report.damaged == (str(folder / "damaged.png"),)
    if suffix == "npz":
        with np.load(target) as written:
            names, vectors = written["files"].tolist(), written["embeddings"]
    else:
        from pyarrow import parquet

        table = parquet.read_table(target)
        names, vectors = table["file"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert names == [str(folder / f"{index:02d}.png") for index in range(10)]
    expected = np.stack([transform(Image.open(name)).mean(dim=(1, 2)) for name in names])
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", f"out.{suffix}"]


def test_interrupted_and_continued_is_the_same_file(folder, tmp_path):
    run(folder, tmp_path / "whole.parquet")
    calls = []

    def fails_later(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mean_of_image(images)

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut.parquet", fails_later)
    assert not (tmp_path / "cut.parquet").exists()
    report = run(folder, tmp_path / "cut.parquet")
    assert report.resumed == 1
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_nothing_is_left_of_images_that_cannot_be_decoded(tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    (made / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 1 images could be decoded"):
        run(made, tmp_path / "out.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]


def test_processes_share_the_parts(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    # The first process waits for the others at the end, so its part is stood in for by an interruption.
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "shared.npz")
    parts = tmp_path / "shared.npz.parts"
    assert sorted(p.name for p in parts.glob("0*")) == ["000000.npz", "000002.npz"]
    monkeypatch.setenv("RANK", "1")
    assert run(folder, tmp_path / "shared.npz") is None
    monkeypatch.setenv("RANK", "0")
    assert run(folder, tmp_path / "shared.npz").images == 10
    assert (tmp_path / "shared.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_parts_of_something_else_are_not_taken_over(folder, tmp_path):
    def fails(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out.npz", fails)
    with pytest.raises(ValueError, match="another model"):
        run(folder, tmp_path / "out.npz", identity="two")
    Image.new("RGB", (8, 8)).save(folder / "new.png")
    with pytest.raises(ValueError, match="other images"):
        run(folder, tmp_path / "out.npz")


def test_shards(folder, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as archive:
            for index in range(5 * shard, 5 * shard + 5):
                archive.add(folder / f"{index:02d}.png", f"{index:02d}.png")
    report = run(f"wds:{tmp_path}/shard-*.tar", tmp_path / "out.npz")
    assert (report.images, report.parts) == (10, 2)
    run(folder, tmp_path / "files.npz")
    with np.load(tmp_path / "out.npz") as a, np.load(tmp_path / "files.npz") as b:
        np.testing.assert_allclose(a["embeddings"], b["embeddings"], rtol=1e-6)
        assert a["files"][0] == f"{tmp_path}/shard-0.tar/00.png"
    damaged = (tmp_path / "shard-1.tar").read_bytes()[:2000]
    (tmp_path / "shard-1.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"shard-1.tar is damaged"):
        run(f"wds:{tmp_path}", tmp_path / "more.npz")


@pytest.mark.parametrize("source", ["nowhere", "wds:nowhere", "*.nothing"])
def test_nothing_to_embed(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere|nothing"):
        plan(source, 10)


def test_targets_that_cannot_be(folder, tmp_path):
    (tmp_path / "there.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists already"):
        run(folder, tmp_path / "there.npz")
    with pytest.raises(ValueError, match=r"must end in .parquet or .npz"):
        run(folder, tmp_path / "out.csv")


@pytest.mark.slow  # two processes that import torch
def test_killed_command_goes_on(folder, tmp_path):
    import vmamba

    vmamba.save_checkpoint(vmamba.create_model("vmamba_test"), tmp_path / "weights.safetensors")
    for index in range(200):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"more-{index:03d}.png")
    (folder / "damaged.png").unlink()
    words = [sys.executable, "-m", "vmamba", "embed", str(folder)]
    options = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--part_size", "4", "--device", "cpu"]
    parts = tmp_path / "cut.parquet.parts"
    process = subprocess.Popen([*words, str(tmp_path / "cut.parquet"), *options])
    deadline = time.monotonic() + 120
    while len(list(parts.glob("0*.npz"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.parquet").exists()
    finished = subprocess.run([*words, str(tmp_path / "cut.parquet"), *options], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "parts taken over" in finished.stdout
    subprocess.run([*words, str(tmp_path / "whole.parquet"), *options], check=True)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
