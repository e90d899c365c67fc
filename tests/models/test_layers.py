"""A model that begins with layers of a trained one: all of them are that model, and what does not fit is a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny_models import VOCABULARY_SIZE, family_of_type, masked_batch, saved, vocabulary, write_config
from trainer.config import LayersFromConfig, ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.classes import FAMILIES
from trainer.model.rehearsal import rehearse

SEQ_LEN = 24


def settings_of(folder: Path, model_type: str, source: Path, layers: list[int], **changes: Any) -> ModelConfig:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    settings = write_config(own, model_type, **changes)
    return settings.model_copy(update={"layers_from": LayersFromConfig(model=str(source), layers=layers)})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=masked_batch()[0]).logits


def loaded(source: Path, model_type: str) -> Any:
    auto_class = getattr(transformers, FAMILIES[family_of_type(model_type)].auto_class)
    return auto_class.from_pretrained(source)


@pytest.mark.parametrize(
    "model_type",
    ["bert", "distilbert", "electra", "esm", "gpt2", "gpt_neox", "llama", "modernbert", "opt", "roberta"],
)
def test_all_layers_are_the_model_itself(model_type: str, tmp_path: Path) -> None:
    source = saved(tmp_path, model_type)
    theirs = loaded(source, model_type)
    layers = list(range(theirs.config.num_hidden_layers))
    settings, family = settings_of(tmp_path, model_type, source, layers), family_of_type(model_type)
    rehearse(settings, vocabulary(), [SEQ_LEN], family)
    built = build_model(settings, vocabulary(), SEQ_LEN, seed=7, family=family)
    assert torch.equal(logits(built.model), logits(theirs))
    assert any(f"of the {len(layers)} of {source}" in note for note in built.notes)


def test_all_layers_of_a_bert_are_a_distilbert_with_its_logits(tmp_path: Path) -> None:
    """Though BERT adds a row for the first type to every token, and DistilBERT has no such table."""
    source = saved(tmp_path, "bert", num_hidden_layers=4)
    settings = settings_of(tmp_path, "distilbert", source, [0, 1, 2, 3], n_layers=4)
    rehearse(settings, vocabulary(), [SEQ_LEN])
    theirs = loaded(source, "bert")
    assert theirs.bert.embeddings.token_type_embeddings.weight[0].abs().max() > 0.01
    ours = build_model(settings, vocabulary(), SEQ_LEN, seed=7).model
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model_type", "stack", "depth"), [("gpt2", "transformer.h", "n_layer"), ("roberta", "", "")])
def test_some_layers_in_the_order_given_and_all_else(model_type: str, stack: str, depth: str, tmp_path: Path) -> None:
    stack, depth = stack or "roberta.encoder.layer", depth or "num_hidden_layers"
    source = saved(tmp_path, model_type, **{depth: 5})
    family = family_of_type(model_type)
    settings = settings_of(tmp_path, model_type, source, [0, 4, 2], **{depth: 3})
    ours, theirs = build_model(settings, vocabulary(), SEQ_LEN, 7, family).model, loaded(source, model_type)
    for own, there in enumerate([0, 4, 2]):
        one, other = ours.get_submodule(f"{stack}.{own}"), theirs.get_submodule(f"{stack}.{there}")
        for (name, weight), (_, given) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(weight, given), name
    given = theirs.state_dict()
    rest = [name for name in ours.state_dict() if not name.startswith(stack)]
    assert all(torch.equal(ours.state_dict()[name], given[name]) for name in rest) and len(rest) > 3
    assert logits(ours).shape == logits(theirs).shape


@pytest.mark.parametrize("own", ["bert", "distilbert"])
def test_further_tokens_get_rows_as_of_a_model_that_goes_on(own: str, tmp_path: Path) -> None:
    source = saved(tmp_path, "bert")
    settings, more = settings_of(tmp_path, own, source, [0, 1]), VOCABULARY_SIZE + 10
    rehearse(settings, vocabulary(more), [SEQ_LEN])
    built = build_model(settings, vocabulary(more), SEQ_LEN, seed=7)
    table = built.model.get_input_embeddings().weight
    given = loaded(source, "bert").get_input_embeddings().weight
    assert len(table) == more and torch.equal(table[:VOCABULARY_SIZE], given)
    assert (table[VOCABULARY_SIZE:] - given.mean(dim=0)).abs().max() < 0.1 * given.abs().max()
    assert any("resized from 200 to 210" in note for note in built.notes)
    assert torch.equal(table, built.model.get_output_embeddings().weight)


def test_rows_beyond_the_tokenizers_are_left_out(tmp_path: Path) -> None:
    source = saved(tmp_path, "bert")
    model = loaded(source, "bert")
    model.resize_token_embeddings(VOCABULARY_SIZE + 24)
    model.save_pretrained(source)
    settings = settings_of(tmp_path, "distilbert", source, [0, 1])
    rehearse(settings, vocabulary(), [SEQ_LEN])
    ours = build_model(settings, vocabulary(), SEQ_LEN, seed=7).model
    torch.testing.assert_close(logits(ours), logits(model)[..., :VOCABULARY_SIZE], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "source", "layers", "changes", "said"),
    [
        ("bert", "bert", [0, 2], {}, "has 2 layers, and so none of number 2"),
        ("bert", "bert", [0], {}, "The model has 2 layers, and 1 are taken"),
        ("bert", "bert", [0, 1], {"intermediate_size": 64}, "are not alike"),
        (
            "bert",
            "bert",
            [0, 1],
            {"num_attention_heads": 2},
            "The model has 2 attention heads, and that of the layers 4",
        ),
        ("roberta", "bert", [0, 1], {}, "type 'roberta' cannot begin with layers of one of type 'bert'"),
        ("albert", "albert", [0, 1, 2, 3, 4], {}, "albert's layers share weights"),
        ("distilbert", "roberta", [0, 1], {}, "type 'distilbert' cannot begin"),
        ("modernbert", "modernbert", [3, 2, 1, 0], {}, "1 weights of the layers have no place in the model"),
        ("modernbert", "modernbert", [0, 3, 1, 2], {}, "The model's layers are full_attention, sliding_attention"),
        ("bert", "bert", [0, 1], {"hidden_act": "relu"}, "hidden_act is relu in the model, and gelu in"),
        ("distilbert", "bert", [0, 1], {"activation": "relu"}, "activation is relu in the model, and gelu in"),
    ],
)
def test_what_does_not_fit_is_a_card_without_weights_and_with(
    own: str, source: str, layers: list[int], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, own, saved(tmp_path, source), layers, **changes)
    for start in (
        lambda: rehearse(settings, vocabulary(), [SEQ_LEN]),
        lambda: build_model(settings, vocabulary(), SEQ_LEN, seed=0),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert said in str(caught.value) and caught.value.where.startswith("model.layers_from")


def test_a_folder_that_is_no_model_is_named_by_its_key(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "bert", tmp_path / "nothing", [0, 1])
    with pytest.raises(UserError) as caught:
        rehearse(settings, vocabulary(), [SEQ_LEN])
    assert "model.layers_from.model" in str(caught.value) and "from_pretrained" not in str(caught.value)


def test_a_head_of_its_own_is_not_copied_onto_the_embeddings(tmp_path: Path) -> None:
    source = saved(tmp_path, "bert", tie_word_embeddings=False)
    settings = settings_of(tmp_path, "bert", source, [0, 1])
    with pytest.raises(UserError, match="two different ones"):
        build_model(settings, vocabulary(), SEQ_LEN, seed=0)
    untied = settings.model_copy(update={"overrides": {"tie_word_embeddings": False}})
    theirs = loaded(source, "bert")
    assert torch.equal(logits(build_model(untied, vocabulary(), SEQ_LEN, seed=0).model), logits(theirs))
