import json
import os
import pickle
import random
import signal
import subprocess
import time
from collections import deque

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vmamba.models.checkpoint import CheckpointError
from vmamba.training.checkpointing import CheckpointFolder, Position, read_checkpoint_folder, seed_update

PARTS = {
    "optimizer": {"state": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.arange(4.0)}}, "groups": [{"lr": 0.1}]},
    "scaler": None,
    "betas": (0.9, 0.1 + 0.2),
}


def write(folder, updates=7, value=1.0):
    weights = {"model": lambda path: save_file({"w": torch.full((1000,), value)}, path)}
    return folder.write(Position(epoch=1, step=2, updates=updates, sums={"loss": 1 / 3}), weights, PARTS)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


def refuse(message):
    raise AssertionError(message)


def test_round_trip_is_exact(folder):
    path = write(folder)
    found = folder.read_newest(refuse)
    assert found.path == path
    assert found.position == Position(epoch=1, step=2, updates=7, sums={"loss": 1 / 3})
    assert found.parts["betas"] == (0.9, 0.1 + 0.2)
    assert found.parts["scaler"] is None
    state = found.parts["optimizer"]["state"]["w"]
    assert torch.equal(state["exp_avg"], torch.arange(4.0))
    assert state["step"].shape == ()
    assert torch.equal(found.weights("model")["w"], torch.ones(1000))
    assert sorted(entry.name for entry in folder.path.iterdir()) == [path.name]


def test_a_state_that_json_cannot_hold_is_refused(folder):
    with pytest.raises(TypeError, match="cannot hold /x of type object"):
        folder.write(Position(), {}, {"x": object()})
    assert not folder.paths()


def test_nothing_is_replaced_and_the_newest_of_an_update_wins(folder):
    first, second = write(folder, value=1.0), write(folder, value=2.0)
    assert first != second
    assert folder.read_newest(refuse).weights("model")["w"][0] == 2.0


def test_old_checkpoints_go_except_those_kept_for_good(folder):
    for updates in range(6):
        write(folder, updates)
    (folder.path / ".update-0000000009-00.abc.tmp").mkdir()  # a crash left it
    folder.prune(2, lambda position: position.updates == 1)
    assert [path.name[:17] for path in folder.paths()] == [f"update-{n:010d}" for n in (1, 4, 5)]
    assert not list(folder.path.glob(".*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-5])


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/vmamba-was-here",))


def put_pickle(path):
    path.write_bytes(pickle.dumps({"w": Evil()}))


def with_sums_of(damage):
    """Damage a file, and write a manifest that believes it."""
    import hashlib

    def act(path):
        damage(path)
        manifest = json.loads((path.parent / "manifest.json").read_text())
        body = json.loads(manifest["body"])
        body["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        text = json.dumps(body)
        sums = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
        (path.parent / "manifest.json").write_text(json.dumps(sums))

    return act


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [flip, shorten, put_pickle, lambda path: path.unlink(), lambda p: p.write_bytes(b"")]
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(folder, name, damage):
    older, newest = write(folder, 3), write(folder, 4)
    damage(newest / name)
    said = []
    assert folder.read_newest(said.append).path == older
    assert len(said) == 1
    assert f"{newest} is damaged: {name}" in said[0]
    assert "trying an older checkpoint" in said[0]


def test_a_pickle_that_the_manifest_believes_is_still_not_run(folder, tmp_path):
    path = write(folder)
    with_sums_of(put_pickle)(path / "state.safetensors")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        folder.read_newest(lambda sentence: None)
    assert not os.path.exists("/tmp/vmamba-was-here")


def test_missing_and_foreign_checkpoints_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="stopped before it had saved anything"):
        folder.read_newest(refuse)
    path = write(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    body = json.loads(manifest["body"]) | {"format": 99}
    import hashlib

    text = json.dumps(body)
    (path / "manifest.json").write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}))
    with pytest.raises(CheckpointError, match="another version of vmamba"):
        read_checkpoint_folder(path)


def test_next_epoch_starts_from_nothing_but_keeps_what_counts_for_the_run():
    position = Position(3, 4, 34, {"loss": 1.25}, 9, 2.0, 1.0, 40, 1, 2, 0.5)
    position.next_epoch()
    assert position == Position(epoch=4, updates=34, read=40, damaged=1, skipped=2, best=0.5)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_every_update_of_every_process_has_random_numbers_of_its_own():
    seen = set()
    for key in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]:
        seed_update(*key)
        first = draws()
        seed_update(*key)
        assert draws() == first
        seen.add(first)
    assert len(seen) == 4


def test_a_full_disk_leaves_the_old_checkpoint(small_disk):
    folder = CheckpointFolder(small_disk / "checkpoints")
    old = write(folder, 1)
    (small_disk / "other").write_bytes(bytes(1015 * 1024 - 4 * 4096))
    with pytest.raises(CheckpointError, match=r"could not write the checkpoint .*; older checkpoints are as they were"):
        deque(write(folder, updates) for updates in range(2, 30))
    kept = folder.paths()
    assert kept[0] == old
    for path in kept:
        read_checkpoint_folder(path)
    assert not list(folder.path.glob(".*"))


def test_a_read_only_disk_leaves_the_old_checkpoint(small_disk):
    folder = CheckpointFolder(small_disk / "checkpoints")
    old = write(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        write(folder, 2)
    assert folder.read_newest(refuse).path == old


def _write_for_ever(folder):
    for updates in range(10**9):
        write(folder, updates, float(updates))
        folder.prune(2, lambda position: False)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_hundred_kills_at_random_moments_never_leave_the_run_without_a_checkpoint(folder):
    write(folder, 0, 0.0)
    moments = random.Random(0)
    survived = []
    for _ in range(100):
        child = os.fork()
        if not child:
            try:
                _write_for_ever(folder)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        found = folder.read_newest(refuse)  # the newest is whole: none is ever passed over
        assert found.weights("model")["w"][0] == found.position.updates
        survived.append(len(list(folder.path.glob(".*"))))
    assert any(survived), "no kill came while a checkpoint was being written"
    folder.prune(2, lambda position: False)
    assert not list(folder.path.glob(".*"))
