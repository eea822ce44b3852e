import subprocess
import sys
import time

import pytest

from vmamba import __version__
from vmamba.cli import COMMANDS


def test_overview_names_every_command(vmamba):
    for words in ((), ("--help",), ("-h",)):
        outcome = vmamba(*words)
        assert outcome.status == 0
        assert all(command in outcome.out for command in COMMANDS)


def test_version(vmamba):
    assert vmamba("--version").out.strip() == f"vmamba {__version__}"


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean train?"), ("evaluate", "did you mean eval?"), ("xyzzy", "there are")]
)
def test_an_unknown_command_gets_the_nearest(vmamba, word, hint):
    outcome = vmamba(word)
    assert outcome.status == 2
    assert hint in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(vmamba, command):
    outcome = vmamba(command, "--help")
    assert outcome.status == 0
    assert f"usage: vmamba {command}" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys\nfrom vmamba.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy', 'PIL', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_help_is_quick():
    def seconds():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vmamba", "--help"], check=True, capture_output=True)
        return time.perf_counter() - began

    # The fastest of three: other work on the machine slows single runs.
    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize(
    "error",
    [ValueError("a plain mistake"), TypeError("a plain mistake"), FileNotFoundError("a plain mistake")],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_of_users_are_a_sentence_unless_a_traceback_is_asked_for(vmamba, monkeypatch, error):
    from vmamba.cli import models

    def fail(argv):
        raise error

    monkeypatch.setattr(models, "run", fail)
    outcome = vmamba("models")
    assert (outcome.status, outcome.err) == (2, "vmamba models: a plain mistake\n")
    monkeypatch.setenv("VMAMBA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        vmamba("models")


def test_a_missing_extra_is_named_and_a_bug_is_not_hidden(vmamba, monkeypatch):
    from vmamba.cli import models

    def fail_with(error):
        def run(argv):
            raise error

        monkeypatch.setattr(models, "run", run)

    fail_with(ModuleNotFoundError("No module named 'accelerate'", name="accelerate"))
    outcome = vmamba("models")
    assert outcome.status == 2
    assert "pip install 'vmamba[train]'" in outcome.err
    fail_with(ModuleNotFoundError("No module named 'faster_coco_eval'", name="faster_coco_eval.core"))
    assert "pip install 'vmamba[detection]'" in vmamba("models").err
    fail_with(ModuleNotFoundError("No module named 'vmamba.oops'", name="vmamba.oops"))
    with pytest.raises(ModuleNotFoundError):
        vmamba("models")
    fail_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        vmamba("models")
    fail_with(KeyboardInterrupt())
    assert vmamba("models").status == 130


def test_a_full_disk_and_a_closed_door_name_the_file(vmamba, monkeypatch):
    from vmamba.cli import models

    def run(argv):
        raise PermissionError(13, "Permission denied", "/somewhere/report.json")

    monkeypatch.setattr(models, "run", run)
    assert vmamba("models").err == "vmamba models: /somewhere/report.json: Permission denied\n"


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m vmamba train --help | true"
    outcome = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert outcome.stderr == ""
