import copy
import dataclasses
import json
import signal
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faster_coco_eval.core import mask as coco_mask
from rich.console import Console
from several_processes import Group
from torch._dynamo.utils import counters

from coco_samples import make_coco
from vmamba.cli.arguments import parse
from vmamba.data.coco import read_coco
from vmamba.data.coco_loading import encoding_of, masks_in, whole
from vmamba.data.reading import ALONE
from vmamba.models.checkpoint import save_checkpoint
from vmamba.models.registry import create_model
from vmamba.models.vmamba import VMamba
from vmamba.tasks.detection_checkpoint import load_detector
from vmamba.training.detection import DetectionTask
from vmamba.training.detection_evaluation import evaluate_detector, report_of
from vmamba.training.detection_recipe import DetectionRecipe, detection_optimizer
from vmamba.training.engine import TrainingInterruptedError, train
from vmamba.training.replay import replay

FAST = dataclasses.replace(detection_optimizer(), lr=3e-3, lr_batch=0)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("objects")
    make_coco(root, 8)
    make_coco(root, 4, seed=1, name="val")
    return root


def recipe(data, output, **changes):
    options = {"model": "vmamba_test", "epochs": 2, "batch_size": 4, "channels": 8, "min_sizes": (64,), "max_size": 96}
    options |= {"optimizer": FAST, "trackers": (), "log_every": 1}
    options |= {"crop": 0.5, "model_options": {"drop_path_rate": 0.1}, "device": "cpu", "workers": 0}
    return DetectionRecipe(data=str(data), output=str(output), **{**options, **changes})


def quiet():
    return Console(file=StringIO())


def perfect(images):
    """Return results that say what the annotations say."""
    found = []
    for image in images.images:
        for index, (box, label, shape) in enumerate(zip(image.boxes.tolist(), image.labels, image.shapes, strict=True)):
            mask = masks_in(image, [index], whole(image))[0]
            encoding = coco_mask.encode(np.asfortranarray(mask)) if not isinstance(shape, dict) else encoding_of(shape)
            record = {"image_id": image.key, "category_id": int(label) + 1, "score": 0.9, "segmentation": encoding}
            found.append(record | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})
    return found


def keys(images):
    return [image.key for image in images.images]


def test_perfect_results_have_precision_one_and_others_less(data):
    images = read_coco(data / "train.json", data / "images", masks=True)
    report = report_of(perfect(images), keys(images), images, masks=True)
    assert report.box.totals["AP"] == report.mask.totals["AP"] == pytest.approx(1)
    assert report.box.per_class == pytest.approx((1, 1, 1))
    assert (report.images, report.objects) == (8, 16)
    wrong = [{**record, "category_id": record["category_id"] % 3 + 1} for record in perfect(images)]
    assert report_of(wrong, keys(images), images, masks=True).box.totals["AP"] < 0.3
    assert report_of([], keys(images), images, masks=True).figures()["box_AP"] == 0


def test_average_precision_is_that_of_a_count_by_hand(data):
    """One object found, one missed, a false one between them in confidence: recall ½ at precision 1, and no more."""
    images = read_coco(data / "train.json", data / "images", masks=True)
    image = images.images[0]
    one = dataclasses.replace(
        image,
        boxes=np.float32([[0, 0, 20, 20], [40, 40, 60, 60]]),
        labels=np.int64([0, 0]),
        crowd=np.array([False, False]),
        areas=np.float64([400, 400]),
        shapes=(None, None),
    )
    images = dataclasses.replace(images, images=(one,))
    found = [
        {"image_id": one.key, "category_id": 1, "bbox": box, "score": score}
        for box, score in (([0, 0, 20, 20], 0.9), ([70, 0, 20, 20], 0.8), ([41, 40, 20, 20], 0.1))
    ]
    report = report_of(found, [one.key], images, masks=False)
    # 101 recalls: 51 up to 1/2 at precision 1, 50 at 2/3; the box a pixel aside overlaps by 19/21, below 0.95 alone.
    by_overlap = [(51 + 50 * 2 / 3) / 101] * 9 + [51 / 101]
    assert report.box.totals["AP"] == pytest.approx(np.mean(by_overlap))
    assert report.box.per_class == (pytest.approx(np.mean(by_overlap)), None, None)


