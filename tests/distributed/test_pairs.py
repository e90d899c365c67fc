"""Pairs of segments on real ranks: the same losses in any layout and over a resume, evaluated, converted, and learnt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForPreTraining, AutoTokenizer

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.ranks import ADDING, TINY_ROBERTA, WITHOUT_DROPOUT, losses, metrics, tiny_config, train, write_config
from tools.convert import convert
from tools.prepare import prepare
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

SIZES = {**TINY_ROBERTA, **WITHOUT_DROPOUT, "max_position_embeddings": 48}
MODELS: dict[str, dict[str, Any]] = {
    "nsp": {"preset": "bert-base", "overrides": SIZES},
    "sop": {"preset": "albert-base", "overrides": {**SIZES, "embedding_size": 16, "classifier_dropout_prob": 0.0}},
}
CLASSES = {"nsp": "BertForPreTraining", "sop": "AlbertForPreTraining"}
LOGITS = {"nsp": "seq_relationship_logits", "sop": "sop_logits"}
every_task = pytest.mark.parametrize("task", MODELS)


@pytest.fixture(scope="module")
def sentences(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's text with words and sentences marked, train and validation; four sentences a document."""
    folder = tmp_path_factory.mktemp("sentences") / "data"
    text = (workspace / "text.txt").read_text().split("\n\n")
    # The rule wants a capital letter after a full stop.
    capitals = "\n\n".join(" ".join(part.strip().capitalize() + "." for part in one.split(".")[:4]) for one in text)
    (folder.parent / "text.txt").write_text(capitals)
    prepare(
        [str(folder.parent / "text.txt")],
        str(workspace / "tokenizer"),
        str(folder),
        workers=1,
        validation_fraction=0.1,
        word_starts="tokenizer",
        sentence_starts="rules",
        console=make_console(),
    )
    return folder


def config_of(workspace: Path, source: Path, run_dir: Path, task: str, **sections: Any) -> Config:
    own: dict[str, Any] = {
        "data": {
            "train": str(source / "train"),
            "validation": str(source / "validation"),
            "seq_len": 48,
            **sections.pop("data", {}),
        },
        "objective": {"pair": {"task": task, "weight": 0.7}, **sections.pop("objective", {})},
        "train": {"steps": 12},
        "checkpoint": {"every_steps": 6, "keep_last": 9},
        "eval": {"every_steps": 6, "samples": 20},
    }
    config = tiny_config(workspace, run_dir, **{**own, **sections})
    model = {"preset": None, "overrides": {}, **MODELS[task], **sections.get("model", {})}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def lose_the_last(config: Config) -> None:
    """As if the run had been lost after step 6."""
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000012")


def values(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run_dir) if name in line]


@every_task
def test_the_losses_depend_on_no_layout_and_a_resume_is_bit_exact(
    task: str, sentences: Path, workspace: Path, tmp_path: Path
) -> None:
    stages = [{"from_tokens": 0, "ratio": 0.3}, {"from_tokens": 2000, "ratio": 0.15}]
    own: dict[str, Any] = {"objective": {"scheme": "ngram", "mask_ratio": stages}}
    one = config_of(workspace, sentences, tmp_path / "one", task, **dict(own))
    assert train(one) == EXIT_FINISHED
    clean, of_pairs = losses(tmp_path / "one"), values(tmp_path / "one", f"train/loss/{task}")
    of_tokens = values(tmp_path / "one", "train/loss/mlm")
    assert len(of_pairs) == 12 and min(of_pairs) > 0.1
    for whole, tokens, pairs in zip(clean, of_tokens, of_pairs, strict=True):
        assert whole == pytest.approx(tokens + 0.7 * pairs, rel=1e-6)
    lose_the_last(one)
    assert train(one) == EXIT_FINISHED
    assert losses(tmp_path / "one") == clean

    options: dict[str, Any] = {"deepspeed": "zero3", "data": {"workers": 1}, **ADDING}
    two = config_of(workspace, sentences, tmp_path / "two", task, **dict(own), **options)
    assert train(two, 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
    assert values(tmp_path / "two", f"train/loss/{task}") == pytest.approx(of_pairs, abs=1e-5, rel=0)
    for name in ("eval/loss", "eval/perplexity", f"eval/{task}/loss", f"eval/{task}/accuracy", f"eval/{task}/ignored"):
        assert values(tmp_path / "two", name) == pytest.approx(values(tmp_path / "one", name), rel=1e-4), name
    lose_the_last(two)
    assert train(config_of(workspace, sentences, tmp_path / "two", task, **dict(own))) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
