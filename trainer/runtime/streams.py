"""What a person reads is a convenience: a stream that cannot be written never ends the work, nor changes its exit code.

A reader leaves (`| head`), a device is full, a descriptor was closed by the shell, a terminal hangs up, an encoding
lacks a character. Python raises for each of these, in `print` as in its last flush, and rich ends the process.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import IO, Any, TextIO

PATIENCE_S = 1.0
_STANDARD = (0, 1, 2)
_PART_BYTES = 4096  # a pipe that has room has room for so many (PIPE_BUF)


class ConsoleStream(io.TextIOWrapper):
    """A text stream over a descriptor that never raises; what cannot be written is lost.

    Characters that the encoding lacks are written as escapes.

    Args:
        descriptor: stays open when the stream is closed, for others may write there.
        patience_s: how long a reader that is there but does not read may hold up the work, in all until it reads again;
            None: for ever, as results must arrive.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8", patience_s: float | None = None) -> None:
        self._raw = _Descriptor(descriptor, patience_s)
        super().__init__(
            io.BufferedWriter(self._raw), encoding=encoding, errors="backslashreplace", line_buffering=True
        )

    @property
    def lost(self) -> OSError | None:
        """The first reason why something could not be written."""
        return self._raw.lost


class _Descriptor(io.FileIO):
    """Writes everything, or loses it."""

    def __init__(self, descriptor: int, patience_s: float | None) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None
        self._patience_s, self._waits = patience_s, True

    def write(self, data: Any, /) -> int:
        rest = memoryview(data)
        while rest and self._has_room():
            try:
                written = super().write(rest[:_PART_BYTES])
            except OSError as error:
                self.lost = self.lost or error
                break
            rest = rest[written or 0 :]  # None where the descriptor does not block and is full again
        return len(data)

    def _has_room(self) -> bool:
        """Wait for a reader, but only once as long as the patience lasts."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        wait_ms = None if self._patience_s is None else self._patience_s * 1000 * self._waits
        self._waits = bool(poll.poll(wait_ms))
        if not self._waits:
            self.lost = self.lost or OSError(errno.EAGAIN, "nobody reads it")
        return self._waits


def use_consoles() -> None:
    """Make this process's stdout and stderr such streams, for the rest of its life.

    A descriptor that the shell closed leads to nowhere: left closed, the next file that is opened would get its number,
    and what a library prints. Results on stdout wait for their reader, messages on stderr only for a moment.
    """
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    for name, descriptor, patience in (("stdout", 1, None), ("stderr", 2, PATIENCE_S)):
        old: TextIO | None = getattr(sys, name)
        if old is not None:
            old.flush()
        setattr(sys, name, ConsoleStream(descriptor, old.encoding if old is not None else "utf-8", patience))


def first_loss(stream: IO[str]) -> OSError | None:
    """Return the first reason why something could not be written to a stream; None where there was none."""
    return stream.lost if isinstance(stream, ConsoleStream) else None


def reader_has_left(stream: IO[str]) -> bool:
    """Tell whether nobody reads a stream any more, or ever will."""
    if not isinstance(stream, ConsoleStream):
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors and a hang-up are told unasked
    return bool(poll.poll(0)) or (stream.lost is not None and stream.lost.errno in (errno.EPIPE, errno.EIO))
