"""Every type that AutoModelForMaskedLM knows trains, grows and can be converted, or is refused before data are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, continued, masked_batch, vocabulary, write_config
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model, constant_inputs
from trainer.model.prediction_head import install
from trainer.model.rehearsal import rehearse
from trainer.sizing.flops import flops_per_token

GROWN = VOCABULARY_SIZE + 20
TYPES = sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
REFUSED = {
    "bart": "is no encoder",
    "funnel": "changes a weight of Funnel whenever it loads one",
    "mbart": "is no encoder",
    "mvp": "is no encoder",
    "modernvbert": "is a model of several parts",
    "ultravbert": "is a model of several parts",
}
DO_NOT_GROW = {
    "ibert": "cannot be given the rows",
    "perceiver": "cannot be given the rows",
    "reformer": "could not be converted: its saved config makes other weights: lm_head.bias",
}


def train_a_step(model: torch.nn.Module) -> None:
    """One step of a few positions, as the engine takes it."""
    input_ids, index, labels, _ = masked_batch()
    positions = install(model)
    with positions.select(index):
        output = model(input_ids=input_ids, **constant_inputs(model, SEQ_LEN, torch.device("cpu")))
    loss = cross_entropy(positions.rows(output.logits, index), labels)
    assert torch.isfinite(loss)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=masked_batch()[0]).logits


def assert_reloads(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_trains_grows_and_reloads_or_is_refused(model_type: str, tmp_path: Path):
    settings = write_config(tmp_path, model_type)
    if model_type in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type]) as caught:
            rehearse(settings, vocabulary(), [SEQ_LEN])
        assert caught.value.where == "model.config"
        return
    rehearse(settings, vocabulary(), [SEQ_LEN])
    model = build_model(settings, vocabulary(), SEQ_LEN, seed=0).model
    assert flops_per_token(model, SEQ_LEN, 0.2) > 0
    train_a_step(model)
    assert_reloads(model, tmp_path / "trained")

    further, grown = continued(tmp_path / "trained"), vocabulary(GROWN)
    if model_type in DO_NOT_GROW:
        with pytest.raises(UserError, match=DO_NOT_GROW[model_type]):
            rehearse(further, grown, [SEQ_LEN])
        rehearse(further, vocabulary(), [SEQ_LEN])
        return
    rehearse(further, grown, [SEQ_LEN])
    bigger = build_model(further, grown, SEQ_LEN, seed=0).model
    assert logits_of(bigger).shape[-1] == GROWN
    train_a_step(bigger.train())
    assert_reloads(bigger, tmp_path / "grown")


def test_hashes_that_are_drawn_anew_are_refused(tmp_path: Path):
    changes = {"attn_layers": ["local", "lsh"], "lsh_attn_chunk_length": 8, "num_buckets": 4}
    with pytest.raises(UserError, match="hashes at random") as caught:
        rehearse(write_config(tmp_path, "reformer", **changes), vocabulary(), [SEQ_LEN])
    assert caught.value.where == "model.overrides.attn_layers"


@pytest.mark.parametrize(
    ("model_type", "changes", "words", "where"),
    [
        ("bert", {"initializer_range": float("nan")}, "initializer_range of the model's config is not finite", True),
        ("roberta", {"layer_norm_eps": float("inf")}, "layer_norm_eps of the model's config is not finite", True),
        ("roberta", {"initializer_range": -1.0}, "cannot draw its first weights: normal expects std >= 0.0", True),
        ("modernbert", {"initializer_range": -0.5}, "cannot draw its first weights", True),
        ("bert", {"chunk_size_feed_forward": 7}, "chunk size 7", True),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size is 0", True),
        ("roberta", {"hidden_act": "nothing"}, "nothing", False),
        ("modernbert", {"layer_types": ["full_attention"]}, "", False),
        ("reformer", {"axial_pos_shape": [4, 5]}, "config.axial_pos_shape factors: (4, 5) multiply to", True),
    ],
)
def test_a_config_whose_class_cannot_compute_a_block_is_refused(model_type, changes, words, where, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        rehearse(write_config(tmp_path, model_type, **changes), vocabulary(), [SEQ_LEN])
    assert words in caught.value.problem
    assert not where or caught.value.where == f"model.config: {next(iter(changes))}"
    assert len(caught.value.problem) < 1000


def test_an_override_is_named_as_one_and_each_length_of_blocks_is_tried(tmp_path: Path):
    settings = ModelConfig(preset="bert-base", tokenizer="t", overrides={"chunk_size_feed_forward": 8})
    rehearse(settings, vocabulary(), [32, 16])
    with pytest.raises(UserError) as caught:
        rehearse(settings, vocabulary(), [32, 20])
    assert caught.value.where == "model.overrides.chunk_size_feed_forward"
    assert "a block of 20 tokens" in caught.value.problem


def test_a_config_nested_too_deeply_is_a_card(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError):
        rehearse(ModelConfig(config=str(tmp_path), tokenizer="t"), vocabulary(), [SEQ_LEN])
