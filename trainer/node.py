"""What this machine and the job it works in are called."""

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
