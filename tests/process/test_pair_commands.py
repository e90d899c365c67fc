"""Pairs of segments in commands: what does not fit is a card, and `data show`, `plan` and `simulate` know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import assert_one_card, maskwright
from tests.preparing import prepare_text
from tests.ranks import tiny_config, write_config
from trainer.config.file import load_config
from trainer.data.batch import Batch
from trainer.data.loader import SampledBlocks
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs

PAIR = "objective.pair={task: nsp}"


def prepare_sentences(workspace: Path, folder: Path, documents: int = 700) -> Path:
    folder.mkdir(parents=True)
    texts = (workspace / "text.txt").read_text().split("\n\n")[:documents]
    capitals = [" ".join(part.strip().capitalize() + "." for part in text.split(".")[:4]) for text in texts]
    (folder / "text.txt").write_text("\n\n".join(capitals))
    return prepare_text(folder / "text.txt", workspace, folder / "data", sentence_starts="rules")


@pytest.fixture(scope="module")
def data(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sentences(workspace, tmp_path_factory.mktemp("pairs") / "all")


@pytest.fixture
def config(workspace: Path, data: Path, tmp_path: Path) -> Path:
    model = {"preset": "bert-base", "overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
    sections: dict[str, Any] = {"data": {"train": str(data), "seq_len": 64}, "model": model}
    return write_config(tiny_config(workspace, tmp_path / "run", **sections), tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.pair.task=nps"], ("objective.pair.task", "'nsp' or 'sop'")),
        (["objective.pair={task: sop, weight: 0}"], ("objective.pair.weight", "greater than 0")),
        ([PAIR, "objective.name=clm"], ("pair does nothing with name clm",)),
        (
            [PAIR, "data.samples=documents", "model.document_attention=true"],
            ("objective.pair", "data.samples=documents", "data.samples=stream"),
        ),
        ([PAIR, "model.document_attention=true"], ("objective.pair", "model.document_attention=false")),
        (
            [PAIR, "model.preset=roberta-base"],
            ("'roberta'", "head for pairs of sentences", "bert, ernie, megatron-bert or albert", "objective.pair=null"),
        ),
        ([PAIR, "model.overrides.type_vocab_size=1"], ("type_vocab_size must be 2, got 1",)),
    ],
)
def test_what_does_not_fit_is_one_card(overrides: list[str], words: tuple[str, ...], config: Path) -> None:
    assert_one_card(maskwright("validate", config, *overrides), EXIT_USER_MISTAKE, *words)


def test_data_without_sentence_starts_are_a_card_with_the_option(config: Path, workspace: Path) -> None:
    done = maskwright("validate", config, PAIR, f"data.train={workspace / 'data'}")
    assert_one_card(done, EXIT_USER_MISTAKE, "The data set has no sentence starts", "--sentence-starts")


def test_next_sentences_need_a_second_block(config: Path, workspace: Path, tmp_path: Path) -> None:
    short = prepare_sentences(workspace, tmp_path / "short", documents=1)
    done = maskwright("validate", config, PAIR, f"data.train={short}")
    assert_one_card(done, EXIT_USER_MISTAKE, "one block of 64 tokens", "objective.pair.task=sop", str(short))
    assert maskwright("validate", config, PAIR.replace("nsp", "sop"), f"data.train={short}").returncode == EXIT_FINISHED
    given = (f"data.validation={short}", "eval.every_steps=5")
    done = maskwright("validate", config, PAIR, *given)
    assert_one_card(done, EXIT_USER_MISTAKE, "The validation data is one block of 64 tokens", "data.validation")


def test_validate_says_how_many_blocks_have_no_pair(config: Path) -> None:
    said = maskwright("validate", config, PAIR).stdout
    assert "pairs: nsp; " in said and "of the blocks of 64 have none, and no label\n" in said
    assert "pairs:" not in maskwright("validate", config).stdout


@pytest.mark.parametrize("task", ["nsp", "sop"])
def test_samples_that_are_shown_are_those_of_the_run(task: str, config: Path) -> None:
    override = f"objective.pair.task={task}"
    found = json.loads(maskwright("data", "show", config, override, "--samples", "8", "--json").stdout)
    inputs = open_inputs(load_config(config, [override]), 1)
    numbers = np.arange(8)
    columns = [numbers, *inputs.order.locate(numbers), *([inputs.order.partners(numbers)] if task == "nsp" else [])]
    dataset = SampledBlocks(inputs.sources, inputs.objective, inputs.config.run.seed)
    batch = dataset.__getitems__(np.stack(columns, axis=1))
    assert isinstance(batch, Batch)
    for row, sample in enumerate(found):
        assert {"t", "input_ids", "labels", "text", "masked_text", "terms"} <= sample.keys()
        assert sample["input_ids"] == batch.inputs["input_ids"][row].tolist()
        label = int(batch.labels[task][row])
        begins = batch.inputs["token_type_ids"][row].tolist().index(1)
        shown = {"task": task, "label": None if label < 0 else label, "second_begins": begins}
        assert sample["pair"] == shown
        assert sample["terms"] == {"mlm": len(sample["labels"]), task: int(label >= 0)}
        assert sample["input_ids"][begins - 1] == inputs.vocabulary.end_id
    assert {sample["pair"]["label"] for sample in found} >= {0, 1}
    done = maskwright("data", "show", config, override, "--samples", "8")
    said = ("B is from elsewhere", "B follows A") if task == "nsp" else ("not in order", "in order")
    for words in said:
        assert f"; {task}: {words}, B begins at token " in done.stdout


def test_plan_and_simulation_reckon_with_blocks_of_pairs(config: Path) -> None:
    simulated = maskwright("data", "simulate", config, PAIR, "--steps", "4")
    assert simulated.returncode == EXIT_FINISHED, simulated.stderr
    flops = []
    for overrides in ([], [PAIR]):
        planned = maskwright("plan", config, *overrides, "--device", "cpu", "--json")
        assert planned.returncode == EXIT_FINISHED, planned.stderr
        flops.append(_find(json.loads(planned.stdout), "flops_per_token"))
    # The head predicts 9 of 61 tokens in place of 9 of 62.
    assert flops[1] - flops[0] == pytest.approx(3 * (2 * 32**2 + 4 * 32) / 64)


def _find(facts: Any, name: str) -> float:
    if isinstance(facts, dict):
        if name in facts:
            return facts[name]
        facts = list(facts.values())
    return next((found for each in facts if isinstance(each, dict | list) and (found := _find(each, name))), 0.0)


def test_raw_text_is_prepared_with_its_sentences(config: Path, data: Path, tmp_path: Path) -> None:
    text = data.parent / "text.txt"
    given = (f"data.train={text}", "objective.pair.task=sop", "train.steps=40")
    done = maskwright("train", config, *given, "--dry-run")
    assert done.returncode == EXIT_FINISHED, done.stderr
    assert "pairs: sop; " in done.stdout
