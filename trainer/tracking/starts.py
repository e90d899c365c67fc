"""RUN/starts.jsonl: each start of a run, and whether a job's restarts still lead somewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import MaskwrightError, cannot_write
from trainer.runtime.process import job_id, node_name, restart_count
from trainer.runtime.side_files import read_lines, replace_side_file
from trainer.runtime.typed_json import Count, Seconds, as_type

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class StartRecord:
    """One start of a run that had something to do.

    Attributes:
        time: seconds since 1970.
        step: optimizer steps done before.
        job: the SLURM job; empty outside SLURM. A requeue keeps it, and raises `restart`.
        restart: how often SLURM had requeued that job.
        nodes: the job's, as SLURM writes them (`gpu[03-06]`); outside SLURM the machine of rank 0.
        world: ranks.
    """

    time: Seconds
    step: Count
    job: str
    restart: Count
    nodes: str
    world: Count


def read_start_records(run_dir: Path) -> list[StartRecord]:
    """Read the starts of a run, oldest first."""
    return read_lines(run_dir / STARTS, lambda line: as_type(StartRecord, line))


def idle_starts(starts: Iterable[StartRecord], job: str, step: int) -> int:
    """Count how many starts of a SLURM job, one after the other up to the last one, began at this step."""
    count = 0
    for start in starts:
        count = count + 1 if job and (start.job, start.step) == (job, step) else 0
    return count


def record_start(run_dir: Path, step: int, world_size: int, max_idle_starts: int | None) -> str:
    """Record that this process group starts at a step; returns a line about it.

    Outside SLURM, and in a new job, a person has decided to start again: only restarts of one job are judged.

    Raises:
        MaskwrightError: when `max_idle_starts` starts of this job have come no further.
        UserError: when the file cannot be written.
    """
    starts = read_start_records(run_dir)
    this = StartRecord(
        time=time.time(),
        step=step,
        job=job_id(),
        restart=restart_count(),
        nodes=os.environ.get("SLURM_JOB_NODELIST") or node_name(),
        world=world_size,
    )
    idle = idle_starts(starts, this.job, step)
    if max_idle_starts is not None and idle >= max_idle_starts:
        raise MaskwrightError(
            f"SLURM job {this.job} makes no progress: it has started {idle} times at step {step}, and is there again.",
            where=str(run_dir / STARTS),
            remedy="See in the job's log how the earlier starts ended. If they ended before they could save: "
            "checkpoint.every_steps or every_minutes smaller, resilience.stop_before_end_seconds or --time larger. "
            "Then submit again.",
        )
    path = run_dir / STARTS
    try:
        replace_side_file(path, "".join(json.dumps(asdict(start)) + "\n" for start in (*starts, this)).encode())
    except OSError as error:
        raise cannot_write(path, run_dir, error) from None
    job = f"SLURM job {this.job}, restart {this.restart}, " if this.job else ""
    return f"start {len(starts) + 1} of this run: {job}{world_size} rank{'s' if world_size > 1 else ''} on {this.nodes}"
