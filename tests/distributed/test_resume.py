"""Checkpoints: a killed run goes on bit for bit; nothing half-written is ever resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.commands import start_maskwright
from tests.damage import DAMAGES
from tests.faults import with_dropout
from tests.gate import Gate
from tests.ranks import ADDING, losses, metrics, run_ranks, tiny_config, train, write_config
from tests.waiting import TIMEOUT_S, rank_processes, wait_for_step
from trainer.checkpoint.find import candidates, find_candidate_faults
from trainer.config import Config
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_USER_MISTAKE
from trainer.tracking.starts import read_start_records


@pytest.mark.timeout(600)
def test_a_run_killed_three_times_at_random_steps_has_the_losses_of_the_uninterrupted_one_bit_for_bit(
    workspace: Path, tmp_path: Path
) -> None:
    sections = {"train": {"steps": 30}, "checkpoint": {"every_steps": 5}, "data": {"workers": 1}}
    assert train(with_dropout(workspace, tmp_path / "clean", **sections), 2) == EXIT_FINISHED
    generator = random.Random()
    config = with_dropout(workspace, tmp_path / "killed", **sections)
    command = ("train", write_config(config, tmp_path / "config.yaml"), "--nproc-per-node", "2")
    gate = Gate(tmp_path)
    steps = sorted(generator.sample(range(6, 30), 3))
    for step in steps:
        gate.close_after(step)
        process = start_maskwright(*command, **gate.environment)
        wait_for_step(process, tmp_path / "killed", step)
        os.kill(generator.choice(rank_processes(process)), signal.SIGKILL)
        gate.open()
        output = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 1, output
        assert "SIGKILL" in output
    process = start_maskwright(*command, **gate.environment)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_FINISHED, output
    assert "resuming from step-" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "clean"), f"killed at steps {steps}"


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3"])
def test_resume_is_bit_exact_with_dropout_at_every_stage(preset: str, workspace: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"steps": 8}, "checkpoint": {"every_steps": 3}, **ADDING}
    config = with_dropout(workspace, tmp_path / "run", deepspeed=preset, **sections)
    assert train(config, 2) == EXIT_FINISHED
    clean = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")  # as if the run had been lost after step 6
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean
    assert [start.step for start in read_start_records(tmp_path / "run")] == [0, 6]


def test_checkpoints_change_no_loss(workspace: Path, tmp_path: Path) -> None:
    assert train(with_dropout(workspace, tmp_path / "none"), 2) == EXIT_FINISHED
    assert train(with_dropout(workspace, tmp_path / "two", checkpoint={"every_steps": 7}), 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == losses(tmp_path / "none")


def stop_at_step_7(config: Config, resume: str) -> int:
    """Runs on each rank: TERM reaches this process while step 7 is computed (on rank 0 only)."""
    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def step_and_signal(self: Loop, *arguments: object) -> object:
        if self.state.step == 6 and self.world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)  # type: ignore[arg-type]

    Loop._train_step = step_and_signal  # type: ignore[method-assign,assignment]
    return run(config, resume)


def test_a_signal_to_one_rank_saves_once_at_the_same_step_on_all_and_exits_75(workspace: Path, tmp_path: Path) -> None:
    config = with_dropout(workspace, tmp_path / "run")
    assert run_ranks(stop_at_step_7, 2, config, "auto") == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))] == ["step-00000007"]
    assert train(config, 2) == EXIT_FINISHED
    assert train(with_dropout(workspace, tmp_path / "clean"), 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")


@pytest.fixture(scope="module")
def finished(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 20 steps with checkpoints at 10 and 20."""
    config = tiny_config(workspace, tmp_path_factory.mktemp("finished"), checkpoint={"every_steps": 10})
    assert train(config) == EXIT_FINISHED
    return config


@pytest.fixture
def copy(finished: Config, tmp_path: Path) -> Config:
    return copied(finished, tmp_path / "run")


