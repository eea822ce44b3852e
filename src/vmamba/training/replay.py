"""`python -m vmamba.training.replay FILE`: compute an update again that was skipped because it was not finite.

The file, which the run wrote into its folder `skipped`, holds the weights before the update, the images and the seed of
everything random; the recipe is read from the run folder it lies in, and the data it names is opened for its classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vmamba.training.checkpointing import seed_update
from vmamba.training.run_folder import RunFolder
from vmamba.training.task import Task

# Task, as the recipe names it -> its recipe and its Task.
_KINDS = {
    "classification": ("recipe:Recipe", "classification:ClassificationTask"),
    "detection": ("detection_recipe:DetectionRecipe", "detection:DetectionTask"),
    "segmentation": ("segmentation_recipe:SegmentationRecipe", "segmentation:SegmentationTask"),
}


@dataclass(frozen=True)
class Replay:
    """What computing an update again showed.

    Attributes:
        record: What the run wrote about it: step, losses, norm of the gradient, rank, names of the images, …
        losses: Loss of each part of the batch.
        first_module: The first module whose output is not finite; None when all are.
        nonfinite_gradients: Parameters whose gradient is not finite.
        nonfinite_images: Names of images with values that are not finite.
    """

    record: dict[str, Any]
    losses: list[float]
    first_module: str | None
    nonfinite_gradients: list[str]
    nonfinite_images: list[str]


def replay(
    path: Path,
    make_recipe: Callable[..., Any] | None = None,
    make_task: Callable[[Any], Task] | None = None,
    device: str = "cpu",
) -> Replay:
    """Compute the update of a dump again: forward and backward, in float32.

    Args:
        path: The dump.
        make_recipe: Builds the recipe from the words of a command line; by default that of the run's task.
        make_task: The kind of task; by default the run's.
        device: Where to compute; the same kind as in the run gives the same random numbers.

    Raises:
        FileNotFoundError: There is no such file, or no run around it.
        ValueError: It is damaged, or of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record, plain = json.loads(header["record"]), json.loads(header["batches"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not the dump of an update, or damaged ({error})") from None
    folder = RunFolder(path.resolve().parent.parent)
    kind, task_kind = (_imported(name) for name in _KINDS[folder.read_config().get("task", "classification")])
    words = ["--config", str(folder.config)]
    task = (make_task or task_kind)(make_recipe(words) if make_recipe else _recipe_of(words, kind))
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    task.model.load_state_dict(weights)
    task.model.to(device)
    task.prepare_training()
    batches = [_batch(task, index, values, tensors) for index, values in enumerate(plain)]
    seed_update(int(record["seed"]), int(record["step"]) - 1, int(record["rank"]))
    first = _FirstBad(task.model)
    losses: list[float] = []
    for batch in batches:
        step = task.step(task.model, batch.to(torch.device(device)))
        losses.append(float(step.loss.detach()))
        (step.loss / len(batches)).backward()
    gradients = [name for name, p in task.model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    images = [
        name
        for batch in batches
        for name, image in zip(batch.names, getattr(batch, "images", ()), strict=False)
        if not _finite(image)
    ]
    return Replay(record, losses, first.name, gradients, images)


def main(argv: Sequence[str] | None = None) -> int:
    """Replay a dump and print what it shows; the exit status is 0 when it could be computed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m vmamba.training.replay RUN/skipped/FILE.safetensors", file=sys.stderr)
        return 2
    try:
        found = replay(Path(words[0]))
    except (ValueError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    record = found.record
    print(
        f"update {record['step']}, process {record['rank']} of {record['processes']},"
        f" {len(record['images'])} images, scale {record['scale']}\n"
        f"losses in the run        {', '.join(record['losses'])}; norm of the gradient {record['gradient_norm']}\n"
        f"losses computed again    {', '.join(map(str, found.losses))}\n"
        f"first output not finite  {found.first_module or 'none'}\n"
        f"gradients not finite     {', '.join(found.nonfinite_gradients) or 'none'}\n"
        f"images not finite        {', '.join(found.nonfinite_images) or 'none'}"
    )
    return 0


class _FirstBad:
    """Notes the first innermost module whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.name: str | None = None
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.name is None and isinstance(output, Tensor) and not _finite(output):
                self.name = name

        return check


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _batch(task: Task, index: int, values: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    prefix = f"batch/{index}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return task.batch_type(**values, **own)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"vmamba.training.{module}"), attribute)


def _recipe_of(words: list[str], kind: type) -> Any:
    import yaml
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(kind, "recipe")
    content = yaml.safe_load(Path(words[1]).read_text(encoding="utf-8"))
    return parser.instantiate(parser.parse_object({"recipe": content})).recipe


if __name__ == "__main__":
    sys.exit(main())
