import os
import shutil
import signal
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import assert_same, quiet, recipe, state_of
from safetensors.torch import load_file

from vmamba.data.loaders import evaluation_loader
from vmamba.data.sources import open_source
from vmamba.data.transforms import Preprocessing
from vmamba.models.checkpoint import CheckpointError, load_model
from vmamba.tasks.classification import evaluate
from vmamba.training import classification, engine, run
from vmamba.training.checkpointing import CheckpointFolder, read_checkpoint_folder
from vmamba.training.engine import TrainingInterruptedError, train
from vmamba.training.guards import TrainingFailedError
from vmamba.training.recipe import AugmentationOptions, CheckpointOptions, GuardOptions, OptimizerOptions, Recipe
from vmamba.training.replay import main, replay


def stop_after(monkeypatch, updates):
    """Send this process SIGINT once the given number of updates is made."""
    original, made = engine._update, []

    def counted(run, batches, measured):
        made.append(1)
        if len(made) == updates:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, batches, measured)

    monkeypatch.setattr(engine, "_update", counted)


@pytest.fixture(params=["read at once", "read later"])
def outcome(request, monkeypatch):
    """Have the optimiser skip bad updates itself, as on a GPU, where the loop reads later what came of them."""
    if request.param == "read later":
        made = run.make_optimizer
        monkeypatch.setattr(run, "make_optimizer", lambda *args, **kwargs: made(*args, **{**kwargs, "fused": True}))
    return request.param


