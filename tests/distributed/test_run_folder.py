"""One job a run folder; and what a run keeps, removes and needs there."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.commands import assert_one_card, maskwright, start_maskwright
from tests.ranks import metrics, run_ranks, tiny_config, train, write_config
from tests.waiting import TIMEOUT_S, rank_processes, wait_for_step
from trainer.checkpoint.find import candidates
from trainer.checkpoint.retention import estimated_bytes
from trainer.config import Config
from trainer.engine.state_size import OPTIMIZER_BYTES
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_USER_MISTAKE
from trainer.runtime.run_lock import GUARD, RECORD, RunLock


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_second_job_is_refused_and_a_killed_ones_folder_is_taken_over(workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(workspace, run_dir, train={"steps": 100_000}, checkpoint={"every_steps": 50})
    command = ("train", write_config(config, tmp_path / "config.yaml"), "--nproc-per-node", "2")
    first = start_maskwright(*command)
    try:
        wait_for_step(first, run_dir, 60)
        main_rank = rank_processes(first)[0]
        refused = maskwright(*command, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
        assert_one_card(refused, 2, "Another job trains", f"process {main_rank} on {socket.gethostname()}, since 2")
        assert refused.stdout == "", "it has come to nothing else"
        step = metrics(run_dir)[-1]["step"]
        wait_for_step(first, run_dir, step + 5)
        logs = [path.read_text() for path in sorted((run_dir / "logs").iterdir())]
        assert len(logs) == 2 and not any("Another job" in log for log in logs), "nor in the first one's logs"
    finally:
        first.kill()  # the kernel kills the ranks with it
    first.communicate(timeout=TIMEOUT_S)
    assert json.loads((run_dir / RECORD).read_text())["pid"] == main_rank, "nobody has released it"
    second = start_maskwright(*command)
    wait_for_step(second, run_dir, step + 60)
    second.send_signal(signal.SIGTERM)
    output = second.communicate(timeout=TIMEOUT_S)[0]
    assert second.returncode == EXIT_STOPPED_AFTER_SAVING, output
    assert f"took over the run folder from process {main_rank} on {socket.gethostname()}" in output
    assert "its process is gone" in output and "resuming from step-" in output
    assert not (run_dir / RECORD).exists() and (run_dir / GUARD).exists()


def test_all_ranks_are_refused_but_a_dry_run_writes_nothing_and_may_go_on(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path / "run", train={"steps": 2})
    lock = RunLock(tmp_path / "run", print)
    lock.take()
    try:
        assert train(config, 2) == EXIT_USER_MISTAKE
        output = capsys.readouterr().out
        assert all(
            f"rank {rank}: Another job trains in this run folder: process {os.getpid()}" in output for rank in (0, 1)
        )
        assert train(config, 2, dry_run=True) == EXIT_FINISHED
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [GUARD, RECORD]
    finally:
        lock.release()
    assert train(config, 2) == EXIT_FINISHED
    assert "took over" not in capsys.readouterr().out


def lose_the_lock(config: Config) -> int:
    """Runs on each rank: in step 5 another machine's job takes the folder, as after a long suspension of this one."""
    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def step_and_lose(self: Loop, *arguments: object) -> object:
        if self.state.step == 4 and self.world.is_main:
            path = Path(config.run.dir) / RECORD
            path.write_text(json.dumps({**json.loads(path.read_text()), "token": "other", "host": "elsewhere"}))
        return original(self, *arguments)  # type: ignore[arg-type]

    Loop._train_step = step_and_lose  # type: ignore[method-assign,assignment]
    return run(config)


def test_a_job_whose_folder_was_taken_over_ends_before_it_writes_a_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path, checkpoint={"every_steps": 3})
    assert run_ranks(lose_the_lock, 2, config) == [EXIT_USER_MISTAKE] * 2
    assert "Another job has taken over this run" in capsys.readouterr().out
    assert names(tmp_path) == ["latest", "step-00000003"]
    assert json.loads((tmp_path / RECORD).read_text())["host"] == "elsewhere", "the other one's lock stays"


def test_rotation_keeps_the_last_and_those_kept_for_good(workspace: Path, tmp_path: Path) -> None:
    settings = {"every_steps": 3, "keep_last": 2, "keep_every_steps": 6}
    assert train(tiny_config(workspace, tmp_path, checkpoint=settings)) == EXIT_FINISHED
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (6, 12, 18, 20))]


def test_one_kept_means_two_and_the_one_resumed_from_and_leftovers_go_at_the_start(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"every_steps": 2, "keep_last": 1}
    assert train(tiny_config(workspace, tmp_path, train={"steps": 6}, checkpoint=settings)) == EXIT_FINISHED
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000006"]
    left = tmp_path / "checkpoints" / ".tmp-step-00000008"
    left.mkdir()
    (left / "mp_rank_00_model_states.pt").write_bytes(bytes(5 << 20))
    settings |= {"every_steps": 100}
    longer = tiny_config(workspace, tmp_path, train={"steps": 7}, checkpoint=settings, schedule={"name": "constant"})
    capsys.readouterr()
    assert train(longer) == EXIT_FINISHED
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "removed .tmp-step-00000008, 5.0 MiB of a checkpoint that was not finished"
    settings |= {"every_steps": 1}
    more = tiny_config(workspace, tmp_path, train={"steps": 12}, checkpoint=settings, schedule={"name": "constant"})
    assert train(more) == EXIT_FINISHED
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (7, 11, 12))]


@pytest.mark.parametrize(
    ("preset", "precision"),
    [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")],
)
def test_the_estimate_of_the_first_checkpoint_is_near_and_not_too_high(
    preset: str, precision: str, workspace: Path, tmp_path: Path
) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    overrides = {**tiny_config(workspace, tmp_path).model.overrides, **wide}
    config = tiny_config(
        workspace,
        tmp_path,
        model={"overrides": overrides},
        deepspeed=preset,
        train={"steps": 1, "precision": precision},
    )
    assert train(config, 2) == EXIT_FINISHED
    (found,) = candidates(tmp_path)
    assert found.manifest is not None
    assert found.manifest.model["parameters"] * OPTIMIZER_BYTES > 5e6, "large beside the tokenizer and the like"
    assert 0.8 <= estimated_bytes(found.manifest) / found.manifest.bytes <= 1.0


def test_a_run_folder_that_cannot_be_written_is_refused_on_all_ranks(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, Path("/proc/1/run"))
    assert train(config, 2) == EXIT_USER_MISTAKE
    output = capsys.readouterr().out
    assert all(f"rank {rank}: Cannot write to the run folder" in output for rank in (0, 1))
    assert output.count("[run.dir=/proc/1/run] Give a run.dir that") == 2


def test_a_file_where_tensorboard_writes_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "tensorboard").touch()
    config = tiny_config(workspace, tmp_path, logging={"tensorboard": True})
    assert train(config, 2) == EXIT_USER_MISTAKE
    line = f"Cannot write to the run folder: {tmp_path / 'tensorboard'}: File exists. [run.dir={tmp_path}]"
    assert capsys.readouterr().out.count(line) == 2
