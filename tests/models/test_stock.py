"""What is trained fits the class that `convert` builds from its config, or the run is refused before it starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, continued, saved, tiny_model, vocabulary
from trainer.errors import DamagedError, UserError
from trainer.model.build import build_model
from trainer.model.stock import first_not_finite, origins, prove_convertible, stock_model, tied_to

DECODERS = {
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "albert": ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
    "electra": ("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
}


def with_a_decoder_of_its_own(folder: Path, model_type: str) -> torch.Tensor:
    """Give a saved checkpoint a decoder that is not its embedding; returns its weight."""
    path, (embedding, decoder) = folder / "model.safetensors", DECODERS[model_type]
    weights = load_file(path)
    weights[decoder] = weights[embedding] + 0.1
    save_file(weights, path, {"format": "pt"})
    return weights[decoder]


@pytest.mark.parametrize("model_type", sorted(DECODERS))
@pytest.mark.parametrize("size", [VOCABULARY_SIZE, VOCABULARY_SIZE + 10])
def test_a_decoder_that_differs_from_the_embedding_is_trained_apart(model_type: str, size: int, tmp_path: Path):
    folder = saved(tmp_path, model_type)
    decoder = with_a_decoder_of_its_own(folder, model_type)
    built = build_model(continued(folder), vocabulary(size), SEQ_LEN, 0)
    model, (embedding, name) = built.model, DECODERS[model_type]
    (note,) = [note for note in built.notes if note.startswith("ties: ")]
    assert f"{embedding} and {name} differ in the checkpoint" in note or embedding in note
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.get_parameter(name)[:VOCABULARY_SIZE], decoder)
    assert not torch.equal(model.get_parameter(embedding)[:VOCABULARY_SIZE], decoder)
    assert model.get_parameter(name).shape == model.get_parameter(embedding).shape
    assert len(model.get_parameter(name)) == size
    prove_convertible(model)
    # A checkpoint that an earlier version saved is recognised; where the vocabulary grew, that version tied again.
    assert built.says_tied is (size == VOCABULARY_SIZE)


def test_a_tied_checkpoint_stays_tied_and_says_nothing(tmp_path: Path):
    built = build_model(continued(saved(tmp_path, "bert")), vocabulary(), SEQ_LEN, 0)
    assert built.notes == ()
    assert built.model.config.tie_word_embeddings and built.says_tied


def test_weights_of_an_untied_class_come_from_what_they_are_tied_to_in_training():
    config = tiny_bert_config(tie_word_embeddings=False)
    config.architectures = ["BertForMaskedLM"]
    stock = stock_model(config, "meta")
    trained = {name for name, _ in stock.named_parameters()} - {"cls.predictions.decoder.bias"}
    found = origins(stock, trained)
    assert found["cls.predictions.decoder.bias"] == "cls.predictions.bias"
    assert {origin for name, origin in found.items() if name in trained} == trained
    assert "cls.predictions.bias" not in origins(stock, trained - {"cls.predictions.bias"})


def tiny_bert_config(**changes):
    from transformers import BertConfig

    from tests.tiny_models import sizes

    return BertConfig(**{**sizes("bert"), "vocab_size": VOCABULARY_SIZE, **changes})


def lose_a_bias(model) -> None:
    model.cls.predictions.transform.dense.bias = None


def gain_a_weight(model) -> None:
    model.bert.extra = nn.Parameter(torch.zeros(3))


def change_a_shape(model) -> None:
    model.bert.embeddings.position_embeddings = nn.Embedding(7, 32)


def tie_two(model) -> None:
    model.config.num_hidden_layers = 1


def untie(model) -> None:
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lose_a_bias, "cls.predictions.transform.dense.bias"),
        (gain_a_weight, "bert.extra"),
        (change_a_shape, "bert.embeddings.position_embeddings.weight"),
        (tie_two, "bert.encoder.layer.1."),
        (untie, "cls.predictions.decoder.weight"),
    ],
)
def test_what_the_saved_config_would_not_build_is_refused_by_name(change, named: str, tmp_path: Path):
    model = tiny_model(tmp_path, "bert")
    prove_convertible(model)
    change(model)
    with pytest.raises(UserError) as caught:
        prove_convertible(model)
    assert named in caught.value.problem
    assert "What BertForMaskedLM trains here could not be converted" in caught.value.problem


def test_a_config_that_does_not_survive_saving_is_refused(tmp_path: Path):
    model = tiny_model(tmp_path, "bert")
    model.config.spans = {1, 2}  # JSON has no sets
    with pytest.raises(UserError, match="could not be converted: its config"):
        prove_convertible(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_that_is_not_finite_is_refused_with_the_weights_name(value: float, tmp_path: Path):
    folder, name = saved(tmp_path, "bert"), "bert.encoder.layer.1.output.dense.weight"
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedError) as caught:
        build_model(continued(folder), vocabulary(), SEQ_LEN, 0)
    assert caught.value.problem.endswith(f"(NaN or infinity), in {name}.")
    assert caught.value.where == "model.from_pretrained"


def test_large_values_whose_sum_overflows_are_finite():
    module = nn.Linear(4, 4)
    with torch.no_grad():
        module.weight.fill_(3e38)
    assert first_not_finite(module) is None


def test_tied_names_have_the_first_one(tmp_path: Path):
    ties = tied_to(tiny_model(tmp_path, "bert"))
    assert ties["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    assert ties["bert.embeddings.word_embeddings.weight"] == "bert.embeddings.word_embeddings.weight"
