"""How long this rank works by itself, for the comparison with the others. It never waits for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RankTimer:
    """Seconds in `stragglers.OWN_PHASES` since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._data = self._forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def read_data(self, seconds: float) -> None:
        """Count time spent waiting for the loader."""
        self._data += seconds

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count a forward pass: on CUDA by events, which the device reaches when it has done the work."""
        if not self._is_cuda:
            start = time.perf_counter()
            yield
            self._forward += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take(self) -> list[float]:
        """Return the seconds, and begin anew; to be called when the host has waited for the device anyway."""
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self._events if end.query())
        taken = [self._data, self._forward + milliseconds / 1000]
        self._data = self._forward = 0.0
        self._events.clear()
        return taken
