"""Training that goes on from a checkpoint folder: a converted run with a grown vocabulary, BERT, ESM, any class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

from launcher.console import make_console
from tests.conftest import write_text
from tests.ranks import TINY_ROBERTA, losses, metrics, tiny_config, train
from tools.convert import convert
from tools.prepare import prepare
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

NEW_TOKENS = [f"neologism{number}" for number in range(10)]


def evaluations(run_dir: Path) -> list[float]:
    return [line["eval/loss"] for line in metrics(run_dir) if "eval/loss" in line]


def evaluated(workspace: Path, run_dir: Path, data: Path, **sections: Any) -> Config:
    settings = {
        "data": {"train": str(data), "validation": str(data)},
        "eval": {"every_steps": 1000, "samples": 64},
        "batch": {"global_size": 16, "micro_size": 8},
        "optimizer": {"lr": 1e-2},
        "logging": {"every_steps": 50},
    }
    return tiny_config(workspace, run_dir, **{**settings, **sections})


def other_text(workspace: Path, folder: Path) -> Path:
    """Text of the same language that the first run has not seen, with new words in it."""
    text = write_text(folder / "seen.txt", documents=1200, seed=1).read_text()  # the workspace's 700 and 500 more
    unseen = text.split("\n\n")[700:]
    path = folder / "other.txt"
    marked = [f"{document} {NEW_TOKENS[number % 10]}." for number, document in enumerate(unseen)]
    path.write_text("\n\n".join(marked) + "\n")
    return path


def test_a_converted_run_goes_on_where_it_was_with_ten_more_tokens(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(workspace, tmp_path / "first", workspace / "data", train={"steps": 150})
    assert train(first, 2) == EXIT_FINISHED
    untrained, learned = evaluations(tmp_path / "first")
    assert learned < untrained - 1.0, "the first run must have learned for this to say anything"
    convert(str(tmp_path / "first"), str(tmp_path / "model"), "float32", "5GB", make_console())

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    size = len(tokenizer)
    assert tokenizer.add_tokens(NEW_TOKENS) == 10
    tokenizer.save_pretrained(tmp_path / "grown")
    text, data = other_text(workspace, tmp_path), tmp_path / "data"
    console = make_console()
    prepare([str(text)], str(tmp_path / "grown"), str(data), workers=1, validation_fraction=0.2, console=console)

    model = {"preset": None, "from_pretrained": str(tmp_path / "model"), "tokenizer": str(tmp_path / "grown")}
    second = evaluated(
        workspace,
        tmp_path / "second",
        data,
        model={**model, "overrides": {}},
        optimizer={"lr": 5e-3},
        train={"steps": 40},
    )
    capsys.readouterr()
    assert train(second, 2) == EXIT_FINISHED
    shown = capsys.readouterr().out
    assert f"vocabulary: resized from {size} to {size + 10}; new rows start at the mean" in shown
    start, end = evaluations(tmp_path / "second")
    print(f"untrained {untrained:.3f}, first run's end {learned:.3f}, second run's start {start:.3f}, end {end:.3f}")
    assert start < learned + 0.35 * (untrained - learned), "it starts from the first run's level"
    assert end < start, "and learns the new words"

    convert(str(tmp_path / "second"), str(tmp_path / "again"), "float32", "5GB", console)
    reloaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert reloaded.config.vocab_size == size + 10
    assert reloaded.get_input_embeddings().weight.shape[0] == size + 10
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(again) == size + 10
    assert again.convert_tokens_to_ids(NEW_TOKENS) == list(range(size, size + 10))


def tiny(model_class: type[PreTrainedModel], config_class: Any, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**TINY_ROBERTA, "vocab_size": 500, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_class(config_class(**{**settings, "pad_token_id": 1, **changes}))


CLASSES = {
    "BERT": lambda: tiny(BertForMaskedLM, BertConfig),
    # ESM's contact head is part of the class and takes no part in the loss: its weights never get a gradient.
    "ESM": lambda: tiny(EsmForMaskedLM, EsmConfig, mask_token_id=4, position_embedding_type="rotary"),
    "a class that we know nothing of": lambda: tiny(RoFormerForMaskedLM, RoFormerConfig, embedding_size=32),
}


@pytest.mark.parametrize("name", CLASSES)
def test_any_masked_lm_class_trains_at_stage_1_and_3_and_converts(
    name: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CLASSES[name]()
    model.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(workspace / "tokenizer").save_pretrained(tmp_path / "start")
    settings = {"preset": None, "from_pretrained": str(tmp_path / "start"), "tokenizer": None, "overrides": {}}
    found = []
    for preset in ("zero1", "zero3"):
        run_dir = tmp_path / preset
        config = tiny_config(workspace, run_dir, model=settings, train={"steps": 3}, deepspeed=preset)
        assert train(config, 2) == EXIT_FINISHED
        convert(str(run_dir), str(tmp_path / f"{preset}-model"), "float32", "5GB", make_console())
        found.append(losses(run_dir))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][2] < found[0][0]
    assert ("computes the logits of all positions" in capsys.readouterr().out) == ("know nothing" in name)

    trained = [AutoModelForMaskedLM.from_pretrained(tmp_path / f"{preset}-model") for preset in ("zero1", "zero3")]
    assert all(type(one) is type(model) for one in trained)
    for weight, one, three in zip(model.parameters(), *(other.parameters() for other in trained), strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=1e-5)
        assert torch.isfinite(one).all()
        assert weight.shape == one.shape
