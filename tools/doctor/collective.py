"""A real all-reduce between processes, over gloo or NCCL; as a program, one of its processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from datetime import timedelta

from tools.doctor.lines import Line
from trainer.runtime.rendezvous import LOCALHOST, free_port

TIMEOUT_S = 120
_NUMBERS = 4 << 20  # float32: 16 MiB
_ROUNDS = 3


def check_all_reduce(backend: str, processes: int) -> list[Line]:
    """Start processes on this machine that add up tensors, and compare the sum."""
    name = f"all-reduce, {backend}"
    port = free_port()
    commands = [
        [sys.executable, "-m", "tools.doctor.collective", backend, str(rank), str(processes), str(port)]
        for rank in range(processes)
    ]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    deadline, outputs, late = time.monotonic() + TIMEOUT_S, [], False
    for process in started:
        try:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            late = True
            break
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    remedy = "NCCL_DEBUG=INFO shows more; see GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, firewalls and peer access."
    if late:
        return [Line("fail", name, f"{processes} processes have not answered each other in {TIMEOUT_S} s", remedy)]
    failed = [
        errors.strip().splitlines() for process, (_, errors) in zip(started, outputs, strict=True) if process.returncode
    ]
    if failed:
        return [Line("fail", name, (failed[0] or ["it ended without a word"])[-1], remedy)]
    seconds = float(outputs[0][0])
    return [Line("ok", name, f"{processes} processes agree; {_NUMBERS * 4 / 2**20:.0f} MiB in {1000 * seconds:.0f} ms")]


def _main(backend: str, rank: int, processes: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = dist.TCPStore(LOCALHOST, port, processes, rank == 0, timedelta(seconds=TIMEOUT_S))  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=rank, world_size=processes, timeout=timedelta(seconds=TIMEOUT_S), store=store)
    best = float("inf")
    for _ in range(_ROUNDS):
        values = torch.full((_NUMBERS,), float(rank + 1), device=device)
        start = time.perf_counter()
        dist.all_reduce(values)
        total = values.double().sum().item()
        best = min(best, time.perf_counter() - start)
        expected = _NUMBERS * processes * (processes + 1) / 2
        if total != expected:
            raise SystemExit(f"a sum of {total:g} where {expected:g} is right")
    if rank == 0:
        print(best)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
