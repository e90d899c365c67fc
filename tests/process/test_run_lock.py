"""Who holds a run folder: a second job is refused, a dead one's lock is taken over, on one machine and on several."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.process.killable import Killable
from tests.waiting import wait_for
from trainer.errors import UserError
from trainer.runtime import run_lock
from trainer.runtime.run_lock import GUARD, RECORD, RunLock

REFUSED = "Another job trains in this run folder: "


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seconds in the place of minutes; but silence is long, for a busy machine keeps its holders waiting too."""
    for name, seconds in {"BEAT_S": 0.1, "WATCH_S": 1.5, "SILENCE_S": 60.0, "_POLL_S": 0.02, "_SETTLE_S": 0.1}.items():
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[Callable[[], RunLock]]:
    """Makes locks of tmp_path, which are released in the end."""
    made: list[RunLock] = []

    def make() -> RunLock:
        made.append(RunLock(tmp_path, print))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


def hold(run_dir: Path, variables: dict[str, str]) -> None:
    """Runs in a process of its own: take the lock, and keep it until killed."""
    os.environ.update(variables)
    run_lock.BEAT_S = 0.1
    RunLock(run_dir, print).take()
    (run_dir / "taken").touch()
    time.sleep(3600)


def hold_without_record_locks(run_dir: Path, variables: dict[str, str]) -> None:
    """The same on a file system that has none."""
    run_lock._lock = lambda _file: False
    hold(run_dir, variables)


def started(run_dir: Path, work: Callable[..., None] = hold, **variables: str) -> Killable:
    (run_dir / "taken").unlink(missing_ok=True)
    process = Killable(work, run_dir, variables)
    process.wait_until((run_dir / "taken").exists)
    assert (run_dir / "taken").exists(), "the holder has ended"
    return process


def rewrite(run_dir: Path, age_s: float = 0.0, **changes: Any) -> None:
    """Make the record that of another job, last renewed so long ago."""
    path = run_dir / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def leave_record(run_dir: Path, age_s: float = 0.0, **changes: Any) -> None:
    """What a killed job leaves."""
    with started(run_dir) as process:
        assert process.kill()
    rewrite(run_dir, age_s, **changes)


@contextmanager
def while_it_watches(run_dir: Path, act: Callable[[], object]) -> Iterator[tuple[RunLock, list[str]]]:
    """A lock, and what it says; `act` is done once it watches another machine's record."""
    said: list[str] = []
    watches = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        watches.set()

    lock = RunLock(run_dir, say)
    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(lambda: (watches.wait(), act()))
        try:
            yield lock, said
            acted.result()
        finally:
            watches.set()
            lock.release()


ELSEWHERE: dict[str, Any] = {"host": "node9", "boot": "another", "token": "other", "slurm_job": "cluster/4711"}


def test_one_holds_it_and_gives_it_back(locks: Callable[[], RunLock], tmp_path: Path) -> None:
    first = locks()
    first.take()
    assert first.notes == [] and first.lost() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [GUARD, RECORD]
    first.release()
    assert [path.name for path in tmp_path.iterdir()] == [GUARD]
    locks().take()


@pytest.mark.parametrize("work", [hold, hold_without_record_locks])
def test_a_second_job_is_refused_with_host_pid_job_and_time(
    work: Callable[..., None], locks: Callable[[], RunLock], tmp_path: Path
) -> None:
    with started(tmp_path, work, SLURM_JOB_ID="123", SLURM_CLUSTER_NAME="hpc") as process:
        record = (tmp_path / RECORD).read_text()
        with pytest.raises(UserError) as caught:
            locks().take()
        who = rf"SLURM job 123, process {process.pid} on {os.uname().nodename}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(REFUSED + who + r"\.", caught.value.problem), caught.value.problem
        assert caught.value.where == f"run.dir={tmp_path}"
        assert (tmp_path / RECORD).read_text() == record


