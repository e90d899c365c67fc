"""A full disk costs lines of the reports, not the run."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import metrics, run_ranks, tiny_config
from trainer.config import Config
from trainer.errors import EXIT_FINISHED


def fill_the_disk(config: Config, name: str) -> int:
    """Runs on each rank: from step 5 to 10 no file of rank 0 can grow to more than 20 bytes above the size of one."""
    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def step_with_limit(self: Loop, *arguments: object) -> object:
        result = original(self, *arguments)  # type: ignore[arg-type]
        if self.world.is_main and self.state.step == 5:
            size = os.path.getsize(next(Path(config.run.dir).glob(name)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        if self.world.is_main and self.state.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return result

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    Loop._train_step = step_with_limit  # type: ignore[method-assign,assignment]
    return run(config)


def shown_by_tensorboard(run_dir: Path) -> list[int]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_metrics_that_cannot_be_written_are_warned_of_and_training_goes_on(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path, logging={"tensorboard": True})
    assert run_ranks(fill_the_disk, 2, config, "metrics.jsonl") == [EXIT_FINISHED] * 2
    shown = capsys.readouterr().out
    warned = [step for step in range(1, 21) if f"WARNING: the metrics of step {step} are not all written" in shown]
    assert warned == [5, 6, 7, 8, 9]  # the first of these is cut off in its middle
    assert f"saved {tmp_path}/checkpoints/step-00000020" in shown
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, *range(10, 21)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum(line.startswith("{") and not line.endswith("}") for line in lines) == 1, "one line is cut off"
    assert json.loads(lines[-1])["step"] == 20
    assert shown_by_tensorboard(tmp_path) == [1, 2, 3, 4, *range(10, 21)]


def test_tensorboard_goes_on_when_there_is_space_again(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is the larger one, so it alone cannot be written; its thread has ended with that."""
    config = tiny_config(workspace, tmp_path, logging={"tensorboard": True})
    assert run_ranks(fill_the_disk, 2, config, "tensorboard/*") == [EXIT_FINISHED] * 2
    shown = capsys.readouterr().out
    warned = [step for step in range(1, 21) if f"WARNING: the metrics of step {step} are not all written" in shown]
    assert warned and set(warned) <= set(range(5, 12))
    assert [line["step"] for line in metrics(tmp_path)][-9:] == list(range(12, 21))
    steps = shown_by_tensorboard(tmp_path)
    assert steps[:4] == [1, 2, 3, 4] and steps[-9:] == list(range(12, 21))
