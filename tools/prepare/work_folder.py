"""The work folder `.prepare` of an unfinished job: whose it is, and what lies there that is not.

It holds `job.json` (what the job is; the first process writes it), a record for each finished unit, and `lock`. Several
tasks, on several machines, work in it at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.prepare.job import JOB_FILE, Job, setting_differences
from tools.prepare.plan import Unit
from tools.prepare.summary import counted, say
from tools.prepare.worker import record_path
from trainer.data.manifest import SPLITS
from trainer.errors import DamagedError, UserError
from trainer.runtime.files import create_synced, file_sums, replace_synced, sync_files, sync_folder, unique_token
from trainer.runtime.plain_text import listed


def claim_folder(job: Job) -> None:
    """Create the output with its work folder, and nothing else: it may turn out to be another job's.

    Raises:
        UserError: when it holds anything that is not an unfinished job, or cannot be created.
    """
    if job.output.exists() and not job.output.is_dir():
        raise UserError("The output is a file.", where=str(job.output), remedy="Choose another --output.")
    # Listed first: another task makes the work folder before anything else.
    held = sorted(path.name for path in job.output.iterdir()) if job.output.is_dir() else []
    if held and not job.work_folder.is_dir() and job.finished() is None:
        raise UserError(
            f"The output folder already holds other files: {listed(held)}.",
            where=str(job.output),
            remedy="Choose an --output that is new or empty.",
        )
    try:
        job.work_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create the output folder: {error.strerror}.",
            where=str(job.output),
            remedy="Choose another --output.",
        ) from None


def enter(job: Job, tasks: int | None, console: Console) -> None:
    """Make the work folder this job's, with a folder for each split and the tokenizer; the first process does it.

    Args:
        tasks: how many tasks the job has; None for a run that does all of it. The latter may take the place of an
            earlier one of its kind: units that still fit are kept.

    Raises:
        UserError: when the folder is another job's, with the differences.
    """
    path, own = job.work_folder / JOB_FILE, {**_describe(job), "tasks": tasks}
    content = (json.dumps(own, ensure_ascii=False) + "\n").encode()
    new = create_synced(path, content)
    if not new and (differs := _differences(found := _read(path), own)):
        if tasks is not None or found["tasks"] is not None:
            _refuse(job, differs)
        say(console, f"The unfinished prepare that was here had {'; '.join(differs)}: keeping what still fits.")
        replace_synced(path, content)
        new = True
    if new:
        _remove_foreign_parts(job)
    for folder in job.folders.values():
        folder.mkdir(exist_ok=True)
    place_tokenizer(job)


def place_tokenizer(job: Job) -> None:
    """Save the tokenizer beside the shards, unless it is there: whole or not at all, whoever else does the same.

    Compared by every byte: the manifest will vouch for these files, and a copy that an earlier start left may have been
    damaged since, in a place that changes no ids.
    """
    folder, token = job.tokenizer_folder, unique_token()
    temporary = job.work_folder / f"tokenizer.{token}.tmp"
    job.tokenizer.save_pretrained(str(temporary))
    expected = file_sums(temporary)
    if _holds(folder, expected):
        shutil.rmtree(temporary)
        return
    sync_files(temporary)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, job.work_folder / f"tokenizer.{token}.old")  # an earlier job's
    try:
        os.rename(temporary, folder)
    except OSError:
        if not _holds(folder, expected):  # else another task was first
            raise
    sync_folder(job.output)


def _holds(folder: Path, expected: Mapping[str, tuple[int, str]]) -> bool:
    try:
        return file_sums(folder) == expected
    except (FileNotFoundError, NotADirectoryError):  # or another task has moved it away
        return False


def check_job(job: Job) -> int | None:
    """Check that the parts in the work folder are this job's; returns the number of its tasks, if they are known.

    Raises:
        UserError: when they are another job's, with the differences.
    """
    path = job.work_folder / JOB_FILE
    if not path.is_file():
        return None
    found = _read(path)
    if differs := _differences(found, _describe(job)):
        _refuse(job, differs)
    return found["tasks"]


def foreign_parts(job: Job, files: Mapping[Path, Collection[str]]) -> list[Path]:
    """Find shard files that are not among `files` (folder → names), and records of units beyond the plan."""
    found = []
    for folder in (job.output, *(job.output / name for name in SPLITS)):
        expected = files.get(folder, ())
        found += [path for path in folder.glob("shard-*") if path.name not in expected]
    return sorted(found) + [
        record_path(job.work_folder, number) for number in sorted(recorded_units(job)) if number >= len(job.units)
    ]


def recorded_units(job: Job) -> set[int]:
    """List the numbers of the units that have a record; whose it is and whether it holds is not looked at."""
    return {
        int(number)
        for path in job.work_folder.glob("unit-*.json")
        if (number := path.stem.removeprefix("unit-")).isdecimal()
    }


def remove_temporaries(job: Job, units: Sequence[Unit] | None = None) -> None:
    """Remove what killed writers of these units (default: of all) left; nobody may be writing them."""
    names = None if units is None else {unit.shard for unit in units}
    for folder in (job.output, *(job.output / name for name in SPLITS)):
        for path in folder.glob(".shard-*.tmp"):
            if names is None or path.name.split(".")[1] in names:
                path.unlink(missing_ok=True)


def _describe(job: Job) -> dict[str, Any]:
    """Describe what makes two jobs the same. Paths are left out: machines may mount the input in different places."""
    return {
        "settings": job.settings,
        "tokenizer_sha256": job.vocabulary.sha256,
        "units": len(job.units),
        "inputs": [[file.name, file.size, file.mtime_ns, file.parts, file.revision] for file in job.inputs.files],
        "written_by": f"maskwright {version('maskwright')}",
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in ("settings", "tokenizer_sha256", "units", "inputs", "tasks"):
            found[key]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"Cannot read what job this is: {error!r}.",
            where=str(path),
            remedy="Delete this file and run the same command again; finished units are kept.",
        ) from None


def _differences(found: dict[str, Any], own: dict[str, Any]) -> list[str]:
    differs = setting_differences(found["settings"], own["settings"])
    if found["tokenizer_sha256"] != own["tokenizer_sha256"]:
        differs.append("another tokenizer")
    if found["inputs"] != own["inputs"]:
        differs.append(_input_differences(found["inputs"], own["inputs"]))
    elif found["units"] != own["units"]:
        differs.append(f"{counted(found['units'], 'unit')} instead of {own['units']:,} (another version of maskwright)")
    return differs


def _input_differences(found: list[list[Any]], own: list[list[Any]]) -> str:
    before, now = {row[0]: row[1:] for row in found}, {row[0]: row[1:] for row in own}
    differs = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            differs.append(f"'{name}' besides")
        elif name not in before:
            differs.append(f"no '{name}'")
        elif before[name][0] != now[name][0]:
            differs.append(f"'{name}' of {before[name][0]:,} bytes instead of {now[name][0]:,}")
        elif before[name] != now[name]:
            differs.append(f"'{name}' of another time")
    return f"other input files ({listed(differs) or 'in another order'})"


def _refuse(job: Job, differs: list[str]) -> None:
    raise UserError(
        f"The folder holds the unfinished parts of another job, with {'; '.join(differs)}.",
        where=str(job.output),
        remedy=f"Choose another --output. If the change is meant, delete {job.work_folder / JOB_FILE}: finished units "
        "that still fit are then kept.",
    )


def _remove_foreign_parts(job: Job) -> None:
    """Remove the parts of an earlier job that this one has no name for; it writes the others anew where they differ."""
    plan = job.shard_files(job.units)
    for path in foreign_parts(job, dict.fromkeys(job.folders.values(), plan)):
        path.unlink(missing_ok=True)
    for name in SPLITS:
        folder = job.output / name
        if name not in job.folders and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
