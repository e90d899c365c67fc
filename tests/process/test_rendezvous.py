"""Where ranks meet: who is there, and that the socket is the first rank's alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.errors import HangError, UserError
from trainer.runtime.rendezvous import Introduction, call_the_roll, close_listening_sockets, listen


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


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([(0, 2, "gloo"), (1, 2, "gloo")], ""),
        ([(0, 4, "gloo"), (1, 4, "gloo"), (1, 2, "gloo")], "rank 0 is one of 4, rank 1 one of 2"),
        ([(0, 2, "nccl"), (1, 2, "gloo")], "Rank 0 has a GPU, rank 1 a CPU"),
        ([(0, 3, "gloo"), (2, 3, "gloo"), (2, 3, "gloo")], "Rank 2 is there twice"),
    ],
)
def test_ranks_that_do_not_fit_together_all_hear_it(
    places: list[tuple[int, int, str]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.runtime.rendezvous._LINGER_S", 0.2)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    heard = []

    def come(place: tuple[int, int, str]) -> None:
        store = TCPStore("127.0.0.1", server.port, is_master=False)
        try:
            call_the_roll(store, Introduction(*place, node="node"), timedelta(seconds=60))
            heard.append("")
        except UserError as error:
            heard.append(f"{error} ")

    come_one_after_another = [threading.Thread(target=come, args=(place,)) for place in places]
    for place, thread in enumerate(come_one_after_another):
        thread.start()
        while int(server.add("arrived", 0)) <= place:  # the first one is to be rank 0
            time.sleep(0.01)
    for thread in come_one_after_another:
        thread.join()
    assert len(heard) == len(places)
    assert all(said in line and bool(line) == bool(said) for line in heard), heard


def test_ranks_that_do_not_come_are_counted() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(HangError, match="1 of 2 ranks have come"):
        call_the_roll(store, Introduction(0, 2, "gloo", "node"), timedelta(seconds=0.2))
