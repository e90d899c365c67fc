"""Where output goes: one log file a rank, and a console that shows only what we mean to show.

Libraries print from Python and from C++, so the process's own stdout and stderr are pointed at the log file; the
terminal is kept under another descriptor for rank 0.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.errors import cannot_write
from trainer.runtime.plain_text import printable
from trainer.runtime.streams import PATIENCE_S, ConsoleStream

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def make_log(run_dir: Path, rank: int) -> Path:
    """See that this rank can write its log.

    Raises:
        UserError: when it cannot.
    """
    path = log_path(run_dir, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise cannot_write(path, run_dir, error) from None
    return path


@contextmanager
def rank_log(path: Path, rank: int) -> Iterator[TextIO]:
    """Send everything this process prints to its log file; yields the stream of the user's console.

    On ranks other than 0 the console is the log file too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    console = ConsoleStream(os.dup(1), getattr(sys.stdout, "encoding", None) or "utf-8", PATIENCE_S)
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        handlers = _install_handlers(file, console if rank == 0 else None)
        try:
            yield console if rank == 0 else file
        except BaseException:
            logging.getLogger(__name__).exception("this rank stops")
            raise
        finally:
            for handler in handlers:
                logging.getLogger().removeHandler(handler)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


class _PlainFormatter(logging.Formatter):
    """For the user's console: names and paths in a message cannot move its cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def console_handler(console: TextIO) -> logging.Handler:
    """Make a handler for a user's console, which shows our own warnings alone.

    Those of other libraries are for a log, and so is the traceback of what ends this rank.
    """
    handler = logging.StreamHandler(console)
    handler.setFormatter(_PlainFormatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.name.startswith("trainer.") and record.exc_info is None)
    return handler


def _install_handlers(file: TextIO, console: TextIO | None) -> list[logging.Handler]:
    to_file = logging.StreamHandler(file)
    to_file.setFormatter(logging.Formatter(FORMAT))
    handlers: list[logging.Handler] = [to_file]
    if console is not None:
        handlers.append(console_handler(console))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    return handlers
