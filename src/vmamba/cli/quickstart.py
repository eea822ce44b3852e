"""`vmamba quickstart`: the main job from end to end, on images that need no download."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.cli.arguments import parse
from vmamba.training.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from vmamba.cli.opening import OpenedModel
    from vmamba.data.sources import Source

_SHOWN = 24
_LISTED = 6


@dataclass(frozen=True)
class QuickstartOptions:
    """Train vmamba_nano on handwritten digits, evaluate it on held-out ones, and look at what it sees.

    Args:
        model: Name of the variant.
        epochs: Passes over the training images.
        seed: Seed of the run.
        output: Folder of the run; by default a new numbered one, runs/quickstart-001 and so on.
    """

    model: str = Recipe.model
    epochs: int = Recipe.epochs
    seed: int = 0
    output: str | None = None


def run(argv: Sequence[str]) -> int:
    """Train, evaluate, predict, and say what to try next."""
    options = parse("quickstart", QuickstartOptions, argv)
    recipe = Recipe(model=options.model, epochs=options.epochs, seed=options.seed, output=options.output)
    print(f"Training {recipe.model} on scikit-learn's handwritten digits, brought to 32×32 pixels.", flush=True)
    began = time.perf_counter()
    from rich.console import Console

    from vmamba.cli.opening import open_model
    from vmamba.data.sources import open_source
    from vmamba.training.engine import TrainingInterruptedError, train
    from vmamba.training.pictures import draw_confusion

    console = Console()
    try:
        result = train(recipe, console, run_name="quickstart")
    except TrainingInterruptedError as interrupted:
        print(f"vmamba quickstart: {interrupted}", file=sys.stderr)
        return interrupted.exit_status
    folder = result.folder
    # From here on as anyone would use the run: from its weights file alone. The last weights, not the best: picking
    # the best epoch by the held-out images would flatter the figure.
    opened = open_model(str(folder.last), "auto")
    source = open_source(recipe.data, recipe.held_out)
    confusion = folder.path / "confusion_matrix.png"
    draw_confusion(result.report.confusion, result.report.classes, confusion)
    predictions = folder.path / "predictions.png"
    mistakes = _draw_predictions(opened, source, predictions)
    examples = _save_examples(source, folder.path / "images")
    _print_results(
        console,
        {
            "held-out images": f"{result.report.count}",
            "right": f"{result.report.top1:.2%}",
            "true label among the first five": f"{result.report.top5:.2%}",
            "mistakes": ", ".join(mistakes) or "none",
            "time": f"{time.perf_counter() - began:.0f} s",
            "pictures with labels": str(predictions),
            "curves": str(folder.curves),
            "confusion matrix": str(confusion),
            "weights": str(folder.last),
        },
    )
    _print_classified(console, opened, examples)
    console.print(
        f"\nTry next:\n  {_program()} predict --checkpoint {folder.last} {folder.path / 'images'}\n"
        f"  {_program()} train --data FOLDER_OF_CLASS_FOLDERS",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _program() -> str:
    """Return how this program was called, so that the commands it prints can be pasted."""
    called = Path(sys.argv[0])
    if called.name != "vmamba" or not called.exists():
        return "python -m vmamba"
    return str(called.relative_to(Path.cwd()) if called.is_relative_to(Path.cwd()) else called)


def _draw_predictions(opened: "OpenedModel", source: "Source", path: Path) -> list[str]:
    """Classify all held-out images; draw every mistake and some of the rest; return the mistakes in words."""
    import torch

    from vmamba.data.loaders import evaluation_loader
    from vmamba.data.sources import ImageSet
    from vmamba.training.pictures import draw_predictions

    labels, images = source.classes, source.held_out
    assert isinstance(images, ImageSet)  # which digits are
    said: list[int] = []
    shares: list[float] = []
    with torch.inference_mode():
        for batch in evaluation_loader(images, opened.preprocessing.transform(), 64):
            best = opened.model(batch.images.to(opened.device)).softmax(1).max(1)
            said += best.indices.tolist()
            shares += best.values.tolist()
    true = images.targets.tolist()
    wrong = [i for i in range(len(true)) if said[i] != true[i]]
    right = [i for i in range(len(true)) if said[i] == true[i]]
    mistakes = wrong[: _SHOWN // 2]
    shown = mistakes + right[: _SHOWN - len(mistakes)]
    draw_predictions(
        [images.read(i) for i in shown],
        [labels[true[i]] for i in shown],
        [labels[said[i]] for i in shown],
        [shares[i] for i in shown],
        path,
        title=f"Held-out digits: {len(right)} of {len(true)} right; mistakes first, in red",
    )
    more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
    return [*(f"{labels[true[i]]} read as {labels[said[i]]}" for i in wrong[:_LISTED]), *more]


def _save_examples(source: "Source", folder: Path) -> list[tuple[str, str]]:
    """Write a held-out image of each class as a file; return paths and true labels."""
    from vmamba.data.sources import ImageSet

    images = source.held_out
    assert isinstance(images, ImageSet)  # which digits are
    folder.mkdir(exist_ok=True)
    examples = []
    for target, label in enumerate(source.classes):
        index = images.targets.tolist().index(target)
        path = folder / f"a_{label}.png"
        images.read(index).save(path)
        examples.append((str(path), label))
    return examples


def _print_results(console: "Console", results: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="Results", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in results.items():
        table.add_row(name, value)
    console.print()
    console.print(table, highlight=False)


def _print_classified(console: "Console", opened: "OpenedModel", examples: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table

    from vmamba.cli.predict import classify

    table = Table("image file", "predicted", "confidence", "true", title="Some held-out images", title_justify="left")
    table.columns[0].overflow = "fold"
    for (path, true), record in zip(examples, classify(opened, [path for path, _ in examples], 1, 32), strict=True):
        best = record["predictions"][0]
        color = "green" if best["label"] == true else "red"
        table.add_row(path, f"[{color}]{best['label']}[/{color}]", f"{best['confidence']:.1%}", true)
    console.print()
    console.print(table, highlight=False)
