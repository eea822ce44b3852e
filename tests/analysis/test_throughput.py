"""Measuring speed: what is timed, how it is compared, what a user sees."""

import csv
from dataclasses import replace

import pytest
import torch

from vmamba.analysis import throughput
from vmamba.analysis.throughput import Workload, compare, measure, rows, write_csv
from vmamba.cli import main

SMALL = Workload("vmamba_test", (32, 32), 2, "float32", "eager")


def test_inference_and_training_are_measured_and_compared() -> None:
    workloads = [SMALL, replace(SMALL, mode="training"), replace(SMALL, model="convnext_atto")]
    measured = compare(measure(workloads, "cpu", rounds=2, seconds_a_round=0.01), "vmamba_test")
    assert [m.workload for m in measured] == workloads
    for m in measured:
        assert m.median_ms > 0
        assert m.images_per_second == pytest.approx(2e3 / m.median_ms)
    assert measured[0].ratio == measured[1].ratio == 1.0  # each under its own conditions
    assert measured[2].ratio == pytest.approx(measured[2].images_per_second / measured[0].images_per_second)


def test_a_training_step_leaves_gradients_and_inference_none() -> None:
    for mode, expected in (("training", True), ("inference", False)):
        runner = throughput.Runner(replace(SMALL, mode=mode), torch.device("cpu"))
        runner.step()
        assert all((p.grad is not None) == expected for p in runner.model.parameters())


def test_gradient_checkpointing_is_for_training_and_gives_the_same_gradients() -> None:
    plain, recomputed = (
        throughput.Runner(replace(SMALL, mode="training", gradient_checkpointing=on), torch.device("cpu"))
        for on in (False, True)
    )
    recomputed.model.load_state_dict(plain.model.state_dict())
    recomputed.images, recomputed.targets = plain.images, plain.targets
    kept = []
    for runner in (plain, recomputed):
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=bytes_kept: kept.append(t.nbytes) or t, lambda t: t
        ):
            runner.step()
        kept.append(sum(bytes_kept))
    for one, other in zip(plain.model.parameters(), recomputed.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert kept[0] > 0
    with pytest.raises(ValueError, match="inference has no gradient checkpointing: it is for training"):
        throughput.Runner(replace(SMALL, gradient_checkpointing=True), torch.device("cpu"))
    measured = measure([replace(SMALL, mode="training", gradient_checkpointing=True)], "cpu", rounds=1)
    assert rows(measured, "cpu")[0]["gradient_checkpointing"] is True


def test_autocast_keeps_float32_weights_and_plain_bfloat16_does_not() -> None:
    for precision, dtype in (("autocast-bfloat16", torch.float32), ("bfloat16", torch.bfloat16)):
        runner = throughput.Runner(replace(SMALL, precision=precision), torch.device("cpu"))
        assert next(runner.model.parameters()).dtype == dtype
        runner.step()


def test_memory_that_runs_out_halves_the_batch(monkeypatch) -> None:
    class Greedy(throughput.Runner):
        def __init__(self, workload, device, build):
            if workload.batch_size > 3:
                raise torch.OutOfMemoryError("no room")
            super().__init__(workload, device, build)

    monkeypatch.setattr(throughput, "Runner", Greedy)
    (measured,) = measure([replace(SMALL, batch_size=12)], "cpu", rounds=1, seconds_a_round=0.01)
    assert measured.workload.batch_size == 3

    monkeypatch.setattr(Greedy, "__init__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(ValueError, match="single image"):
        measure([SMALL], "cpu")


def test_rows_carry_device_versions_and_commit(tmp_path) -> None:
    table = rows(measure([SMALL], "cpu", rounds=1, seconds_a_round=0.01), "cpu")
    write_csv(tmp_path / "speed.csv", table)
    (row,) = csv.DictReader((tmp_path / "speed.csv").read_text().splitlines())
    assert row["model"] == "vmamba_test"
    assert row["torch"] == torch.__version__
    assert row["device"]
    assert row["commit"]
    assert float(row["median_ms"]) > 0


FAST = ["--img_sizes", "[32]", "--batch_sizes", "[1]", "--rounds", "2", "--seconds_a_round", "0.01"]


def test_command_prints_a_table_and_writes_both_files(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    files = [str(tmp_path / "speed.csv"), str(tmp_path / "speed.png")]
    words = [
        "--models",
        "vmamba_test",
        "--compare",
        "convnext_atto",
        "convnext_femto",
        "--output",
        files[0],
        "--picture",
        files[1],
    ]
    assert main(["benchmark", *words, *FAST]) == 0
    out = capsys.readouterr().out
    assert "vmamba_test" in out
    assert "inference, 32×32, float32, eager" in out
    assert "over those of convnext_atto" in out
    assert (tmp_path / "speed.csv").read_text().count("\n") == 4
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--models", "vmamba_tinny"], "did you mean vmamba_tiny"),
        (["--precisions", "int8"], "autocast-bfloat16"),
        (["--modes", "[resting]"], "inference, training"),
        (["--img_sizes", "[big]"], "HEIGHTxWIDTH"),
        (["--rounds", "0"], "1 or more"),
        (["--output", "nowhere/speed.csv"], "does not exist"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_command_refuses_bad_input_in_a_sentence(words, hint, capsys) -> None:
    if hint == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["benchmark", *words]) == 2
    assert hint in capsys.readouterr().err
