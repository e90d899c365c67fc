"""A model that begins with the weights of a narrower one, tiled: which place each takes, and what it then computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_layers import loaded, logits
from tests.tiny_models import (
    SEQ_LEN,
    VOCABULARY_SIZE,
    family_of_type,
    masked_batch,
    saved,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.config import LayersFromConfig, ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.classes import DETECTING, MASKED, PAIRED
from trainer.model.rehearsal import rehearse
from trainer.model.tiling import TILED, layers_for, shares, spread

TWICE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
WIDER: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 61}
NAMES = {
    "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"},
}


def tiled(folder: Path, model_type: str, source: Path, layers: list[int] | None = None, **sizes: Any) -> ModelConfig:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    names = NAMES.get(model_type, {})
    settings = write_config(own, model_type, **{names.get(name, name): value for name, value in sizes.items()})
    return settings.model_copy(update={"layers_from": LayersFromConfig(model=str(source), layers=layers, tile=True)})


def built(settings: ModelConfig, family: str, size: int = VOCABULARY_SIZE) -> Any:
    rehearse(settings, vocabulary(size), [SEQ_LEN], family)
    return build_model(settings, vocabulary(size), SEQ_LEN, seed=7, family=family)


def test_places_wrap_around_a_whole_copy_in_the_middle() -> None:
    assert spread(3, 3).tolist() == [0, 1, 2]
    assert spread(3, 8).tolist() == [1, 2, 0, 1, 2, 0, 1, 2]  # as ModernBERT's from_middle: two before the middle one
    assert spread(4, 6, 2).tolist() == [0, 1, 2, 3, 0, 1]  # heads of two: none fits before it
    assert spread(4, 8, 2).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_layers_are_taken_by_how_far_up_they_are() -> None:
    assert layers_for(3, 3) == [0, 1, 2]
    assert layers_for(3, 6) == [0, 0, 1, 1, 2, 2]
    assert layers_for(6, 3) == [1, 3, 5]
    assert layers_for(22, 28)[:6] == [0, 1, 1, 2, 3, 4] and sorted(set(layers_for(22, 28))) == list(range(22))


def test_shares_of_a_unit_add_up_to_one_and_differ_from_row_to_row() -> None:
    places = spread(3, 8)
    found = shares(places, 5)
    assert torch.allclose(
        torch.zeros(5, 3, dtype=torch.float64).index_add_(1, places, found), torch.ones(5, 3).double()
    )
    ratios = found[:, 0] / found[:, 3]  # two copies of the second
    assert found.min() > 0.1 and len(ratios.unique()) == 5
    assert torch.equal(shares(spread(4, 4), 2), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("model_type", sorted(TILED))
def test_a_multiple_of_the_width_gives_the_logits_of_the_narrower_one(model_type: str, tmp_path: Path) -> None:
    """The property behind the division: norms, attention and head see each unit as often as any other."""
    source, family = saved(tmp_path, model_type), family_of_type(model_type)
    model = built(tiled(tmp_path, model_type, source, **TWICE), family).model
    assert model.config.hidden_size == 64
    torch.testing.assert_close(logits(model), logits(loaded(source, model_type)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "family"), [("electra", DETECTING), ("bert", PAIRED)])
def test_so_does_one_with_another_head(model_type: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, model_type, family=family)
    model.save_pretrained(tmp_path / "checkpoint")
    wide = built(tiled(tmp_path, model_type, tmp_path / "checkpoint", **TWICE), family).model
    with torch.no_grad():
        one, other = (each.eval()(input_ids=masked_batch()[0]).to_tuple() for each in (wide, model))
    assert len(one) == (2 if family == PAIRED else 1)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_element_is_that_which_the_rule_says(tmp_path: Path) -> None:
    """ModernBERT's fused projections, by part, at a width that is no multiple."""
    source = saved(tmp_path, "modernbert")
    ours = built(tiled(tmp_path, "modernbert", source, **WIDER), MASKED).model.state_dict()
    theirs = loaded(source, "modernbert").state_dict()
    wide, inner = spread(32, 48, 8).tolist(), spread(48, 61).tolist()
    assert wide[8:40] == list(range(32)), "the narrower model is whole in the middle, one head beside it on each side"
    rows = {"attn.Wqkv": (3, 32, wide), "attn.Wo": (1, 32, wide), "mlp.Wi": (2, 48, inner), "mlp.Wo": (1, 32, wide)}
    for name, (parts, height, places) in rows.items():
        own, given = (each[f"model.layers.2.{name}.weight"] for each in (ours, theirs))
        columns = inner if name == "mlp.Wo" else wide
        taken = [part * height + place for part in range(parts) for place in places]
        assert own.shape == (len(taken), len(columns))
        parts_of = shares(torch.tensor(columns), len(taken))
        for row, there in enumerate(taken):
            expected = [float(given[there, place] * part) for place, part in zip(columns, parts_of[row], strict=True)]
            torch.testing.assert_close(own[row], torch.tensor(expected), rtol=1e-6, atol=0)
    table, norm = "model.embeddings.tok_embeddings.weight", "model.layers.2.mlp_norm.weight"
    assert torch.equal(ours[table][:, 8:40], theirs[table]) and torch.equal(ours[table][:, :8], theirs[table][:, 24:])
    assert torch.equal(ours[norm], theirs[norm][torch.tensor(wide)])
    met = torch.zeros(32).index_add_(0, torch.tensor(wide), ours["head.norm.weight"])
    torch.testing.assert_close(met, theirs["head.norm.weight"])  # its output meets the table, which is not divided


