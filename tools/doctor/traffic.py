"""How nodes talk: an all-reduce whose sum is known, and the speed of the way from each to the next."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_NUMBERS = 4 << 20  # float32: 16 MiB
_ROUNDS = 3


@dataclass(frozen=True)
class Traffic:
    """What one node saw.

    Attributes:
        error: why it could not talk; empty when it could.
        is_right: whether the sum was.
        from_previous_mbit: speed of the way from the node before it in the ring, while all others talk too; None alone.
        all_reduce_mbit: bytes of the tensor over the time of the all-reduce; None alone.
    """

    backend: str
    error: str = ""
    is_right: bool = True
    from_previous_mbit: float | None = None
    all_reduce_mbit: float | None = None


def measure_traffic(store: Any, rank: int, count: int, backend: str, timeout_s: float) -> Traffic:
    """Talk to the other nodes; every one of the `count` calls it."""
    if count == 1:
        return Traffic(backend)
    try:
        return _measure(store, rank, count, backend, timeout_s)
    except RuntimeError as error:  # of torch: refused, timed out, …
        return Traffic(backend, error=str(error).partition("\n")[0], is_right=False)


def _measure(store: Any, rank: int, count: int, backend: str, timeout_s: float) -> Traffic:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    own = dist.PrefixStore("traffic", store)  # type: ignore[attr-defined]  # documented, and not in __all__
    dist.init_process_group(backend, rank=rank, world_size=count, timeout=timedelta(seconds=timeout_s), store=own)
    bits, expected = 32 * _NUMBERS, _NUMBERS * count * (count + 1) / 2
    is_right, reduce_s, ring_s = True, float("inf"), float("inf")
    incoming = torch.empty(_NUMBERS, device=device)
    for _ in range(_ROUNDS):
        values = torch.full((_NUMBERS,), float(rank + 1), device=device)
        reduce_s = min(reduce_s, _seconds(device, lambda values=values: dist.all_reduce(values)))
        is_right = is_right and values.double().sum().item() == expected
        ring_s = min(ring_s, _seconds(device, lambda: _pass_on(incoming, rank, count)))
        is_right = is_right and bool((incoming == float((rank - 1) % count + 1)).all())
    return Traffic(backend, "", is_right, bits / ring_s / 1e6, bits / reduce_s / 1e6)


def _pass_on(incoming: Any, rank: int, count: int) -> None:
    """Send to the next rank and receive from the one before it; all ranks do so at once."""
    import torch
    import torch.distributed as dist

    outgoing = torch.full_like(incoming, float(rank + 1))
    send = dist.P2POp(dist.isend, outgoing, (rank + 1) % count)
    receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % count)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()


def _seconds(device: Any, work: Any) -> float:
    """Measure the time of some work that all do, from when all are ready."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
