"""`checkpoint.async`: files written while training goes on are those of a save that training waits for."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from tools.convert import convert
from trainer.checkpoint.find import candidates
from trainer.checkpoint.manifest import find_faults, read_checkpoint_manifest
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.engine.partitions import MOMENTS, WEIGHT
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING

BACKGROUND = {"every_steps": 4, "keep_last": 9, "async": True}


def assert_same_state(one: Path, other: Path) -> None:
    """Weights and moments of two checkpoints are equal to the last bit."""
    first, second = ZeroFiles(one), ZeroFiles(other)
    assert first.shapes == second.shapes and first.adam_step == second.adam_step
    for name, shape in first.shapes.items():
        for kind in (WEIGHT, *MOMENTS):
            values = torch.empty(shape.numel()), torch.empty(shape.numel())
            first.read_into(name, 0, values[0], kind)
            second.read_into(name, 0, values[1], kind)
            assert torch.equal(*values), (name, kind)


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2_offload", "zero3"])
def test_what_is_saved_in_the_background_is_the_state_of_that_step(
    preset: str, workspace: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"deepspeed": preset, "train": {"steps": 6}}
    saves = {"every_steps": 2, "keep_last": 9}
    waited = tiny_config(workspace, tmp_path / "a", checkpoint=saves, **sections)
    assert train(waited, 2) == EXIT_FINISHED
    background = tiny_config(workspace, tmp_path / "b", checkpoint={**saves, "async": True}, **sections)
    assert run_ranks(with_held_writes, 2, background) == [EXIT_FINISHED] * 2
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    names = [f"step-{step:08d}" for step in (2, 4, 6)]
    for name in names:
        folders = [tmp_path / run / "checkpoints" / name for run in ("a", "b")]
        assert find_faults(folders[1], read_checkpoint_manifest(folders[1])) == []
        assert_same_state(*folders)
    checkpoint = tmp_path / "b" / "checkpoints" / names[1]
    convert(str(checkpoint), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))


def with_held_writes(config: Config, steps: int = 1) -> int:
    """Runs on each rank: rank 1's disk takes nothing until so many steps are trained, or training waits for it."""
    from trainer.checkpoint.save import Saver
    from trainer.engine import snapshot
    from trainer.loop import Loop
    from trainer.train import run

    write, begin, finish, train_step = snapshot._write, Saver.begin, Saver.finish, Loop._train_step
    takes, trained, meanwhile = threading.Event(), [], []

    def held_write(path: Path, content: object) -> None:
        if os.environ["RANK"] == "1" and threading.current_thread() is not threading.main_thread():
            takes.wait()
        write(path, content)

    def begin_held(self: Saver, *arguments: object) -> None:
        takes.clear()
        trained.clear()
        begin(self, *arguments)  # type: ignore[arg-type]

    def finish_released(self: Saver) -> Path | None:
        takes.set()
        return finish(self)

    def noted_step(self: Loop, *arguments: object) -> object:
        if self.saver._unfinished is not None:
            meanwhile.append(self.state.step)
        result = train_step(self, *arguments)  # type: ignore[arg-type]
        trained.append(self.state.step)
        if len(trained) >= steps:
            takes.set()
        return result

    snapshot._write = held_write
    Saver.begin, Saver.finish = begin_held, finish_released  # type: ignore[method-assign,assignment]
    Loop._train_step = noted_step  # type: ignore[method-assign,assignment]
    code = run(config)
    assert meanwhile, "no step was trained while a save was being written: this test shows nothing"
    return code


def test_a_background_save_that_fails_is_said_and_the_next_one_succeeds(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path, checkpoint=BACKGROUND)
    assert run_ranks(full_disk_until_step_10, 2, config) == [EXIT_FINISHED] * 2
    whole = [candidate.step for candidate in candidates(tmp_path) if candidate.manifest is not None]
    assert whole == [20, 16, 12]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "checkpoint at step 4 was not saved (rank 1: " in log


