"""Preparation as several tasks: shares, kills at any time, locks."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_text
from tests.gate import record_gate, wait_before_records
from tests.preparing import UNIT_BYTES, folder_hashes, quiet_console, read_token_documents, records
from tests.process.killable import Killable
from tests.unit.tools.test_readers import write_rows
from tools.prepare import Job, PrepareOptions, finalize_job, open_job, prepare_job, prepare_task
from tools.prepare.locks import locked, locked_units
from tools.prepare.share import Share, choose_share
from tools.prepare.work_folder import JOB_FILE
from trainer.errors import UserError


def run_tasks(arguments: dict, tasks: list[Share], workers: int) -> None:
    """Run tasks one after the other, in this process."""
    import tools.prepare.plan

    tools.prepare.plan.MINIMUM_UNIT_BYTES = UNIT_BYTES
    job = open_job(**arguments)
    for share in tasks:
        prepare_task(job, share.task, share.tasks, workers)


def run_tasks_in_part(arguments: dict, tasks: list[Share], workers: int, folder: Path, limit: int) -> None:
    """The same, but not to its end: units wait when so many are finished."""
    folder.mkdir()
    os.environ |= record_gate(folder, limit)
    wait_before_records(limit)
    run_tasks(arguments, tasks, workers)


def all_tasks(count: int) -> list[Share]:
    return [Share(task, count) for task in range(count)]


def arguments_of(job: Job, tokenizer: Path, **options) -> dict:
    paths = [file.path for file in job.inputs.files]
    return {
        "inputs": paths,
        "tokenizer": str(tokenizer),
        "output": str(job.output),
        "options": PrepareOptions(**options),
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, list[str]]:
    """An uninterrupted plain run with a held-out split, and its inputs."""
    folder = tmp_path_factory.mktemp("clean")
    for name, documents in (("a", 1200), ("b", 300)):
        write_text(folder / f"{name}.txt", documents, seed=documents)
    (folder / "empty.txt").write_text("")
    inputs = [str(path) for path in sorted(folder.glob("*.txt"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", UNIT_BYTES)
        prepare_job(open_job(inputs, str(tokenizer), str(folder / "data"), PrepareOptions(validation_fraction=0.1)))
    return folder / "data", inputs


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_tasks_killed_at_any_time_give_the_bytes_of_a_clean_run(
    tmp_path: Path, tokenizer: Path, clean, units, tasks: int, workers: int
) -> None:
    generator = random.Random(tasks * 10 + workers)
    expected, inputs = clean
    arguments = {
        "inputs": inputs,
        "tokenizer": str(tokenizer),
        "output": str(tmp_path / "data"),
        "options": PrepareOptions(validation_fraction=0.1),
    }
    job = open_job(**arguments)
    assert len(job.units) >= 16

    limit = len(job.units) - 2  # none of them ends before the kill
    for wanted in sorted(generator.sample(range(len(job.units) - 2), 2)):
        part = (arguments, all_tasks(tasks), workers, tmp_path / f"to-{wanted}", limit)
        with Killable(run_tasks_in_part, *part) as process:
            process.wait_until(lambda wanted=wanted: len(records(job)) > wanted)
            time.sleep(generator.uniform(0.0, 0.03))
            assert process.kill()
    finished = {name: (job.work_folder / name).stat().st_mtime_ns for name in records(job)}
    # The rest with another number of tasks.
    with Killable(run_tasks, arguments, all_tasks(tasks + 1), workers) as process:
        assert process.wait() == 0
    kept = {name: (job.work_folder / name).stat().st_mtime_ns for name in finished}
    finalize_job(job)

    assert kept == finished, "a finished unit was written again"
    assert folder_hashes(tmp_path / "data") == folder_hashes(expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text.txt", {"documents": "line"}),
        ("text.txt", {"documents": "paragraph"}),
        ("rows.jsonl", {}),
        ("rows.parquet", {}),
    ],
)
def test_one_large_file_spreads_over_all_tasks(tmp_path: Path, make_job, units, name: str, options: dict) -> None:
    paragraphs = write_text(tmp_path / "source", documents=900, seed=1).read_text().strip().split("\n\n")
    paragraphs[5] = "a literal <mask> and </s> in the text"
    if name == "text.txt":
        (tmp_path / name).write_text("\n\n".join(paragraphs))
    else:
        write_rows(tmp_path / name, paragraphs, row_group_size=50)
    prepare_job(make_job([tmp_path / name], tmp_path / "plain", **options))
    job = make_job([tmp_path / name], tmp_path / "tasks", **options)

    written = [prepare_task(job, task, 2, workers=1) for task in range(2)]
    finalize_job(job)

    assert all(summary and summary.tokens > 0 for summary in written)
    assert sum(summary.documents for summary in written if summary) == 900
    assert folder_hashes(tmp_path / "tasks") == folder_hashes(tmp_path / "plain")
    assert all(min(ids) > 4 for ids in read_token_documents(tmp_path / "tasks"))


def test_a_document_longer_than_many_units_is_one_document(tmp_path: Path, make_job, units) -> None:
    """What stands for a document of 2³¹ tokens: units inside it hold nothing and do not read it."""
    text = write_text(tmp_path / "source", documents=900, seed=1).read_text().replace("\n", " ").strip()
    (tmp_path / "long.txt").write_text(f"before\n\n{text}\n\nafter\n")
    (tmp_path / "alone.txt").write_text(text)
    prepare_job(make_job([tmp_path / "alone.txt"], tmp_path / "alone", documents="file"))
    (alone,) = read_token_documents(tmp_path / "alone")
    hashes = []
    for documents in ("line", "paragraph"):
        for tasks in (1, 3):
            job = make_job([tmp_path / "long.txt"], tmp_path / f"{documents}-{tasks}", documents=documents)
            run = [prepare_task(job, task, tasks, workers=1) for task in range(tasks)]
            summary = finalize_job(job)
            _, found, _ = read_token_documents(job.output)
            assert found == alone
            assert summary.splits["train"].longest_document_tokens == len(alone)
            assert len(job.units) > 5 and sum(part.documents for part in run if part) == 3
            hashes.append(folder_hashes(job.output))
    assert hashes[0] == hashes[1] and hashes[2] == hashes[3]


def hold(lock: str, arguments: dict, task: Share | None, held: str) -> None:
    """Hold a lock of a job until killed; makes the file `held` when it has it."""
    import tools.prepare.plan

    tools.prepare.plan.MINIMUM_UNIT_BYTES = UNIT_BYTES
    job = open_job(**arguments)
    job.output.mkdir(exist_ok=True)
    with locked(job) if lock == "all" else locked_units(job, task.of(job.units) if task else ()):
        Path(held).touch()
        signal.pause()


def test_who_may_work_at_the_same_time(tmp_path: Path, tokenizer: Path, make_job, units) -> None:
    path = write_text(tmp_path / "text.txt", documents=600, seed=1)
    job = make_job([path], tmp_path / "data")
    arguments, held = arguments_of(job, tokenizer), tmp_path / "held"

    def while_held(lock: str, task: Share | None, check: Callable[[], None]) -> None:
        held.unlink(missing_ok=True)
        with Killable(hold, lock, arguments, task, str(held)) as process:
            process.wait_until(held.exists)
            assert held.exists()
            check()
            assert process.kill()

    def a_task_runs() -> None:
        for act in (prepare_job, finalize_job):
            with pytest.raises(UserError, match="Another prepare, or a task of one, is writing"):
                act(job)
        with pytest.raises(UserError, match=r"Another process is writing \d+ units of this task: 0, 3, "):
            prepare_task(job, 0, 3)
        with pytest.raises(UserError, match="is writing"):
            prepare_task(job, 3, 4)  # another number of tasks, units in common
        assert prepare_task(job, 1, 3) and prepare_task(job, 2, 3)

    def all_of_it_runs() -> None:
        with pytest.raises(UserError, match="Another prepare"):
            prepare_job(job)
        with pytest.raises(UserError, match="without --task, or with --finalize"):
            prepare_task(job, 0, 3)

    while_held("task", Share(0, 3), a_task_runs)
    while_held("all", None, all_of_it_runs)
    prepare_task(job, 0, 3)
    finalize_job(job)
    assert prepare_task(job, 0, 3) is None, "already prepared"


@pytest.mark.parametrize("act", [prepare_job, lambda job: prepare_task(job, 0, 1), finalize_job])
def test_a_job_that_another_process_ends_meanwhile_is_left_as_it_is(
    tmp_path: Path, make_job, units, monkeypatch: pytest.MonkeyPatch, act
) -> None:
    path = write_text(tmp_path / "text.txt", documents=100, seed=1)
    job, other = make_job([path], tmp_path / "data"), make_job([path], tmp_path / "data")
    prepare_task(other, 0, 1)
    finished, ended = Job.finished, []

    def end_after_the_first_look(self: Job) -> dict | None:
        found = finished(self)
        if self is not other and not ended:
            ended.append(prepare_job(other))
            ended.append(folder_hashes(job.output))
        return found

    monkeypatch.setattr(Job, "finished", end_after_the_first_look)
    result = act(job)
    assert result is None or result.already_prepared
    assert folder_hashes(job.output) == ended[1]


def run_without_locks(arguments: dict, task: Share, ready: str) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.lockf = no_locks
    Path(ready).touch()
    while len(list(Path(ready).parent.glob("ready-*"))) < 2:
        time.sleep(0.001)
    run_tasks(arguments, [task], workers=1)


def test_without_locks_two_writers_of_a_unit_do_not_mix(tmp_path: Path, tokenizer: Path, make_job, units) -> None:
    path = write_text(tmp_path / "text.txt", documents=600, seed=1)
    job = make_job([path], tmp_path / "data")
    arguments = arguments_of(job, tokenizer)
    with (
        Killable(run_without_locks, arguments, Share(0, 1), str(tmp_path / "ready-0")) as first,
        Killable(run_without_locks, arguments, Share(0, 1), str(tmp_path / "ready-1")) as second,
    ):
        assert (first.wait(), second.wait()) == (0, 0)
    finalize_job(job)
    prepare_job(make_job([path], tmp_path / "clean"))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def finalize_and_die(arguments: dict, moment: str) -> None:
    """Join, and be killed at a moment: between two manifests, or half through the work folder."""
    import tools.prepare.finalize
    import tools.prepare.plan

    tools.prepare.plan.MINIMUM_UNIT_BYTES = UNIT_BYTES
    replace, remove = tools.prepare.finalize.replace_synced, tools.prepare.finalize.shutil.rmtree

    def write_and_die(*given: object) -> None:
        replace(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    def remove_and_die(folder: Path, **options: bool) -> None:
        if not (folder / JOB_FILE).exists():  # something in the work folder
            return remove(folder, **options)
        remove(folder / "scratch", ignore_errors=True)
        (folder / JOB_FILE).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "manifests":
        tools.prepare.finalize.replace_synced = write_and_die
    else:
        tools.prepare.finalize.shutil.rmtree = remove_and_die
    finalize_job(open_job(**arguments))


def test_a_copy_of_the_tokenizer_that_was_damaged_between_two_tasks_is_written_anew(
    tmp_path: Path, make_job, units
) -> None:
    write_text(tmp_path / "text.txt", 300, seed=5)
    job = make_job([tmp_path / "text.txt"], tmp_path / "data")
    prepare_task(job, 0, 2)
    copy = {path.name: path.read_bytes() for path in job.tokenizer_folder.iterdir()}
    path = job.tokenizer_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "mask_token": settings["pad_token"]}))  # the ids of text are the same
    prepare_task(job, 1, 2)
    finalize_job(job)
    assert {path.name: path.read_bytes() for path in job.tokenizer_folder.iterdir()} == copy


@pytest.mark.parametrize("moment", ["manifests", "work folder"])
def test_a_joining_that_is_killed_is_done_again(tmp_path: Path, tokenizer: Path, make_job, units, moment: str) -> None:
    path = write_text(tmp_path / "text.txt", documents=300, seed=1)
    job = make_job([path], tmp_path / "data", validation_fraction=0.2)
    prepare_task(job, 0, 1)
    (job.output / "train" / ".shard-00001.tok.0123456789ab.tmp").write_bytes(b"left by a killed writer")
    arguments = arguments_of(job, tokenizer, validation_fraction=0.2)
    with Killable(finalize_and_die, arguments, moment) as process:
        assert process.wait() == -signal.SIGKILL
    assert job.work_folder.exists()
    assert len(list(job.output.glob("*/manifest.json"))) == (1 if moment == "manifests" else 2)
    summary = finalize_job(job)

    assert summary.already_prepared == (moment == "work folder")
    prepare_job(make_job([path], tmp_path / "clean", validation_fraction=0.2))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_nothing_is_printed_without_a_console(tmp_path: Path, make_job, units, capfd) -> None:
    job = make_job([write_text(tmp_path / "text.txt", documents=300, seed=1)], tmp_path / "data")
    for task in range(2):
        prepare_task(job, task, 2, workers=1)
    summary = finalize_job(job)
    finalize_job(job)
    assert capfd.readouterr() == ("", "")
    assert summary.documents == 300


def test_a_task_says_what_it_did_and_what_comes_next(tmp_path: Path, make_job, units) -> None:
    job = make_job([write_text(tmp_path / "text.txt", documents=300, seed=1)], tmp_path / "data")
    said = []
    for task in range(2):
        console = quiet_console()
        prepare_task(job, task, 2, workers=1, console=console)
        said.append(console.file.getvalue())
    count = len(job.units)
    assert f"Task 0/2: {(count + 1) // 2} units, " in said[0]
    assert f"{(count + 1) // 2} of {count} units are written. When all tasks have ended, join them" in said[0]
    assert f"All {count} units are written, join them: the same command with --finalize" in said[1]
    console = quiet_console()
    prepare_task(job, 60, 61, workers=1, console=console)
    assert f"The input has only {count} units" in console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("3/3", "There is no task 3/3."),
        ("0/0", "There is no task 0/0."),
        ("a/b", "'a/b' is no task."),
        ("1", "'1' is no task."),
        ("-1/3", "'-1/3' is no task."),
        ("1/2/3", "'1/2/3' is no task."),
    ],
)
def test_a_task_that_cannot_be_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_share(text, finalize=False, environ={})
    assert caught.value.problem == problem
    assert caught.value.where == f"--task {text}" and "--task" in caught.value.remedy + caught.value.where


def test_a_share_is_chosen_from_options_or_the_job_array() -> None:
    def array(number: int, count: int, first: int, last: int, step: int = 1) -> dict[str, str]:
        names = ("ID", "COUNT", "MIN", "MAX", "STEP")
        return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, (number, count, first, last, step), strict=True)}

    assert choose_share("2/8", False, {}) == Share(2, 8)
    assert choose_share(None, False, {}) is None
    assert choose_share(None, False, array(3, 8, 0, 7)) == Share(3, 8)
    assert choose_share(None, False, array(9, 3, 5, 9, 2)) == Share(2, 3)
    assert choose_share("0/1", False, array(3, 8, 0, 7)) == Share(0, 1)
    assert choose_share(None, True, array(3, 8, 0, 7)) is None
    with pytest.raises(UserError, match="not evenly spaced"):
        choose_share(None, False, array(1, 3, 0, 5))
    with pytest.raises(UserError, match="exclude each other"):
        choose_share("0/2", True, {})
