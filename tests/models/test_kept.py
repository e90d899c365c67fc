"""Weights of a source that the trained class has not: which are kept for the converted model, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ElectraForPreTraining,
    PreTrainedModel,
    RobertaModel,
)

from tests.models.test_masked_lm_types import REFUSED, TYPES
from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, sizes, vocabulary
from trainer.config import ModelConfig
from trainer.model.build import build_model
from trainer.model.classes import DETECTING, MASKED, PAIRED
from trainer.model.kept import describe_kept, read_kept

POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
PAIRS = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}


def source(kind: Any, model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A checkpoint of a class, every weight drawn."""
    from transformers import AutoConfig

    settings = {key: value for key, value in sizes(model_type).items() if key != "model_type"}
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY_SIZE, pad_token_id=1, **{**settings, **changes})
    torch.manual_seed(1)
    model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return model


def kept_of(folder: Path, family: str = MASKED, rows: int = VOCABULARY_SIZE) -> dict[str, torch.Tensor]:
    settings = ModelConfig(from_pretrained=str(folder))
    return read_kept(build_model(settings, vocabulary(rows), SEQ_LEN, 0, family).model, settings)


@pytest.mark.parametrize(
    ("kind", "model_type", "names"),
    [
        (BertForPreTraining, "bert", POOLER | PAIRS),
        (BertModel, "bert", POOLER),
        (BertForMaskedLM, "bert", set()),
        (BertForSequenceClassification, "bert", POOLER),  # a classifier is of a task, not of the pre-training
        (RobertaModel, "roberta", {"roberta.pooler.dense.weight", "roberta.pooler.dense.bias"}),
        (
            ElectraForPreTraining,
            "electra",
            {
                f"discriminator_predictions.{part}.{leaf}"
                for part in ("dense", "dense_prediction")
                for leaf in ("weight", "bias")
            },
        ),
    ],
)
def test_what_the_other_classes_of_the_type_have_is_kept(
    kind: Any, model_type: str, names: set[str], tmp_path: Path
) -> None:
    weights = source(kind, model_type, tmp_path).state_dict()
    kept = kept_of(tmp_path)
    assert kept.keys() == names
    for name, weight in kept.items():
        assert torch.equal(weight, weights[name] if name in weights else weights[name.partition(".")[2]])
    assert [name in line for line in describe_kept(kept) for name in names] == [True] * len(names)


def test_the_names_of_old_files_and_half_precision_make_no_difference(tmp_path: Path) -> None:
    model = source(BertForPreTraining, "bert", tmp_path / "new").half()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in model.state_dict().items()
    }
    (tmp_path / "old").mkdir()
    model.config.save_pretrained(tmp_path / "old")
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    kept = kept_of(tmp_path / "old")
    assert kept.keys() == POOLER | PAIRS
    assert all(torch.equal(weight.half(), old[name]) for name, weight in kept.items())


def test_nothing_is_kept_that_is_trained_or_that_a_grown_vocabulary_does_not_fit(tmp_path: Path) -> None:
    source(BertForPreTraining, "bert", tmp_path)
    assert kept_of(tmp_path, PAIRED) == {}
    assert kept_of(tmp_path, rows=VOCABULARY_SIZE + 8).keys() == POOLER | PAIRS
    whole, grown = kept_of(tmp_path, DETECTING).keys(), kept_of(tmp_path, DETECTING, VOCABULARY_SIZE + 8).keys()
    assert whole - grown == {"cls.predictions.bias"}
    assert "cls.predictions.decoder.weight" not in whole, "it is the embeddings, which are trained"
    settings = ModelConfig(config=str(tmp_path), tokenizer="unused")
    assert read_kept(build_model(settings, vocabulary(), SEQ_LEN, 0).model, settings) == {}, "there is no source"


NO_BARE_SOURCE = {"perceiver": "its decoder is part of the head"}


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in REFUSED.keys() | NO_BARE_SOURCE.keys()])
def test_a_source_of_any_type_keeps_what_its_wider_classes_have(model_type: str, tmp_path: Path) -> None:
    """Written beside the trained weights, it leaves nothing to be drawn at random when a wider class is loaded."""
    for kind in (AutoModel, AutoModelForPreTraining):
        folder = tmp_path / kind.__name__
        try:
            weights = source(kind, model_type, folder)
        except ValueError:  # there is no class for pre-training
            assert kind is AutoModelForPreTraining
            continue
        settings = ModelConfig(from_pretrained=str(folder))
        trained = build_model(settings, vocabulary(), SEQ_LEN, 0).model
        kept = read_kept(trained, settings)
        trained.save_pretrained(tmp_path / "out", state_dict={**trained.state_dict(), **kept})
        wider: Any = type(weights)
        again, report = wider.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"], report
        for name, weight in weights.named_parameters():
            assert torch.equal(weight, again.get_parameter(name)), name
