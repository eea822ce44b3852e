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
