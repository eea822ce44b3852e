"""Training to segment: groups, rate, start, resuming bit for bit, damaged pairs, figures of two processes."""

import os
import signal

import numpy as np
import pytest
import several_processes
import torch
from runs import assert_same, quiet, state_of

from mask_samples import CLASSES, write_pairs
from vmamba.models import create_model
from vmamba.models.checkpoint import save_checkpoint
from vmamba.tasks.segmentation_checkpoint import load_segmentation_model
from vmamba.training.engine import TrainingInterruptedError, train
from vmamba.training.guards import TrainingFailedError
from vmamba.training.optim import make_optimizer
from vmamba.training.processes import evaluation_group
from vmamba.training.recipe import OptimizerOptions
from vmamba.training.replay import main as replay
from vmamba.training.segmentation import SegmentationTask
from vmamba.training.segmentation_pictures import class_colours, draw_overlay, index_picture
from vmamba.training.segmentation_recipe import SegmentationRecipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 12)


def recipe(data, output, **changes):
    options = {"model": "vmamba_test", "hidden": 16, "auxiliary": 8, "crop": 32, "short_side": 48, "long_side": 96}
    options |= {"epochs": 2, "batch_size": 4, "device": "cpu", "trackers": (), "held_out": 0.25, "workers": 0}
    return SegmentationRecipe(data=str(data), output=str(output), **{**options, **changes})


def train_to_segment(options):
    return train(options, quiet(), make_task=SegmentationTask)


def test_published_groups_spare_the_norms_of_the_backbone_alone(pairs, tmp_path):
    optimizer = OptimizerOptions(decay_form="published", weight_decay=0.01)
    task = SegmentationTask(recipe(pairs, tmp_path, optimizer=optimizer))
    decayed, spared = task.parameter_groups(task.recipe)
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    free = {names[id(parameter)] for parameter in spared["params"]}
    assert {"backbone.outnorm0.weight", "backbone.layers.0.blocks.0.norm.bias"} <= free
    assert all(name.startswith("backbone.") and "norm" in name for name in free)
    assert "decode_head.bottleneck.batch_norm.weight" not in free
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


def test_the_rate_warms_up_and_falls_on_a_straight_line_to_nothing(pairs, tmp_path):
    optimizer = OptimizerOptions(lr=6e-5, min_lr=0.0, warmup_lr=6e-11, warmup_epochs=0.09375)
    task = SegmentationTask(recipe(pairs, tmp_path, epochs=10, updates=16000, optimizer=optimizer))
    adam = make_optimizer(task.parameter_groups(task.recipe), optimizer)
    schedule = task.schedule(adam, task.recipe, 16000)
    rates = {}
    for update in (0, 750, 1500, 80750, 159999):
        schedule.step_update(update)
        rates[update] = adam.param_groups[0]["lr"]
    assert rates[0] == pytest.approx(6e-11)
    assert rates[750] == pytest.approx(3e-5, rel=1e-3)
    assert rates[1500] == pytest.approx(6e-5)
    assert rates[80750] == pytest.approx(3e-5)
    assert rates[159999] == pytest.approx(6e-5 / 158500)


def test_training_starts_from_a_classifier_or_a_segmentation_model(pairs, tmp_path):
    classifier = create_model("vmamba_test", num_classes=3)
    save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    task = SegmentationTask(recipe(pairs, tmp_path, weights=str(tmp_path / "classifier.safetensors")))
    for name, value in classifier.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(task.model.state_dict()[f"backbone.{name}"], value)
    result = train_to_segment(recipe(pairs, tmp_path / "run", epochs=1))
    again = SegmentationTask(recipe(pairs, tmp_path, weights=str(result.folder.last)))
    model, metadata = load_segmentation_model(result.folder.last)
    assert_same(again.model.state_dict(), model.state_dict())
    assert metadata["labels"] == list(CLASSES)
    assert (metadata["task"], metadata["crop"], metadata["short_side"]) == ("segmentation", 32, 48)
    with pytest.raises(ValueError, match="the data decides it"):
        SegmentationTask(recipe(pairs, tmp_path, model_options={"num_classes": 3}))


