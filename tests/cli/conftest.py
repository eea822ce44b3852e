"""One small trained run that the tests of the commands share, and a way to call a command in this process."""

from pathlib import Path
from typing import NamedTuple

import pytest

from vmamba.cli import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def vmamba(capsys, monkeypatch, tmp_path):
    """Call `vmamba` with some words, in an empty folder; returns exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of vmamba_test on digits: three epochs, so that it knows more than nothing."""
    folder = tmp_path_factory.mktemp("session") / "run"
    words = ["train", "--model", "vmamba_test", "--epochs", "3", "--output", str(folder), "--trackers", "[]"]
    assert main([*words, "--optimizer.lr", "5e-3"]) == 0
    return folder