def test_a_crowd_costs_no_precision(data):
    images = read_coco(data / "train.json", data / "images", masks=True)
    found = perfect(images)
    first = dataclasses.replace(images.images[0], crowd=np.array([True, False]))
    crowded = dataclasses.replace(images, images=(first, *images.images[1:]))
    report = report_of(found, keys(images), crowded, masks=True)
    assert report.box.totals["AP"] == pytest.approx(1)
    assert report.objects == 15


def test_only_images_that_were_looked_at_count(data):
    images = read_coco(data / "train.json", data / "images", masks=True)
    seen = keys(images)[:3]
    found = [record for record in perfect(images) if record["image_id"] in seen]
    assert report_of(found, seen, images, masks=True).box.totals["AP"] == pytest.approx(1)
    assert report_of(found, keys(images), images, masks=True).box.totals["AP"] < 0.9


def test_training_lowers_the_loss_and_leaves_weights_that_stand_for_themselves(data, tmp_path):
    output = tmp_path / "run"
    result = train(recipe(data, output, epochs=6), quiet(), make_task=DetectionTask)
    records = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    losses = [record["train_loss"] for record in records if record["kind"] == "epoch"]
    assert losses[-1] < 0.7 * losses[0]
    assert {"train_loss_mask", "box_AP", "mask_AP"} <= set(records[-1])
    assert result.folder.curves.is_file()
    model, metadata = load_detector(result.folder.last)
    assert metadata["labels"] == ["disc", "square", "triangle"]
    task = DetectionTask(recipe(data, output, weights=str(result.folder.last)))
    again = evaluate_detector(model, task.evaluation_batches(ALONE, False), task.held_out)
    assert again.figures() == result.report.figures()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), task.model.state_dict().values(), strict=True)
    )


