from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM, BertForPreTraining, RobertaModel

from tests.tiny_models import (
    ARCHITECTURES,
    SEQ_LEN,
    VOCABULARY_SIZE,
    continued,
    masked_batch,
    preset,
    saved,
    tiny_model,
    tiny_roberta,
    vocabulary,
    write_config,
)
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model, constant_inputs, fp32_buffers, restore_fp32_buffers
from trainer.model.classes import CAUSAL, MASKED, PERMUTED, model_class
from trainer.model.hf_config import build_config, position_offset
from trainer.model.model_code import is_stock
from trainer.model.prediction_head import install
from trainer.model.presets import PRESETS

CPU = torch.device("cpu")
GROWN = VOCABULARY_SIZE + 10


def meta_model(settings: ModelConfig, vocabulary_size: int, seq_len: int = 512):
    with torch.device("meta"):
        family = {"gpt2": CAUSAL, "xlnet": PERMUTED}.get(str(settings.preset).split("-")[0], MASKED)
        config = build_config(settings, vocabulary(vocabulary_size), seq_len, family)
        return model_class(config)._from_config(config)


# Presets and configs


@pytest.mark.parametrize(
    ("name", "vocabulary_size", "parameters"),
    [
        ("roberta-base", 50_265, 124_697_433),
        ("roberta-large", 50_265, 355_412_057),
        ("bert-base", 30_522, 109_514_298),
        ("albert-base", 30_000, 11_221_680),
        ("distilbert", 30_522, 66_985_530),
        ("modernbert-base", 50_368, 149_655_232),
        ("electra-small", 30_522, 13_546_682),
        ("electra-base", 30_522, 109_514_298),
        ("deberta-v3-base", 128_100, 184_551_780),
        ("gpt2", 50_257, 124_439_808),
        ("gpt2-small-char", 100, 10_784_256),
        ("xlnet-base", 32_000, 116_750_336),
        ("nezha-base", 21_128, 101_897_096),
    ],
)
def test_presets_have_the_published_size(name, vocabulary_size, parameters):
    model = meta_model(preset(name), vocabulary_size, seq_len=256)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.vocab_size == vocabulary_size


def test_every_preset_is_checked_above():
    berts = {"roberta-base", "roberta-large", "bert-base", "albert-base", "distilbert", "nezha-base"}
    with_generators = {"electra-small", "electra-base", "deberta-v3-base"}
    assert set(PRESETS) == {*berts, "modernbert-base", *with_generators, "gpt2", "gpt2-small-char", "xlnet-base"}


def test_modernbert_preset_alternates_global_and_local_attention():
    config = meta_model(preset("modernbert-base"), 50_368).config
    assert [kind == "full_attention" for kind in config.layer_types] == [i % 3 == 0 for i in range(22)]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160_000.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0
    assert not config.sparse_prediction


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "mpnet"])
def test_special_ids_come_from_the_tokenizer(model_type, tmp_path):
    settings = write_config(tmp_path, model_type, vocab_size=7, pad_token_id=5, bos_token_id=6, eos_token_id=6)
    config = build_config(settings, vocabulary(), SEQ_LEN)
    assert (config.vocab_size, config.pad_token_id) == (VOCABULARY_SIZE, 1)
    expected = {"bos": 0, "cls": 0, "eos": 2, "sep": 2, "mask": VOCABULARY_SIZE - 1}
    ids = {token: getattr(config, f"{token}_token_id", None) for token in expected}
    assert all(value is None or value == expected[token] for token, value in ids.items()), ids
    if model_type in ("esm", "eurobert"):
        assert ids["mask"] == VOCABULARY_SIZE - 1


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    one, same, other = (build_model(tiny_roberta(), vocabulary(), 64, seed).model for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.dense.weight, other.lm_head.dense.weight)
    assert one.training
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}


def test_overrides_reach_the_model_by_either_name(tmp_path):
    assert build_config(tiny_roberta(hidden_dropout_prob=0.3), vocabulary(), 64).hidden_dropout_prob == 0.3
    settings = write_config(tmp_path, "distilbert")
    for name in ("dim", "hidden_size"):
        changed = settings.model_copy(update={"overrides": {name: 64}})
        assert build_config(changed, vocabulary(), SEQ_LEN).dim == 64


