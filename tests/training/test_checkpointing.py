import random

import numpy as np
import pytest
import torch

from vmamba.models.checkpoint import CheckpointError
from vmamba.training.checkpointing import Position, load_state, restore_random_state, save_state


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_state_round_trip_restores_position_parts_and_randomness(tmp_path):
    path = tmp_path / "state.pt"
    position = Position(epoch=3, step=4, updates=34, loss=1.25, correct=7, seen=9, best_top1=0.5)
    save_state(path, position, {"model": {"weight": torch.arange(3.0)}, "ema": None})
    expected = draw()
    draw()
    loaded, parts, randomness = load_state(path)
    restore_random_state(randomness)
    assert draw() == expected
    assert loaded == position
    assert torch.equal(parts["model"]["weight"], torch.arange(3.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_next_epoch_starts_from_nothing_but_keeps_the_best():
    position = Position(epoch=3, step=4, updates=34, loss=1.25, correct=7, seen=9, seconds=2.0, best_top1=0.5)
    position.next_epoch()
    assert position == Position(epoch=4, updates=34, best_top1=0.5)


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, Position(epoch=1), {})

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_state(path, Position(epoch=2), {})
    assert load_state(path)[0].epoch == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_missing_damaged_and_foreign_states_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(FileNotFoundError, match="stopped before it had saved anything"):
        load_state(path)
    save_state(path, Position(), {"model": {"weight": torch.zeros(100)}})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is damaged"):
        load_state(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a training state"):
        load_state(path)
