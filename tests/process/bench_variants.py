"""Variants for the tests of the benchmark machinery; imports little, for they run in processes of their own."""

from __future__ import annotations

import time

from tools.bench.common import Measurement, measure


def spin(seconds: float) -> int:
    """Use the CPU; returns 7, as if that many tokens."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 7


def spin_in_own_process(seconds: float) -> Measurement:
    return measure(lambda: spin(seconds))


def fail_in_own_process() -> Measurement:
    raise ValueError("no such thing")