def test_a_run_learns_and_leaves_all_its_files(colours, tmp_path):
    plain, fast = AugmentationOptions(policy="none"), OptimizerOptions(lr=1e-2)
    options = {"epochs": 4, "augmentation": plain, "optimizer": fast, "trackers": ("tensorboard",)}
    result = train(recipe(colours, tmp_path / "run", **options), quiet())
    assert result.report.count == 9
    assert result.report.top1 == 1.0
    files = {path.name for path in result.folder.path.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "checkpoints",
        "curves.png",
    } <= files
    assert list((result.folder.path / "tensorboard").glob("events.out.tfevents.*"))
    epochs = [record for record in result.folder.read_metrics() if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["top1"] == result.report.top1
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    model, metadata = load_model(result.folder.last)
    assert metadata["labels"] == ["blue", "green", "red"]
    assert (metadata["img_size"], metadata["epoch"]) == (32, 4)
    assert model.config.num_classes == 3


@pytest.mark.parametrize(("updates", "ema"), [(1, 0.9), (2, 0.0), (3, 0.9), (5, 0.9), (6, 0.9)])
def test_an_interrupted_run_ends_bit_equal_to_an_unbroken_one(colours, tmp_path, monkeypatch, updates, ema, outcome):
    options = {
        "log_every": 9,
        "optimizer": OptimizerOptions(ema_decay=ema),
        "augmentation": AugmentationOptions(policy="photo", mixup=0.5),
    }
    straight = train(recipe(colours, tmp_path / "straight", **options), quiet())
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(TrainingInterruptedError, match="go on with: vmamba train --resume") as caught:
            train(recipe(colours, tmp_path / "broken", **options), quiet())
    assert caught.value.exit_status == 130
    # What is read later is known an update later, but for the last of an epoch.
    extra = outcome == "read later" and updates % 3 > 0
    assert state_of(tmp_path / "broken")[0].updates == updates + extra
    resumed = train(recipe(colours, tmp_path / "broken", resume=str(tmp_path / "broken"), **options), quiet())
    (position, parts), (other_position, other_parts) = state_of(tmp_path / "straight"), state_of(tmp_path / "broken")
    assert_same(parts, other_parts)
    assert (position.updates, position.best) == (other_position.updates, other_position.best)
    assert resumed.report == straight.report
    records = [
        [{k: v for k, v in record.items() if k != "images_per_second"} for record in result.folder.read_metrics()]
        for result in (straight, resumed)
    ]
    assert [r for r in records[0] if r["kind"] == "epoch"] == [r for r in records[1] if r["kind"] == "epoch"]


def test_an_interrupt_during_evaluation_is_resumed_there(colours, tmp_path, monkeypatch):
    straight = train(recipe(colours, tmp_path / "straight", epochs=1), quiet())
    original = engine._evaluate

    def interrupted(run):
        os.kill(os.getpid(), signal.SIGINT)
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_evaluate", interrupted)
        with pytest.raises(TrainingInterruptedError):
            train(recipe(colours, tmp_path / "broken", epochs=1), quiet())
    resumed = train(recipe(colours, tmp_path / "broken", epochs=1, resume=str(tmp_path / "broken")), quiet())
    assert resumed.report == straight.report


def test_a_finished_run_can_be_prolonged(colours, tmp_path):
    train(recipe(colours, tmp_path / "run", epochs=1), quiet())
    longer = train(recipe(colours, tmp_path / "run", epochs=3, resume=str(tmp_path / "run")), quiet())
    assert [r["epoch"] for r in longer.folder.read_metrics() if r["kind"] == "epoch"] == [1, 2, 3]


def test_a_resumed_run_refuses_to_become_another(colours, tmp_path):
    train(recipe(colours, tmp_path / "run", epochs=1), quiet())
    with pytest.raises(ValueError, match="a resumed run keeps its batch_size: it was 8, 4 was asked for"):
        train(recipe(colours, tmp_path / "run", batch_size=4, resume=str(tmp_path / "run")), quiet())
    with pytest.raises(ValueError, match="a run stays in its folder"):
        train(recipe(colours, tmp_path / "other", resume=str(tmp_path / "run")), quiet())
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        train(recipe(colours, tmp_path / "none", resume=str(tmp_path / "none")), quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vmamba_tny"}, "vmamba_tiny"),
        ({"data": "digts"}, "did you mean digits"),
        ({"model_options": {"num_classes": 5}}, "the data decides it"),
        ({"model_options": {"depth": 5}}, "depth"),
        ({"model_options": {"backend": "triton"}, "device": "cpu"}, "'triton' cannot run"),
        ({"weights": "/no/such/file.pth"}, "no file"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
        ({"augmentation": AugmentationOptions(policy="photo", auto_augment="zzz")}, "does not understand"),
    ],
)
def test_nothing_is_written_for_a_recipe_that_cannot_be_carried_out(colours, tmp_path, changes, message):
    options = {"data": colours, **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe(options.pop("data"), tmp_path / "run", **options), quiet())
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(colours, tmp_path):
    with pytest.raises(ValueError, match="--trackers nosuch: not installed or unknown"):
        train(recipe(colours, tmp_path / "run", trackers=("nosuch",)), quiet())
    assert not (tmp_path / "run").exists()


def test_damaged_images_are_skipped_and_named(colours, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(colours, data)
    for name in ("red/3.png", "blue/0.png", "green/7.png"):
        (data / name).write_bytes((data / name).read_bytes()[:200])
    result = train(recipe(data, tmp_path / "run"), quiet())
    assert len(result.damaged) == 3
    assert sorted(result.damaged) == sorted((tmp_path / "run" / "damaged.txt").read_text().splitlines())


def test_images_that_are_all_damaged_are_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "data" / name / f"{index}.png").write_bytes(b"no")
    with pytest.raises(
        TrainingFailedError, match="4 of the 4 training images read so far are damaged, more than the 25%"
    ):
        train(recipe(tmp_path / "data", tmp_path / "run", batch_size=4), quiet())
    assert len((tmp_path / "run" / "damaged.txt").read_text().splitlines()) == 4


def test_one_class_is_refused_and_classes_without_images_are_named(colours, tmp_path):
    (tmp_path / "one" / "a").mkdir(parents=True)
    for index in range(4):
        shutil.copy(colours / "red" / f"{index}.png", tmp_path / "one" / "a")
    with pytest.raises(ValueError, match="has the one class 'a'; to classify takes two"):
        train(recipe(tmp_path / "one", tmp_path / "run"), quiet())
    shutil.copytree(colours, tmp_path / "two")
    (tmp_path / "two" / "violet").mkdir()
    console = quiet()
    train(recipe(tmp_path / "two", tmp_path / "run", epochs=1), console)
    assert "classes 1 without an image to train on: 'violet'" in console.file.getvalue()


def poison(monkeypatch, updates):
    """Make the loss of some updates (counted from 0) not a number."""
    original = classification.classification_loss
    made = []

    def spoiled(logits, targets, label_smoothing):
        made.append(1)
        loss = original(logits, targets, label_smoothing)
        return loss * float("nan") if len(made) - 1 in updates else loss

    monkeypatch.setattr(classification, "classification_loss", spoiled)


def test_an_update_whose_loss_is_no_number_changes_nothing(colours, tmp_path, monkeypatch, outcome):
    poison(monkeypatch, {1})
    options = {
        "epochs": 1,
        "optimizer": OptimizerOptions(ema_decay=0.9),
        "checkpoints": CheckpointOptions(every=1, keep=9),
    }
    result = train(recipe(colours, tmp_path / "run", **options), quiet())
    before, after, later = (
        read_checkpoint_folder(path) for path in CheckpointFolder(tmp_path / "run" / "checkpoints").paths()
    )
    for name in ("model", "ema"):
        assert_same(before.weights(name), after.weights(name))
        assert not torch.equal(after.weights(name)["patch_embed.0.weight"], later.weights(name)["patch_embed.0.weight"])
    assert_same(before.parts["optimizer"]["state"], after.parts["optimizer"]["state"])
    assert (after.position.skipped, later.position.skipped) == (1, 0)
    (record,) = [record for record in result.folder.read_metrics() if record["kind"] == "skipped"]
    assert (record["step"], record["losses"], record["images"]) == (2, ["nan"], 8)
    assert len(record["dumps"]) == 1


def test_a_run_whose_loss_stays_no_number_stops_with_advice_and_saves(colours, tmp_path, monkeypatch, outcome):
    poison(monkeypatch, range(2, 99))
    console = quiet()
    with pytest.raises(TrainingFailedError, match="update 5 is not finite, nor were the 2 before it; a smaller"):
        train(recipe(colours, tmp_path / "run", guards=GuardOptions(nonfinite=3)), console)
    assert "nothing was changed by it" in console.file.getvalue()
    position, _ = state_of(tmp_path / "run")
    assert (position.updates, position.skipped) == (4 if outcome == "read at once" else 5, 3)


@pytest.mark.parametrize("outcome", ["read later"], indirect=True)
def test_an_outcome_that_is_read_later_is_the_same(colours, tmp_path, monkeypatch, outcome):
    """Weights, averages, records and dumps of a run with a bad update do not depend on when outcomes are read."""
    kept, later = [], run.Run.reads_later.func
    for wanted in (True, False):
        with monkeypatch.context() as patch:
            poison(patch, {1, 4})
            patch.setattr(run.Run, "reads_later", property(lambda it, wanted=wanted: later(it) and wanted))
            options = {"optimizer": OptimizerOptions(ema_decay=0.9), "log_every": 9}
            result = train(recipe(colours, tmp_path / str(wanted), **options), quiet())
        records = [
            {
                key: value
                for key, value in record.items()
                if key not in ("seconds", "images_per_second", "data_wait", "dumps")
            }
            for record in result.folder.read_metrics()
        ]
        position, parts = state_of(result.folder.path)
        dumps = {path.name: load_file(path) for path in (result.folder.path / "skipped").iterdir()}
        kept.append((records, position.updates, position.sums, parts, dumps))
    assert [r["step"] for r in kept[0][0] if r["kind"] == "skipped"] == [2, 5]
    assert_same(*kept)


def test_a_dump_reproduces_the_update_it_is_of(colours, tmp_path, monkeypatch, outcome):
    """The loss of one image is infinite; computing the update again from the file alone shows it."""
    options = {"augmentation": AugmentationOptions(policy="photo", mixup=0.5), "epochs": 1, "log_every": 9}
    path = tmp_path / "run"

    original = classification.classification_loss

    def infinite(logits, targets, label_smoothing):
        loss = original(logits, targets, label_smoothing)
        losses.append(float(loss.detach()))
        return loss + float("inf")

    losses = []
    with monkeypatch.context() as patch:
        patch.setattr(classification, "classification_loss", infinite)
        train(recipe(colours, path, **options), quiet())
    first, second, third = sorted((path / "skipped").iterdir())
    for dump, loss in zip((first, second, third), losses, strict=True):
        replayed = replay(dump)
        assert replayed.losses == [loss]  # to the last bit: weights, images, mixup and drop path are the same
        assert replayed.nonfinite_gradients == []
        assert len(replayed.record["images"]) == 8
    assert main([str(second)]) == 0


def test_half_precision_is_refused_without_a_gpu_and_fsdp_too(colours, tmp_path):
    with pytest.raises(ValueError, match="fsdp needs several GPUs"):
        train(recipe(colours, tmp_path / "run", parallel="fsdp"), quiet())


@pytest.mark.parametrize("fits", [2, 0])
def test_too_large_a_batch_ends_in_advice_that_was_tried(colours, tmp_path, monkeypatch, fits):
    original = classification.classification_loss

    def limited(logits, targets, label_smoothing):
        if len(logits) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return original(logits, targets, label_smoothing)

    monkeypatch.setattr(classification, "classification_loss", limited)
    advice = "2 at once do: --accumulate 4 keeps the batch of 8" if fits else "not even one fits"
    with pytest.raises(TrainingFailedError, match=rf"8 images at once are too many .*2.00 GiB.*; {advice}"):
        train(recipe(colours, tmp_path / "run"), quiet())


def test_accumulated_parts_give_the_gradient_of_the_whole(colours, tmp_path):
    """Without chance, a batch in one part and in four is the same update, but for rounding."""
    plain = {"augmentation": AugmentationOptions(policy="none"), "model_options": {"drop_path_rate": 0.0}, "epochs": 1}
    whole = train(recipe(colours, tmp_path / "whole", **plain), quiet())
    parts = train(recipe(colours, tmp_path / "parts", accumulate=4, **plain), quiet())
    one, other = (load_model(result.folder.last)[0].state_dict() for result in (whole, parts))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert parts.report.loss == pytest.approx(whole.report.loss, abs=1e-4)


def test_a_batch_that_cannot_be_divided_is_refused(colours, tmp_path):
    with pytest.raises(ValueError, match="--batch_size 8 cannot be divided among 1 processes × 3 parts; 6 can"):
        train(recipe(colours, tmp_path / "run", accumulate=3), quiet())
    mixed = AugmentationOptions(mixup=0.5)
    with pytest.raises(ValueError, match="mixup pairs the images a process computes at once, here 1"):
        train(recipe(colours, tmp_path / "run", accumulate=8, augmentation=mixed), quiet())


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(colours, tmp_path):
    train(recipe(colours, tmp_path / "run", epochs=2), quiet())
    newest = CheckpointFolder(tmp_path / "run" / "checkpoints").paths()[-1]
    (newest / "model.safetensors").write_bytes(b"")
    console = quiet()
    result = train(recipe(colours, tmp_path / "run", epochs=2, resume=str(tmp_path / "run")), console)
    said = console.file.getvalue()
    assert f"{newest} is damaged: model.safetensors" in said
    assert "going on in epoch 2 after 3 updates" in said
    assert [r["epoch"] for r in result.folder.read_metrics() if r["kind"] == "epoch"] == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(colours, tmp_path):
    train(recipe(colours, tmp_path / "run", epochs=1), quiet())
    wider = {"drop_path_rate": 0.2, "mlp_ratio": 3.0}
    train(recipe(colours, tmp_path / "other", epochs=1, model_options=wider), quiet())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(
        ValueError, match=r"is of another model than the recipe's: layers.0.blocks.0.mlp.fc1.bias differs"
    ):
        train(recipe(colours, tmp_path / "run", resume=str(tmp_path / "run")), quiet())


def test_resume_auto_starts_or_goes_on(colours, tmp_path):
    with pytest.raises(ValueError, match="name that folder"):
        train(Recipe(resume="auto"), quiet())
    options = {"resume": "auto", "epochs": 1}
    train(recipe(colours, tmp_path / "run", **options), quiet())
    console = quiet()
    train(recipe(colours, tmp_path / "run", **{**options, "epochs": 2}), console)
    assert "going on in epoch 2" in console.file.getvalue()


def test_resume_auto_starts_again_where_nothing_was_saved(colours, tmp_path):
    straight = train(recipe(colours, tmp_path / "straight"), quiet())
    train(recipe(colours, tmp_path / "run", epochs=1), quiet())
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as after a kill in the first epoch
    with pytest.raises(FileNotFoundError, match="before it had saved anything"):
        train(recipe(colours, tmp_path / "run", resume=str(tmp_path / "run")), quiet())
    console = quiet()
    again = train(recipe(colours, tmp_path / "run", resume="auto"), console)
    assert "holds no checkpoint yet; its run starts from the beginning" in console.file.getvalue().replace("\n", "")
    assert again.report == straight.report
    steps = [[line["step"] for line in result.folder.read_metrics()] for result in (straight, again)]
    assert steps[0] == steps[1]


def test_checkpoints_within_an_epoch_and_for_good(colours, tmp_path):
    options = CheckpointOptions(every=2, keep=1, keep_epochs=2)
    train(recipe(colours, tmp_path / "run", epochs=5, checkpoints=options), quiet())
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == [f"update-{updates:010d}-00" for updates in (6, 12, 15)]


def test_a_full_disk_ends_a_run_with_its_old_checkpoint(colours, small_disk, monkeypatch):
    train(recipe(colours, small_disk / "run", epochs=1), quiet())
    (small_disk / "other").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 65536))
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(recipe(colours, small_disk / "run", epochs=2, resume=str(small_disk / "run")), quiet())
    assert state_of(small_disk / "run")[0].epoch == 1


