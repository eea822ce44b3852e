import os
import signal
import subprocess
import sys
import time

import pytest

from vmamba.training.guards import STALLED_STATUS, InterruptGuard, StallWatch, requeue_slurm_job, smaller_batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with InterruptGuard() as guard:
        os.kill(os.getpid(), number)
        assert guard.noted == number
        assert not guard.stop  # not before the others know
        guard.agree(guard.flags())
        assert guard.stop
        assert guard.exit_status == 128 + number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_the_second_interrupt_is_immediate():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background start with it ignored
    try:
        with InterruptGuard() as guard:
            os.kill(os.getpid(), signal.SIGINT)
            assert guard.noted == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_came_to_another_process_is_taken_over():
    guard = InterruptGuard()
    guard.agree([0.0, 0.0, 0.0])
    assert not guard.stop
    guard.agree([1.0, 0.0, 1.0])
    assert guard.exit_status == 128 + signal.SIGTERM


def test_the_largest_part_of_a_batch_that_fits_is_found():
    tried = []

    def fits(number):
        tried.append(number)
        return number <= 5

    assert smaller_batch(32, fits) == 4
    assert tried == [16, 8, 4]
    assert smaller_batch(1, fits) == 0
    assert smaller_batch(8, lambda number: False) == 0


def test_a_process_that_makes_no_progress_ends_itself_and_says_where(tmp_path):
    # In a process of its own: this one would be gone.
    program = (
        "import time\nfrom vmamba.training.guards import StallWatch\n"
        "with StallWatch(0.4, rank=3) as watch:\n    watch.beat('computing update 7')\n    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == STALLED_STATUS
    assert "process 3 has been computing update 7 for" in ended.stderr
    assert "time.sleep(60)" in ended.stderr or 'File "<string>", line 5' in ended.stderr


def test_a_process_that_goes_on_is_left_alone():
    with StallWatch(0.4, rank=0) as watch:
        for _ in range(10):
            time.sleep(0.1)
            watch.beat("working")


@pytest.mark.parametrize(("status", "said"), [(0, "SLURM queues job 17 again"), (1, "SLURM did not queue job 17")])
def test_a_job_is_queued_again(tmp_path, monkeypatch, status, said):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho no such job >&2\nexit {status}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue_slurm_job().startswith(said)
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_outside_slurm_nothing_is_queued(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "no SLURM job" in requeue_slurm_job()
