"""The tables of docs/scaling.md are those of the script, and the script computes what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("scaling_table", ROOT / "benchmarks" / "scaling_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_table"] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_a_row_by_hand(script):
    step = script.Step("model", "GPU", batch=100, parameters=10_000_000, seconds=0.1)
    given = script.Assumptions(nvlink=1e9, network=1e8, images_per_core=50, bytes_per_image=1e5)
    alone, node, nodes = (script.row(step, gpus, given) for gpus in (1, 8, 64))
    assert (alone.traffic, alone.rate, alone.cores) == (0, 1000, 20)
    assert node.traffic == pytest.approx(2 * 40e6 * 7 / 8)
    assert node.exchange == pytest.approx(0.07)
    assert node.rate == pytest.approx(800 / 0.17)
    assert nodes.exchange == pytest.approx(2 * 40e6 * 63 / 64 / 1e8)
    assert nodes.read == pytest.approx(nodes.rate * 1e5)


def test_the_document_has_the_tables_of_the_script(script):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (step,) = script.read_steps(ROOT / "benchmarks" / "results" / "training_step.csv")
    given = script.Assumptions(images_per_core=159, bytes_per_image=110000)
    assert script.tables(step, given) in text, "write them anew with the command at the head of docs/scaling.md"


def test_a_file_of_something_else_is_refused(script, tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("model,mode\na,training\n")
    with pytest.raises(ValueError, match="lacks a readable column"):
        script.read_steps(path)
    path.write_text("model,mode\na,inference\n")
    with pytest.raises(ValueError, match="no row whose mode is training"):
        script.read_steps(path)