def test_a_config_in_half_precision_still_makes_fp32_weights(tmp_path):
    model = build_model(write_config(tmp_path, "roberta", dtype="bfloat16"), vocabulary(), SEQ_LEN, 0).model
    assert model.lm_head.dense.weight.dtype == torch.float32


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_activation_checkpointing_changes_no_gradient(model_type, tmp_path):
    settings = write_config(tmp_path, model_type).model_copy(update={"activation_checkpointing": True})
    if model_type == "albert":
        with pytest.raises(UserError, match="AlbertForMaskedLM does not support activation checkpointing"):
            build_config(settings, vocabulary(), SEQ_LEN)
        return
    plain = build_model(write_config(tmp_path, model_type), vocabulary(), SEQ_LEN, 0).model
    recomputing = build_model(settings, vocabulary(), SEQ_LEN, 0).model
    assert recomputing.is_gradient_checkpointing
    input_ids, *_, labels = masked_batch()
    for model in (plain, recomputing):
        model(input_ids=input_ids, labels=labels).loss.backward()
    for ours, theirs in zip(recomputing.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.allclose(ours.grad, theirs.grad, atol=1e-7)


# Constant inputs


@pytest.mark.parametrize(
    ("model_type", "offset", "names"),
    [
        ("albert", 0, {"position_ids", "token_type_ids"}),
        ("bert", 0, {"position_ids", "token_type_ids"}),
        ("camembert", 2, {"position_ids", "token_type_ids"}),
        ("distilbert", 0, {"position_ids"}),
        ("ernie", 0, {"position_ids", "token_type_ids"}),
        ("esm", 2, {"position_ids"}),
        ("eurobert", 0, set()),
        ("modernbert", 0, set()),
        ("mpnet", 2, set()),
        ("roberta", 2, {"position_ids", "token_type_ids"}),
        ("xlm-roberta", 2, {"position_ids", "token_type_ids"}),
    ],
)
def test_constant_inputs_are_what_the_class_makes_itself(model_type, offset, names, tmp_path):
    model = tiny_model(tmp_path, model_type).eval()
    constants = constant_inputs(model, SEQ_LEN, CPU)
    assert position_offset(model) == offset
    assert set(constants) == names
    input_ids = masked_batch()[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids, **constants).logits, model(input_ids=input_ids).logits)


def test_rotary_esm_makes_its_own_positions(tmp_path):
    model = tiny_model(tmp_path, "esm", position_embedding_type="rotary")
    assert position_offset(model) == 0
    assert constant_inputs(model, SEQ_LEN, CPU) == {}


# Continued pre-training


def loss_of(model, seq_len: int = SEQ_LEN) -> float:
    input_ids, *_, labels = masked_batch()
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "mpnet"])
def test_a_grown_vocabulary_keeps_what_was_learned(model_type, tmp_path):
    folder = saved(tmp_path, model_type)
    built = build_model(continued(folder), vocabulary(GROWN), SEQ_LEN, seed=1)
    loader = AutoModelForMaskedLM if is_stock(type(built.model)) else type(built.model)
    old = loader.from_pretrained(folder)
    again = build_model(continued(folder), vocabulary(GROWN), SEQ_LEN, seed=1).model
    model = built.model
    assert "vocabulary: resized from 200 to 210; new rows start at the mean" in built.notes

    old_weights, new_weights = old.state_dict(), model.state_dict()
    assert list(old_weights) == list(new_weights)
    for name, tensor in old_weights.items():
        grown = new_weights[name]
        assert torch.equal(grown[: len(tensor)] if tensor.dim() else grown, tensor), name
        assert len(grown) == (GROWN if len(tensor) == VOCABULARY_SIZE else len(tensor)), name
        assert torch.equal(grown, again.state_dict()[name]), name
        if len(grown) == GROWN:
            assert torch.allclose(
                grown[VOCABULARY_SIZE:], tensor.mean(dim=0).expand_as(grown[VOCABULARY_SIZE:]), atol=1e-4
            )
    assert model.config.vocab_size == GROWN
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert tied or model_type == "eurobert"

    input_ids = masked_batch()[0]
    with torch.no_grad():
        before, after = old.eval()(input_ids=input_ids).logits, model.eval()(input_ids=input_ids).logits
    assert torch.allclose(after[..., :VOCABULARY_SIZE], before, atol=1e-6)
    assert loss_of(old) <= loss_of(model) < loss_of(old) + 0.1  # ten more tokens share the probability

    model.save_pretrained(tmp_path / "grown")
    loaded, report = loader.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in new_weights.items())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tied_weights_of_a_grown_model_learn_together(model_type, tmp_path):
    model = build_model(continued(saved(tmp_path, model_type)), vocabulary(GROWN), SEQ_LEN, seed=1).model
    positions = install(model)
    input_ids, index, labels, _ = masked_batch()
    labels = labels.clone()
    labels[0] = GROWN - 1
    with positions.select(index):
        logits = model(input_ids=input_ids, **constant_inputs(model, SEQ_LEN, CPU)).logits
    cross_entropy(logits, labels).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    ties = model.all_tied_weights_keys
    assert bool(ties) == model.config.tie_word_embeddings
    for name, source in ties.items():
        assert model.get_parameter(name) is model.get_parameter(source)