def full_disk_until_step_10(config: Config) -> int:
    """Runs on each rank: rank 1 cannot write large files at first."""
    import resource

    from trainer.loop import Loop
    from trainer.train import run

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = Loop._train_step

    def step(self: Loop, *arguments: object) -> object:
        if self.world.rank == 1:
            limit = 20_000 if self.state.step < 10 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return original(self, *arguments)  # type: ignore[arg-type]

    Loop._train_step = step  # type: ignore[method-assign,assignment]
    return run(config)


def test_a_rank_without_memory_for_the_copy_costs_that_save_alone(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path, checkpoint=BACKGROUND)
    assert run_ranks(no_memory_at_step_8, 2, config) == [EXIT_FINISHED] * 2
    assert [candidate.step for candidate in candidates(tmp_path)] == [20, 16, 12, 4]
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "checkpoint at step 8 was not saved (rank 1: no copy in the host's memory: not enough)" in log


def no_memory_at_step_8(config: Config) -> int:
    """Runs on each rank."""
    from trainer.engine.snapshot import HostBuffers
    from trainer.loop import Loop
    from trainer.train import run

    begin, copy = Loop._save, HostBuffers.copy

    def save(self: Loop, *arguments: bool, **named: bool) -> bool:
        def no_memory(*_: object) -> torch.UntypedStorage:
            raise MemoryError("not enough")

        fails = self.world.rank == 1 and self.state.step == 8
        HostBuffers.copy = no_memory if fails else copy  # type: ignore[method-assign,assignment]
        return begin(self, *arguments, **named)

    Loop._save = save  # type: ignore[method-assign]
    return run(config)


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without checkpoints."""
    run_dir = tmp_path_factory.mktemp("clean")
    assert train(tiny_config(workspace, run_dir), 2) == EXIT_FINISHED
    return losses(run_dir)


def test_a_signal_while_a_save_is_written_finishes_it_and_saves_the_present_step(
    clean: list[float], workspace: Path, tmp_path: Path
) -> None:
    config = tiny_config(workspace, tmp_path / "run", checkpoint=BACKGROUND)
    assert run_ranks(stopped_during_a_save, 2, config) == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert [candidate.step for candidate in candidates(tmp_path / "run")] == [9, 8, 4]
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean


def stopped_during_a_save(config: Config) -> int:
    """Runs on each rank: TERM reaches rank 0 in step 9, when the files of step 8 are still being written."""
    from trainer.loop import Loop

    original = Loop._agree

    def agree(self: Loop, *arguments: object) -> object:
        if self.state.step == 9 and self.world.is_main:
            assert self.saver._unfinished is not None and self.saver._unfinished.step == 8
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)  # type: ignore[arg-type]

    Loop._agree = agree  # type: ignore[method-assign,assignment]
    return with_held_writes(config, steps=2)


def test_a_run_killed_while_a_save_is_written_goes_on_from_the_one_before(
    clean: list[float], workspace: Path, tmp_path: Path
) -> None:
    config = tiny_config(workspace, tmp_path / "run", checkpoint=BACKGROUND)
    assert run_ranks(killed_during_a_save, 2, config) == [7, 7]
    assert [candidate.step for candidate in candidates(tmp_path / "run")] == [4]
    assert list((tmp_path / "run" / "checkpoints").glob(".tmp-step-00000008"))
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean
    shutil.rmtree(tmp_path / "run" / "checkpoints")


def killed_during_a_save(config: Config) -> int:
    """Runs on each rank: all are gone before step 9, when the files of step 8 are still being written."""
    from trainer.loop import Loop

    original = Loop._train_step

    def step(self: Loop, *arguments: object) -> object:
        if self.state.step == 8:
            os._exit(7)
        return original(self, *arguments)  # type: ignore[arg-type]

    Loop._train_step = step  # type: ignore[method-assign,assignment]
    return with_held_writes(config, steps=2)


def test_the_time_that_saves_stopped_training_for_is_in_the_metrics(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path, checkpoint={"every_steps": 4}, logging={"every_steps": 2})
    assert train(config, 1) == EXIT_FINISHED
    stalls = {line["step"]: line["time/save_seconds"] for line in metrics(tmp_path) if "train/loss" in line}
    assert {step for step, seconds in stalls.items() if seconds > 1e-3} == {6, 10, 14, 18}
