"""An objective that only this test knows: the trainer takes it with no line changed but its registration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from rich.console import Console
from transformers import AutoModelForMaskedLM

from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from tools.convert import convert
from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.blocks import Blocks, framed_view
from trainer.data.tokenizer import Vocabulary
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.objectives.objective import Network, ObjectiveCard, Predicted, Tally, Term
from trainer.objectives.registry import OBJECTIVES, Objective


class ParitySamples:
    """Blocks as they are; predicted is at each position whether the id of its token is odd."""

    marks: tuple[str, ...] = ()
    shape_count = 1

    def __init__(self, vocabulary: Vocabulary, seq_len: int) -> None:
        self.vocabulary, self.seq_len, self.view, self.head_rows = (
            vocabulary,
            seq_len,
            framed_view(seq_len),
            seq_len - 1,
        )

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        return self.plain(blocks)

    def plain(self, blocks: Blocks) -> Batch:
        rows = len(blocks.tokens)
        tokens = np.full((rows, self.seq_len), self.vocabulary.end_id, np.int64)
        tokens[:, 0], tokens[:, 1:-1] = self.vocabulary.begin_id, blocks.tokens
        return Batch(
            inputs={"input_ids": torch.from_numpy(tokens)},
            labels={"parity": torch.from_numpy((tokens % 2).reshape(-1))},
            prediction_index=torch.arange(rows * self.seq_len),
        )

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        return np.eye(1, self.seq_len, dtype=np.bool_).repeat(len(blocks.tokens), axis=0)


class Parity:
    """The first two logits of a position stand for even and odd."""

    terms = (Term("parity", 1.0),)

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        logits = network(batch.inputs, batch.prediction_index, batch.documents).logits[:, :2].float()
        entropies = functional.cross_entropy(logits, batch.labels["parity"], reduction="none")
        return {"parity": Predicted(entropies, None if torch.is_grad_enabled() else logits.argmax(dim=-1))}

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        return {"eval/parity": tallies["parity"].accuracy}

    def describe(self, values: Mapping[str, float]) -> str:
        return f"parity told right {values['eval/parity']:.1%}"


PARITY = Objective(
    family=lambda config: "masked",
    view=lambda config, seq_len: framed_view(seq_len),
    samples=lambda config, vocabulary, seq_len, evaluating: ParitySamples(vocabulary, seq_len),
    criterion=lambda config, kernel: Parity(),
    card=ObjectiveCard(
        ("feature-extraction",), lambda settings, tokens: "parity of the tokens", {"eval/parity": ("told", ".1%")}, ""
    ),
)


def train_parity(config: Config) -> int:
    """Runs on each rank."""
    from trainer.train import run

    OBJECTIVES["parity"] = PARITY
    return run(config)


def test_it_trains_evaluates_resumes_and_converts(workspace: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    sections = {
        "objective": {"name": "parity"},
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 10, "samples": 16},
        "checkpoint": {"every_steps": 10},
    }
    config = tiny_config(workspace, tmp_path / "run", **sections)
    assert run_ranks(train_parity, 2, config) == [EXIT_FINISHED] * 2
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.1, "it learns"
    evaluated = [line["eval/parity"] for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) == 3 and evaluated[-1] > evaluated[0]
    assert "parity told right " in capfd.readouterr().out

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")  # as if the run had been lost after step 10
    assert run_ranks(train_parity, 2, config) == [EXIT_FINISHED] * 2
    assert losses(tmp_path / "run") == found

    monkeypatch.setitem(OBJECTIVES, "parity", PARITY)
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert "| objective | parity of the tokens |" in (tmp_path / "model" / "README.md").read_text()


def test_a_name_that_nobody_has_registered_is_a_card(workspace: Path, tmp_path: Path, capfd) -> None:
    assert train(tiny_config(workspace, tmp_path / "run", objective={"name": "mlmm"})) == EXIT_USER_MISTAKE
    assert "There is no objective 'mlmm'. Did you mean 'mlm'?" in capfd.readouterr().out


def test_a_checkpoint_from_before_a_key_of_the_objective_resumes(workspace: Path, tmp_path: Path, capfd) -> None:
    config = tiny_config(workspace, tmp_path / "run", checkpoint={"every_steps": 10})
    assert train(config) == EXIT_FINISHED
    found = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    path = tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("scheme", "pair"):
        del manifest["identity"]["objective"][key]
    manifest.pop("checksum")
    path.write_text(json.dumps(manifest))
    assert train(config) == EXIT_FINISHED
    assert losses(tmp_path / "run") == found
    assert "resuming from step-00000010" in capfd.readouterr().out