def test_a_smaller_tokenizer_leaves_the_padded_rows(tmp_path):
    built = build_model(continued(saved(tmp_path, "roberta")), vocabulary(190), SEQ_LEN, 0)
    assert built.notes == ("vocabulary: the tokenizer has 190 tokens; the model keeps its 200 rows",)
    assert built.model.get_input_embeddings().num_embeddings == VOCABULARY_SIZE


def test_the_same_tokenizer_changes_nothing(tmp_path):
    folder = saved(tmp_path, "roberta")
    built = build_model(continued(folder), vocabulary(), SEQ_LEN, 0)
    stored = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    assert built.notes == ()
    assert built.model.training
    assert all(torch.equal(tensor, stored[name]) for name, tensor in built.model.state_dict().items())


def test_a_half_precision_checkpoint_is_trained_in_fp32(tmp_path):
    tiny_model(tmp_path, "roberta").bfloat16().save_pretrained(tmp_path / "half")
    model = build_model(continued(tmp_path / "half"), vocabulary(), SEQ_LEN, 0).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_encoder_without_head_gets_a_seeded_one_and_says_so(tmp_path):
    write_config(tmp_path, "roberta")
    RobertaModel(tiny_model(tmp_path, "roberta").config, add_pooling_layer=True).save_pretrained(tmp_path / "encoder")
    one, same = (build_model(continued(tmp_path / "encoder"), vocabulary(), SEQ_LEN, 5) for _ in range(2))
    missing, unused = one.notes
    assert missing.startswith("checkpoint: no weights for lm_head.")
    assert missing.endswith("initialised at random")
    assert unused == "checkpoint: not used: pooler.dense.bias, pooler.dense.weight"
    assert torch.equal(one.model.lm_head.dense.weight, same.model.lm_head.dense.weight)


@pytest.mark.parametrize("model_type", ["data2vec-text", "fnet", "nystromformer", "roberta"])
def test_the_biases_of_a_head_that_is_new_are_zero_and_not_what_the_memory_was(model_type, tmp_path):
    config = tiny_model(tmp_path, model_type).config
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    used = [torch.full((VOCABULARY_SIZE,), torch.nan) for _ in range(100)]
    del used  # what is not written is likely to be seen
    model = build_model(continued(tmp_path / "encoder"), vocabulary(), SEQ_LEN, 5).model
    biases = [weight for name, weight in model.named_parameters() if name.endswith(".bias") and len(weight) > 128]
    assert biases and not any(bias.any() for bias in biases)


def test_weights_of_other_heads_are_named(tmp_path):
    BertForPreTraining(tiny_model(tmp_path, "bert").config).save_pretrained(tmp_path / "pretraining")
    (note,) = build_model(continued(tmp_path / "pretraining"), vocabulary(), SEQ_LEN, 0).notes
    assert note.startswith("checkpoint: not used: bert.pooler.dense.bias")
    assert "cls.seq_relationship.weight" in note


def test_dropout_may_change_in_continued_pretraining(tmp_path):
    settings = continued(saved(tmp_path, "roberta"), hidden_dropout_prob=0.25)
    model = build_model(settings, vocabulary(), SEQ_LEN, 0).model
    assert model.roberta.embeddings.dropout.p == 0.25


def test_the_checkpoints_own_padding_id_stays(tmp_path):
    folder = saved(tmp_path, "roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    built = build_model(continued(folder), vocabulary(), SEQ_LEN, 0)
    assert built.notes == ("padding: the tokenizer's id is 1; the model keeps its own, 3",)
    assert position_offset(built.model) == 4


# Rotary frequencies


@pytest.mark.parametrize(
    ("model_type", "changes"), [("modernbert", {}), ("eurobert", {}), ("esm", {"position_embedding_type": "rotary"})]
)
def test_rotary_frequencies_survive_a_cast(model_type, changes, tmp_path):
    model = tiny_model(tmp_path, model_type, **changes)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    kept = fp32_buffers(model)
    assert set(kept) == set(before)
    assert before

    model.bfloat16()
    assert any(
        not torch.equal(buffer.float(), before[name]) for name, buffer in model.named_buffers() if name in before
    )
    restore_fp32_buffers(model, kept)
    for name, buffer in model.named_buffers():
        if name in before:
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, before[name]), name
    output = model(input_ids=masked_batch()[0], labels=masked_batch()[3])
    assert output.logits.dtype == torch.bfloat16
    assert torch.isfinite(output.loss)
