"""Small runs, and what is left of them."""

from io import StringIO

import torch
from rich.console import Console

from vmamba.training.checkpointing import CheckpointFolder
from vmamba.training.recipe import Recipe


def quiet():
    return Console(file=StringIO())


def recipe(data, output, **changes):
    options = {"model": "vmamba_test", "img_size": 32, "epochs": 2, "batch_size": 8, "held_out": 0.25, "log_every": 2}
    options["model_options"] = {"drop_path_rate": 0.2}
    return Recipe(data=str(data), output=str(output), **{**options, "trackers": (), **changes})


def state_of(folder):
    def refuse(sentence):
        raise AssertionError(sentence)

    found = CheckpointFolder(folder / "checkpoints").read_newest(refuse)
    names = [path.stem for path in found.path.glob("*.safetensors") if path.stem != "state"]
    return found.position, {**found.parts, **{name: found.weights(name) for name in names}}


def assert_same(one, other):
    """Compare nested state dicts bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other
