"""What a run writes so that it can go on where it stopped, and so that others can use its weights."""

from __future__ import annotations

import pickle
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmamba.models.checkpoint_files import replacing

_FORMAT = 1


@dataclass
class Position:
    """How far a run has come, and what it has measured in the epoch it is in.

    Attributes:
        epoch: Complete epochs.
        step: Updates made in the current epoch.
        updates: Updates made in the whole run.
        loss: Sum of the loss over the images seen in this epoch.
        correct: Images recognised while training in this epoch.
        seen: Images seen in this epoch.
        seconds: Time spent training in this epoch.
        best_top1: Best share of held-out images recognised so far; -1 before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch += 1
        self.step, self.loss, self.correct, self.seen, self.seconds = 0, 0.0, 0, 0, 0.0


def save_state(path: Path, position: Position, parts: dict[str, Any]) -> None:
    """Write the state of a run, or leave the old one untouched when that fails.

    Args:
        path: Where to.
        position: How far the run has come.
        parts: State dicts by name; None for a part that the run does not have.
    """
    state = {"format": _FORMAT, "position": asdict(position), "random": _random_state(), "parts": parts}
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> tuple[Position, dict[str, Any], dict[str, Any]]:
    """Read what `save_state` wrote: the position, the parts, and the state of the random generators.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or not the state of a run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: the run stopped before it had saved anything; start it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {str(error).partition(chr(10))[0]}") from None
    known = {item.name for item in fields(Position)}
    if not isinstance(state, dict) or state.get("format") != _FORMAT or set(state["position"]) != known:
        raise ValueError(f"{path} is not a training state that this version of vmamba can go on from")
    return Position(**state["position"]), state["parts"], state["random"]


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the random generators of python, numpy and torch back to where they were."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    # A run may go on with another number of GPUs; each that both have goes on exactly.
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": (version, list(words), gauss),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
