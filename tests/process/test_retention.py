"""What is kept, what is removed, and whether one more checkpoint fits."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.damage import DAMAGES
from tests.ranks import FORK_SERVER
from tests.unit.checkpoint.checkpoint_folders import RECORDS, write_checkpoint
from trainer.checkpoint.find import Candidate, candidates
from trainer.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest, step_folder, write_manifest
from trainer.checkpoint.retention import (
    LEAST_VALID,
    best_so_far,
    estimated_bytes,
    expendable,
    is_complete,
    is_sound,
    prepare_folder,
    remove,
    too_little_space,
)
from trainer.config import CheckpointConfig
from trainer.errors import UserError

MANIFEST = CheckpointManifest(**vars(RECORDS), state={"step": 0}, files={"a": (1, "")})


def steps(folders: list[Path]) -> list[int]:
    return [int(folder.name[5:]) for folder in folders]


@given(
    found=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), unique_by=lambda one: one[0]),
    keep_last=st.integers(1, 5),
    every=st.none() | st.integers(1, 8),
    pinned=st.sets(st.integers(1, 60), max_size=2),
)
def test_what_is_kept_for_any_folder(
    found: list[tuple[int, bool, bool]], keep_last: int, every: int | None, pinned: set[int]
) -> None:
    """(step, its manifest can be read, its files are whole) of each checkpoint."""
    found.sort(reverse=True)
    listed = [Candidate(Path(f"step-{step}"), step, MANIFEST if readable else None) for step, readable, _ in found]
    valid = {step for step, readable, whole in found if readable and whole}
    removed = steps(
        expendable(
            listed,
            CheckpointConfig(keep_last=keep_last, keep_every_steps=every),
            [Path(f"step-{step}") for step in pinned],
            lambda candidate: candidate.step in valid,
        )
    )
    kept = valid - set(removed)
    newest = sorted(valid)[-max(keep_last, 2) :]
    assert kept >= set(newest), "the last few valid ones"
    assert len(kept) >= min(LEAST_VALID, len(valid))
    assert not pinned & set(removed)
    assert not every or all(step % every for step in removed)
    assert not set(removed) & {step for step, readable, _ in found if not readable}, "not ours to remove"
    if len(newest) == max(keep_last, 2):
        assert all(step < newest[0] for step in removed)
        old = {step for step in valid if step < newest[0]} - pinned - {s for s in valid if every and s % every == 0}
        assert old <= set(removed), "nothing is kept without a reason"
    else:
        assert not removed


def test_the_best_checkpoint_is_the_newest_whole_one_whose_own_evaluation_was_the_best(tmp_path: Path) -> None:
    for step, best in ((1, None), (2, 2), (3, 3), (4, 3), (5, 5), (6, 5)):
        write_checkpoint(tmp_path, step, best_step=best, best_loss=None if best is None else 9.0 - best)
    found = candidates(tmp_path)
    assert best_so_far(found, is_complete) == step_folder(tmp_path / "checkpoints", 5)
    (tmp_path / "checkpoints/step-00000005/weights.pt").unlink()
    assert best_so_far(found, is_complete) == step_folder(tmp_path / "checkpoints", 3), "5 cannot be used"
    assert best_so_far(found[-1:], is_complete) is None, "step 1 was not evaluated, or by an older version"


def test_a_damaged_checkpoint_does_not_count_among_the_kept_ones(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    DAMAGES["truncated"](tmp_path / "checkpoints/step-00000006/weights.pt")
    DAMAGES["deleted"](tmp_path / "checkpoints/step-00000004/sub/config.json")
    DAMAGES["empty"](tmp_path / "checkpoints/step-00000001/weights.pt")
    found = candidates(tmp_path)
    assert [is_complete(candidate) for candidate in found] == [False, True, False, True, True, False]
    doomed = expendable(found, CheckpointConfig(keep_last=1), [], is_complete)
    assert steps(doomed) == [2, 1], "5 and 3 are the newest two that are whole"


def test_leftovers_are_removed_and_told(tmp_path: Path) -> None:
    assert prepare_folder(tmp_path) == [], "no checkpoints yet"
    folder = write_checkpoint(tmp_path, 3)
    left = folder.with_name(".tmp-step-00000004")
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "weights.pt").write_bytes(bytes(3 << 20))
    os.rename(write_checkpoint(tmp_path, 2), folder.with_name(".tmp-step-00000002-removed"))
    lines = prepare_folder(tmp_path)
    assert [line.split(" of a checkpoint")[0] for line in lines] == [
        "removed .tmp-step-00000002-removed, 0.0 MiB",
        "removed .tmp-step-00000004, 3.0 MiB",
    ]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    remove(folder)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def as_nobody(run_dir: Path) -> None:
    """Runs in a process of its own: root may write anywhere."""
    os.chdir(run_dir)  # the folders above may be closed to others
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    with pytest.raises(UserError, match=r"^Cannot write to the run folder: checkpoints: Permission denied\.") as caught:
        prepare_folder(Path())
    assert caught.value.where == "run.dir=."


def test_a_folder_of_checkpoints_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").chmod(0o555)
    process = FORK_SERVER.Process(target=as_nobody, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_the_first_save_is_measured_against_the_model_and_later_ones_against_the_last(tmp_path: Path) -> None:
    small = replace(RECORDS, model={"parameters": 1000})
    huge = replace(RECORDS, model={"parameters": 10**15})
    assert too_little_space(tmp_path, small) == ""
    problem = too_little_space(tmp_path, huge)
    numbers = rf"[\d,]+ MiB are free in {tmp_path}, one should take {14 * 10**15 / 2**20:,.0f} MiB"
    assert re.fullmatch(numbers, problem), problem
    write_checkpoint(tmp_path, 1)
    assert too_little_space(tmp_path, huge) == "", "what the last one took is known, and better than an estimate"
    frozen = replace(RECORDS, model={"parameters": 10**15, "frozen": 10**14})
    assert too_little_space(tmp_path, frozen), "but it says nothing of one whose state is larger or smaller"


@pytest.mark.parametrize(("stage", "precision", "expected"), [(0, "fp32", 12), (1, "fp32", 16), (2, "bf16", 14)])
def test_bytes_a_parameter(stage: int, precision: str, expected: int) -> None:
    records = replace(RECORDS, model={"parameters": 7}, layout={"stage": stage, "precision": precision})
    assert estimated_bytes(records) == 7 * expected
    assert estimated_bytes(replace(records, model={"parameters": 7, "frozen": 3})) == 4 * expected + 3 * 4


def test_a_checkpoint_saved_while_steps_were_skipped_pushes_no_other_out(tmp_path: Path) -> None:
    """Stopped and resumed among skipped steps, a run keeps what a rollback needs: those from before them."""
    for step in (4, 8, 10, 12):
        folder = write_checkpoint(tmp_path, step)
        manifest = read_checkpoint_manifest(folder)
        skipped = {"skipped_in_a_row": max(0, step - 8)}
        write_manifest(folder, replace(manifest, state={**manifest.state, **skipped}))
    found = candidates(tmp_path)
    assert [candidate.step for candidate in found if is_sound(candidate)] == [8, 4]
    assert expendable(found, CheckpointConfig(keep_last=2), (), is_sound) == []
