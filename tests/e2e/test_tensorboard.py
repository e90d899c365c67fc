"""The TensorBoard file and metrics.jsonl, read back: every documented name, the same values, each step once."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import TIMEOUT_S, start_maskwright
from tests.gate import Gate
from tests.ranks import losses, metrics, tiny_config, train, write_config
from tests.waiting import wait_for_step
from trainer.config import Config
from trainer.config.file import dump_config
from trainer.errors import EXIT_FINISHED
from trainer.tracking.metrics import COUNTERS, EVALUATION_METRICS, TRAINING_METRICS

CONTRACT = {
    "step",
    "samples",
    "tokens",
    "time",
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "throughput/tokens_per_second",
    "throughput/mfu",
    "time/data_wait_fraction",
    "memory/peak_gib",
    "memory/reserved_gib",
}


MASKED_METRICS = EVALUATION_METRICS.keys() - {"eval/accuracy"}  # that is of causal models


def watched_config(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    watched = {
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 10, "samples": 16},
        "logging": {"every_steps": 2, "tensorboard": True},
        "train": {"steps": 20},
        "checkpoint": {"every_steps": 5},
    }
    return tiny_config(workspace, run_dir, **{**watched, **sections})


def shown_by_tensorboard(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def assert_same_as_metrics(run_dir: Path) -> None:
    """Every scalar of metrics.jsonl is shown at its step, once, in float32, but for null; and nothing else is."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run_dir):
        for name in {*TRAINING_METRICS, *EVALUATION_METRICS} & set(line):
            if line[name] is not None:
                expected.setdefault(name, []).append((line["step"], float(np.float32(line[name]))))
    events = shown_by_tensorboard(run_dir)
    shown = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert shown == expected


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = watched_config(workspace, tmp_path_factory.mktemp("watched"))
    assert train(config) == EXIT_FINISHED
    return config


def test_every_documented_scalar_is_shown_with_the_values_of_metrics_jsonl(run: Config) -> None:
    run_dir = Path(run.run.dir)
    shown = shown_by_tensorboard(run_dir).Tags()["scalars"]
    assert set(shown) == {*TRAINING_METRICS, *MASKED_METRICS} - {"throughput/mfu"}, "which a CPU has none of"
    assert_same_as_metrics(run_dir)


def test_the_resolved_config_is_shown_as_text(run: Config) -> None:
    events = shown_by_tensorboard(Path(run.run.dir))
    assert events.Tags()["tensors"] == ["config/text_summary"]
    (text,) = events.Tensors("config/text_summary")
    assert dump_config(run) in text.tensor_proto.string_val[0].decode()


def test_metrics_jsonl_has_the_keys_and_steps_that_are_promised(run: Config) -> None:
    lines = metrics(Path(run.run.dir))
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert len(training) + len(evaluations) == len(lines)
    assert [line["step"] for line in training] == [1, *range(2, 21, 2)]
    assert [line["step"] for line in evaluations] == [0, 10, 20]
    for line in training:
        assert set(line) == {*COUNTERS, *TRAINING_METRICS} >= CONTRACT
        assert line["samples"] == line["step"] * 8
        assert line["tokens"] == line["samples"] * 32
        assert 0 <= line["time/data_wait_fraction"] <= 1
        assert line["throughput/tokens_per_second"] > 0 and line["memory/reserved_gib"] >= line["memory/peak_gib"] > 0
    for line in evaluations:
        assert set(line) == {*COUNTERS, *MASKED_METRICS}
        assert line["eval/perplexity"] == pytest.approx(np.exp(line["eval/loss"]))
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_after_a_kill_and_a_resume_no_step_is_shown_twice(workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = watched_config(workspace, run_dir, train={"steps": 100}, logging={"every_steps": 1, "tensorboard": True})
    path = write_config(config, tmp_path / "my.yaml")
    kill_at = random.choice([7, 8, 9, 12, 13, 14])
    gate = Gate(tmp_path)
    gate.close_after(kill_at)
    process = start_maskwright("train", path, **gate.environment)
    wait_for_step(process, run_dir, kill_at)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL, "killed before it was done"
    assert train(config) == EXIT_FINISHED

    assert len(losses(run_dir)) == 100
    assert len(list((run_dir / "tensorboard").glob("events*"))) == 2
    assert_same_as_metrics(run_dir)
