"""Run many random cases in a process that may hang, die or eat memory, and judge how each command ended.

`FUZZ=N` sets how many cases a fuzzer tries, `FUZZ_SEED=S` the first one: the seed of a case is all of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import FORK_SERVER

CODES = (0, 2, 3, 4, 75, 130)
"""What a command may end with; 1 is what nobody foresaw."""
CARD_LINES = 25
CASE_S = 240.0
"""After which a case hangs; the longest takes some seconds."""
MEMORY_BYTES = 16 << 30
"""Of address space, most of which torch takes and does not use."""


def seeds(default_count: int) -> range:
    """The cases to try."""
    first = int(os.environ.get("FUZZ_SEED", "0"))
    return range(first, first + int(os.environ.get("FUZZ", str(default_count))))


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str

    def problem(self, *expected: int) -> str | None:
        """What is wrong with the way it ended, None when nothing is.

        Args:
            expected: the exit codes that are right here; without any, all that maskwright has.
        """
        if "Traceback (most recent call last)" in self.output or "panicked at" in self.output:
            return f"a traceback, exit code {self.code}"
        if self.code not in (expected or CODES):
            return f"exit code {self.code}"
        lines = self.output.splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith(("Please check: ", "Damaged: "))]
        if self.code in (2, 3) and starts and len(lines) - starts[-1] >= CARD_LINES:
            return f"a card of {len(lines) - starts[-1]} lines"
        if self.code in (2, 3) and not starts and "Usage: " not in self.output:
            return "no card"
        if len(starts) > 1:
            return f"{len(starts)} cards"
        return None


def call(*arguments: str | Path, cwd: Path | None = None) -> Outcome:
    """Run one command of maskwright in this process, and put back what it changes in it."""
    from launcher.cli import app

    environ, folder = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with tempfile.TemporaryFile() as output, _descriptors(output.fileno()):
        try:
            os.chdir(cwd or folder)
            app(list(map(str, arguments)), prog_name="maskwright")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            os.chdir(folder)
            for name in set(os.environ) - set(environ):
                del os.environ[name]
            os.environ.update(environ)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        _flush()
        output.seek(0)
        return Outcome(code, output.read().decode(errors="replace"))


@contextlib.contextmanager
def _descriptors(output: int) -> Any:
    """Send all that this process prints, in whatever language, to one file."""
    _flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        yield
    finally:
        _flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _flush() -> None:
    import sys

    sys.stdout.flush()
    sys.stderr.flush()


def try_all(case: Callable[..., list[str]], cases: Sequence[int], folder: Path, *arguments: Any) -> list[str]:
    """Call `case(seed, an empty folder, *arguments)` for each seed, in a process of its own; all their problems.

    One that hangs or dies costs that case: the rest goes on in another process.
    """
    left, problems = list(cases), list[str]()
    journal = folder / "journal.jsonl"
    while left:
        journal.write_text("")
        process = FORK_SERVER.Process(target=_work, args=(case, left, folder, journal, arguments))
        process.start()
        done, last = 0, time.monotonic()
        while process.is_alive():
            process.join(0.1)
            now = journal.read_text().count("\n")
            if now > done:
                done, last = now, time.monotonic()
            elif time.monotonic() - last > CASE_S + 30:
                process.kill()
                process.join()
        found = [json.loads(line) for line in journal.read_text().splitlines()]
        problems += [problem for entry in found for problem in entry]
        if len(found) < len(left):
            ended = f"hangs, or the process died with {process.exitcode}"
            log = (folder / "output").read_text(errors="replace")[-3000:]
            problems.append(f"seed {left[len(found)]}: {ended}\n{log}")
        left = left[len(found) + 1 :]
    return problems


def _keep_the_process_group() -> None:
    """Let all runs of this process have the group of the first one: DeepSpeed remembers it."""
    from functools import cache

    from trainer.runtime import distributed

    start = distributed.start
    first = cache(lambda: start())
    distributed.start = lambda *_: first()
    distributed.stop = lambda: None


def _work(
    case: Callable[..., list[str]], cases: Sequence[int], folder: Path, journal: Path, arguments: Sequence[Any]
) -> None:
    import torch

    torch.set_num_threads(1)
    _keep_the_process_group()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with open(folder / "output", "ab") as stacks, open(journal, "a", buffering=1) as found:
        for seed in cases:
            faulthandler.dump_traceback_later(CASE_S, exit=True, file=stacks)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"case-{seed}-") as place:
                problems = case(seed, Path(place), *arguments)
            faulthandler.cancel_dump_traceback_later()
            found.write(json.dumps([f"seed {seed}: {problem}" for problem in problems]) + "\n")
    os._exit(0)