def copied(config: Config, run_dir: Path) -> Config:
    shutil.copytree(config.run.dir, run_dir)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def test_a_relaunch_after_the_last_step_says_finished_and_changes_nothing(
    copy: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(copy.run.dir)
    before = content_of(run_dir)
    assert train(copy) == EXIT_FINISHED
    assert "finished" in capsys.readouterr().out
    assert content_of(run_dir) == before


def content_of(run_dir: Path) -> dict[Path, bytes]:
    """All files but those in which each start leaves a trace of itself."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not {"logs", "heartbeats"} & set(path.parts)]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished_by_two(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 20 steps on two ranks with checkpoints at 10 and 20."""
    config = tiny_config(workspace, tmp_path_factory.mktemp("finished-by-two"), checkpoint={"every_steps": 10})
    assert train(config, 2) == EXIT_FINISHED
    return config


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("truncated", "mp_rank_00_model_states.pt"),
        ("empty", "huggingface/config.json"),
        ("flipped", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("deleted", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("flipped", "manifest.json"),
        ("deleted", "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_stepped_over_by_all_ranks_and_the_older_one_used(
    damage: str, name: str, finished_by_two: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(finished_by_two, tmp_path / "run")
    DAMAGES[damage](checkpoint(config, 20) / name)
    assert train(config, 2) == EXIT_FINISHED
    output = capsys.readouterr().out
    loud = f"CHECKPOINT DAMAGED, an older one is tried: step-00000020: {name}: "
    assert output.count(f"WARNING: {loud}") == 1, "on the console, not in the logs alone"
    assert "resuming from step-00000010 at step 10" in output
    logs = [(tmp_path / "run" / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert all(loud in log for log in logs)
    assert losses(tmp_path / "run") == losses(Path(finished_by_two.run.dir))
    whole = candidates(tmp_path / "run")
    assert [candidate.step for candidate in whole] == [20, 10]
    assert not any(find_candidate_faults(candidate) for candidate in whole)


def test_checkpoints_but_none_whole_is_an_error_never_a_fresh_start(
    finished_by_two: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(finished_by_two, tmp_path / "run")
    DAMAGES["flipped"](checkpoint(config, 10) / "mp_rank_00_model_states.pt")
    DAMAGES["empty"](checkpoint(config, 20) / "manifest.json")
    assert train(config, 2) == EXIT_DAMAGED
    output = capsys.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: None of the 2 checkpoints is whole. step-00000020: manifest.json: " in output
    assert "step-00000010: mp_rank_00_model_states.pt: content differs from its checksum" in output
    named = str(checkpoint(config, 10))
    assert train(config, 2, resume=named) == EXIT_DAMAGED
    assert "step-00000010: mp_rank_00_model_states.pt: content differs" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 20


@pytest.mark.parametrize("content", [None, "", "step-00000010", "step-00000030", "nonsense"])
def test_latest_is_never_trusted(content: str | None, copy: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, empty, stale, of a checkpoint that is not there, or anything."""
    latest = checkpoint(copy, 20).parent / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    assert train(copy) == EXIT_FINISHED
    assert "resuming from step-00000020 at step 20" in capsys.readouterr().out


def test_a_run_folder_that_is_a_file_is_refused_on_all_ranks(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        assert train(tiny_config(workspace, tmp_path / place), 2) == EXIT_USER_MISTAKE
        assert f"[run.dir={tmp_path / place}]" in capsys.readouterr().out
    assert train(tiny_config(workspace, tmp_path / "file"), dry_run=True) == EXIT_USER_MISTAKE
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_modes_do_what_they_say_and_say_why(
    copy: Config, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tiny_config(workspace, tmp_path / "empty")
    assert train(empty, resume="must") == EXIT_USER_MISTAKE
    assert "has no checkpoint" in capsys.readouterr().out
    newest = (checkpoint(copy, 20) / "manifest.json").read_bytes()
    assert train(copy, resume=str(checkpoint(copy, 10))) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert "resuming from step-00000010 at step 10" in output
    # The branch that is left is moved away, so that it is never resumed or converted in place of the new one.
    assert "moved what this start does not continue to" in output
    left = Path(copy.run.dir) / "previous-1" / "checkpoints"
    assert [path.name for path in left.iterdir()] == ["step-00000020"]
    assert (left / "step-00000020" / "manifest.json").read_bytes() == newest
    assert (checkpoint(copy, 20) / "manifest.json").read_bytes() != newest
    elsewhere = tiny_config(workspace, tmp_path / "empty", checkpoint={"every_steps": 10})
    assert train(elsewhere, resume=str(checkpoint(copy, 10))) == EXIT_FINISHED
    assert train(elsewhere, resume=str(checkpoint(copy, 10))) == EXIT_FINISHED  # its own command goes on with a branch
    assert "nothing changed" in capsys.readouterr().out
    third = shutil.copytree(checkpoint(copy, 10), tmp_path / "third" / "checkpoints" / "step-00000010")
    assert train(elsewhere, resume=str(third)) == EXIT_USER_MISTAKE
    assert "is a checkpoint of another run" in capsys.readouterr().out
    assert train(copy, resume="never") == EXIT_FINISHED
    assert "starting afresh (--resume never)" in capsys.readouterr().out
    assert (Path(copy.run.dir) / "previous-2" / "checkpoints" / "step-00000010" / "manifest.json").is_file()
    assert len(losses(Path(copy.run.dir))) == 20


def stop_in_the_evaluation_at_step_10(config: Config) -> int:
    """Runs on each rank: TERM reaches rank 1 while step 10 is evaluated."""
    from trainer.evaluation.evaluator import Evaluator
    from trainer.train import run

    original = Evaluator.run
    evaluations = []

    def run_and_signal(self: Evaluator, *arguments: object) -> object:
        evaluations.append(1)
        if len(evaluations) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)  # type: ignore[arg-type]

    Evaluator.run = run_and_signal  # type: ignore[method-assign,assignment]
    return run(config)


def test_an_evaluation_cut_short_by_a_stop_is_done_after_the_resume(workspace: Path, tmp_path: Path) -> None:
    data = {"validation": str(workspace / "data")}
    config = tiny_config(workspace, tmp_path, data=data, eval={"every_steps": 10, "samples": 32})
    assert run_ranks(stop_in_the_evaluation_at_step_10, 2, config) == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert [line["step"] for line in metrics(tmp_path) if "eval/loss" in line] == [0]
    assert train(config, 2) == EXIT_FINISHED
    assert [line["step"] for line in metrics(tmp_path) if "eval/loss" in line] == [0, 10, 20]
