"""Causal language models on real ranks: the same losses in any layout and over a resume, and what comes out writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.commands import assert_one_card, maskwright
from tests.ranks import ADDING, losses, metrics, run_ranks, tiny_config, train, write_config
from tools.convert import convert
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "preset": "gpt2",
        "overrides": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "llama": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
    },
}


def config_of(workspace: Path, run_dir: Path, model_type: str, **sections: Any) -> Config:
    model = dict(MODELS[model_type])
    if "config" in model:
        path = run_dir.with_name(f"{run_dir.name}-config.json")
        path.write_text(json.dumps(model["config"]))
        model["config"] = str(path)
    own: dict[str, Any] = {
        "objective": {"name": "clm"},
        "data": {"validation": str(workspace / "data"), **sections.pop("data", {})},
        "eval": {"every_steps": 6, "samples": 16},
        "train": {"steps": 12},
        "checkpoint": {"every_steps": 6, "keep_last": 9},
    }
    config = tiny_config(workspace, run_dir, **{**own, **sections})
    settings = {"preset": None, "config": None, "overrides": {}, **model, **sections.get("model", {})}
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


def lose_the_last(config: Config) -> None:
    """As if the run had been lost after step 6."""
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000012")


def train_in_pieces(config: Config) -> int:
    """Runs on each rank: logits of a few rows at a time."""
    from trainer.model import prediction_head
    from trainer.train import run

    prediction_head.LOGITS_AT_ONCE = 50 * 300
    return run(config)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_losses_depend_on_no_layout_and_a_resume_is_bit_exact(
    model_type: str, workspace: Path, tmp_path: Path
) -> None:
    one = config_of(workspace, tmp_path / "one", model_type)
    assert train(one) == EXIT_FINISHED
    clean = losses(tmp_path / "one")
    assert clean[-1] < clean[0] - 0.3, "it learns"
    lose_the_last(one)
    assert train(one) == EXIT_FINISHED
    assert losses(tmp_path / "one") == clean

    two = config_of(workspace, tmp_path / "two", model_type, deepspeed="zero3", **ADDING)
    assert run_ranks(train_in_pieces, 2, two) == [EXIT_FINISHED] * 2
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
    lose_the_last(two)
    assert train(config_of(workspace, tmp_path / "two", model_type, deepspeed="zero1")) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_the_other_stages_give_the_same(stage: str, workspace: Path, tmp_path: Path) -> None:
    assert train(config_of(workspace, tmp_path / "one", "gpt2")) == EXIT_FINISHED
    assert train(config_of(workspace, tmp_path / "two", "gpt2", deepspeed=stage), 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5, rel=0)


@pytest.mark.parametrize("samples", ["stream", "documents"])
def test_attention_within_documents(samples: str, workspace: Path, tmp_path: Path) -> None:
    def config(name: str, **sections: Any) -> Config:
        made = config_of(workspace, tmp_path / name, "gpt2", data={"samples": samples}, **sections)
        return made.model_copy(update={"model": made.model.model_copy(update={"document_attention": True})})

    assert train(config("one")) == EXIT_FINISHED
    assert train(config("two", deepspeed="zero3", **ADDING), 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5, rel=0)


def test_what_it_evaluates_and_converts_is_what_transformers_makes_of_it(workspace: Path, tmp_path: Path) -> None:
    assert train(config_of(workspace, tmp_path / "run", "gpt2"), 2) == EXIT_FINISHED
    evaluated = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) == 3 and evaluated[-1]["eval/perplexity"] < evaluated[0]["eval/perplexity"]
    assert 0 < evaluated[-1]["eval/accuracy"] < 1 and "eval/masked_accuracy" not in evaluated[-1]

    proven = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_from_training == 0 and proven.difference_after_reload == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()) and model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.eos_token_id == tokenizer.sep_token_id or model.config.eos_token_id == tokenizer.eos_token_id
    writes = pipeline("text-generation", model=str(tmp_path / "model"))
    torch.manual_seed(0)
    (found,) = writes("ka", max_new_tokens=12, do_sample=False)
    assert found["generated_text"].startswith("ka") and len(found["generated_text"]) > 2
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "| validation perplexity |" in card


def test_what_does_not_fit_is_one_card(workspace: Path, tmp_path: Path) -> None:
    def refused(config: Config) -> str:
        done = maskwright("validate", str(write_config(config, tmp_path / "c.yaml")))
        assert_one_card(done, EXIT_USER_MISTAKE)
        return done.stderr

    encoder = tiny_config(workspace, tmp_path / "run", objective={"name": "clm"})
    said = refused(encoder)
    assert "'roberta', as configured, is no decoder with a causal language-model head" in said
    assert "objective.name=mlm" in said
    masked = config_of(workspace, tmp_path / "run", "gpt2", objective={"name": "mlm"})
    assert "objective.name=clm" in refused(masked)
    path = write_config(config_of(workspace, tmp_path / "run", "gpt2"), tmp_path / "c.yaml")
    done = maskwright("validate", str(path), "objective.scheme=word")
    assert_one_card(done, EXIT_USER_MISTAKE, "scheme does nothing with name clm")
