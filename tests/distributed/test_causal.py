"""Causal language models on real ranks: the same losses in any layout and over a resume, and what comes out writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from tests.commands import assert_one_card, maskwright
from tests.ranks import ADDING, losses, metrics, run_ranks, tiny_config, train, write_config
from tools.convert import convert
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL
from trainer.model.source import load_vocabulary

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "preset": "gpt2",
        "overrides": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "bert": {"config": {"model_type": "bert-generation", **SIZES}},
    "llama": {
        "config": {
            "model_type": "llama",
            **SIZES,
            "num_key_value_heads": 2,
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


def train_bert_generation(config: Config) -> int:
    """Runs on each rank: as if nobody had known that the type is not causal by itself."""
    from trainer.model import architecture, classes
    from trainer.train import run

    causal = classes.FAMILIES[CAUSAL]
    known = {**causal.classes, "bert-generation": "BertGenerationDecoder"}
    classes.FAMILIES = {**classes.FAMILIES, CAUSAL: replace(causal, classes=known)}
    architecture.FAMILIES = classes.FAMILIES
    return run(config)


def train_in_pieces(config: Config) -> int:
    """Runs on each rank: logits of a few rows at a time."""
    from trainer.model import prediction_head
    from trainer.train import run

    prediction_head.LOGITS_AT_ONCE = 50 * 300
    return run(config)


def test_logits_in_pieces_change_nothing_in_any_layout(workspace: Path, tmp_path: Path) -> None:
    """Where the vocabulary's matrix is one of its own, and at stage 3 is gathered for each pass."""
    model_type = "llama"
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


def test_attention_within_documents(workspace: Path, tmp_path: Path) -> None:
    def config(name: str, **sections: Any) -> Config:
        steps = {"train": {"steps": 4}, "eval": {"every_steps": None}, "checkpoint": {"every_steps": None}}
        made = config_of(workspace, tmp_path / name, "gpt2", **steps, **sections)
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
    trained = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    assert trained("ka").input_ids[-1] == model.config.eos_token_id, "it closes a text, and what follows is another one"
    ids = trained("ka", add_special_tokens=False).input_ids
    assert tokenizer("ka").input_ids == ids, "the stream has no begin token, and the text is left open"
    writes = pipeline("text-generation", model=str(tmp_path / "model"))
    (found,) = writes("ka", max_new_tokens=3, do_sample=False, return_full_text=False)
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found["generated_text"] == tokenizer.decode(ids[-3:], skip_special_tokens=True)
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


def plain_losses(config: Config, steps: int) -> list[float]:
    """Train transformers' GPT-2 by a loop of plain torch, on windows of the token file in the order of the run."""
    inputs = open_inputs(config, 1)
    model = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed, CAUSAL).model
    stock = GPT2LMHeadModel(GPT2Config.from_dict(model.config.to_dict()))
    stock.load_state_dict(model.state_dict())
    (file,) = Path(config.data.train[0].path).glob("train/*.tok")
    stream = torch.from_numpy(np.fromfile(file, "<u2").astype(np.int64))
    length, batch, peak = config.data.seq_len, config.batch.global_size, config.optimizer.lr
    decayed = [weight for weight in stock.parameters() if weight.ndim > 1]
    others = [weight for weight in stock.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    found = []
    for step in range(1, steps + 1):
        _, blocks = inputs.order.locate(np.arange((step - 1) * batch, step * batch))
        windows = torch.stack([stream[block * length : (block + 1) * length + 1] for block in blocks.tolist()])
        logits = stock(input_ids=windows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = peak * min(1.0, step / 4) * (1 - max(0, step - 4) / (steps - 4))
        adamw.step()
        found.append(loss.item())
    return found


def test_a_loop_of_plain_torch_gives_the_same_losses(workspace: Path, tmp_path: Path) -> None:
    """As nanoGPT trains: windows of the stream, each token told from those before it, clipped AdamW."""
    sections = {"train": {"steps": 20}, "eval": {"every_steps": None}, "data": {"validation": None}}
    config = config_of(workspace, tmp_path / "run", "gpt2", **sections)
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(config, 20), abs=1e-5, rel=0)


def test_a_class_that_sees_what_it_is_to_tell_is_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """BERT's generation model is causal only when it is told so; transformers counts it among the causal ones."""
    config = config_of(workspace, tmp_path / "run", "bert")
    assert run_ranks(train_bert_generation, 2, config) == [EXIT_USER_MISTAKE] * 2
    assert "BertGenerationDecoder, as configured, looks at later tokens" in capfd.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_with_one_special_token_is_enough(workspace: Path, tmp_path: Path) -> None:
    """As GPT-2's: its token ends a document, begins one, and pads, and its row is learnt."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    pieces.train([str(workspace / "text.txt")], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=end, eos_token=end, unk_token=end).save_pretrained(
        tmp_path / "tokenizer"
    )
    command = ("prepare", "--input", str(workspace / "text.txt"), "--tokenizer", str(tmp_path / "tokenizer"))
    prepared = maskwright(*command, "--output", str(tmp_path / "data"))
    assert prepared.returncode == 0, prepared.stderr
    assert "it has no mask token, which causal models do without" in prepared.stderr

    for samples in ("stream", "documents"):
        sections = {"data": {"train": str(tmp_path / "data"), "validation": None, "samples": samples}}
        config = config_of(workspace, tmp_path / samples, "llama", eval={"every_steps": None}, **sections)
        model = {"tokenizer": str(tmp_path / "tokenizer"), "document_attention": samples == "documents"}
        config = config.model_copy(update={"model": config.model.model_copy(update=model)})
        assert train(config) == EXIT_FINISHED
        found = losses(tmp_path / samples)
        assert found[-1] < found[0] - 0.3
    convert(str(tmp_path / "documents"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    table = AutoModelForCausalLM.from_pretrained(tmp_path / "model").get_input_embeddings()
    untrained = build_model(config.model, load_vocabulary(config), 32, config.run.seed, CAUSAL).model
    assert table.padding_idx is None
    assert not torch.equal(table.weight[0], untrained.get_input_embeddings().weight[0])

    masked = tiny_config(workspace, tmp_path / "masked", data={"train": str(tmp_path / "data")})
    path = write_config(masked, tmp_path / "masked.yaml")
    done = maskwright("validate", str(path), f"model.tokenizer={tmp_path / 'tokenizer'}")
    assert_one_card(done, EXIT_USER_MISTAKE, "The tokenizer has no mask and no pad token")


def test_rows_of_documents_are_converted_with_their_begin_token(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run", "gpt2", data={"samples": "documents"})
    model = config.model.model_copy(update={"document_attention": True})
    assert train(config.model_copy(update={"model": model})) == EXIT_FINISHED
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    trained = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    assert tokenizer("ka").input_ids == trained("ka").input_ids[:-1]
    assert tokenizer("ka").input_ids[0] == trained.cls_token_id
    assert tokenizer.get_vocab() == trained.get_vocab() and tokenizer.mask_token == trained.mask_token


def test_padding_that_is_another_token_too_is_refused_where_positions_depend_on_it(
    workspace: Path, tmp_path: Path
) -> None:
    """RoBERTa gives padding no position: plain transformers would place text otherwise than training did."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    tokenizer.pad_token = tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "c.yaml")
    overrides = (f"model.tokenizer={tmp_path / 'tokenizer'}", "model.overrides.max_position_embeddings=40")
    done = maskwright("validate", str(path), *overrides)
    assert_one_card(done, EXIT_USER_MISTAKE, "The tokenizer's padding token has another role as well")