@pytest.mark.parametrize("work", [hold, hold_without_record_locks])
def test_the_lock_of_a_killed_job_is_taken_over_at_once(
    work: Callable[..., None], locks: Callable[[], RunLock], tmp_path: Path
) -> None:
    with started(tmp_path, work) as process:
        assert process.kill()
    lock = locks()
    lock.take()
    (note,) = lock.notes
    assert note.startswith(f"took over the run folder from process {process.pid} on ")
    assert note.endswith(": its process is gone")
    assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()


def test_a_pid_that_is_used_again_or_a_zombie_is_not_the_holder(locks: Callable[[], RunLock], tmp_path: Path) -> None:
    leave_record(tmp_path, pid=os.getpid(), ticks=1)
    lock = locks()
    lock.take()
    assert lock.notes[0].endswith("its process is gone")
    lock.release()
    with subprocess.Popen(["sleep", "3600"]) as child:
        leave_record(tmp_path, pid=child.pid, ticks=run_lock._start_ticks(child.pid))
        try:
            with pytest.raises(UserError, match=f"{REFUSED}process {child.pid} on"):
                locks().take()
        finally:
            child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not collected
        locks().take()


@pytest.mark.parametrize("age_s", [0.0, 3600.0, -3600.0])
def test_another_machines_job_is_refused_at_its_first_sign_of_life_whatever_its_clock(
    age_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WATCH_S", 60.0)
    leave_record(tmp_path, age_s, **ELSEWHERE)
    start = time.monotonic()
    refused = pytest.raises(UserError, match=f"{REFUSED}SLURM job 4711, process .* on node9, since")
    with while_it_watches(tmp_path, lambda: rewrite(tmp_path, age_s - 0.3)) as (lock, said), refused:
        lock.take()
    assert time.monotonic() - start < run_lock.WATCH_S
    assert "locked by SLURM job 4711, process" in said[0]
    assert json.loads((tmp_path / RECORD).read_text())["host"] == "node9"


@pytest.mark.parametrize(
    ("silence_s", "age_s", "at_least_s"),
    [(600.0, 3600.0, 1.5), (3.0, 0.0, 3.0), (600.0, 597.5, 2.5), (3.0, -3600.0, 3.0)],
)
def test_another_machines_silent_job_is_taken_over_when_it_has_been_silent_long_enough(
    silence_s: float,
    age_s: float,
    at_least_s: float,
    locks: Callable[[], RunLock],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old ones sooner; never without looking for a while. A clock that is ahead only makes the wait the longest."""
    leave_record(tmp_path)
    monkeypatch.setattr(run_lock, "SILENCE_S", silence_s)
    start = time.monotonic()
    rewrite(tmp_path, age_s, **ELSEWHERE)
    lock = locks()
    lock.take()
    assert at_least_s <= time.monotonic() - start < 300.0
    assert re.search(r"from SLURM job 4711, .*node9.*: no sign of life for \d+ s$", lock.notes[0])


def test_another_machines_job_that_ends_while_it_is_watched_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WATCH_S", 60.0)
    leave_record(tmp_path, **ELSEWHERE)
    with while_it_watches(tmp_path, (tmp_path / RECORD).unlink) as (lock, said):
        lock.take()
    assert lock.notes == [] and len(said) == 1


def test_a_requeued_job_takes_over_from_its_earlier_start_at_once(
    locks: Callable[[], RunLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "hpc")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with started(tmp_path, SLURM_JOB_ID="123", SLURM_CLUSTER_NAME="hpc", SLURM_RESTART_COUNT="1") as process:
        lock = locks()
        lock.take()  # though that one has the record lock, as a network file system may keep it for a dead node
        assert "process " + str(process.pid) in lock.notes[0] and "requeued since, and is this one" in lock.notes[0]
        lock.release()
    mine: dict[str, Any] = {"slurm_job": "hpc/123", "restarts": 2}
    leave_record(tmp_path, **{**ELSEWHERE, **mine, "restarts": 1})
    lock = locks()
    lock.take()
    assert "requeued since" in lock.notes[0]
    lock.release()
    for other in (mine, {**mine, "slurm_job": "hpc/124", "restarts": 1}, {**mine, "slurm_job": "/123", "restarts": 1}):
        with started(tmp_path):
            rewrite(tmp_path, **other)
            with pytest.raises(UserError, match=REFUSED):
                locks().take()


def test_a_lock_that_can_be_had_proves_the_end_of_a_container_on_this_machine(
    locks: Callable[[], RunLock], tmp_path: Path
) -> None:
    container: dict[str, Any] = {"namespace": "pid:[1]", "host": "f00", "pid": 1}
    with started(tmp_path) as process:
        rewrite(tmp_path, **container)
        with pytest.raises(UserError, match=f"{REFUSED}process 1 on f00"):
            locks().take()
        process.kill()
    rewrite(tmp_path, **container)
    lock = locks()
    lock.take()
    assert lock.notes[0].endswith("it has let go of its lock")


RACERS = 4


def race(run_dir: Path, number: int) -> None:
    """Runs in a process of its own: try to take a dead job's lock where there are no record locks."""
    run_lock._lock = lambda _file: False
    (run_dir / f"ready-{number}").touch()
    while not (run_dir / "go").exists():
        time.sleep(0.0005)
    try:
        RunLock(run_dir, print).take()
        (run_dir / f"won-{number}").touch()
        while len([*run_dir.glob("won-*"), *run_dir.glob("refused-*")]) < RACERS:  # the others see it alive
            time.sleep(0.01)
    except UserError:
        (run_dir / f"refused-{number}").touch()


def test_of_several_that_take_over_without_record_locks_one_wins(tmp_path: Path) -> None:
    leave_record(tmp_path)
    racers = [Killable(race, tmp_path, number) for number in range(RACERS)]
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == RACERS, "the racers")
        (tmp_path / "go").touch()
        assert [racer.wait() for racer in racers] == [0] * RACERS
    finally:
        for racer in racers:
            racer.kill()
    assert len(list(tmp_path.glob("won-*"))) == 1 and len(list(tmp_path.glob("refused-*"))) == RACERS - 1


def test_a_record_that_somebody_removes_is_written_again_and_the_lock_holds_meanwhile(
    locks: Callable[[], RunLock], tmp_path: Path
) -> None:
    with started(tmp_path):
        before = (tmp_path / RECORD).read_bytes()
        (tmp_path / RECORD).unlink()
        with pytest.raises(UserError, match=REFUSED):
            locks().take()
        wait_for((tmp_path / RECORD).exists, "the record")
        assert (tmp_path / RECORD).read_bytes() == before


def test_a_job_that_was_silent_too_long_knows_when_another_was_there_meanwhile(
    locks: Callable[[], RunLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 600.0)  # as if suspended
    lock = locks()
    lock.take()
    mine = (tmp_path / RECORD).read_bytes()
    rewrite(tmp_path, **ELSEWHERE)
    lost = lock.lost()
    assert lost is not None and "SLURM job 4711" in lost.problem
    (tmp_path / RECORD).write_bytes(mine)
    assert lock.lost() is not None, "once is enough"
    lock.release()
    again = locks()
    again.take()
    (tmp_path / RECORD).unlink()
    assert again.lost() is None, "removed by somebody, and there was no time for another job"
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.0)
    lost = again.lost()
    assert lost is not None and "one that has ended since" in lost.problem


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}'])
def test_a_record_that_cannot_be_read_is_not_in_the_way(
    content: str, locks: Callable[[], RunLock], tmp_path: Path
) -> None:
    (tmp_path / RECORD).write_text(content)
    lock = locks()
    lock.take()
    assert lock.notes == ["took over the run folder from an earlier job: its record cannot be read"]


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_what_cannot_be_locked_is_named_and_left(kind: str, locks: Callable[[], RunLock], tmp_path: Path) -> None:
    guard = tmp_path / GUARD
    guard.mkdir() if kind == "folder" else guard.symlink_to(GUARD)
    with pytest.raises(UserError, match="is no file that can be locked") as caught:
        locks().take()
    assert str(guard) in caught.value.problem and "remove it" in caught.value.remedy
    assert guard.is_symlink() or guard.is_dir()
