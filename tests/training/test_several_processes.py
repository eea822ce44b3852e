"""The engine in two processes over gloo; one group of them does what belongs together: starting it takes longest."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from runs import assert_same, quiet, recipe, state_of
from several_processes import Group
from torch import distributed
from torch.nn import Conv2d, Flatten, Linear, Sequential
from torch.nn.parallel import DistributedDataParallel

from vmamba.models.checkpoint import load_model
from vmamba.training import classification, engine, run
from vmamba.training.averaging import GradientAverage
from vmamba.training.checkpointing import CheckpointFolder, read_checkpoint_folder
from vmamba.training.engine import TrainingInterruptedError, train
from vmamba.training.guards import TrainingFailedError
from vmamba.training.recipe import AugmentationOptions, CheckpointOptions, GuardOptions, OptimizerOptions
from vmamba.training.replay import replay

CHANCE = {
    "optimizer": OptimizerOptions(ema_decay=0.9),
    "augmentation": AugmentationOptions(policy="photo", mixup=0.5),
}
PLAIN = {"augmentation": AugmentationOptions(policy="none"), "model_options": {"drop_path_rate": 0.0}}


def rank():
    return int(os.environ["RANK"])


def skip_by_themselves():
    """Have optimisers leave out bad updates themselves, as on GPUs; returns a list that grows with every one made."""
    original, used = run.make_optimizer, []
    run.make_optimizer = lambda *args, **kwargs: used.append(1) or original(*args, **{**kwargs, "fused": True})
    return used


def signal_after(updates, number, who):
    """Send one of the processes a signal while it makes an update; returns what puts the engine back."""
    original, made = engine._update, []

    def counted(run, batches, measured):
        made.append(1)
        if len(made) == updates and rank() == who:
            os.kill(os.getpid(), number)
        return original(run, batches, measured)

    engine._update = counted
    return lambda: setattr(engine, "_update", original)


def resume_at_every_step(data, folder, later=False):
    straight = train(recipe(data, folder / "straight", **CHANCE), quiet())
    for updates in range(1, 7):  # two epochs of three updates
        broken = folder / f"broken-{updates}"
        put_back = signal_after(updates, signal.SIGTERM, who=updates % 2)
        with pytest.raises(TrainingInterruptedError) as caught:
            train(recipe(data, broken, **CHANCE), quiet())
        assert caught.value.exit_status == 143
        put_back()
        # What is read later is known an update later, but where the loss is read as well: after two, and at the end.
        assert state_of(broken)[0].updates == updates + (later and updates % 3 == 1)
        resumed = train(recipe(data, broken, resume=str(broken), **CHANCE), quiet())
        assert resumed.report == straight.report
        (position, parts), (other_position, other_parts) = state_of(folder / "straight"), state_of(broken)
        assert_same(parts, other_parts)
        assert (position.updates, position.best) == (other_position.updates, other_position.best)
        losses = [
            [r["loss"] for r in result.folder.read_metrics() if r["kind"] == "epoch"] for result in (straight, resumed)
        ]
        assert losses[0] == losses[1]


def resume_where_outcomes_are_read_later(data, folder):
    used = skip_by_themselves()
    resume_at_every_step(data, folder, later=True)
    assert used


@pytest.mark.slow  # thirteen runs in each of two processes
@pytest.mark.parametrize("resume", [resume_at_every_step, resume_where_outcomes_are_read_later])
def test_sigterm_to_one_of_two_processes_at_any_step_ends_both_and_goes_on_bit_equal(colours, tmp_path, resume):
    Group(tmp_path / "logs", resume, colours, tmp_path).finish()


def one_process_is_poisoned(data, folder, step):
    original, made = classification.classification_loss, []

    def spoiled(logits, targets, label_smoothing):
        made.append(1)
        loss = original(logits, targets, label_smoothing)
        return loss * float("nan") if rank() == 1 and len(made) > step else loss

    classification.classification_loss = spoiled
    options = {"guards": GuardOptions(nonfinite=2), "checkpoints": CheckpointOptions(every=1, keep=9)}
    with pytest.raises(TrainingFailedError, match=f"update {step + 2} is not finite, nor were the 1 before it"):
        train(recipe(data, folder / "run", **CHANCE, **options), quiet())
    weights = torch.cat([p.flatten() for p in LAST["model"].state_dict().values()])
    torch.save(weights, folder / f"weights-{rank()}.pt")


LAST = {}


def remembering(*arguments):
    original = engine._skip

    def noted(run, *args, **kwargs):
        LAST["model"] = run.bare_model
        return original(run, *args, **kwargs)

    engine._skip = noted
    one_process_is_poisoned(*arguments)


def fused_and_remembering(*arguments):
    used = skip_by_themselves()
    remembering(*arguments)
    assert used


@pytest.mark.parametrize("poison", [remembering, fused_and_remembering])  # a GPU's optimiser skips the update itself
def test_no_number_on_one_of_two_processes_changes_weights_on_neither(colours, tmp_path, poison):
    Group(tmp_path / "logs", poison, colours, tmp_path, 2).finish()
    checkpoints = [read_checkpoint_folder(p) for p in CheckpointFolder(tmp_path / "run" / "checkpoints").paths()]
    before, after, last = checkpoints[1:]  # after updates 2, 3 (of the first epoch's end) and the end
    assert [c.position.skipped for c in (before, after, last)] == [0, 1, 2]
    for name in ("model", "ema"):
        assert_same(before.weights(name), last.weights(name))
    assert_same(before.parts["optimizer"]["state"], last.parts["optimizer"]["state"])
    weights = torch.cat([value.flatten() for value in before.weights("model").values()])
    mine, other = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert torch.equal(mine, other)
    assert torch.equal(mine.sort().values, weights.sort().values)
    dumps = sorted((tmp_path / "run" / "skipped").iterdir())
    assert [path.name.rpartition("-")[2] for path in dumps] == ["1.safetensors"] * 2  # the culprit's alone
    found = replay(dumps[0])
    assert (found.record["rank"], found.record["losses"]) == (1, ["nan"])
    assert len(found.record["images"]) == 4
    assert np.isfinite(found.losses).all()  # the weights and images are sound: it was the loss that was spoiled


def as_one_process(data, folder):
    result = train(recipe(data, folder / "two", **PLAIN), quiet())
    assert result.report.count == 9  # five images here and four there


def test_two_processes_compute_what_one_does(colours, tmp_path):
    Group(tmp_path / "logs", as_one_process, colours, tmp_path).finish()
    alone = train(recipe(colours, tmp_path / "one", **PLAIN), quiet())
    one, two = (load_model(tmp_path / name / "last.safetensors")[0].state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    epochs = [r for r in engine.RunFolder(tmp_path / "two").read_metrics() if r["kind"] == "epoch"]
    assert epochs[-1]["loss"] == pytest.approx(alone.report.loss, abs=1e-4)
    # A run goes on with another number of processes: batches are those of all together.
    longer = train(recipe(colours, tmp_path / "two", **PLAIN, epochs=3, resume=str(tmp_path / "two")), quiet())
    assert [r["epoch"] for r in longer.folder.read_metrics() if r["kind"] == "epoch"] == [1, 2, 3]


def endless(data, folder):
    train(recipe(data, folder / "run", epochs=10000, guards=GuardOptions(stall=60)), quiet())


def started(group, folder):
    checkpoints = CheckpointFolder(folder / "run" / "checkpoints")
    deadline = time.monotonic() + 200
    while not checkpoints.paths():
        assert time.monotonic() < deadline, group.logs()
        assert all(process.is_alive() for process in group.processes), group.logs()
        time.sleep(0.2)


def test_a_signal_from_outside_and_a_process_killed(colours, tmp_path):
    group = Group(tmp_path / "logs", endless, colours, tmp_path)
    started(group, tmp_path)
    os.kill(group.processes[0].pid, signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert "go on with: vmamba train --resume" in group.logs()
    assert state_of(tmp_path / "run")[0].updates > 0

    other = tmp_path / "killed"
    group = Group(other / "logs", endless, colours, other)
    started(group, other)
    os.kill(group.processes[1].pid, signal.SIGKILL)
    assert group.wait() == [1, -signal.SIGKILL]
    assert "lost another process of the run" in group.logs()
    assert state_of(other / "run")[0].epoch > 0


def everyone_hears_of_it(data, folder):
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    for options, message in (
        ({"output": str(folder / "taken")}, "is not empty"),  # which the main process alone finds out
        ({"data": "digts"}, "did you mean digits"),
        ({"batch_size": 7}, "--batch_size 7 cannot be divided among 2 processes"),
    ):
        changes = {"data": data, "output": folder / "run", **options}
        with pytest.raises(ValueError, match=message):
            train(recipe(changes.pop("data"), changes.pop("output"), **changes), quiet())
    assert not (folder / "run").exists()


def test_what_one_process_refuses_all_refuse(colours, tmp_path):
    Group(tmp_path / "logs", everyone_hears_of_it, colours, tmp_path).finish()


def evaluate_by_command(run, folder, output):
    from vmamba.cli import main

    os.chdir(folder)
    assert main(["eval", "--checkpoint", str(run), "--output", str(output), "--split", "all"]) == 0


def test_evaluation_by_command_is_that_of_one_process(colours, tmp_path):
    train(recipe(colours, tmp_path / "run", epochs=1), quiet())
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        folder = tmp_path / f"logs-{processes}"
        Group(folder, evaluate_by_command, tmp_path / "run", tmp_path, output, processes=processes).finish()
        assert (folder / "process-0.log").read_text().count("top-1") == 1
        found.append(json.loads(output.read_text()))
    alone, together = found
    assert alone["count"] == together["count"] == 36
    for figure in ("top1", "top5", "confusion", "per_class"):
        assert alone[figure] == together[figure]
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert "top-1" not in (tmp_path / "logs-2" / "process-1.log").read_text()


def assert_same_everywhere(tensor):
    both = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(both, tensor.detach())
    assert torch.equal(*both)


def average_beside_distributed_data_parallel():
    distributed.init_process_group("gloo")
    torch.manual_seed(rank())  # other weights in each process, until they are joined
    one, other = (Sequential(Conv2d(3, 4, 3), Conv2d(4, 4, 3), Flatten(), Linear(144, 5)) for _ in range(2))
    one[1].weight.requires_grad_(False)
    average, wrapped = GradientAverage(one), DistributedDataParallel(other)
    other.load_state_dict(one.state_dict())
    assert_same_everywhere(one[3].bias)
    for step in range(2):
        images = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(7 * step + rank()))
        for model in (one, wrapped):
            model.zero_grad()
            model(images.to(memory_format=torch.channels_last)).square().mean().backward()
        other[1].weight.grad = None
        if rank() == 1 and step:  # a process whose part of the loss does not reach a weight
            one[3].bias.grad = None
        average()
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            if name != "3.bias" or not step:
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    assert_same_everywhere(one[3].bias.grad)
    distributed.destroy_process_group()


def test_gradients_averaged_in_one_piece_are_those_of_distributed_data_parallel(tmp_path):
    Group(tmp_path / "logs", average_beside_distributed_data_parallel).finish()


def train_with_graphs_and_without(data, folder):
    torch.compile = lambda model, **options: model  # a processor has no CUDA graphs
    options = {"epochs": 2, **CHANCE}
    plain = train(recipe(data, folder / "plain", **options), quiet())
    graphs = train(recipe(data, folder / "graphs", compile=True, compile_mode="reduce-overhead", **options), quiet())
    assert graphs.report == plain.report
    for one, other in zip(state_of(folder / "plain")[1:], state_of(folder / "graphs")[1:], strict=True):
        assert_same(one, other)


def test_with_cuda_graphs_two_processes_train_as_without(colours, tmp_path):
    Group(tmp_path / "logs", train_with_graphs_and_without, colours, tmp_path).finish()
