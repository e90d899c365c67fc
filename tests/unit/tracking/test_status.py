"""status.json from one start to the next, and where it cannot be written or read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, DivergedError, UserError
from trainer.state import TrainState
from trainer.tracking.status import STATUS, Status, StatusWriter, change_status, read_status, settle_resume


def status_of(run_dir: Path) -> Status:
    status = read_status(run_dir)
    assert status is not None
    return status


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_a_branch_says_whose_it_is_and_its_command_goes_on_with_it(tmp_path: Path) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    branch.mkdir()
    begun, command = checkpoint_of(trunk, 4), str(checkpoint_of(trunk, 4))
    assert settle_resume(branch, command) == command, "it is to begin there"
    StatusWriter(branch, ["n1"], 1).start(TrainState(step=4), 9, begun, is_new=False, is_branch=True)
    assert status_of(branch).branch_of == str(begun)
    assert settle_resume(branch, command) == command, "nothing is saved yet"
    own = checkpoint_of(branch, 6)
    own.mkdir(parents=True)
    (own / "manifest.json").touch()
    assert {settle_resume(branch, each) for each in (command, str(trunk))} == {"auto"}
    for other in ("auto", "must", "never", str(checkpoint_of(trunk, 2)), str(own)):
        assert settle_resume(branch, other) == other
    StatusWriter(branch, ["n1"], 1).start(TrainState(step=6), 9, own, is_new=False)
    assert status_of(branch).branch_of == str(begun), "it still is"
    StatusWriter(branch, ["n1"], 1).start(TrainState(), 9, None, is_new=True)
    assert status_of(branch).branch_of == "", "begun anew it is none"


def test_a_start_that_goes_on_counts_a_restart_and_one_that_does_not_counts_none(tmp_path: Path) -> None:
    first = StatusWriter(tmp_path, ["n1", "n2"], 4)
    assert status_of(tmp_path).state == "starting"
    first.start(TrainState(), 20, None, is_new=False)
    first.progress(state="training", step=5)
    first.ended(EXIT_STOPPED_AFTER_SAVING, "SIGUSR1", TrainState(step=7, samples=70, tokens=700))
    stopped = status_of(tmp_path)
    assert (stopped.state, stopped.reason, stopped.step, stopped.tokens) == ("stopped", "SIGUSR1", 7, 700)
    assert (stopped.restarts, stopped.nodes, stopped.world_size) == (0, ("n1", "n2"), 4)

    second = StatusWriter(tmp_path, ["n3"], 2)
    second.start(TrainState(step=7), 20, checkpoint_of(tmp_path, 7), is_new=False)
    second.ended(EXIT_FINISHED, "")
    finished = status_of(tmp_path)
    assert (finished.state, finished.reason, finished.restarts) == ("finished", "", 1)
    assert (finished.last_checkpoint, finished.nodes) == ("step-00000007", ("n3",))

    content = (tmp_path / STATUS).read_bytes()
    StatusWriter(tmp_path, ["n4"], 2).take_back()
    assert (tmp_path / STATUS).read_bytes() == content, "there was nothing to do"

    StatusWriter(tmp_path, ["n1"], 2).start(TrainState(), 20, None, is_new=True)
    assert status_of(tmp_path).restarts == 0


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (UserError("a key is wrong", where="x", remedy="y"), "failed", "a key is wrong"),
        (DivergedError("losses are not finite"), "diverged", "losses are not finite"),
        (ValueError("no such value"), "failed", "ValueError: no such value"),
        (KeyboardInterrupt(), "stopped", "a second Ctrl-C: at once, without saving"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_run_is_its_reason(error: BaseException, state: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), StatusWriter(tmp_path, ["n1"], 1).until_the_end():
        raise error
    status = status_of(tmp_path)
    assert (status.state, status.reason) == (state, reason)


def test_one_line_says_that_a_run_does_not_start(tmp_path: Path) -> None:
    change_status(tmp_path, state="failed", reason="no progress in 3 restarts")
    StatusWriter(tmp_path, ["n1"], 1).start(TrainState(step=4), 9, checkpoint_of(tmp_path, 4), is_new=False)
    change_status(tmp_path, state="failed", reason="no progress in 4 restarts")
    status = status_of(tmp_path)
    assert (status.state, status.reason, status.step) == ("failed", "no progress in 4 restarts", 4)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"step": 3, "nodes": 7}'])
def test_a_status_that_cannot_be_understood_is_none(content: str, tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / STATUS).write_text(content)
    assert read_status(tmp_path) is None


def test_a_later_versions_field_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text('{"state": "training", "step": 3, "colour": "red"}')
    assert status_of(tmp_path).step == 3


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = StatusWriter(folder, ["n1"], 1)
    (folder / STATUS).unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        writer.set(state="saving")
        change_status(folder, state="failed")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert STATUS in caplog.text
