"""The probe at the evaluations of a run: the same for any layout, and training does not know of it."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_objectives import lose_the_last
from tests.objective_cases import CASES
from tests.preparing import prepare_text
from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_USER_MISTAKE
from trainer.tracking.metrics import PROBE_METRICS

TEXTS, CLASSES = 60, ("few", "more")
NAMES = (
    *("mlm", "mlm by words, documents, code of its own", "mlm and nsp"),
    *("clm", "clm, documents", "plm", "rtd", "rtd, disentangled"),
)
"""Cases of one model and two, of each family, of code of its own, with document attention and without."""


@pytest.fixture(scope="module")
def labels(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of several lengths, some longer than a block, by how many sentences they have."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    paragraphs = (workspace / "text.txt").read_text(encoding="utf-8").split("\n\n")[:TEXTS]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for number, paragraph in enumerate(paragraphs):
            sentences = paragraph.split(". ")
            writer.writerow((". ".join(sentences[: 1 + number % 4]), CLASSES[number % 4 > 1]))
    return path


@pytest.fixture(scope="module")
def marked(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, marks = tmp_path_factory.mktemp("marked"), {"word_starts": "tokenizer", "sentence_starts": "rules"}
    settings = {"validation_fraction": 0.1, **marks}
    return str(prepare_text(workspace / "text.txt", workspace, folder / "data", **settings))


def evaluations(config: Config) -> list[dict[str, Any]]:
    """What the evaluations of a run have found, without the time."""
    lines = [line for line in metrics(Path(config.run.dir)) if "eval/loss" in line]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def probed(config: Config) -> list[dict[str, float]]:
    return [{name: line[name] for name in PROBE_METRICS} for line in evaluations(config)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_for_any_layout_and_training_does_not_know_of_it(
    name: str, workspace: Path, marked: str, labels: Path, tmp_path: Path
) -> None:
    case, tokenizer = CASES[name], str(workspace / "tokenizer")

    def config_of(run: str, probe: dict[str, Any] | None, **sections: Any) -> Config:
        steps = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2}}
        given: dict[str, Any] = {"eval": {"every_steps": 2, "samples": 8, "probe": probe}, **steps, **sections}
        raw = case.raw(tokenizer, marked, str(tmp_path / run), 0.1, **given)
        raw["data"]["validation"] = marked
        return parse_config(raw, "test")

    probe, layout = {"path": str(labels)}, {"deepspeed": "zero3", "batch": {"micro_size": 2}}
    alone = config_of("alone", probe, deepspeed="zero0")
    assert train(alone) == EXIT_FINISHED
    two, without = config_of("two", probe, **layout), config_of("without", None, **layout)
    assert train(two, 2) == train(without, 2) == EXIT_FINISHED

    first, other = probed(alone), probed(two)
    assert len(first) == len(other) == 3 and first[0] == other[0], "of the same weights"
    assert first[0]["eval/probe/majority"] == 0.5 < first[0]["eval/probe/accuracy"]
    assert losses(Path(two.run.dir)) == losses(Path(without.run.dir)), "to the bit"
    unprobed = [{name: value for name, value in line.items() if name not in PROBE_METRICS} for line in evaluations(two)]
    assert unprobed == evaluations(without)

    before = losses(Path(two.run.dir)), evaluations(two)
    lose_the_last(two)
    assert train(two, 2) == EXIT_FINISHED
    assert (losses(Path(two.run.dir)), evaluations(two)) == before, "after a resume, to the bit"


def small_config(workspace: Path, run_dir: Path, labels: Path, **sections: Any) -> Config:
    given = {
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 2, "samples": 8, "probe": {"path": str(labels)}},
        "train": {"steps": 4},
        "batch": {"micro_size": 2},
        **sections,
    }
    return tiny_config(workspace, run_dir, **given)


def _train_and_stop(config: Config, at_pass: int) -> int:
    """Train, and have a rank ask itself to stop in a pass of the probe."""
    from trainer.evaluation import probe
    from trainer.train import run

    features_of, passes = probe.features_of, []

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        if len(passes) == at_pass and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return features_of(*arguments)

    probe.features_of = counted
    try:
        return run(config)
    finally:
        print(f"rank {os.environ['RANK']}: {len(passes)} passes", flush=True)


def test_a_request_to_stop_cuts_it_short_on_all_ranks_and_it_is_done_after_the_resume(
    workspace: Path, labels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clean, cut = (small_config(workspace, tmp_path / name, labels) for name in ("clean", "cut"))
    assert train(clean, 2) == EXIT_FINISHED
    assert run_ranks(_train_and_stop, 2, cut, 2) == [EXIT_STOPPED_AFTER_SAVING] * 2
    output = capfd.readouterr().out
    assert "rank 0: 2 passes" in output and "rank 1: 2 passes" in output
    assert evaluations(cut) == [], "of step 0, which is not done"
    assert train(cut, 2) == EXIT_FINISHED
    assert losses(tmp_path / "cut") == losses(tmp_path / "clean")
    assert evaluations(cut) == evaluations(clean) != []


def test_a_dry_run_probes_and_ranks_that_read_other_texts_are_refused(
    workspace: Path, labels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copy(labels, tmp_path / "own.csv"))
    config = small_config(workspace, tmp_path / "run", own)
    assert train(config, 2, dry_run=True) == EXIT_FINISHED
    assert capfd.readouterr().out.count("probe: 60 texts, 2 classes, majority 50.0%") == 1
    assert run_ranks(_train_on_other_texts, 2, config) == [EXIT_USER_MISTAKE] * 2
    assert f"eval.probe.path={own} is " in capfd.readouterr().out


def _train_on_other_texts(config: Config) -> int:
    """Train, where the machine of rank 1 has another file of that name."""
    from trainer.inputs import consistency
    from trainer.train import run

    if os.environ["RANK"] == "1":
        identity = consistency._identity
        consistency._identity = lambda path: identity(path) + " of another" * (path.suffix == ".csv")
    return run(config)