def test_a_run_stopped_in_an_epoch_goes_on_as_if_it_had_not(data, tmp_path, monkeypatch):
    train(recipe(data, tmp_path / "whole"), quiet(), make_task=DetectionTask)
    step, count = DetectionTask.step, []

    def interrupted(self, model, batch):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, model, batch)

    monkeypatch.setattr(DetectionTask, "step", interrupted)
    with pytest.raises(TrainingInterruptedError) as stopped:
        train(recipe(data, tmp_path / "parts"), quiet(), make_task=DetectionTask)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    monkeypatch.undo()
    train(recipe(data, tmp_path / "parts", resume=str(tmp_path / "parts")), quiet(), make_task=DetectionTask)
    one, other = (load_detector(tmp_path / name / "last.safetensors")[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_update_that_is_not_finite_is_skipped_and_can_be_computed_again(data, tmp_path, monkeypatch):
    step, count = DetectionTask.step, []

    def broken(self, model, batch):
        found = step(self, model, batch)
        count.append(1)
        return found._replace(loss=found.loss * float("nan")) if len(count) == 2 else found

    monkeypatch.setattr(DetectionTask, "step", broken)
    result = train(recipe(data, tmp_path / "run", epochs=1), quiet(), make_task=DetectionTask)
    monkeypatch.undo()
    (dump,) = result.folder.skipped.glob("*.safetensors")
    found = replay(dump, lambda words: parse("train", DetectionRecipe, words), DetectionTask)
    assert np.isfinite(found.losses).all()
    assert len(found.record["images"]) == 4


def test_damaged_images_are_named_and_the_rest_is_learnt(tmp_path):
    make_coco(tmp_path, 8)
    make_coco(tmp_path, 2, seed=1, name="val")
    (tmp_path / "images" / "train-0.png").write_bytes(b"rubbish")
    result = train(recipe(tmp_path, tmp_path / "run", epochs=1), quiet(), make_task=DetectionTask)
    assert len(result.damaged) == 1
    assert "train-0.png" in result.folder.damaged.read_text()


def test_a_file_most_of_whose_records_are_wrong_is_refused_before_anything_is_written(tmp_path):
    content = make_coco(tmp_path, 4)
    for annotation in content["annotations"][:4]:
        annotation["bbox"] = [0, 0, 0, 0]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"4 of the 8 annotations of .* are unusable, more than the 25%"):
        train(recipe(tmp_path, tmp_path / "run", held_out=0.5), quiet(), make_task=DetectionTask)
    assert not (tmp_path / "run").exists()


def _evaluate_share(data, output):
    from vmamba.training.processes import evaluation_group

    group = evaluation_group("cpu")
    torch.manual_seed(0)
    task = DetectionTask(recipe(data, output, score_threshold=0.0))
    report = evaluate_detector(task.model, task.evaluation_batches(group.share, False), task.held_out)
    Path(f"{output}-{group.share.rank}.json").write_text(json.dumps(report.to_dict()))


def test_precision_is_the_same_whatever_the_number_of_processes(data, tmp_path):
    group = Group(tmp_path / "two", _evaluate_share, data, tmp_path / "two", processes=2)
    torch.manual_seed(0)
    task = DetectionTask(recipe(data, "unused", score_threshold=0.0))
    alone = evaluate_detector(task.model, task.evaluation_batches(ALONE, False), task.held_out)
    group.finish()
    assert alone.images == 4
    assert alone.box.totals["AP"] > 0
    for rank in (0, 1):
        assert json.loads((tmp_path / f"two-{rank}.json").read_text()) == json.loads(json.dumps(alone.to_dict()))


@pytest.mark.parametrize(
    ("epochs", "milestones", "falls"), [(12, (8, 11), (8, 11)), (12, (), (8, 11)), (36, (27, 33), (27, 33))]
)
def test_the_rate_warms_up_and_falls_as_published(data, epochs, milestones, falls):
    task = DetectionTask(recipe(data, "unused", epochs=epochs, milestones=milestones, batch_size=8))
    options = dataclasses.replace(task.recipe, batch_size=16, optimizer=detection_optimizer())
    optimizer = torch.optim.AdamW(task.parameter_groups(options), lr=options.optimizer.lr)
    steps = 7329
    schedule = task.schedule(optimizer, options, steps)

    def rate(update):
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(1e-7)
    assert rate(500) == pytest.approx(5.005e-5)
    assert rate(1000) == rate(falls[0] * steps - 1) == pytest.approx(1e-4)
    assert rate(falls[0] * steps) == rate(falls[1] * steps - 1) == pytest.approx(1e-5)
    assert rate(falls[1] * steps) == pytest.approx(1e-6)


def test_decay_spares_norms_as_published_or_what_should_be_spared(data):
    task = DetectionTask(recipe(data, "unused"))
    names = {id(weight): name for name, weight in task.model.named_parameters()}

    def decayed(form):
        options = dataclasses.replace(
            task.recipe, optimizer=dataclasses.replace(detection_optimizer(), decay_form=form)
        )
        groups = task.parameter_groups(options)
        assert sum(len(group["params"]) for group in groups) == len(names)
        return {names[id(weight)] for group in groups if group["weight_decay"] for weight in group["params"]}

    block = "backbone.body.layers.0.blocks.0"
    published, clean = decayed("published"), decayed("clean")
    assert {f"{block}.op.A_logs", f"{block}.op.Ds", "roi_heads.box_head.fc6.bias"} <= published - clean
    assert f"{block}.norm.weight" not in published | clean
    assert "backbone.body.outnorm0.weight" not in published | clean
    assert "roi_heads.box_head.fc6.weight" in published & clean


def test_a_classifier_of_ours_starts_a_detector(data, tmp_path):
    classifier = create_model("vmamba_test", num_classes=7)
    assert isinstance(classifier, VMamba)
    save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    task = DetectionTask(recipe(data, "unused", weights=str(tmp_path / "classifier.safetensors")))
    name = "layers.2.blocks.0.op.in_proj.weight"
    assert torch.equal(task.model.backbone.body.state_dict()[name], classifier.state_dict()[name])


@pytest.fixture
def compiles_fast(monkeypatch):
    """Trace and differentiate as torch.compile does, without the minutes in which C++ is written and compiled."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_one_compiled_backbone_does_for_all_sizes(data, compiles_fast):
    task = DetectionTask(recipe(data, "unused", compile=True, model_options={"drop_path_rate": 0.0}))
    body = task.model.backbone.body.train()
    plain = copy.deepcopy(body)
    assert body._compiled_call_impl
    assert not plain._compiled_call_impl
    for images in ((4, 3, 64, 96), (4, 3, 96, 64), (2, 3, 128, 160), (3, 3, 64, 224)):
        x = torch.randn(images)
        for model in (body, plain):
            model.zero_grad()
            sum(y.square().mean() for y in model(x)).backward()
        for (name, weight), other in zip(body.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, other.grad, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_detector_trains(data, tmp_path, compiles_fast):
    options = {"epochs": 1, "min_sizes": (64, 80, 96), "model_options": {"drop_path_rate": 0.0}}
    runs = [
        train(recipe(data, tmp_path / str(compiled), compile=compiled, **options), quiet(), make_task=DetectionTask)
        for compiled in (True, False)
    ]
    assert counters["stats"]["unique_graphs"] >= 1
    records = [[json.loads(line) for line in run.folder.metrics.read_text().splitlines()] for run in runs]
    losses = [[record["train_loss"] for record in found if "train_loss" in record] for found in records]
    assert losses[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"min_sizes": ()}, "min_sizes needs one length"),
        ({"min_sizes": (900,), "max_size": 800}, "must not exceed max_size"),
        ({"milestones": (11, 8)}, "rising numbers of epochs"),
        ({"crop": 2.0}, "crop must lie in"),
        ({"compile": True, "compile_mode": "reduce-overhead"}, "CUDA graphs anew for every size"),
        ({"compile": True, "parallel": "fsdp"}, "which --parallel fsdp divides"),
        ({"task": "classification"}, "recipe of --task detection"),
        ({"decay_rate": 0.0}, "decay_rate must lie in"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        DetectionRecipe(**changes)


def test_every_published_row_has_a_recipe_with_its_schedule():
    paths = sorted((ROOT / "recipes").glob("coco_*.yaml"))
    assert len(paths) == 13
    rates = {"tiny": 0.2, "small": 0.3, "base": 0.6}
    for path in paths:
        found = parse("train", DetectionRecipe, ["--config", str(path)])
        three = "_3x" in path.stem
        assert (found.epochs, found.milestones) == ((36, (27, 33)) if three else (12, (8, 11)))
        assert (found.min_sizes, found.crop) == ((tuple(range(480, 801, 32)), 0.5) if three else ((800,), 0.0))
        expected = 0.2 if found.model.startswith("vanilla") else rates[found.model.split("_")[1]]
        assert found.model_options == {"drop_path_rate": expected}
        assert found.batch_size == (8 if "bs8" in path.stem else 16)
        assert found.optimizer.rate_scale(found.batch_size) * found.optimizer.lr == 1e-4
        assert DetectionRecipe(**{**dataclasses.asdict(found), **_nested(found)}) == found
        assert yaml.safe_load(yaml.safe_dump(found.to_dict()))["min_sizes"] == list(found.min_sizes)


def _nested(found):
    return {name: getattr(found, name) for name in ("optimizer", "checkpoints", "guards")}
