"""The steps of the ladder compute what the model does, whatever way they go about it."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import vmamba
from vmamba.analysis import ladder
from vmamba.analysis.ladder import (
    LADDER,
    Implementation,
    LadderRow,
    StepSS2D,
    build_step,
    count_ladder,
    ladder_table,
    measure_ladder,
    reversals,
)
from vmamba.analysis.throughput import Measurement, Workload
from vmamba.models.published import PUBLISHED
from vmamba.models.vmamba import VSSBlock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EVERY = list(dict.fromkeys(step.implementation for step in LADDER if step.implementation))


def carried_out(model: vmamba.VMamba, implementation: Implementation) -> vmamba.VMamba:
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, VSSBlock):
            block.op = StepSS2D(block.op, implementation)
    return model


def assert_same(model: vmamba.VMamba, implementation: Implementation, images: torch.Tensor, relative_error) -> None:
    results = []
    for variant in (model, carried_out(model, implementation)):
        logits = variant(images)
        logits.square().sum().backward()
        gradients = {name.replace("op.op.", "op."): p.grad for name, p in variant.named_parameters()}
        results.append((logits, gradients))
    (logits, gradients), (theirs, their_gradients) = results
    assert relative_error(theirs, logits) < 1e-5
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(their_gradients[name], gradient) < 1e-4, name


@pytest.mark.skipif(INTERPRETED, reason="its Triton side runs in the process that the test below starts")
@pytest.mark.parametrize("changes", [{}, {"gated": True, "d_state": 3, "d_conv": 0}, {"routes": "bidi"}], ids=str)
@pytest.mark.parametrize("implementation", [replace(each, triton_routes=False) for each in EVERY], ids=str)
def test_steps_compute_what_the_model_does(implementation, changes, relative_error) -> None:
    assert_same(
        vmamba.create_model("vmamba_test", **changes), implementation, torch.randn(2, 3, 40, 64), relative_error
    )


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("implementation", [EVERY[1], EVERY[3]], ids=str)
def test_triton_steps_compute_what_the_model_does(implementation, relative_error) -> None:
    model = vmamba.create_model("vmamba_test", depths=(1, 1), dims=(4, 8), stem="patch", backend="chunked")
    assert_same(model, implementation, torch.randn(1, 3, 12, 20), relative_error)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_steps_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "triton_steps", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, "-p", "no:xdist"], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "2 passed" in run.stdout


def test_every_step_is_the_published_configuration() -> None:
    rows = count_ladder()
    assert [row.step.label for row in rows] == [step.label for step in LADDER]
    for row in rows:
        published = PUBLISHED[row.step.model]
        assert row.params == published.params
        assert row.gflops == pytest.approx(published.gflops, rel=1e-4)
        assert (row.step.throughput is None) == row.step.label.startswith("ours")
    assert [row.step.throughput for row in rows][:12] == [
        426, 467, 464, 638, 813, 1336, 1137, 1179, 1164, 1942, 1340, 1686,
    ]  # fmt: skip
    assert [row.step.train_throughput for row in rows][:12] == [
        138, 165, 184, 195, 248, 405, 348, 360, 358, 647, 464, 571,
    ]  # fmt: skip


def test_a_step_is_built_from_its_own_parts() -> None:
    for step in LADDER[0], LADDER[-1]:
        model = build_step(step, depths=(1, 1), dims=(8, 16))
        blocks = [block for block in model.modules() if isinstance(block, VSSBlock)]
        assert all(isinstance(block.op, StepSS2D) == (step.implementation is not None) for block in blocks)
    with pytest.raises(ValueError, match="cascade2d"):
        StepSS2D(vmamba.create_model("vmamba_test", routes="cascade2d").layers[0].blocks[0].op, EVERY[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here every step runs")
def test_what_cannot_run_here_says_why_and_the_rest_is_timed(monkeypatch) -> None:
    chosen = [step for step in LADDER if step.label in ("Vanilla", "(a)", "ours", "ours, compiled")]
    monkeypatch.setattr(ladder, "LADDER", tuple(chosen))
    small = {"depths": (1, 1), "dims": (8, 16)}
    monkeypatch.setattr(ladder, "build_step", lambda step: build_step(step, **small))
    rows = measure_ladder("cpu", img_size=(32, 32), batch_size=1, precision="float32", rounds=1, seconds_a_round=0.01)
    assert [row.reason is None for row in rows] == [True, False, True, False]
    assert "CUDA" in (rows[1].reason or "")
    assert all((row.measured["training"] is not None) == (row.reason is None) for row in rows)
    assert rows[0].inference
    assert rows[0].inference.workload.memory_format == "contiguous"
    table = ladder_table(rows, "cpu")
    assert table[0]["measured_inference"] > 0
    assert table[0]["published_inference"] == 426
    assert table[1]["measured_inference"] is None
    assert {"device", "torch", "commit"} <= table[0].keys()


def test_reversals_are_the_neighbours_that_go_the_other_way() -> None:
    def timed(label: str, speed: float | None) -> LadderRow:
        (step,) = (step for step in LADDER if step.label == label)
        m = None if speed is None else Measurement(Workload(label), 1, 1.0, 0.0, speed, None, 0.0)
        return LadderRow(step, 1, 1.0, m)

    rows = [timed("Vanilla", 10), timed("(a)", 12), timed("(b)", 13), timed("(c)", None), timed("(d)", 20)]
    assert reversals(rows, "inference") == [("(a)", "(b)")]  # published: 467, then 464
    assert reversals(rows, "training") == []
