"""SLURM's commands, as far as submitting needs them."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence

from trainer.errors import UserError

_TIMEOUT_S = 120
_N = "([0-9]{1,9})"
_TIME = re.compile(f"(?:{_N}-{_N}(?::{_N}(?::{_N})?)?)|(?:{_N}(?::{_N}(?::{_N})?)?)")


def require_sbatch() -> None:
    """Check that SLURM's commands are there.

    Raises:
        UserError: where SLURM's commands are missing.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no sbatch on this machine.",
            where="sbatch",
            remedy="Submit on a login node of the cluster, or see what would be submitted with --dry-run.",
        )


def sbatch(*arguments: str) -> int:
    """Submit a job; returns its number.

    Raises:
        UserError: when SLURM refuses it, with what it says.
    """
    try:
        result = _run(["sbatch", "--parsable", *arguments])
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch gave no answer in {_TIMEOUT_S} s.",
            where=" ".join(["sbatch", *arguments]),
            remedy="See with `sinfo` whether SLURM answers at all, and with `squeue --me` whether the job is queued.",
        ) from None
    if result.returncode != 0:
        said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in result.stderr.splitlines())
        raise UserError(
            f"SLURM refuses the job: {said}",
            where=" ".join(["sbatch", *arguments]),
            remedy="Correct the options; `sinfo` lists partitions and nodes, and --dry-run shows the script.",
        )
    number = result.stdout.strip().partition(";")[0]
    if not re.fullmatch(r"[0-9]{1,18}", number):
        raise UserError(
            f"sbatch answered with no job number: '{result.stdout.strip()}'",
            where=" ".join(["sbatch", *arguments]),
            remedy="See with `squeue --me` whether the job is queued.",
        )
    return int(number)


def queued_jobs() -> dict[int, str]:
    """Find this user's jobs that have not ended, with their states; empty where SLURM does not answer."""
    try:
        result = _run(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A %T"])
    except (OSError, KeyError, subprocess.TimeoutExpired):  # KeyError: a user without a name
        return {}
    return {int(job): state for job, state in re.findall(r"^ *([0-9]{1,18}) +(\S+) *$", result.stdout, re.MULTILINE)}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)


def parse_time(text: str) -> int | None:
    """Read SLURM's time limits in seconds (`90`, `90:00`, `1:30:00`, `2-0`, `2-12:00`); None for no limit.

    Raises:
        UserError: when it is none.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"'{text}' is no time limit.",
            where=f"--time {text}",
            remedy="Write minutes, hours:minutes:seconds, or days-hours, as in --time 90, 24:00:00 or 2-12.",
        )
    if match[1] is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups()[:4])
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    first, second, third = match.groups()[4:]
    if third is not None:
        return (int(first) * 60 + int(second)) * 60 + int(third)
    return int(first) * 60 + int(second or 0)
