"""What this machine and the job it works in are called; whether a process is there, and its end with its parent."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def node_name() -> str:
    """Name this machine as the scheduler does, whose commands take that name (`--exclude`), else as it names itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str:
    """Return the SLURM job that this process belongs to; empty outside SLURM."""
    return os.environ.get("SLURM_JOB_ID", "")


def restart_count() -> int:
    """Read how often SLURM has requeued this job; 0 where the variable is no number: it is only told."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def has_process(pid: int) -> bool:
    """Tell whether this machine has a process of this number, whoever's, and if only as a zombie.

    psutil.pid_exists takes one of another user for gone where /proc hides it (hidepid).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def make_die_with_parent() -> Callable[[], None]:
    """Make a function for the child, between fork and exec: have the kernel kill it when this process dies (Linux)."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    parent = os.getpid()

    def die_with_parent() -> None:
        if prctl is None:
            return
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return die_with_parent
