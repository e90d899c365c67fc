"""A run that an earlier version began goes on here as it would have there.

golden/run_v1.tar.xz was written by the version before warm-up and epochs followed from a run's size: a config with
nothing but defaults for both, its data, and its run folder, stopped at step 4 of 14 on two ranks with ZeRO-1.
golden/run_v1.json holds the learning rates and losses of the same run, uninterrupted, by that version.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

from launcher.cli import app
from tests.e2e.test_golden_loss import TOLERANCE
from tests.ranks import train
from trainer.checkpoint.find import locate
from trainer.config import Config
from trainer.config.file import load_config
from trainer.errors import EXIT_FINISHED
from trainer.tracking.jsonl import read_metrics

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN / "run_v1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def config_of(folder: Path, *overrides: str) -> Config:
    """Read its config; the ranks of these tests have a current folder of their own."""
    paths = {"run.dir": "run", "model.tokenizer": "data/tokenizer", "data.train": "data", "data.validation": "data"}
    return load_config(str(folder / "c.yaml"), [*(f"{key}={folder / name}" for key, name in paths.items()), *overrides])


def test_it_resumes_with_the_schedule_and_the_length_that_it_began_with(earlier: Path) -> None:
    assert train(config_of(earlier), world_size=2, resume="must") == EXIT_FINISHED
    golden = json.loads((GOLDEN / "run_v1.json").read_text())
    lines = read_metrics(earlier / "run" / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    assert [(line["step"], line["samples"]) for line in trained] == [tuple(row[:2]) for row in golden["train"]]
    assert [line["train/learning_rate"] for line in trained] == pytest.approx([row[2] for row in golden["train"]])
    assert [line["train/loss"] for line in trained] == pytest.approx(
        [row[3] for row in golden["train"]], abs=TOLERANCE, rel=0
    )
    evaluated = [[line["step"], line["eval/loss"]] for line in lines if "eval/loss" in line]
    assert [step for step, _ in evaluated] == [step for step, _ in golden["eval"]]
    assert [loss for _, loss in evaluated] == pytest.approx([row[1] for row in golden["eval"]], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize(("ranks", "stage"), [(1, "zero3"), (3, "zero2")])
def test_it_resumes_on_other_ranks_and_another_stage(earlier: Path, ranks: int, stage: str) -> None:
    other = ("batch.global_size=6", "train.epochs=null", "train.steps=7", f"deepspeed={stage}")
    assert train(config_of(earlier, *other), world_size=ranks, resume="must") == EXIT_FINISHED
    assert read_metrics(earlier / "run" / "metrics.jsonl")[-1]["step"] == 7


def test_its_evaluations_are_judged_from_here_on(earlier: Path) -> None:
    """Its checkpoint knows of none, and its config has no key for it."""
    judged = config_of(earlier, "checkpoint.keep_best=true", "eval.patience=9")
    assert train(judged, world_size=2, resume="must") == EXIT_FINISHED
    resumed = next(json.loads(line)["step"] for line in (earlier / "run/starts.jsonl").read_text().splitlines()[::-1])
    lines = [line for line in read_metrics(earlier / "run" / "metrics.jsonl") if "eval/loss" in line]
    found = {line["step"]: line["eval/loss"] for line in lines if line["step"] > resumed}
    manifest = locate(earlier / "run")[1]
    assert (manifest.state["best_step"], manifest.state["best_loss"]) == min(found.items(), key=lambda one: one[1])


def test_everything_of_it_opens(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the logits to the last bit but one: they were recorded on a CPU whose kernels may add in another order."""
    monkeypatch.chdir(earlier)
    for command, pattern in (
        ("checkpoint verify run", "step-00000004"),
        ("status run", "4"),
        ("report run", r"wrote \S+/run/report\.html"),
        ("data verify data", "Whole"),
        ("data show data", "tokens"),
        ("validate c.yaml", "steps"),
        ("convert run --output model", r"logits: (0|\d(\.\d+)?e-0[789]) from the training engine's, 0 after reload"),
    ):
        assert app(command.split(), standalone_mode=False) == EXIT_FINISHED, command
        printed = capsys.readouterr()
        assert re.search(pattern, printed.out + printed.err), command
