from __future__ import annotations

import os
import signal

import pytest

from trainer.signals import STOP_SIGNALS, stop_requests


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_that_stays(number: signal.Signals) -> None:
    with stop_requests() as request:
        assert not request.received
        os.kill(os.getpid(), number)
        assert request.received
        assert request.signal_name == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == number.name, "the first one is the reason"


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_ctrl_c_after_a_request_stops_at_once(first: signal.Signals) -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert request.received


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_requests():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_held_back_before_is_let_through() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with stop_requests() as request:
            assert request.signal_name == "SIGUSR1"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
