"""Where the ranks of a run meet: the store that rank 0 serves at MASTER_ADDR and MASTER_PORT.

No torch until they do: the launcher imports this module.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from trainer.errors import UserError

LISTENER_VARIABLE = "MASKWRIGHT_LISTENER"
"""Set by our own launcher: in rank 0 the descriptor of a socket that listens on MASTER_PORT already; else empty.

A port that is chosen and closed again can be taken while the ranks are still importing torch, for some seconds.
"""
LOCALHOST = "127.0.0.1"
_BACKLOG = 4096  # connections that wait until rank 0 is ready; the kernel lowers it to its own limit


def listen() -> socket.socket:
    """A socket that listens on a free port of this machine."""
    listener = socket.socket()
    listener.bind((LOCALHOST, 0))
    listener.listen(_BACKLOG)
    return listener


def free_port() -> int:
    """A port that is free now; for what can do without handing a socket over."""
    with listen() as listener:
        return listener.getsockname()[1]


def listen_for_nodes(port: int) -> socket.socket:
    """A socket that listens on this port of all the machine's addresses.

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
    """For a process that was forked from a rank: a copy there would keep the port taken after the rank's death."""
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
        UserError: on rank 0, when another process has the port.
    """
    import torch.distributed as dist

    store = _own_store(rank, size, timeout)
    with naming_a_taken_port(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]):
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)


@contextmanager
def naming_a_taken_port(address: str, port: int | str) -> Iterator[None]:
    """Around what makes torch listen on a port.

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
    """The store over the launcher's socket; None where torch makes one from the environment."""
    import torch.distributed as dist

    listener = os.environ.pop(LISTENER_VARIABLE, None)  # nobody else is to use it
    if listener is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    descriptor = int(listener) if listener else None
    return dist.TCPStore(  # type: ignore[attr-defined]  # it is documented, and not in __all__
        address, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=descriptor
    )
