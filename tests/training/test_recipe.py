import dataclasses
from pathlib import Path

import pytest
import yaml

from vmamba.cli.arguments import parse
from vmamba.training.recipe import CHANGEABLE_ON_RESUME, AugmentationOptions, OptimizerOptions, Recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_a_recipe_survives_yaml(tmp_path):
    recipe = Recipe(
        model="vmamba_tiny",
        model_options={"drop_path_rate": 0.3},
        optimizer=OptimizerOptions(lr=3e-4, betas=(0.9, 0.95)),
        augmentation=AugmentationOptions(policy="photo", auto_augment="rand-m9-mstd0.5-inc1"),
        trackers=(),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert parse("train", Recipe, ["--config", str(path)]) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, not 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        ({"img_size": 16}, "img_size must be 32 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OptimizerOptions, {"lr": -1.0}),
        (OptimizerOptions, {"lr": float("inf")}),
        (OptimizerOptions, {"ema_decay": 1.0}),
        (OptimizerOptions, {"betas": (0.9, 1.0)}),
        (AugmentationOptions, {"mixup": -0.1}),
        (AugmentationOptions, {"label_smoothing": 1.0}),
    ],
)
def test_impossible_options_are_named(kind, options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        kind(**options)


def test_what_may_change_on_resume_exists():
    assert set(CHANGEABLE_ON_RESUME) <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_understood(path):
    recipe = parse("train", Recipe, ["--config", str(path)])
    assert recipe.epochs >= 1
    assert path.read_text().startswith("#")


def test_there_are_recipes():
    assert RECIPES
