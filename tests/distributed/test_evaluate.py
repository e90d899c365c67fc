"""`maskwright evaluate`: the numbers of training, of plain transformers, and of a loop that masks one token at a time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from launcher.console import make_console
from tests.objective_cases import CASES
from tests.preparing import prepare_text
from tests.ranks import metrics, run_ranks, tiny_config, train
from tests.teachers import make_teacher
from tools.convert import convert
from tools.evaluate.options import EvaluateOptions
from tools.evaluate.run import evaluate, this_process
from trainer.checkpoint.find import locate
from trainer.config.file import parse_config
from trainer.errors import EXIT_FINISHED
from trainer.objectives.registry import family_of

LANGUAGE = {"mlm": "eval/mlm/loss", "mlm, taught": "eval/mlm/loss"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def measure(*models: str | Path, **options: Any) -> dict[str, Any]:
    """What the command prints as JSON, found in this process."""
    asked = EvaluateOptions(models=tuple(map(str, models)), **options)
    return json.loads(evaluate(asked, this_process(), Console(file=io.StringIO())).to_json())


@pytest.fixture(scope="module")
def marked(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The workspace's text with its words and sentences marked, in two splits."""
    marks = {"word_starts": "tokenizer", "sentence_starts": "rules", "validation_fraction": 0.2}
    folder = tmp_path_factory.mktemp("marked") / "data"
    return str(prepare_text(workspace / "text.txt", workspace, folder, **marks))


@pytest.fixture(scope="module")
def run_of(workspace: Path, marked: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a case of the table for two steps, once, with an evaluation at the end; returns its run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, ranks: int = 1) -> Path:
        case, run_dir, tokenizer = CASES[name], folder / f"{name}-{ranks}", str(workspace / "tokenizer")
        if run_dir.exists():
            return run_dir
        raw = case.raw(tokenizer, marked, str(run_dir), 0.1)
        raw["data"]["validation"] = marked
        raw["train"]["steps"], raw["schedule"]["warmup_steps"] = 2, 1
        raw["checkpoint"]["every_steps"] = None
        raw["eval"] = {"every_steps": 2, "samples": 22}  # which no batch divides
        if case.teacher is not None:
            family = family_of(case.config("unused", "unused", "unused"))
            teacher = make_teacher(folder / "teacher", tokenizer, case.preset, case.teacher, family)
            raw["objective"]["teacher"] = {**case.objective["teacher"], "model": teacher}
        config = parse_config(raw, "test")
        assert train(config, ranks) == EXIT_FINISHED
        return run_dir

    return make


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "eval/loss" in line]


@pytest.mark.parametrize(
    "name", ["mlm", "mlm by words", "mlm, documents", "mlm and nsp", "mlm, taught", "clm", "plm", "rtd, disentangled"]
)
def test_a_checkpoint_gives_the_loss_that_training_wrote_bit_for_bit(name: str, run_of: Any) -> None:
    run_dir = run_of(name)
    (found,) = measure(run_dir)["models"]
    written = evaluations(run_dir)[-1]
    assert found["step"] == written["step"] == 2 and found["samples"] == 22
    if CASES[name].teacher is not None:  # which no other model has: its own term is compared
        assert found["loss"] == written["eval/mlm/loss"]
        return
    values = {key.removeprefix("eval/"): value for key, value in written.items() if key.startswith("eval/")}
    assert values and {key: found[key] for key in values} == values
