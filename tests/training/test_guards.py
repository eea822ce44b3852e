import os
import signal

import pytest

from vmamba.training.guards import InterruptGuard, TrainingFailedError, require_finite_loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with InterruptGuard() as guard:
        assert not guard.stop
        os.kill(os.getpid(), number)
        assert guard.stop
        assert guard.exit_status == 128 + number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_the_second_interrupt_is_immediate():
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(loss):
    require_finite_loss(1.0, 1, 1)
    with pytest.raises(TrainingFailedError, match=r"the loss became (nan|inf) by step 20 of epoch 3; a smaller"):
        require_finite_loss(loss, 3, 20)
