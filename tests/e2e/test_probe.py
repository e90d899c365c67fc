"""`eval.probe` as a user meets it: a card for what cannot be probed, and a number that rises as an encoder learns."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import assert_one_card, maskwright
from tests.preparing import prepare_text, quiet_console
from tests.ranks import metrics, tiny_config, write_config
from tools.tokenizer import train_tokenizer
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.tracking.metrics import PROBE_METRICS

TOPICS, WORDS = 8, 15
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def write_labels(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture
def config(workspace: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config that probes labels.csv, which is right, but for the keys given."""
    write_labels(tmp_path / "labels.csv", [(f"ka lo mi {number}", str(number % 2)) for number in range(20)])

    def write(validation: str | None = str(workspace / "data"), **probe: Any) -> Path:
        sections: dict[str, Any] = {
            "data": {"validation": validation},
            "eval": {"every_steps": 10, "samples": 8, "probe": {"path": str(tmp_path / "labels.csv"), **probe}},
        }
        return write_config(tiny_config(workspace, tmp_path / "run", **sections), tmp_path / "my.yaml")

    return write


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"label": "lable"},
            ("The first line of 'labels.csv' has no 'lable'. Did you mean 'label'?", "eval.probe.path="),
        ),
        ({"folds": 11}, ("fewer texts than the 11 folds", "'0' (10), '1' (10)", "set fewer folds")),
        ({"path": "nosuch.csv"}, ("Cannot read 'nosuch.csv'", "eval.probe.path=nosuch.csv")),
        ({"validation": None}, ("without validation data there is none", "data.validation=null", "eval.probe=null")),
    ],
    ids=["column", "folds", "no file", "no validation data"],
)
def test_what_cannot_be_probed_is_one_card_for_each_command(
    given: dict[str, Any], words: tuple[str, ...], config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(**given)
    for command in ("validate", "plan", "train"):
        assert_one_card(maskwright(command, path), EXIT_USER_MISTAKE, *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_labels_among_the_files_of_the_run_are_refused(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    inside = write_labels(tmp_path / "run" / "logs" / "labels.csv", [])
    result = maskwright("validate", config(path=str(inside)))
    assert_one_card(result, EXIT_USER_MISTAKE, "lies where the run writes its own logs", "eval.probe.path=")


def test_what_is_probed_is_said_and_a_run_that_never_evaluates_does_not_look(config: Callable[..., Path]) -> None:
    path, line = config(), "probe: 20 texts, 2 classes, majority 50.0%"
    for command in ("validate", "plan"):
        result = maskwright(command, path)
        assert (result.returncode, result.stdout.count(line)) == (EXIT_FINISHED, 1), result.stdout + result.stderr
    never = maskwright("validate", path, "eval.every_steps=null", "eval.probe.path=nosuch.csv")
    assert never.returncode == EXIT_FINISHED and "probe:" not in never.stdout


def write_topics(folder: Path) -> None:
    """Write text.txt, lines of words of one topic each, and labels.csv, so few that some words stand in one text."""
    generator = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < TOPICS * WORDS:
        words["".join(generator.choice(_CONSONANTS) + generator.choice(_VOWELS) for _ in range(3))] = None
    topics = [list(words)[number * WORDS : (number + 1) * WORDS] for number in range(TOPICS)]
    lines = [" ".join(generator.choices(generator.choice(topics), k=28)) for _ in range(2500)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    rows = [(" ".join(generator.choices(topics[n % TOPICS], k=2)), f"topic {n % TOPICS}") for n in range(64)]
    write_labels(folder / "labels.csv", rows)


def test_the_number_rises_as_the_encoder_learns_what_belongs_together(tmp_path: Path) -> None:
    """docs/probe.md has the figures of more words; they are in all the places where a user looks."""
    write_topics(tmp_path)
    train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / "tokenizer"), "wordpiece", 500, quiet_console())
    options = {"documents": "line", "validation_fraction": 0.05}
    data = str(prepare_text(tmp_path / "text.txt", tmp_path, tmp_path / "data", **options))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = {"preset": "bert-base", "overrides": {**sizes, **dropouts, "max_position_embeddings": 32}}
    config = tiny_config(
        tmp_path,
        tmp_path / "run",
        model=model,
        data={"validation": data, "samples": "documents"},
        batch={"global_size": 32, "micro_size": 32},
        optimizer={"lr": 3.0e-3},
        train={"steps": 160},
        eval={"every_steps": 80, "samples": 16, "probe": {"path": str(tmp_path / "labels.csv")}},
        logging={"every_steps": 100, "tensorboard": True},
    )
    result = maskwright("train", write_config(config, tmp_path / "my.yaml"))
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
    lines = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 80, 160]
    untrained, trained = lines[0]["eval/probe/accuracy"], lines[-1]["eval/probe/accuracy"]
    assert untrained < 0.8 and trained > 0.97
    assert lines[-1]["eval/probe/macro_f1"] > 0.97 and lines[0]["eval/probe/majority"] == 1 / TOPICS
    assert f"probe accuracy {trained:.3f} ± " in result.stdout and "(majority 0.125)" in result.stdout
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(PROBE_METRICS) <= set(shown.Tags()["scalars"])
    assert [event.step for event in shown.Scalars("eval/probe/accuracy")] == [0, 80, 160]
