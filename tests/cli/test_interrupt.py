import contextlib
import signal
import subprocess
import sys
import time


def test_ctrl_c_saves_and_the_printed_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside this one
    program = [sys.executable, "-m", "vmamba", "train", "--trackers", "[]"]
    start = [*program, "--model", "vmamba_test", "--epochs", "500", "--output", "run"]
    process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.is_file() and '"kind": "epoch"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "go on with: vmamba train --resume run" in errors
    done = metrics.read_text().count('"kind": "epoch"')
    go_on = [*program, "--resume", "run", "--epochs", str(done + 1)]
    resumed = subprocess.run(go_on, cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on in epoch" in resumed.stdout
    assert metrics.read_text().count('"kind": "epoch"') == done + 1


def test_ctrl_c_in_the_middle_of_an_import_is_no_error_of_the_program(vmamba, monkeypatch):
    from vmamba.cli import models

    def half_imported(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as some packages do around their own imports
            raise RecursionError("maximum recursion depth exceeded") from None

    monkeypatch.setattr(models, "run", half_imported)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = vmamba("models")
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler  # put back
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.status, outcome.err) == (130, "vmamba models: interrupted\n")


def test_ctrl_c_that_was_swallowed_is_heeded_before_training(vmamba, monkeypatch):
    from vmamba.cli import tasks, train

    def swallowing(words):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return tasks.task_of(words)

    monkeypatch.setattr(train, "task_of", swallowing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = vmamba("train", "--model", "vmamba_test")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.status, outcome.out, outcome.err) == (130, "", "vmamba train: interrupted\n")
