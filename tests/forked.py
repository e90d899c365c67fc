"""Fork the commands of tests, and the ranks that they start, from a process that has their imports behind it.

A new interpreter spends eight seconds on imports before it does anything, and a test of two ranks needs three. What is
forked instead has a process, a session, descriptors, an environment and an end of its own. Only the start differs: that
of a new interpreter is tested where `fresh` is asked for, in a shell, under SLURM and from the wheel.
"""

from __future__ import annotations

import atexit
import gc
import mmap
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkProcess, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

MARK = "MASKWRIGHT_TEST"
"""An environment variable of this name marks a command of a test and all processes that it starts."""
_kept: list[mmap.mmap] = []
PROGRAMS = {"launcher": "launcher.__main__", "tools.bench.own_process": "tools.bench.own_process"}
"""What is started as `python -m NAME`, and the module whose `main` it runs."""


class ForkingPopen(subprocess.Popen):
    """Starts one of PROGRAMS as a fork of this process; everything else as ever."""

    def __init__(self, args: Sequence[str] | str, **options: Any) -> None:
        words = _words_of_program(args)
        if words:
            environ = dict(options.get("env") or os.environ)
            kept = tuple(options.get("pass_fds", ()))
            options["preexec_fn"] = partial(_go_on_as, words, environ, kept, options.get("preexec_fn"))
        super().__init__(args, **options)


def _words_of_program(args: Sequence[str] | str) -> list[str]:
    """The name and the arguments of one of PROGRAMS in a command that is Python with it; empty for another command."""
    words = [str(word) for word in args]
    if isinstance(args, str) or not words or words[0] != sys.executable:
        return []
    start = 2 if words[1:2] == ["-P"] else 1
    return words[start + 1 :] if words[start : start + 1] == ["-m"] and words[start + 1] in PROGRAMS else []


def _go_on_as(words: list[str], environ: Mapping[str, str], kept: Sequence[int], prepare: Any) -> NoReturn:
    """Runs in the child of Popen, in place of exec: descriptors and session are those of the new process already."""
    if prepare is not None:
        prepare()
    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))  # among them the pipe on which the parent waits for exec
    resource_tracker._resource_tracker._fd = None  # was one of them; a new process starts a tracker of its own
    gc.enable()  # Popen has it off while it forks
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Popen has put them back; an interpreter ignores them
        signal.signal(number, signal.SIG_IGN)
    atexit._clear()  # what the parent would do at its own end
    code = 1
    try:
        code = BaseProcess._bootstrap(_Program(target=become, args=(words, environ)))  # type: ignore[attr-defined]
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


class _Program(multiprocessing.get_context("fork").Process):
    """A process of multiprocessing that is there already: its end waits for threads and writes what is left."""


def become(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Take the place that a new process with this environment has, and run one of PROGRAMS.

    Args:
        words: its name, and its arguments.
    """
    take_place(environ)
    sys.argv = ["maskwright", *words[1:]]
    for folder in filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)):
        if (site := Path(folder, "sitecustomize.py")).is_file():
            runpy.run_path(str(site))
            break
    import_module(PROGRAMS[words[0]]).main()


def fork_workers() -> None:
    """Have the workers of this process forked from it: those of a fork server would come from that of the tests.

    A fork server of its own would be a new interpreter with the imports of all tests, and nothing to do.
    """
    multiprocessing.set_start_method("fork", force=True)
    ForkServerProcess._Popen = staticmethod(ForkProcess._Popen)  # type: ignore[method-assign]
    forkserver.ensure_running = lambda: None  # type: ignore[assignment]


def take_place(environ: Mapping[str, str]) -> None:
    """Have the environment, the streams and the ways to start processes that a new process has."""
    gc.freeze()  # what was imported is there for good: to look through it takes half a second each time
    os.environ.clear()
    os.environ.update(environ)
    if MARK in environ:  # /proc shows what was mapped, but not an environment that a process gave itself
        descriptor = os.memfd_create(environ[MARK])
        os.truncate(descriptor, mmap.PAGESIZE)
        _kept.append(mmap.mmap(descriptor, mmap.PAGESIZE))
        os.close(descriptor)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", "1")))
    sys.stdin = open(os.devnull)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    fork_workers()
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
