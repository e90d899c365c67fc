"""A run is proven before its first step to be one that can be converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from launcher.console import make_console
from tests.ranks import TINY_ROBERTA, run_ranks, tiny_config, train
from tools.convert import convert
from trainer.checkpoint.contents import prove_repeatable, read_probe_block
from trainer.config import Config
from trainer.engine.engine import TrainingEngine
from trainer.errors import EXIT_FINISHED, UserError
from trainer.inputs.inputs import open_inputs
from trainer.liveness.watchdog import Limits
from trainer.model.build import build_model
from trainer.runtime import distributed


def test_a_decoder_of_its_own_is_trained_resumed_at_another_stage_and_converted(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, decoder = tmp_path / "start", "cls.predictions.decoder.weight"
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**TINY_ROBERTA, vocab_size=500, pad_token_id=1))
    model.save_pretrained(start)
    weights = load_file(start / "model.safetensors")
    save_file(
        {**weights, decoder: weights["bert.embeddings.word_embeddings.weight"] + 0.05},
        start / "model.safetensors",
        {"format": "pt"},
    )
    AutoTokenizer.from_pretrained(workspace / "tokenizer").save_pretrained(start)
    source = {"preset": None, "from_pretrained": str(start), "tokenizer": None, "overrides": {}}
    for preset, steps, ranks in (("zero1", 2, 2), ("zero3", 4, 1)):
        config = tiny_config(workspace, tmp_path / "run", model=source, train={"steps": steps}, deepspeed=preset)
        assert train(config, ranks) == EXIT_FINISHED
    assert "they are trained apart" in capsys.readouterr().out
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training == conversion.difference_after_reload == 0.0
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.tie_word_embeddings is False
    assert not torch.equal(loaded.get_parameter(decoder), loaded.bert.embeddings.word_embeddings.weight)


def start_with_noise(config: Config) -> int:
    """Runs on a rank: the proof at a start, with an encoder whose output is never the same."""
    world = distributed.start(Limits.of(config.watchdog).of_start)
    inputs = open_inputs(config, world.size)
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    engine = TrainingEngine(built, inputs.ds_config, config.optimizer, world)
    block = read_probe_block(inputs)
    prove_repeatable(engine, inputs, block)
    noisy = built.model.base_model.encoder.register_forward_hook(
        lambda _module, _inputs, output: type(output)(last_hidden_state=output[0] + 0.1 * torch.randn_like(output[0]))
    )
    with pytest.raises(UserError, match="RobertaForMaskedLM gives other logits for the same input each time"):
        prove_repeatable(engine, inputs, block)
    noisy.remove()
    with torch.no_grad():
        built.model.lm_head.layer_norm.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"logits of RobertaForMaskedLM are not finite .* before the first step"):
        prove_repeatable(engine, inputs, block)
    return 0


def test_logits_that_do_not_repeat_or_are_not_finite_are_found_before_the_first_step(
    workspace: Path, tmp_path: Path
) -> None:
    assert run_ranks(start_with_noise, 1, tiny_config(workspace, tmp_path / "run")) == [0]


def test_weights_that_a_class_computes_and_freezes_are_in_no_checkpoint_and_convert(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roformer", "embedding_size": 32, **TINY_ROBERTA}))
    source = {"preset": None, "config": str(tmp_path), "overrides": {}}
    config = tiny_config(workspace, tmp_path / "run", model=source, train={"steps": 2})
    assert train(config, 1) == EXIT_FINISHED
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training == conversion.difference_after_reload == 0.0