@pytest.mark.parametrize(("updates", "sent"), [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_an_interrupted_run_ends_bit_equal_to_an_unbroken_one(pairs, tmp_path, monkeypatch, updates, sent):
    straight = train_to_segment(recipe(pairs, tmp_path / "straight"))
    original, made = SegmentationTask.step, []

    def step(self, model, batch):
        made.append(1)
        if len(made) == updates:
            os.kill(os.getpid(), sent)
        return original(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "step", step)
        with pytest.raises(TrainingInterruptedError, match="go on with"):
            train_to_segment(recipe(pairs, tmp_path / "broken"))
    resumed = train_to_segment(recipe(pairs, tmp_path / "broken", resume=str(tmp_path / "broken")))
    assert_same(state_of(tmp_path / "straight")[1], state_of(tmp_path / "broken")[1])
    assert resumed.report == straight.report


def test_an_update_that_is_no_number_is_left_out_and_can_be_replayed(pairs, tmp_path, monkeypatch, capsys):
    original, made = SegmentationTask.step, []

    def step(self, model, batch):
        made.append(1)
        if len(made) == 2:
            batch.images[0, 0, 0, 0] = torch.nan
        return original(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "step", step)
        result = train_to_segment(recipe(pairs, tmp_path / "run"))
    model, _ = load_segmentation_model(result.folder.last)  # which refuses what is not finite
    assert all(value.isfinite().all() for value in model.state_dict().values())
    (dump,) = (tmp_path / "run" / "skipped").glob("*.safetensors")
    assert replay([str(dump)]) == 0
    assert "first output not finite  backbone.patch_embed.0" in capsys.readouterr().out


def test_it_learns(pairs, tmp_path):
    optimizer = OptimizerOptions(lr=5e-3, min_lr=0.0, weight_decay=0.01)
    options = {"epochs": 12, "scales": [0.9, 1.2], "optimizer": optimizer, "crop": 48}
    result = train_to_segment(recipe(pairs, tmp_path / "run", **options))
    losses = [record["train_loss"] for record in result.folder.read_metrics() if record["kind"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]
    assert result.report.pixel_accuracy > 0.5


def test_damaged_pairs_are_counted_and_too_many_end_the_run(tmp_path):
    root = write_pairs(tmp_path / "set", 12)
    (root / "masks" / "003.png").write_bytes(b"")
    result = train_to_segment(recipe(root, tmp_path / "run"))
    assert result.damaged == (f"{root}/masks/003.png: the file is empty",)
    for number in range(8):
        (root / "masks" / f"{number:03d}.png").write_bytes(b"")
    with pytest.raises(TrainingFailedError, match=r"more than the 25% of --guards.damaged"):
        train_to_segment(recipe(root, tmp_path / "other"))


def figures_of(data, output):
    evaluation_group("cpu")
    task = SegmentationTask(recipe(data, output))
    torch.manual_seed(0)
    for parameter in task.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    share = evaluation_group("cpu").share
    report = task.evaluate(task.model, task.evaluation_batches(share, False))
    return report.confusion, report.count, report.miou, len(list(task.evaluation_batches(share, False)))


def agree_with(data, output, expected):
    *figures, length = figures_of(data, output)
    assert tuple(figures) == expected
    assert length == 2 - int(os.environ["RANK"])  # shares differ in length


def test_two_processes_report_what_one_does(pairs, tmp_path):
    alone = figures_of(pairs, tmp_path)
    assert alone[1:] == (3, alone[2], 3)
    assert len({value for row in alone[0] for value in row}) > 3
    several_processes.Group(tmp_path / "logs", agree_with, pairs, tmp_path, alone[:3]).finish()


def test_overlays_show_classes_and_leave_the_rest_as_it_was():
    from PIL import Image

    classes = ("background", "tree", "lake")
    assert len(set(class_colours([f"class {i}" for i in range(150)]))) == 150
    picture, labels = Image.new("RGB", (60, 40), (10, 20, 30)), np.full((40, 60), 255)
    labels[:10], labels[10:30] = 1, 2
    overlay = draw_overlay(picture, labels, classes, strength=1.0)
    pixels = np.asarray(overlay)
    assert overlay.height == 40
    assert (pixels[0, :60] == class_colours(classes)[1]).all()
    assert (pixels[35, :60] == (10, 20, 30)).all()
    legend = {tuple(colour) for colour in pixels[:, 60:].reshape(-1, 3)}
    assert class_colours(classes)[2] in legend  # the largest comes first
    assert (np.asarray(index_picture(labels, classes)) == labels).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 30}, "crop must be a multiple of 4"),
        ({"scales": [2.0, 0.5]}, "smaller one first"),
        ({"power": 0}, "power"),
        ({"optimizer": OptimizerOptions(layer_decay=0.9)}, "layer_decay must be 1"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SegmentationRecipe(**changes)


def test_a_batch_norm_needs_two_pictures(pairs, tmp_path):
    with pytest.raises(ValueError, match="two pictures at once"):
        train_to_segment(recipe(pairs, tmp_path / "run", accumulate=4))
