"""Requests to stop. Each test has a process of its own: a signal to a process with threads may reach any of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import TIMEOUT_S
from trainer.runtime.signals import STOP_SIGNALS

NAMES = [number.name for number in STOP_SIGNALS]
PRELUDE = """
import os, signal, sys
from trainer.runtime.signals import STOP_SIGNALS, stop_requests
def send(name):
    os.kill(os.getpid(), signal.Signals[name])
"""


def check(script: str, *arguments: str) -> None:
    command = [sys.executable, "-c", PRELUDE + script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_a_request_and_the_first_one_is_the_reason(name: str) -> None:
    check(
        """
with stop_requests() as request:
    assert not request.received
    send(sys.argv[1])
    assert request.received and request.signal_name == sys.argv[1]
    send("SIGTERM")
    assert request.signal_name == sys.argv[1]
""",
        name,
    )


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_after_a_request_stops_at_once(name: str) -> None:
    check(
        """
with stop_requests() as request:
    send(sys.argv[1])
    try:
        send("SIGINT")
    except KeyboardInterrupt:
        sys.exit(0)
    sys.exit("not interrupted")
""",
        name,
    )


def test_the_handlers_before_come_back() -> None:
    check(
        """
before = [signal.getsignal(number) for number in STOP_SIGNALS]
with stop_requests():
    assert not set(before) & {signal.getsignal(number) for number in STOP_SIGNALS}
assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
"""
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_held_back_before_is_let_through(name: str) -> None:
    check(
        """
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
send(sys.argv[1])
with stop_requests() as request:
    assert request.signal_name == sys.argv[1]
""",
        name,
    )
