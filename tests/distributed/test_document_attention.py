"""Runs with document attention: documents alone, the same losses for every layout, a stock model at the end."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from launcher.console import make_console
from tests.ranks import ADDING, TINY_ROBERTA, losses, metrics, tiny_config, train
from tools.convert import convert
from trainer.config import Config
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.data.shard_checks import document_starts
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.evaluation.evaluator import EVALUATION_SEED, Evaluator
from trainer.inputs.inputs import open_inputs
from trainer.objectives.registry import make_criterion

SEQ_LEN = 64
SIZES = {**TINY_ROBERTA, "max_position_embeddings": 66}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "roberta-base": {**SIZES, **NO_DROPOUT},
    "bert-base": {**SIZES, **NO_DROPOUT},
    "modernbert-base": {**SIZES, "num_hidden_layers": 4, "local_attention": 8},
}


def config_of(
    workspace: Path,
    run_dir: Path,
    preset: str = "roberta-base",
    document_attention: bool = True,
    overrides: dict[str, Any] | None = None,
    **sections: Any,
) -> Config:
    model = {
        "preset": preset,
        "overrides": {**OVERRIDES[preset], **(overrides or {})},
        "document_attention": document_attention,
        **sections.pop("model", {}),
    }
    data = {"seq_len": SEQ_LEN, **sections.pop("data", {})}
    return tiny_config(workspace, run_dir, model=model, data=data, **sections)


@pytest.fixture(scope="module")
def reference(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """20 steps on one rank, ZeRO-1, micro-batch 2, no workers; fp32, dropout 0."""
    folder = tmp_path_factory.mktemp("reference")
    assert train(config_of(workspace, folder / "within")) == EXIT_FINISHED
    found = losses(folder / "within")
    assert found[-1] < found[0] - 0.3, "the model does not learn, so equal losses would say little"
    assert train(config_of(workspace, folder / "across", document_attention=False)) == EXIT_FINISHED
    assert losses(folder / "across") != pytest.approx(found, abs=1e-3), "document attention makes no difference"
    return found


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, ADDING),
    "1 worker": (1, {"data": {"workers": 1}}),
    "2 ranks, 1 worker": (2, {"data": {"workers": 1}}),
    "micro-batch 8": (1, {"batch": {"micro_size": 8}}),
    "ZeRO-3, 2 ranks": (2, {"deepspeed": "zero3"}),
    "activation checkpointing": (1, {"model": {"activation_checkpointing": True}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_the_layout(name: str, reference: list[float], workspace: Path, tmp_path: Path) -> None:
    ranks, sections = VARIANTS[name]
    assert train(config_of(workspace, tmp_path, **sections), ranks) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(reference, abs=1e-5, rel=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.timeout(600)  # g++ is slow on a busy machine
def test_a_compiled_model_has_the_same_losses(workspace: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"overrides": {"num_hidden_layers": 1}, "train": {"steps": 4}}
    assert train(config_of(workspace, tmp_path / "eager", **small)) == EXIT_FINISHED
    compiled = config_of(workspace, tmp_path / "compiled", model={"compile": True}, **small)
    assert train(compiled, timeout_s=500) == EXIT_FINISHED
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5, rel=0)


def test_bf16_trains_alike(reference: list[float], workspace: Path, tmp_path: Path) -> None:
    assert train(config_of(workspace, tmp_path, train={"precision": "bf16"}), 2) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(reference, abs=0.05, rel=0)


def test_a_resume_is_bit_exact_and_cannot_change_the_setting(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = config_of(workspace, tmp_path / "run", overrides=dropout, checkpoint={"every_steps": 7})
    assert train(config, 2) == EXIT_FINISHED
    assert "attention: by a block mask (no GPU)" in capsys.readouterr().out
    clean = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")  # as if the run had been lost after step 14
    off = config.model_copy(update={"model": config.model.model_copy(update={"document_attention": False})})
    assert train(off, 2) == EXIT_USER_MISTAKE
    assert "document attention was on, now off" in capsys.readouterr().out
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean


def test_a_run_without_it_cannot_go_on_with_it(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = config_of(workspace, tmp_path, document_attention=False, train={"steps": 2})
    assert train(without) == EXIT_FINISHED
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert "document attention" not in manifest["identity"], "checkpoints from before the key would be refused"
    assert train(config_of(workspace, tmp_path, train={"steps": 4})) == EXIT_USER_MISTAKE
    assert "document attention was off, now on" in capsys.readouterr().out


def loss_of_each_document_alone(config: Config, folder: Path) -> float:
    """The evaluation by hand: plain transformers, each document of a block an input of its own, cut by .doc files."""
    inputs = open_inputs(config, 1)
    assert inputs.validation is not None
    borders, before = [], 0
    for entry in inputs.validation.manifest.shards:
        borders.append(document_starts(inputs.validation.folder, entry).astype(np.int64)[:-1] + before)
        before += entry.tokens
    starts, payload = np.concatenate(borders), inputs.objective.view.payload
    blocks = Evaluator(inputs.validation, inputs.objective, make_criterion(config), config.eval.samples, 2).blocks
    tokens = inputs.validation.read_blocks(blocks, payload)
    batch = inputs.objective.make_batch(Blocks(tokens), np.arange(len(blocks), dtype=np.uint64), EVALUATION_SEED)
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED_LABEL)
    labels.view(-1)[batch.prediction_index] = batch.labels["mlm"]
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    loss, documents = 0.0, 0
    for block, ids, targets in zip(blocks.tolist(), batch.inputs["input_ids"], labels, strict=True):
        inside = starts[(starts > block * payload) & (starts < (block + 1) * payload)] - block * payload
        for start, end in itertools.pairwise([0, *(inside + 1).tolist(), SEQ_LEN]):
            with torch.no_grad():
                logits = model(input_ids=ids[None, start:end]).logits[0]
            loss += float(cross_entropy(logits, targets[start:end], ignore_index=IGNORED_LABEL, reduction="sum"))
            documents += 1
    assert documents > 1.3 * len(blocks), "there are hardly any borders, so this says little"
    return loss / len(batch.labels["mlm"])


def test_what_a_token_attends_to_is_counted_from_the_borders(workspace: Path, tmp_path: Path) -> None:
    inputs = open_inputs(config_of(workspace, tmp_path), 1)
    data, payload = inputs.sources[0], inputs.objective.view.payload
    borders, before = set(), 0
    for entry in data.manifest.shards:
        borders |= {int(start) + before for start in document_starts(data.folder, entry)[:-1]}
        before += entry.tokens
    _, blocks = inputs.order.locate(np.arange(1024))
    attended = 0
    for block in blocks.tolist():
        cuts = [place + 1 for place in range(1, payload) if block * payload + place in borders]
        attended += sum((end - start) ** 2 for start, end in itertools.pairwise([0, *cuts, SEQ_LEN]))
    assert inputs.attended_tokens == (attended / (1024 * SEQ_LEN),)
    assert 0.5 * SEQ_LEN < inputs.attended_tokens[0] < 0.95 * SEQ_LEN
    assert f"a token attends to {inputs.attended_tokens[0]:.0f} of 64 on average" in "\n".join(inputs.describe())
    assert open_inputs(config_of(workspace, tmp_path, document_attention=False), 1).attended_tokens == (SEQ_LEN,)


@pytest.mark.parametrize("preset", OVERRIDES)
def test_evaluation_and_conversion_of_each_class(preset: str, workspace: Path, tmp_path: Path) -> None:
    config = config_of(
        workspace,
        tmp_path / "run",
        preset,
        data={"validation": str(workspace / "data")},
        eval={"every_steps": 10, "samples": 24},
        train={"steps": 10},
    )
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.1
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training == 0.0
    assert conversion.difference_after_reload == 0.0
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers.models.")
    evaluation = [line["eval/loss"] for line in metrics(tmp_path / "run") if "eval/loss" in line][-1]
    assert loss_of_each_document_alone(config, tmp_path / "model") == pytest.approx(evaluation, abs=1e-5)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| attention | within documents only" in card
