"""Faults at named moments of a process's life.

A moment is told by what the process does to files, as Python's audit events show it, and not by the names of our
functions: a fault stays where it is when the code around it changes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[tuple[str, str], ...]
"""Steps (kind, regular expression) that are met one after the other; the fault strikes at the last one.

kind: `read` or `write` (a file is opened; the path), `rename` ("old -> new"), `mkdir`, `remove` (the path), each before
it happens; `list`: the names in a folder are read; `closed`: the file of the step before is closed.
"""

FULL_AT_BYTES = 20_000
"""Less than an optimizer file or a tokenizer of the tests has, more than their logs."""
OPTIMIZER_FILE = r"/\.tmp-step-{step}/(bf16_)?zero_pp_rank_\d+_mp_rank_00_optim_states\.pt$"
SAVE_POINTS: dict[str, Point] = {
    "before its first file": (("write", r"/\.tmp-step-{step}/"),),
    "in its optimizer file": (("write", OPTIMIZER_FILE),),
    "after its optimizer file": (("write", OPTIMIZER_FILE), ("closed", "")),
    "before the manifest": (("write", r"/\.tmp-step-{step}/.*manifest\.json"),),
    "between manifest and rename": (("rename", r" -> .*/manifest\.json$"), ("rename", r" -> .*/step-{step}$")),
    "between rename and latest": (("rename", r" -> .*/step-{step}$"), ("write", r"/checkpoints/\.latest")),
    "before latest is replaced": (("rename", r" -> .*/step-{step}$"), ("rename", r" -> .*/latest$")),
    "after latest": (("rename", r" -> .*/step-{step}$"), ("rename", r" -> .*/latest$"), ("read", "")),
    "in the removal of an old one": (("rename", r"/step-\d+ -> .*step-\d+-removed$"), ("remove", ""), ("remove", "")),
}
"""Moments of a save; `{step}` is that of the checkpoint."""


def at_save(name: str, step: int) -> Point:
    """The point of that name in the save of a step."""
    return tuple((kind, pattern.replace("{step}", f"{step:08d}")) for kind, pattern in SAVE_POINTS[name])


class InjectedError(Exception):
    """An error that nothing expects."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_file() -> None:
    """Let the kernel end this process, as SIGKILL would, at the write that takes any file beyond FULL_AT_BYTES."""
    ctypes.CDLL(None).signal(int(signal.SIGXFSZ), None)  # the default action; Python sets it in the main thread only
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, resource.RLIM_INFINITY))


def fill_the_disk() -> None:
    """From now on no file of this process grows beyond FULL_AT_BYTES: each write that would is an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, resource.RLIM_INFINITY))


def free_space() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def no_space_left() -> None:
    """This one operation fails."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail() -> None:
    raise InjectedError("the injected cause")


@dataclass(frozen=True)
class Swap:
    """Puts a file in the place of a folder, in which nothing can be made then: that holds for root as well.

    Attributes:
        back: put the folder back instead.
    """

    folder: Path
    back: bool = False

    def __call__(self) -> None:
        aside = self.folder.with_name(f"{self.folder.name}-aside")
        if self.back:
            self.folder.unlink()
            aside.rename(self.folder)
        else:
            self.folder.rename(aside)
            self.folder.write_text("in the way")


@dataclass(frozen=True)
class Fault:
    """What happens to a rank, once.

    Attributes:
        in_worker: in one of its loader workers, not in itself.
    """

    rank: int
    point: Point
    action: Callable[[], None]
    in_worker: bool = False


def inject(faults: Sequence[Fault]) -> None:
    """Let the faults of this rank (RANK) strike this process, or a process that it forks."""
    for fault in faults:
        if fault.rank == int(os.environ["RANK"]):
            sys.addaudithook(_Watch(fault, os.getpid()))


def injecting_environment(folder: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """Variables with which every Python that a command starts as a rank injects the faults.

    A rank that ends by itself leaves a file `ended-RANK` in the folder.
    """
    (folder / "faults.pickle").write_bytes(pickle.dumps(list(faults)))
    lines = (
        "import atexit, os, pathlib, pickle",
        "if 'RANK' in os.environ:",
        f"    atexit.register(pathlib.Path({str(folder)!r}, 'ended-' + os.environ['RANK']).touch)",
        "    from tests.fault_points import inject",
        f"    inject(pickle.load(open({str(folder / 'faults.pickle')!r}, 'rb')))",
    )
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    root = Path(__file__).parent.parent
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])}


class _Watch:
    """An audit hook that follows the steps of one fault."""

    def __init__(self, fault: Fault, pid: int) -> None:
        self._steps = [(kind, re.compile(pattern)) for kind, pattern in fault.point]
        self._fault, self._pid = fault, pid
        self._last_path = ""
        self._busy: set[int] = set()  # threads: an event of one is not lost because another's is looked at

    def __call__(self, event: str, arguments: tuple) -> None:
        thread = threading.get_ident()
        if not self._steps or thread in self._busy or (os.getpid() == self._pid) == self._fault.in_worker:
            return
        self._busy.add(thread)  # what is done here raises events as well
        try:
            if self._is_met(event, arguments):
                self._steps.pop(0)
                if not self._steps:
                    self._fault.action()
        finally:
            self._busy.discard(thread)

    def _is_met(self, event: str, arguments: tuple) -> bool:
        kind, pattern = self._steps[0]
        if kind == "closed":
            return not _is_open(self._last_path)
        seen = _describe(event, arguments)
        if seen is None or seen[0] != kind or not pattern.search(seen[1]):
            return False
        self._last_path = seen[1]
        return True


def _describe(event: str, arguments: tuple) -> tuple[str, str] | None:
    """Kind and text of an event as in Point, None when it is none of these."""
    if event == "open":
        path, _, flags = arguments
        return "write" if flags & (os.O_WRONLY | os.O_RDWR) else "read", os.fsdecode(path) if _is_path(path) else ""
    if event == "os.rename":
        return "rename", f"{os.fspath(arguments[0])} -> {os.fspath(arguments[1])}"
    if event == "os.listdir":
        return "list", os.fsdecode(arguments[0]) if _is_path(arguments[0]) else ""
    if event in ("os.mkdir", "os.remove"):
        return event.removeprefix("os."), os.fspath(arguments[0])
    return None


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _is_open(path: str) -> bool:
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == os.path.realpath(path):
                return True
        except OSError:  # the one of the listing itself
            continue
    return False
