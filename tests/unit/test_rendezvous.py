"""The socket at which ranks meet is the rank's alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection

from trainer.rendezvous import close_listening_sockets, listen


def report_what_is_open(answers: Connection, listening: int, connected: int) -> None:
    close_listening_sockets()
    is_open = []
    for descriptor in (listening, connected):
        try:
            os.fstat(descriptor)
            is_open.append(True)
        except OSError:
            is_open.append(False)
    answers.send(is_open)


def test_a_forked_worker_keeps_no_listening_socket_so_that_the_port_is_free_after_its_rank() -> None:
    listener = listen()
    port = listener.getsockname()[1]
    ours, theirs = socket.socketpair()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=report_what_is_open, args=(sending, listener.fileno(), ours.fileno()))
    worker.start()
    assert receiving.recv() == [False, True], "and keeps what it is connected by"
    worker.join()
    with socket.create_connection(("127.0.0.1", port)):
        listener.close()
    theirs.close()
