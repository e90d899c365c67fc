"""RUN/examples.jsonl: what the model tells of the first validation samples, evaluation by evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_divergence import damaged, high_loss, rolling_back
from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from trainer.config import Config
from trainer.errors import EXIT_FINISHED
from trainer.evaluation.examples import SAMPLES, TOKENS


def evaluated_config(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    evaluated = {"data": {"validation": str(workspace / "data")}, "eval": {"every_steps": 5, "samples": 6}}
    return tiny_config(workspace, run_dir, **{**evaluated, "checkpoint": {"every_steps": 5}, **sections})


def examples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "examples.jsonl").read_text().splitlines()]


def told(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [piece for piece in sample["pieces"] if "answer" in piece]


@pytest.fixture(scope="module")
def run_dir(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one rank."""
    folder = tmp_path_factory.mktemp("examples")
    assert train(evaluated_config(workspace, folder)) == EXIT_FINISHED
    return folder


def test_each_evaluation_shows_the_same_places_of_the_same_samples(run_dir: Path, workspace: Path) -> None:
    lines = examples(run_dir)
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20]
    text = (workspace / "text.txt").read_text()
    for line in lines:
        assert [sample["t"] for sample in line["examples"]] == list(range(SAMPLES))
        for sample, first in zip(line["examples"], lines[0]["examples"], strict=True):
            assert [(piece["text"], piece.get("shown")) for piece in sample["pieces"]] == [
                (piece["text"], piece.get("shown")) for piece in first["pieces"]
            ]
            assert 0 < len(told(sample)) <= TOKENS
            whole = "".join(piece["text"] for piece in sample["pieces"])
            longest = max(whole.removeprefix("<s>").split("</s>"), key=len).strip()
            assert len(longest) > 20 and longest in text, "it is a passage of the text"
            for piece in told(sample):
                assert piece["right"] == (piece["answer"] == piece["text"])
    shown = [piece["shown"] for sample in lines[0]["examples"] for piece in told(sample)]
    assert shown.count("<mask>") > len(shown) / 2
    assert lines[0] != lines[-1], "it learns"


def test_they_depend_on_no_layout(run_dir: Path, workspace: Path, tmp_path: Path) -> None:
    """One block a pass and rank: the samples of the examples are on both ranks, and in two passes."""
    config = evaluated_config(workspace, tmp_path, batch={"micro_size": 1})
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(losses(run_dir), abs=1e-5, rel=0)
    assert examples(tmp_path) == examples(run_dir), "losses a rounding apart have the same likeliest tokens here"


def test_their_guesses_are_those_that_are_counted(workspace: Path, tmp_path: Path) -> None:
    """All that is predicted in these blocks is shown, so the examples have the accuracy of the evaluation."""
    eval_section = {"every_steps": 20, "samples": SAMPLES}
    config = evaluated_config(workspace, tmp_path, eval=eval_section, train={"steps": 40})
    assert train(config) == EXIT_FINISHED
    accuracies = {line["step"]: line["eval/masked_accuracy"] for line in metrics(tmp_path) if "eval/loss" in line}
    for line in examples(tmp_path):
        right = [piece["right"] for sample in line["examples"] for piece in told(sample)]
        assert len(right) == SAMPLES * round(0.15 * 30)
        assert np.mean(right) == pytest.approx(accuracies[line["step"]])
    assert accuracies[40] > 0, "equal zeros would say little"


def test_evaluations_and_their_examples_change_no_bit_of_the_training(
    run_dir: Path, workspace: Path, tmp_path: Path
) -> None:
    config = evaluated_config(workspace, tmp_path, eval={"every_steps": None})
    assert train(config) == EXIT_FINISHED
    assert losses(tmp_path) == losses(run_dir)
    assert not (tmp_path / "examples.jsonl").exists()


def test_a_resume_cuts_them_back_and_says_the_same_again(run_dir: Path, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    before = examples(run_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    with open(tmp_path / "run" / "examples.jsonl", "a") as file:
        file.write('{"step": 20, "examples": [{"t": 0, "pie')  # as a crash leaves it
    config = evaluated_config(workspace, tmp_path / "run", checkpoint={"every_steps": None})
    assert train(config, resume=str(tmp_path / "run" / "checkpoints" / "step-00000015")) == EXIT_FINISHED
    assert examples(tmp_path / "run") == before

    assert train(config, resume="never") == EXIT_FINISHED
    assert examples(tmp_path / "run") == before
    assert examples(tmp_path / "run" / "previous-1") == before, "what a fresh start leaves behind is whole"


def test_a_rollback_takes_back_those_of_the_steps_that_are_done_again(workspace: Path, tmp_path: Path) -> None:
    """The spike is in step 13; the run goes back to the checkpoint of step 10."""
    validation, every = {"validation": str(workspace / "data")}, {"every_steps": 2, "samples": 6}
    config = rolling_back(workspace, tmp_path / "run", data=validation, eval=every)
    assert run_ranks(damaged, 2, config, high_loss, 13, 13) == [EXIT_FINISHED] * 2
    assert [line["step"] for line in examples(tmp_path / "run")] == list(range(0, 21, 2))
    assert [line["step"] for line in examples(tmp_path / "run" / "previous-1")] == list(range(0, 13, 2))


def lose_the_disk(config: Config) -> int:
    """Runs on the rank: nothing more can be written to examples.jsonl after step 5."""
    from trainer.tracking.reporter import Reporter
    from trainer.train import run

    original = Reporter.evaluation

    def evaluation(self: Reporter, *arguments: Any) -> None:
        if arguments[0]["step"] == 10:
            assert self._examples is not None
            self._examples._file = open("/dev/full", "wb", buffering=0)
        original(self, *arguments)

    Reporter.evaluation = evaluation  # type: ignore[method-assign]
    return run(config)


def test_a_full_disk_costs_lines_and_not_the_run(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(lose_the_disk, 1, evaluated_config(workspace, tmp_path)) == [EXIT_FINISHED]
    shown = capsys.readouterr().out
    assert [step for step in range(21) if f"the examples of step {step} are not all written" in shown] == [10, 15, 20]
    assert [line["step"] for line in examples(tmp_path)] == [0, 5]
    assert len([line for line in metrics(tmp_path) if "eval/loss" in line]) == 5
