"""What the README says stays true."""

import re
import shlex
from pathlib import Path

import pytest

from vmamba.cli import COMMANDS
from vmamba.cli.models import as_markdown, model_rows
from vmamba.ops.capabilities import BACKEND_MODULES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_model_table_is_that_of_the_command():
    _, _, after = README.partition("<!-- models:")
    table = after.partition("-->\n")[2].partition("<!-- end of models -->")[0].strip()
    assert table == as_markdown(model_rows()), "write it anew: vmamba models --format markdown"


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda text: str(text.count("\n")))
def test_the_python_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "pretrained" in snippet:
        # The published weights need a network; freshly made ones of the same model stand in.
        import vmamba

        vmamba.save_checkpoint(vmamba.create_model("vmamba_tiny"), tmp_path / "vmamba_tiny.safetensors")
        monkeypatch.setenv("VMAMBA_WEIGHTS_DIR", str(tmp_path))
    names = {}
    exec(snippet, names)
    if "logits" in names:
        assert names["logits"].shape == (1, 10)
        assert [tuple(m.shape[1:]) for m in names["maps"]] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    if "fine" in names:
        assert names["fine"].get_classifier().out_features == 10


COMMAND_LINES = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("vmamba ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_commands_are_understood(vmamba, line):
    outcome = vmamba(*shlex.split(line)[1:], "--print_config")
    assert outcome.status == 0, outcome.err


def test_the_commands_are_complete():
    shown = {line.split()[1] for line in COMMAND_LINES}
    assert shown | {"quickstart"} == set(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_the_backend_table_is_complete():
    rows = set(re.findall(r"^\| `(\w+)` \|", README.partition("## Backends")[2].partition("## ")[0], re.MULTILINE))
    assert rows == {backend for backends in BACKEND_MODULES.values() for backend in backends} | {"reference"}
