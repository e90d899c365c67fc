"""Permutation language models on real ranks: the same losses in any layout and over a resume, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import assert_one_card, maskwright
from tests.ranks import losses, metrics, tiny_config, train, write_config
from tools.convert import convert
from trainer.checkpoint.contents import read_probe
from trainer.config import Config
from trainer.data.batch import RANKS
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

TINY = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "dropout": 0.0}
XLNETS_OWN = {"scheme": "ngram", "lengths": [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], "mask_ratio": 1 / 6}


def config_of(workspace: Path, run_dir: Path, overrides: dict[str, Any] | None = None, **sections: Any) -> Config:
    own: dict[str, Any] = {
        "objective": {"name": "plm", "mask_ratio": 0.3, **sections.pop("objective", {})},
        "data": {"validation": str(workspace / "data"), **sections.pop("data", {})},
        "eval": {"every_steps": 6, "samples": 16},
        "train": {"steps": 12, **sections.pop("train", {})},
        "checkpoint": {"every_steps": 6, "keep_last": 9},
    }
    config = tiny_config(workspace, run_dir, **{**own, **sections})
    settings = {"preset": "xlnet-base", "overrides": {**TINY, **(overrides or {})}}
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


def test_bf16_is_fp32_but_for_rounding(workspace: Path, tmp_path: Path) -> None:
    assert train(config_of(workspace, tmp_path / "fp32")) == EXIT_FINISHED
    halves = config_of(workspace, tmp_path / "bf16", train={"precision": "bf16"})
    assert train(halves, 2) == EXIT_FINISHED
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), abs=0.05)
    proven = convert(str(tmp_path / "bf16"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_after_reload == 0


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_what_it_evaluates_and_converts_is_what_transformers_makes_of_it(
    stage: str, workspace: Path, tmp_path: Path
) -> None:
    assert train(config_of(workspace, tmp_path / "run", deepspeed=stage), 2) == EXIT_FINISHED
    evaluated = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) == 3 and evaluated[-1]["eval/perplexity"] < evaluated[0]["eval/perplexity"]
    assert 0 < evaluated[-1]["eval/masked_accuracy"] < 1

    proven = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_from_training == 0 and proven.difference_after_reload == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(model).__name__ == "XLNetLMHeadModel" and not any(report.values())
    assert model.config.mem_len is None and model.config.use_mems_eval, "as published"
    probe = read_probe(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert probe.inputs[RANKS].max() == len(probe.prediction_index) // len(probe.inputs[RANKS]) - 1

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer("ka ke ki").input_ids])
    assert model.eval().generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "| predicted tokens told right |" in card
    use = card.split("```python\n")[1].split("```")[0]
    exec(use.replace("PATH_OF_THIS_FOLDER", str(tmp_path / "model")), {"print": lambda tokens: tokens})


def test_samples_show_what_is_predicted_in_which_order(workspace: Path, tmp_path: Path) -> None:
    path = write_config(config_of(workspace, tmp_path / "run"), tmp_path / "c.yaml")
    done = maskwright("data", "show", path, "--json")
    assert done.returncode == EXIT_FINISHED, done.stderr
    found = json.loads(done.stdout)
    for sample in found:
        assert sorted(sample["order"]) == [position for position, _ in sample["labels"]]
        assert [sample["input_ids"][position] for position, _ in sample["labels"]] == [
            token for _, token in sample["labels"]
        ]
        assert sample["text"] == sample["masked_text"] and sample["terms"] == {"plm": 9}
    assert sorted(found[0]["order"]) != found[0]["order"]
    done = maskwright("data", "show", path)
    assert done.returncode == EXIT_FINISHED, done.stderr
    assert "0 of data: 9 predicted ═══" in done.stdout and done.stdout.count("in this order: ") == 3


def test_a_plan_and_a_validation_reckon_with_two_streams(workspace: Path, tmp_path: Path) -> None:
    path = write_config(config_of(workspace, tmp_path / "run"), tmp_path / "c.yaml")
    done = maskwright("validate", str(path))
    assert done.returncode == EXIT_FINISHED and "computes the logits of all positions" not in done.stdout, done.stderr
    done = maskwright("plan", str(path), "batch.micro_size=auto", "--device", "a100", "--gpus-per-node", "2", "--json")
    assert done.returncode == EXIT_FINISHED, done.stderr


def test_what_does_not_fit_is_one_card(workspace: Path, tmp_path: Path) -> None:
    def refused(config: Config, *overrides: str) -> str:
        done = maskwright("validate", str(write_config(config, tmp_path / "c.yaml")), *overrides)
        assert_one_card(done, EXIT_USER_MISTAKE)
        return done.stderr

    xlnet = config_of(workspace, tmp_path / "run")
    assert "objective.name=plm" in refused(xlnet.model_copy(update={"objective": type(xlnet.objective)()}))
    encoder = tiny_config(workspace, tmp_path / "run", objective={"name": "plm"})
    assert "'roberta', as configured, is no model of two streams" in refused(encoder)
    assert "replace_mask does nothing with name plm" in refused(xlnet, "objective.replace_mask=0.5")
    for samples in ("stream", "documents"):
        said = refused(xlnet, "model.document_attention=true", f"data.samples={samples}")
        assert "cannot keep its attention within documents" in said
    assert "does not see both sides of a block" in refused(xlnet, "model.overrides.attn_type=uni")
    assert "--word-starts" in refused(xlnet, "objective.scheme=word")
