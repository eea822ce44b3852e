import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from vmamba.cli.arguments import parse
from vmamba.cli.tasks import part, task_of
from vmamba.data.transforms import Preprocessing
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
        ({"compile_mode": "reduce-overhead"}, "add --compile true"),
        ({"compile": True, "compile_mode": "reduce-overhead", "accumulate": 2}, "default with --accumulate above 1"),
        ({"compile": True, "compile_mode": "max-autotune", "parallel": "fsdp"}, "or --parallel fsdp"),
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
    words = ["--config", str(path)]
    recipe = parse("train", part(task_of(words), "recipe"), words)
    assert recipe.epochs >= 1
    assert path.read_text().startswith("#")


PUBLISHED_RECIPES = {
    "vanilla_vmamba_tiny": "vmambav0_tiny_224",
    "vanilla_vmamba_small": "vmambav0_small_224",
    "vanilla_vmamba_base": "vmambav0_base_224",
    "vmamba_tiny_s2l5": "vmambav2_tiny_224",
    "vmamba_small_s2l15": "vmambav2_small_224",
    "vmamba_base_s2l15": "vmambav2_base_224",
    "vmamba_tiny_s1l8": "vmambav2v_tiny_224",
    "vmamba_small_s1l20": "vmambav2v_small_224",
    "vmamba_base_s1l20": "vmambav2v_base_224",
}


def test_every_published_model_has_a_recipe(shared):
    published = json.loads((shared / "reference" / "published.json").read_text())["models"]
    assert {name for name, model in published.items() if "ckpt" in model.get("published", {})} == set(
        PUBLISHED_RECIPES.values()
    )
    assert set(PUBLISHED_RECIPES) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_the_recipe_is_the_published_one(shared, name):
    """`cls_recipe` of published.json, value by value, and the expected accuracy in the header."""
    reference = json.loads((shared / "reference" / "published.json").read_text())
    wanted, model = reference["cls_recipe"], reference["models"][PUBLISHED_RECIPES[name]]
    path = next(path for path in RECIPES if path.stem == name)
    assert f"expected top-1 {model['published']['acc1']} %" in path.read_text()
    recipe = parse("train", Recipe, ["--config", str(path)])
    optimizer, augmentation = recipe.optimizer, recipe.augmentation
    assert (recipe.model, recipe.img_size) == (name, 224)
    assert (recipe.epochs, recipe.batch_size) == (wanted["epochs"], wanted["batch"])
    scale = optimizer.rate_scale(recipe.batch_size)
    assert optimizer.lr * scale == pytest.approx(wanted["base_lr_at_1024"])
    rates = f"BASE_LR {optimizer.lr:.0e}, WARMUP_LR {optimizer.warmup_lr:.0e}, MIN_LR {optimizer.min_lr:.0e}"
    rule = f"{rates.replace('e-0', 'e-')}, all x (batch*world*accum)/{optimizer.lr_batch}"
    assert rule == wanted["lr_rule"]
    same = ("warmup_epochs", "betas", "eps", "weight_decay", "clip_grad", "layer_decay")
    assert [getattr(optimizer, key) for key in same] == [
        tuple(wanted[key]) if key == "betas" else wanted[key] for key in same
    ]
    assert (optimizer.ema_decay, optimizer.decay_form) == (wanted["ema"], "published")
    assert recipe.precision == wanted["amp"][:4]
    for ours, theirs in {
        "auto_augment": "auto_augment", "color_jitter": "color_jitter", "random_erasing": "reprob", "mixup": "mixup",
        "cutmix": "cutmix", "mix_probability": "mix_prob", "mix_switch": "switch_prob",
        "label_smoothing": "label_smoothing",
    }.items():  # fmt: skip
        assert getattr(augmentation, ours) == wanted[theirs], ours
    # What the weights' own names say wins over the general table.
    size = name.split("_")[2 if name.startswith("vanilla") else 1]
    special = {
        "vanilla_vmamba_tiny": 0.1,
        "vmamba_base_s2l15": 0.6,
        "vmamba_base_s1l20": 0.5,
        "vanilla_vmamba_base": 0.6,
    }
    assert recipe.model_options["drop_path_rate"] == special.get(name, wanted["drop_path"].get(size))


def test_headers_of_detection_and_segmentation_recipes_are_the_published_figures(shared):
    reference = json.loads((shared / "reference" / "published.json").read_text())
    tables = reference["performance_md"]
    headers = {path.stem: " ".join(path.read_text().partition("\ntask:")[0].split("\n# ")) for path in RECIPES}
    expected = []
    for row in tables["det"]:
        figures = [f"{name} {value}" for part in ("bbox", "segm") for name, value in row[part].items()]
        expected.append(("coco", row["backbone"], row["detector"].partition("@")[2], figures))
    for row in [*tables["seg"], *reference["seg_640_old_readme"]]:
        figures = [f"mIoU {row['mIoU_ss']} at one scale", f"{row['mIoU_ms']} at six scales"]
        expected.append(("ade20k", row["backbone"], row["crop"].partition("x")[0], figures))
    ours = [row for row in expected if "VMamba" in row[1]]
    assert len(ours) == sum(name.startswith(("coco", "ade20k")) for name in headers)
    for task, backbone, kind, figures in ours:
        ending = kind.replace("[", "_").rstrip("]")
        (text,) = (
            text
            for name, text in headers.items()
            if name.startswith(task) and name.endswith(f"_{ending}") and text.startswith(f"# {backbone} with ")
        )
        assert all(figure in text for figure in figures), (backbone, kind)


def test_the_published_transforms_are_built(shared):
    """Crop, interpolation, flip, RandAugment, erasing and normalisation as in `cls_recipe`."""
    wanted = json.loads((shared / "reference" / "published.json").read_text())["cls_recipe"]
    preprocessing = Preprocessing.for_style("photos", 224)
    assert (preprocessing.interpolation, preprocessing.crop_pct) == (wanted["interpolation"], 224 / 256)
    assert (list(preprocessing.mean), list(preprocessing.std)) == (wanted["mean"], wanted["std"])
    steps = preprocessing.training_transform(
        "photos", "photo", auto_augment=wanted["auto_augment"], random_erasing=wanted["reprob"]
    ).transforms
    names = [type(step).__name__ for step in steps]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"]
    assert steps[0].scale == (0.08, 1.0)
    assert steps[1].p == wanted["hflip"]
    erasing = steps[-1]
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (wanted["reprob"], True, wanted["recount"])