def test_only_the_head_is_tuned(colours, tmp_path):
    first = train(recipe(colours, tmp_path / "first", epochs=1), quiet())
    options = {
        "tune": "head",
        "weights": str(first.folder.last),
        "img_size": 48,
        "optimizer": OptimizerOptions(lr=1e-2),
    }
    tuned = train(recipe(colours, tmp_path / "tuned", **options), quiet())
    before, after = (load_model(result.folder.last)[0].state_dict() for result in (first, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.head.weight", "classifier.head.bias"}
    assert load_model(tuned.folder.last)[1]["img_size"] == 48


def test_gradient_checkpointing_changes_nothing(colours, tmp_path):
    plain = train(recipe(colours, tmp_path / "plain", epochs=1), quiet())
    saving = train(recipe(colours, tmp_path / "saving", epochs=1, gradient_checkpointing=True), quiet())
    assert saving.report == plain.report


def test_weights_of_another_run_are_a_start(colours, tmp_path):
    first = train(recipe(colours, tmp_path / "first"), quiet())
    frozen = OptimizerOptions(lr=0.0, min_lr=0.0, warmup_lr=0.0)
    second = train(
        recipe(colours, tmp_path / "second", epochs=1, weights=str(first.folder.last), optimizer=frozen), quiet()
    )
    assert_same(state_of(tmp_path / "first")[1]["model"], state_of(tmp_path / "second")[1]["model"])
    assert second.report.top1 == first.report.top1


def test_bf16_trains_on_the_cpu(colours, tmp_path):
    result = train(recipe(colours, tmp_path / "run", precision="bf16", epochs=1), quiet())
    assert np.isfinite(result.report.loss)
    assert all(value.dtype == torch.float32 for value in state_of(tmp_path / "run")[1]["model"].values())


def test_the_moving_average_is_what_is_evaluated_and_kept(colours, tmp_path):
    options = {"precision": "bf16", "optimizer": OptimizerOptions(lr=3e-2, min_lr=3e-2, ema_decay=0.9)}
    result = train(recipe(colours, tmp_path / "run", **options), quiet())
    parts = state_of(tmp_path / "run")[1]
    model, _ = load_model(result.folder.last)
    averaged = parts["ema"]
    assert_same(dict(model.state_dict()), averaged)
    source = open_source(str(colours), 0.25)
    transform = Preprocessing.for_style("photos", 32).transform()
    losses = []
    for weights in (averaged, parts["model"]):
        model.load_state_dict(weights)
        batches = ((batch.images, batch.targets) for batch in evaluation_loader(source.held_out, transform, 9))
        losses.append(evaluate(model, batches, source.classes).loss)
    assert result.report.loss == pytest.approx(losses[0], rel=0.02)  # evaluated in bfloat16 there, in float32 here
    assert abs(result.report.loss - losses[0]) < 0.5 * abs(result.report.loss - losses[1])


def test_a_run_is_not_resumed_on_other_images(colours, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(colours, data)
    train(recipe(data, tmp_path / "run", epochs=1), quiet())
    (data / "red" / "0.png").unlink()
    with pytest.raises(ValueError, match="has other images than when"):
        train(recipe(data, tmp_path / "run", resume=str(tmp_path / "run")), quiet())


def test_progress_is_a_line_an_epoch_outside_a_terminal(colours, tmp_path):
    console = quiet()
    train(recipe(colours, tmp_path / "run"), console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert "img/s" in lines[0]


def test_progress_is_a_live_bar_in_a_terminal(colours, tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=120)
    train(recipe(colours, tmp_path / "run"), console)
    shown = console.file.getvalue()
    for part in ("epoch 2/2", "loss", "top1", "img/s", "wait", "0:00:0"):
        assert part in shown
