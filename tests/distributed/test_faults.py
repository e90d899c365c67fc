"""A rank that dies, or cannot write, at any moment of a save: the checkpoint before it, or the new one, is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_points import (
    FULL_AT_BYTES,
    Fault,
    Swap,
    at_save,
    die_in_the_file,
    fill_the_disk,
    free_space,
    kill,
    no_space_left,
)
from tests.faults import assert_all_ranks_say, assert_resumes, train_with, whole_checkpoints, with_dropout
from tests.ranks import losses, train
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

STEPS = 14
SAVES = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 4, "keep_last": 2}}


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run of 14 steps on 2 ranks."""
    config = with_dropout(workspace, tmp_path_factory.mktemp("clean"), **SAVES)
    assert train(config, 2) == EXIT_FINISHED
    return config


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["before its first file", "in its optimizer file", "after its optimizer file"])
def test_a_rank_killed_in_a_save_costs_that_save_alone(
    moment: str, rank: int, clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = with_dropout(workspace, tmp_path, **SAVES)
    action = die_in_the_file if moment == "in its optimizer file" else kill
    outcome = train_with(config, Fault(rank, at_save(moment, 8), action))
    assert outcome.codes[rank] < 0 < outcome.codes[1 - rank], "one was killed, the other fails"
    assert whole_checkpoints(tmp_path) == [4]
    unfinished = tmp_path / "checkpoints" / ".tmp-step-00000008"
    assert unfinished.is_dir() and not (unfinished / "manifest.json").exists()
    own = unfinished / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    if moment == "before its first file":
        assert not own.exists()
    elif moment == "in its optimizer file":
        assert own.stat().st_size == FULL_AT_BYTES, "cut off in its middle"
    else:
        assert own.stat().st_size > FULL_AT_BYTES
    assert_resumes(config, clean, "resuming from step-00000004")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_it_saves_in_the_background_costs_what_came_after_the_last_checkpoint(
    rank: int, clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = with_dropout(workspace, tmp_path, **{**SAVES, "checkpoint": {**SAVES["checkpoint"], "async": True}})
    outcome = train_with(config, Fault(rank, at_save("in its optimizer file", 8), die_in_the_file))
    assert outcome.codes[rank] < 0 < outcome.codes[1 - rank]
    assert whole_checkpoints(tmp_path) == [4]
    assert_resumes(config, clean, "resuming from step-00000004")


@pytest.mark.parametrize(
    ("moment", "step", "expected"),
    [
        ("before the manifest", 8, [4]),
        ("between manifest and rename", 8, [4]),
        ("between rename and latest", 8, [8, 4]),
        ("before latest is replaced", 8, [8, 4]),
        ("after latest", 8, [8, 4]),
        ("in the removal of an old one", 12, [12, 8]),
    ],
)
def test_a_kill_around_the_commit_leaves_the_old_checkpoint_or_the_new_one(
    moment: str, step: int, expected: list[int], clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = with_dropout(workspace, tmp_path, **SAVES)
    outcome = train_with(config, Fault(0, at_save(moment, step), kill))
    assert outcome.codes[0] < 0 < outcome.codes[1]
    assert whole_checkpoints(tmp_path) == expected
    latest = (tmp_path / "checkpoints" / "latest").read_text()
    assert latest == f"step-{8 if moment == 'after latest' else 12 if step == 12 else 4:08d}"
    assert_resumes(config, clean, f"resuming from step-{expected[0]:08d}")


def cannot_write(moment: str, run_dir: Path) -> list[Fault]:
    """Faults that let the save at step 8 fail, and what frees the disk after it."""
    checkpoints = run_dir / "checkpoints"
    next_save = (("mkdir", r"/\.tmp-step-00000012$"),)
    if moment == "folder not writable":
        points = (("mkdir", r"/\.tmp-step-00000008$"),), next_save
        return [Fault(0, points[0], Swap(checkpoints)), Fault(0, points[1], Swap(checkpoints, back=True))]
    if moment.startswith("disk full in the optimizer file of rank"):
        rank = int(moment[-1])
        freed = at_save("in its optimizer file", 12) if rank else next_save
        return [Fault(rank, at_save("in its optimizer file", 8), fill_the_disk), Fault(rank, freed, free_space)]
    if moment == "disk full in the files beside them":
        start = (("mkdir", r"/\.tmp-step-00000008$"),)
        return [Fault(0, start, fill_the_disk), Fault(0, next_save, free_space)]
    return [Fault(0, at_save(moment, 8), no_space_left)]


@pytest.mark.parametrize(
    ("moment", "where"),
    [
        ("disk full in the optimizer file of rank 0", "rank 0: [Errno 27] File too large"),
        ("disk full in the optimizer file of rank 1", "rank 1: [Errno 27] File too large"),
        ("disk full in the files beside them", "rank 0: "),
        ("before the manifest", "rank 0: [Errno 28] No space left on device"),
        ("between manifest and rename", "rank 0: [Errno 28] No space left on device"),
        ("folder not writable", "rank 0: [Errno 20] Not a directory"),
    ],
)
def test_a_save_that_cannot_be_written_fails_on_all_ranks_and_training_goes_on(
    moment: str, where: str, clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = with_dropout(workspace, tmp_path, **SAVES)
    outcome = train_with(config, *cannot_write(moment, tmp_path))
    assert outcome.codes == [EXIT_FINISHED] * 2
    assert_all_ranks_say(tmp_path, f"checkpoint at step 8 was not saved ({where}")
    assert outcome.output.count("was not saved") == 1, "and the console once"
    assert "saved" in outcome.output and f"saved {tmp_path}/checkpoints/step-00000008" not in outcome.output
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000012", "step-00000014"], "the next save succeeds, and nothing is left over"
    assert whole_checkpoints(tmp_path) == [14, 12]
    assert losses(tmp_path) == losses(Path(clean.run.dir))
