"""`maskwright prepare`: all of a job at once, or its tasks one by one and then the joining.

A job (`open_job`) is a function of the input and the options. Its units may be written by one process tree
(`prepare`), or by any number of tasks on any machines (`prepare_task`) and then be joined (`finalize_job`): the bytes
are the same, also after any number of interruptions, because finished units are kept and the rest is written anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

from rich.console import Console

from tools.prepare.bad_documents import Losses
from tools.prepare.encode import Encoder
from tools.prepare.estimate import check_free_space, estimate_output
from tools.prepare.finalize import collect_records, remove_work_folder, total_losses, write_manifests
from tools.prepare.hints import input_notes
from tools.prepare.job import Job, open_job
from tools.prepare.locks import locked, locked_units
from tools.prepare.options import PrepareOptions
from tools.prepare.plan import Unit
from tools.prepare.pool import run_units
from tools.prepare.progress import ReadProgress
from tools.prepare.share import Share
from tools.prepare.summary import (
    PrepareSummary,
    TaskSummary,
    counted,
    describe_refused,
    human_bytes,
    print_summary,
    print_task_summary,
    say,
)
from tools.prepare.work_folder import (
    check_job,
    claim_folder,
    enter,
    place_tokenizer,
    recorded_units,
    remove_temporaries,
)
from trainer.data.manifest import Manifest
from trainer.errors import UserError


def prepare(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    workers: int | None = None,
    console: Console | None = None,
    **options: Any,
) -> PrepareSummary:
    """Tokenize text into shards: `open_job`, with `PrepareOptions` by name, and `prepare_job`."""
    return prepare_job(open_job(inputs, tokenizer, output, PrepareOptions(**options)), workers, console)


def prepare_job(job: Job, workers: int | None = None, console: Console | None = None) -> PrepareSummary:
    """Write all units and join them.

    Args:
        workers: processes; default one for each usable core.
        console: for progress and the summary; None says nothing.

    Raises:
        UserError: for a mistake in the input, and when the output holds something else or others write to it.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; finished units are kept.
    """
    started, console, workers = time.monotonic(), console or _silent(), _worker_count(workers)
    manifests, already = job.finished(), True
    if manifests is None:
        claim_folder(job)
        with _interruptible(console), locked(job):
            manifests = job.finished()  # by another process, since
            if manifests is None:
                already = False
                enter(job, None, console)
                remove_temporaries(job)
                _write_units(job, job.units, workers, console)
                manifests = write_manifests(job, collect_records(job))
    return _conclude(job, manifests, already, started, console)


def prepare_task(
    job: Job,
    task: int,
    tasks: int,
    workers: int | None = None,
    console: Console | None = None,
    cancel: Event | None = None,
) -> TaskSummary | None:
    """Write the units of one of several tasks: those with the numbers task, task + tasks, …

    Tasks may run at the same time, on machines that share the output folder; `finalize_job` comes after them.

    Args:
        task: from 0 to tasks - 1.
        workers, console: as in `prepare_job`.
        cancel: when another thread sets it, the workers are ended.

    Returns:
        what the task wrote; None when the job has been finished and joined before.

    Raises:
        UserError: as `prepare_job`; also when the folder is that of another job (other input, tokenizer or options),
            and when the same task is running already.
        KeyboardInterrupt: on Ctrl-C, SIGTERM or `cancel`; finished units are kept.
    """
    started, console, workers = time.monotonic(), console or _silent(), _worker_count(workers)
    share = Share(task, tasks)
    if job.finished() is None:
        claim_folder(job)
        with _interruptible(console), locked_units(job, share.of(job.units)) as alone:
            if job.finished() is None:
                return _write_share(job, share, alone, workers, started, console, cancel)
    remove_work_folder(job)
    say(console, f"Already prepared: {job.output}")
    return None


def finalize_job(job: Job, console: Console | None = None) -> PrepareSummary:
    """Join the units that tasks have written.

    Documents that a task left out stay left out, whatever the job says of bad documents.

    Raises:
        UserError: when units are missing or parts are not of this job (they are named), when the input has changed,
            and when tasks are still running.
    """
    started, console = time.monotonic(), console or _silent()
    job = dataclasses.replace(job, skip_bad_documents=True)
    manifests, already = job.finished(), True
    if manifests is None:
        if not job.work_folder.is_dir() and job.finished() is None:
            raise UserError(
                "There is nothing to join: no task has written to this folder.",
                where=str(job.output),
                remedy="Run the same command with --task I/N in place of --finalize, for every I from 0 to N-1.",
            )
        with locked(job):
            manifests = job.finished()
            if manifests is None:
                already = False
                records = collect_records(job, tasks=check_job(job))
                place_tokenizer(job)
                manifests = write_manifests(job, records)
    return _conclude(job, manifests, already, started, console)


def _write_share(
    job: Job, share: Share, alone: bool, workers: int, started: float, console: Console, cancel: Event | None
) -> TaskSummary:
    """Write the units of a share; `alone`: no other process can be writing these units."""
    enter(job, share.tasks, console)
    own = share.of(job.units)
    if alone:
        remove_temporaries(job, own)
    if not own:
        say(
            console,
            f"The input has only {counted(len(job.units), 'unit')}: compressed, csv and arrow files stay whole.",
        )
    kept = _write_units(job, own, workers, console, cancel)
    records = [record for unit in own if (record := job.record(unit))]
    splits = [split for record in records for split in record.splits.values() if split.entry]
    summary = TaskSummary(
        output=job.output,
        task=share.task,
        tasks=share.tasks,
        units=len(own),
        kept_units=kept,
        documents=sum(split.entry.documents for split in splits if split.entry),
        tokens=sum(split.entry.tokens for split in splits if split.entry),
        empty_documents=sum(record.empty_documents for record in records),
        losses=total_losses(records),
        finished_units=len(recorded_units(job)),
        all_units=len(job.units),
        elapsed_seconds=time.monotonic() - started,
    )
    print_task_summary(summary, console)
    return summary


def _write_units(job: Job, units: Sequence[Unit], workers: int, console: Console, cancel: Event | None = None) -> int:
    """Tokenize those of the units that are not finished; returns how many were."""
    remaining = [unit for unit in units if job.record(unit) is None]
    kept = len(units) - len(remaining)
    if not remaining:
        return kept
    for line in (job.describe_inputs(), *job.tokenizer_notes, *input_notes(job.inputs, job.documents, job.names)):
        say(console, line)
    size = sum(unit.size for unit in remaining)
    _announce(job, remaining, size, kept, workers, console)
    with ReadProgress(console, "Tokenizing", size) as progress:

        def show(state: dict[int, tuple[int, int]]) -> None:
            progress.update(sum(size for size, _ in state.values()), sum(tokens for _, tokens in state.values()))

        run_units([(unit, job.identity(unit)) for unit in remaining], job.work_settings(), workers, show, cancel)
    return kept


def _announce(job: Job, remaining: Sequence[Unit], size: int, kept: int, workers: int, console: Console) -> None:
    """Say from a sample how much these units will give, and check that the disk has room for the whole job's."""
    work = job.work_settings()
    losses = Losses()
    encoder = Encoder(work.tokenizer_file, job.dtype, special=job.special)
    estimate = estimate_output(remaining, work.reading, encoder, job.dtype, len(job.starts.by_mark), losses)
    again = f" {kept:,} of {counted(kept + len(remaining), 'unit')} are finished already." if kept else ""
    if estimate.tokens:
        say(
            console,
            f"Expect about {estimate.tokens:,.0f} tokens, {human_bytes(estimate.output_bytes)} of shards; "
            f"workers: {min(workers, len(remaining))}.{again}",
        )
    elif losses.refused:
        see = f"See {job.names('field')} and {job.names('format')}."
        say(console, f"No document of a sample can be read: {describe_refused(losses.refused)}. {see}")
    others = set(range(len(job.units))) - recorded_units(job) - {unit.number for unit in remaining}
    share = size / (size + sum(job.units[number].size for number in others)) if size else 1.0
    check_free_space(job.output, estimate.output_bytes / share)


def _conclude(
    job: Job, manifests: dict[str, Manifest], already: bool, started: float, console: Console
) -> PrepareSummary:
    remove_work_folder(job)
    if already:
        say(console, f"Already prepared: {job.output}")
    summary = PrepareSummary.of(job.output, job.folders, manifests, job.inputs, time.monotonic() - started, already)
    print_summary(summary, console)
    return summary


def _worker_count(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"At least one worker is needed, got {workers}.", where="--workers", remedy="Leave it out.")
    return workers or len(os.sched_getaffinity(0))


def _silent() -> Console:
    return Console(quiet=True)


@contextlib.contextmanager
def _interruptible(console: Console) -> Iterator[None]:
    """Let SIGTERM work like Ctrl-C, and let both say how to go on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's signals are its own
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. Finished units are kept: run the same command again to continue.")
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
