"""Where the ranks of a run meet: the store that rank 0 serves at MASTER_ADDR and MASTER_PORT.

No torch until they do: the launcher imports this module.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from trainer.errors import HangError, UserError
from trainer.runtime.files import unique_token
from trainer.runtime.process import node_name

LISTENER_VARIABLE = "MASKWRIGHT_LISTENER"
"""Set by our own launcher: in rank 0 the descriptor of a socket that listens on MASTER_PORT already; else empty.

A port that is chosen and closed again can be taken while the ranks are still importing torch, for some seconds.
"""
LOCALHOST = "127.0.0.1"
_LINGER_S = 15.0  # ranks that still import come later
_BACKLOG = 4096  # connections that wait until rank 0 is ready; the kernel lowers it to its own limit


def listen() -> socket.socket:
    """Open a socket that listens on a free port of this machine."""
    listener = socket.socket()
    listener.bind((LOCALHOST, 0))
    listener.listen(_BACKLOG)
    return listener


def free_port() -> int:
    """Find a port that is free now; for what can do without handing a socket over."""
    with listen() as listener:
        return listener.getsockname()[1]


def listen_for_nodes(port: int) -> socket.socket:
    """Open a socket that listens on this port of all the machine's addresses.

    Raises:
        UserError: when another process has the port.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"Port {port} of this machine, where the ranks are to meet, cannot be used: {error.strerror}.",
            where=f"--master-port {port}",
            remedy="Give another --master-port, the same one on all nodes.",
        ) from None


def close_listening_sockets() -> None:
    """Close listening sockets in a process forked from a rank, or the port stays taken after the rank's death."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError):  # the listing's own is closed
            if _listens(int(name)):
                os.close(int(name))


def _listens(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    view = socket.socket(fileno=descriptor)
    try:
        return bool(view.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        view.detach()


def join_group(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """Start the process group.

    Raises:
        UserError: on rank 0, when another process has the port; on all, when they do not fit together.
        HangError: when not all have come in time.
    """
    import torch.distributed as dist  # what it documents is not all in its __all__

    with naming_a_taken_port(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]):
        store = _own_store(rank, size, timeout)
        if store is None:
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))  # type: ignore[attr-defined]
        call_the_roll(store, Introduction(rank, size, backend, node_name()), timeout)
        group_store = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=group_store)


@dataclass(frozen=True)
class Introduction:
    """Where a rank believes to be: its number, of how many, the backend of its device, and its machine."""

    rank: int
    size: int
    backend: str
    node: str


def call_the_roll(store: Any, own: Introduction, timeout: timedelta) -> None:
    """See that the ranks fit together, before they make a group: one of another size would never be complete.

    Raises:
        UserError: on every rank that has come, when their number or kind of device differs, or one is there twice.
        HangError: when not all have come in time.
    """
    import torch.distributed as dist

    token = unique_token()
    first = Introduction(**json.loads(store.compare_set("first", "", json.dumps(asdict(own)))))
    seated = json.loads(store.compare_set(f"seat {own.rank}", "", json.dumps([token, own.node])))
    error = _misfit(first, own, seated[1] if seated[0] != token else None)
    arrived = store.add("arrived", 1)
    if error is not None or arrived == own.size:
        told = [error.problem, error.where, error.remedy] if error is not None else []
        store.compare_set("verdict", "", json.dumps(told))
    try:
        store.wait(["verdict"], timeout)
    except dist.DistStoreError:
        minutes = timeout.total_seconds() / 60
        raise HangError(
            f"{store.add('arrived', 0):,} of {own.size:,} ranks have come within {minutes:,.0f} minutes.",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            remedy="See whether every node was started, and reaches this address.",
        ) from None
    verdict = json.loads(store.get("verdict"))
    if not verdict:
        return
    store.add("heard", 1)
    if own.rank == 0:  # it serves the store, which the others would look for in vain
        _wait_for_others(store, own.size)
    raise UserError(verdict[0], where=verdict[1], remedy=verdict[2])


def _misfit(first: Introduction, own: Introduction, taken_by: str | None) -> UserError | None:
    """Say what is wrong with a rank beside the first one that came."""
    places = f"rank {first.rank} on {first.node}, rank {own.rank} on {own.node}"
    if own.size != first.size:
        return UserError(
            f"The ranks were not started alike: rank {first.rank} is one of {first.size:,}, rank {own.rank} one of "
            f"{own.size:,}.",
            where=places,
            remedy="Give the same --nnodes and the same --nproc-per-node on each node.",
        )
    if own.backend != first.backend:
        devices = {"nccl": "a GPU", "gloo": "a CPU"}
        return UserError(
            f"Rank {first.rank} has {devices[first.backend]}, rank {own.rank} {devices[own.backend]}.",
            where=places,
            remedy="See with `maskwright doctor` why torch finds no GPU on that node.",
        )
    if taken_by is not None:
        return UserError(
            f"Rank {own.rank} is there twice.",
            where=f"rank {own.rank} on {taken_by} and on {own.node}",
            remedy="Give each node a --node-rank of its own.",
        )
    return None


def _wait_for_others(store: Any, size: int) -> None:
    """Wait until all that are to come have heard; how many these are is not sure, so not for long."""
    end = time.monotonic() + _LINGER_S
    while store.add("heard", 0) < size and time.monotonic() < end:
        time.sleep(0.1)


@contextmanager
def naming_a_taken_port(address: str, port: int | str) -> Iterator[None]:
    """Say which port is taken, around what makes torch listen on one.

    Raises:
        UserError: when another process has it.
    """
    import torch.distributed as dist

    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"Port {port} of {address}, where the ranks meet, is taken by another process.",
            where=f"MASTER_PORT={port}",
            remedy="Export another MASTER_PORT before srun or torchrun, or end that process.",
        ) from error


def _own_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Open the store over the launcher's socket; None where torch makes one from the environment."""
    import torch.distributed as dist

    listener = os.environ.pop(LISTENER_VARIABLE, None)  # nobody else is to use it
    if listener is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    descriptor = int(listener) if listener else None
    return dist.TCPStore(  # type: ignore[attr-defined]  # it is documented, and not in __all__
        address,
        port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,  # the roll is called
        master_listen_fd=descriptor,
    )
