"""Who is behind, how long a phase may take, and what a heartbeat file holds."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.waiting import TIMEOUT_S, wait_for
from trainer.config import WatchdogConfig
from trainer.errors import EXIT_UNEXPECTED, HangError
from trainer.liveness.activity import Activity
from trainer.liveness.heartbeat import (
    Heartbeat,
    heartbeat_path,
    interval_seconds,
    read_heartbeat,
    read_heartbeats,
    remove_others,
)
from trainer.liveness.watch import watched
from trainer.liveness.watchdog import UNLIMITED, Limits, find_behind, hang_error


def heartbeat(rank: int, beat: int = 5, position: int = 20, phase: str = "step") -> Heartbeat:
    return Heartbeat(rank, 0.0, beat, 1.0, 7, phase, position, 0.0, f"n{rank}", f"host{rank}", 100 + rank)


def look(*beats: Heartbeat) -> dict[int, Heartbeat]:
    return {beat.rank: beat for beat in beats}


def later(*beats: Heartbeat) -> dict[int, Heartbeat]:
    return look(*(replace(beat, beat=beat.beat + 2) for beat in beats))


def test_a_silent_rank_is_named_whatever_it_last_said_and_whatever_its_clock() -> None:
    alive, silent = heartbeat(0), heartbeat(1, position=99)
    found = find_behind(look(alive, silent), {**later(alive), 1: silent}, 2)
    assert [behind.rank for behind in found] == [1]
    assert "rank 1 (node n1, process 101, phase step, step 7), which gives no sign of life any more" in found[0].why


def test_a_rank_that_has_not_come_as_far_as_the_others_is_named() -> None:
    ranks = heartbeat(0), heartbeat(1, position=19, phase="data"), heartbeat(2)
    found = find_behind(look(*ranks), later(*ranks), 3)
    assert [behind.why for behind in found] == ["rank 1 (node n1, process 101, phase data, step 7)"]


def test_a_rank_that_has_ended_or_never_came_is_named() -> None:
    here, ended = heartbeat(0), heartbeat(1, phase="ended", position=30)
    found = find_behind(look(here, ended), {**later(here), 1: ended}, 3)
    assert [behind.rank for behind in found] == [1, 2]
    assert "has ended" in found[0].why and "no sign of life at all" in found[1].why


def test_nobody_is_named_when_all_stand_at_one_place_or_nothing_can_be_read() -> None:
    ranks = heartbeat(0), heartbeat(1)
    assert find_behind(look(*ranks), later(*ranks), 2) == []
    assert find_behind({}, {}, 2) == []


def test_the_message_names_phase_key_and_few_of_many_ranks(tmp_path: Path) -> None:
    activity = Activity()
    activity.enter("save")
    found = find_behind(look(heartbeat(0)), later(heartbeat(0)), 10)
    error = hang_error(activity.place, 61.2, found, tmp_path, rank=0)
    assert error.exit_code == EXIT_UNEXPECTED, "a hang is not requeued"
    assert "No progress in phase 'save' for 61 s" in error.problem
    assert "rank 1 (" in error.problem and "rank 4 (" in error.problem and "and 5 more" in error.problem
    assert "watchdog.save_minutes" in error.remedy and "rank-00001.log" in error.remedy
    assert "rank-00000.log" in error.where


def test_limits_are_those_of_the_config_and_a_start_may_take_longer_in_any_phase() -> None:
    limits = Limits.of(WatchdogConfig(start_minutes=60, data_minutes=1, step_minutes=2, save_minutes=90))
    assert limits.of_phase("step", is_started=True) == 120
    assert limits.of_phase("step", is_started=False) == 3600, "the first step compiles"
    assert limits.of_phase("save", is_started=False) == 5400
    assert limits.of_phase("prepare", is_started=False) is None, "raw text takes as long as it takes"
    assert limits.of_phase("ended", is_started=True) is None
    assert Limits.of(WatchdogConfig(start_minutes=None)).of_phase("step", is_started=False) is None


def test_a_new_shape_in_a_compiled_model_may_take_as_long_as_a_start() -> None:
    """Gpu S18: each phase's first step, and the first evaluation, compile again."""
    activity = Activity()
    activity.compiles((8, 128))
    activity.at_step(1)
    activity.compiles((8, 128))
    assert activity.is_started, "it has been compiled"
    activity.compiles((2, 512))
    assert not activity.is_started
    activity.at_step(2)
    activity.compiles("evaluation")
    assert not activity.is_started


def test_collectives_time_out_after_the_watchdog_and_sooner_once_a_run_has_started() -> None:
    limits = Limits.of(WatchdogConfig())
    assert limits.of_decisions > timedelta(minutes=60)
    assert limits.of_gradients == timedelta(minutes=35) < limits.of_start
    assert Limits.of(WatchdogConfig(data_minutes=None)).of_decisions == UNLIMITED


def test_progress_of_other_kinds_than_a_new_step_counts(tmp_path: Path) -> None:
    given_up: list[HangError] = []
    activity = Activity()
    settings = WatchdogConfig(start_minutes=3.0 / 60)
    with watched(tmp_path, 0, 1, activity, settings, lambda error, _: given_up.append(error)):
        for _ in range(45):
            time.sleep(0.1)
            activity.progress()
        assert given_up == []


def test_a_phase_without_progress_is_given_up_by_the_first_rank_that_knows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given_up = threading.Event()
    seen: list[tuple[HangError, bool]] = []

    def give_up(error: HangError, is_first: bool) -> None:
        seen.append((error, is_first))
        given_up.set()

    activity = Activity()
    with watched(tmp_path, 0, 1, activity, WatchdogConfig(start_minutes=0.2 / 60), give_up):
        assert given_up.wait(TIMEOUT_S)
    error, is_first = seen[0]
    assert "No progress in phase 'start'" in error.problem and "No rank is behind" in error.problem
    assert is_first
    stacks = capfd.readouterr().err
    assert "most recent call first" in stacks and __file__ in stacks, "the main thread's, too"


def test_a_heartbeat_says_where_its_rank_stands_and_the_last_one_that_it_has_ended(tmp_path: Path) -> None:
    activity = Activity()
    activity.enter("data")
    activity.at_step(12)
    (tmp_path / "heartbeats").mkdir()
    for rank in (0, 1, 7):
        heartbeat_path(tmp_path, rank).write_text("x" * 4000)
    with watched(tmp_path, 0, 2, activity, WatchdogConfig(), lambda *_: None):
        wait_for(lambda: read_heartbeat(tmp_path, 0) is not None, "a heartbeat")
        found = read_heartbeat(tmp_path, 0)
        assert found is not None
        assert (found.rank, found.step, found.phase, found.pid) == (0, 12, "data", os.getpid())
        assert abs(found.time - time.time()) < TIMEOUT_S and found.interval_seconds == interval_seconds(2) == 1.0
    last = read_heartbeat(tmp_path, 0)
    assert last is not None and last.phase == "ended" and last.beat > found.beat
    assert not heartbeat_path(tmp_path, 7).exists(), "of an earlier start with more ranks"
    assert read_heartbeats(tmp_path, range(8)).keys() == {0}, "what cannot be read is left out"
    remove_others(tmp_path, 0)
    assert list((tmp_path / "heartbeats").iterdir()) == []


def test_thousands_of_ranks_write_a_hundred_heartbeats_a_second() -> None:
    assert 4096 / interval_seconds(4096) == pytest.approx(100)
