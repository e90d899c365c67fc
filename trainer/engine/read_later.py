"""Reads a number from the device without waiting for what the device is given afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """Start to copy a scalar to the host; the result waits for that, not for what the device is given afterwards."""
    if value.device.type != "cuda":
        return lambda: float(value)
    copy, done = value.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> float:
        done.synchronize()
        return float(copy)

    return read
