"""What this machine and the job it works in are called, and whether a process is there."""

from __future__ import annotations

import os
import socket


def node_name() -> str:
    """As the scheduler calls this machine, whose commands take that name (`--exclude`), else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str:
    """The SLURM job that this process belongs to; empty outside SLURM."""
    return os.environ.get("SLURM_JOB_ID", "")


def restart_count() -> int:
    """How often SLURM has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def has_process(pid: int) -> bool:
    """Whether this machine has a process of this number, whoever's, and if only as a zombie.

    psutil.pid_exists takes one of another user for gone where /proc hides it (hidepid).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
