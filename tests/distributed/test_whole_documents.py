"""Runs whose samples are whole documents: each alone, the same losses for every layout, exact over a resume."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.preparing import prepare_text
from tests.ranks import ADDING, losses, metrics, tiny_config, train, write_config
from tools.convert import convert
from trainer.config import Config
from trainer.data.block_reader import BlockReader
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.evaluation.evaluator import EVALUATION_SEED, Evaluator
from trainer.inputs.inputs import open_inputs
from trainer.objectives.registry import make_criterion


@pytest.fixture(scope="module")
def sentences(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's text, a document a line: a sentence or, of every third paragraph, four: more than 30 tokens."""
    folder = tmp_path_factory.mktemp("sentences")
    paragraphs = (workspace / "text.txt").read_text().split("\n\n")
    lines = [text if number % 3 == 0 else text.replace(". ", ".\n") for number, text in enumerate(paragraphs)]
    (folder / "lines.txt").write_text("\n".join(lines))
    options = {"documents": "line", "validation_fraction": 0.1, "word_starts": "tokenizer"}
    return prepare_text(folder / "lines.txt", workspace, folder / "data", **options)


def config_of(workspace: Path, source: Path, run_dir: Path, **sections: Any) -> Config:
    defaults: dict[str, Any] = {"train": {"steps": 12}, "checkpoint": {"every_steps": 6, "keep_last": 9}}
    data = {"train": str(source), "samples": "documents", **sections.pop("data", {})}
    return tiny_config(workspace, run_dir, **{**defaults, "data": data, **sections})


def test_the_losses_depend_on_no_layout_and_a_resume_is_bit_exact(
    sentences: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"objective": {"scheme": "word", "mask_ratio": 0.3}}
    one = config_of(workspace, sentences, tmp_path / "one", **objective)
    assert train(one) == EXIT_FINISHED
    said = capsys.readouterr().out
    assert "documents: " in said and " rows of 32, " in said and "longer than 30 tokens, and cut into pieces" in said
    clean = losses(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step-00000012")
    assert train(one) == EXIT_FINISHED
    assert losses(tmp_path / "one") == clean

    options: dict[str, Any] = {"deepspeed": "zero3", "data": {"workers": 1}, **ADDING, **objective}
    assert train(config_of(workspace, sentences, tmp_path / "two", **options), 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000012")
    assert train(config_of(workspace, sentences, tmp_path / "two", **objective)) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)


def test_each_document_is_seen_as_if_it_were_alone(sentences: Path, workspace: Path, tmp_path: Path) -> None:
    config = config_of(
        workspace,
        sentences,
        tmp_path / "run",
        data={"validation": str(sentences)},
        eval={"every_steps": 12, "samples": 20},
    )
    assert train(config) == EXIT_FINISHED
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    inputs = open_inputs(config, 1)
    assert inputs.validation is not None
    evaluator = Evaluator(inputs.validation, inputs.objective, make_criterion(config), 20, 4)
    read = BlockReader(inputs.validation, inputs.objective).read(evaluator.blocks)
    batch = inputs.objective.make_batch(read, np.arange(20, dtype=np.uint64), EVALUATION_SEED)
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED_LABEL)
    labels.view(-1)[batch.prediction_index] = batch.labels["mlm"]
    assert batch.documents is not None
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    loss, documents = 0.0, 0
    for ids, targets, positions in zip(batch.inputs["input_ids"], labels, batch.documents.positions, strict=True):
        borders = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(borders):
            if ids[start] == inputs.vocabulary.pad_id:
                continue
            assert ids[start] == inputs.vocabulary.begin_id and ids[end - 1] == inputs.vocabulary.end_id
            with torch.no_grad():
                logits = model(input_ids=ids[None, start:end]).logits[0]
            loss += float(cross_entropy(logits, targets[start:end], ignore_index=IGNORED_LABEL, reduction="sum"))
            documents += 1
    assert documents > 20
    predicted = int((labels != IGNORED_LABEL).sum())
    (line,) = (line for line in metrics(tmp_path / "run") if line["step"] == 12 and "eval/loss" in line)
    assert line["eval/loss"] == pytest.approx(loss / predicted, rel=1e-5)


def test_what_a_sample_is_belongs_to_a_run(
    sentences: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_config(workspace, tmp_path).model.overrides
    attention = {"model": {"preset": "roberta-base", "document_attention": True, "overrides": overrides}}
    for samples in ("documents", "stream"):
        steps, expected = (2, EXIT_FINISHED) if samples == "documents" else (4, EXIT_USER_MISTAKE)
        sections = {"train": {"steps": steps}, "data": {"samples": samples}, **attention}
        assert train(config_of(workspace, sentences, tmp_path / "run", **sections)) == expected
    assert "samples were blocks of the documents, now of the stream (data.samples)" in capsys.readouterr().out

    wrong = config_of(workspace, sentences, tmp_path / "other")
    refused = maskwright("validate", write_config(wrong, tmp_path / "config.yaml"), "model.document_attention=false")
    assert_one_card(refused, EXIT_USER_MISTAKE, "data.samples=documents needs model.document_attention=true")