def test_an_untied_decoder_is_divided_and_the_norm_before_it_is_not(tmp_path: Path) -> None:
    source = saved(tmp_path, "bert", tie_word_embeddings=False)
    settings = tiled(tmp_path, "bert", source, **TWICE)
    model = built(settings.model_copy(update={"overrides": {"tie_word_embeddings": False}}), MASKED).model
    theirs = loaded(source, "bert")
    norm, decoder = "cls.predictions.transform.LayerNorm.weight", "cls.predictions.decoder.weight"
    assert torch.equal(model.get_parameter(norm)[16:48], theirs.get_parameter(norm))
    copies = model.get_parameter(decoder).view(-1, 2, 32).sum(dim=1).roll(-16, dims=1)  # the middle one begins at 16
    torch.testing.assert_close(copies, theirs.get_parameter(decoder))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_a_deeper_one_takes_layers_of_a_kind(tmp_path: Path) -> None:
    """ModernBERT: the first layer has no norm before its attention, and layers 0, 3 and 6 attend to all."""
    source = saved(tmp_path, "modernbert")
    found = built(tiled(tmp_path, "modernbert", source, num_hidden_layers=8, **WIDER), MASKED)
    assert any(note.startswith("layers: 0, 1, 1, 3, 2, 2, 3, 2 of the 4 of ") for note in found.notes)
    assert "layers: tiled from a width of 32 to 48" in found.notes
    first, third = (found.model.model.layers[number].mlp.Wo.weight for number in (3, 6))
    assert torch.equal(first, third) and not torch.equal(first, found.model.model.layers[4].mlp.Wo.weight)


def test_a_kind_of_layer_that_is_not_there_is_a_card(tmp_path: Path) -> None:
    """Of three layers the first alone attends to all, and it has no norm."""
    source = saved(tmp_path, "modernbert", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"No layer of '.*' is of the kind of layer 3 of the model"):
        built(tiled(tmp_path, "modernbert", source, **WIDER), MASKED)


def test_layers_that_are_named_and_rows_of_the_tokenizer(tmp_path: Path) -> None:
    source = saved(tmp_path, "roberta")
    settings = tiled(tmp_path, "roberta", source, [1, 0, 1], num_hidden_layers=3, **TWICE)
    found = built(settings, MASKED, VOCABULARY_SIZE + 10)
    layers = found.model.roberta.encoder.layer
    given = loaded(source, "roberta")
    assert torch.equal(layers[0].output.LayerNorm.weight[16:48], given.roberta.encoder.layer[1].output.LayerNorm.weight)
    assert all(torch.equal(*pair) for pair in zip(layers[0].parameters(), layers[2].parameters(), strict=True))
    table = found.model.get_input_embeddings().weight
    assert len(table) == VOCABULARY_SIZE + 10
    assert torch.equal(table[:VOCABULARY_SIZE, 16:48], given.get_input_embeddings().weight)


def test_the_same_weights_each_time(tmp_path: Path) -> None:
    """Whatever the seed, which draws nothing that is left."""
    settings = tiled(tmp_path, "bert", saved(tmp_path, "bert"), num_hidden_layers=4, **WIDER)
    one, other = (build_model(settings, vocabulary(), SEQ_LEN, seed).model.state_dict() for seed in (1, 2))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_copies_part_with_the_first_steps(model_type: str, tmp_path: Path) -> None:
    """Though nothing drops out: what is read alike would have equal gradients for ever, in AdamW too."""
    model = built(tiled(tmp_path, model_type, saved(tmp_path, model_type), **TWICE), MASKED).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, _, _, labels = masked_batch()
    for _ in range(3):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inner = "mlp.Wi" if model_type == "modernbert" else "intermediate.dense"
    name = next(name for name in model.state_dict() if name.endswith(f".1.{inner}.weight"))
    units = model.get_parameter(name)[:96].view(2, 48, 64)
    table = model.get_input_embeddings().weight.view(-1, 2, 32)
    assert ((units[0] - units[1]).abs().amax(dim=1) > 1e-5).all()  # rounding would make 1e-8 of them
    assert ((table[:, 0] - table[:, 1]).abs().amax(dim=0) > 1e-5).all()


@pytest.mark.parametrize(
    ("own", "source", "sizes", "said"),
    [
        ("bert", "bert", {"hidden_size": 64}, "A head of the model is 16 wide, and one of"),
        ("bert", "bert", {**TWICE, "intermediate_size": 40}, "weights do not grow from those in"),
        ("bert", "bert", {"hidden_size": 16, "num_attention_heads": 2}, "weights do not grow from those in"),
        ("bert", "bert", {**TWICE, "max_position_embeddings": 128}, "position_embeddings.weight is [128, 64], and"),
        ("bert", "roberta", TWICE, "cannot begin with layers of one of type 'roberta', tiled"),
        ("distilbert", "bert", TWICE, "cannot begin with layers of one of type 'bert', tiled"),
        ("esm", "esm", TWICE, "How the weights of a 'esm' are tiled is not known"),
        ("bert", "bert", {"hidden_act": "relu", **TWICE}, "hidden_act is relu in the model"),
    ],
)
def test_what_cannot_be_tiled_is_a_card_without_weights_and_with(
    own: str, source: str, sizes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = tiled(tmp_path, own, saved(tmp_path, source), **sizes)
    for start in (
        lambda: rehearse(settings, vocabulary(), [SEQ_LEN]),
        lambda: build_model(settings, vocabulary(), SEQ_LEN, seed=0),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert said in str(caught.value) and caught.value.where.startswith("model.layers_from")
