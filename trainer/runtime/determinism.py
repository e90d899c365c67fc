"""`train.deterministic`: kernels that give the same bits at each start, on devices where the usual ones do not."""

from __future__ import annotations

import os

import torch
import torch._inductor.config

_WORKSPACE = ":4096:8"  # of cuBLAS for each stream: with a fixed size its sums have a fixed order


def make_deterministic(device: torch.device) -> str:
    """Settle it for this process, before anything is computed on the device; returns the line that says so.

    Flash, cuDNN and efficient attention add gradients of queries by atomics unless they are told not to, so does what
    Inductor makes of an embedding's gradient, and reductions that Inductor has timed may be tuned otherwise after a
    restart. A CPU has none of that.
    """
    if device.type != "cuda":
        return "deterministic: nothing to do on a CPU, where a resume is bit for bit in any case"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only slower
    torch._inductor.config.deterministic = True
    return "deterministic: the same bits at each start, at the price of slower attention, embeddings and compilation"
