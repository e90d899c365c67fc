from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from tests.tiny_models import (
    ARCHITECTURES,
    BLOCKS,
    PREDICTIONS,
    SEQ_LEN,
    VOCABULARY_SIZE,
    masked_batch,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.model.build import build_model, constant_inputs
from trainer.model.model_code import is_stock
from trainer.model.prediction_head import install

CPU = torch.device("cpu")


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def selected_logits(model, positions, input_ids, index) -> torch.Tensor:
    with positions.select(index):
        output = model(input_ids=input_ids, **constant_inputs(model, SEQ_LEN, CPU))
    return positions.rows(output.logits, index)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "mpnet"])
def test_loss_and_gradients_are_the_stock_class_own(model_type, tmp_path):
    input_ids, index, labels, placed_labels = masked_batch()
    model = tiny_model(tmp_path, model_type, **({"hidden_dropout_prob": 0.0} if model_type == "mpnet" else {}))
    stock_loss = model(input_ids=input_ids, labels=placed_labels).loss
    stock_loss.backward()
    stock_gradients = gradients(model)
    model.zero_grad()

    positions = install(model)
    logits = selected_logits(model, positions, input_ids, index)
    loss = cross_entropy(logits, labels)
    loss.backward()

    assert positions.in_head == (model_type in ARCHITECTURES)
    assert logits.shape == (BLOCKS * PREDICTIONS, VOCABULARY_SIZE)
    assert abs(loss.item() - stock_loss.item()) < 1e-6
    largest = max(g.abs().max().item() for g in stock_gradients.values() if g is not None)
    assert largest > 0.01
    for name, ours in gradients(model).items():
        stock = stock_gradients[name]
        assert (ours is None) == (stock is None), name
        if ours is not None and stock is not None:
            assert (ours - stock).abs().max().item() < 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_outside_a_selection_and_after_it_the_class_is_stock(model_type, tmp_path):
    input_ids, index, *_ = masked_batch()
    model = tiny_model(tmp_path, model_type).eval()
    stock = model(input_ids=input_ids).logits
    positions = install(model)
    selected = selected_logits(model, positions, input_ids, index)
    assert torch.equal(model(input_ids=input_ids).logits, stock)
    assert torch.allclose(selected, stock.flatten(0, 1)[index], atol=1e-6)


def test_a_selection_ends_with_an_error_too(tmp_path):
    model = tiny_model(tmp_path, "roberta").eval()
    positions = install(model)
    input_ids, index, *_ = masked_batch()
    with pytest.raises(IndexError), positions.select(index + 10**6):
        model(input_ids=input_ids)
    assert model(input_ids=input_ids).logits.shape == (BLOCKS, SEQ_LEN, VOCABULARY_SIZE)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_weights_keep_their_names_and_round_trip(model_type, tmp_path):
    model = tiny_model(tmp_path, model_type).eval()
    names = list(model.state_dict())
    install(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "saved")
    loader = AutoModelForMaskedLM if is_stock(type(model)) else type(model)
    loaded, report = loader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    if model.config.tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_an_unknown_class_says_that_its_head_is_full(tmp_path):
    settings = write_config(tmp_path, "mpnet")
    notes = build_model(settings, vocabulary(), SEQ_LEN, seed=0).notes
    assert [note for note in notes if note.startswith("head: MPNetForMaskedLM computes the logits of all positions")]
    assert [note for note in notes if note.startswith("attention: MPNetForMaskedLM has no sdpa")]
    assert build_model(write_config(tmp_path, "roberta"), vocabulary(), SEQ_LEN, seed=0).notes == ()


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "nezha", "eurobert"])
def test_one_graph_serves_every_selection(model_type, tmp_path):
    model = tiny_model(tmp_path, model_type)
    positions = install(model)
    input_ids, index, labels, _ = masked_batch()
    other = (index + 1) % (BLOCKS * SEQ_LEN)
    expected = [selected_logits(model, positions, input_ids, chosen) for chosen in (index, other)]

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for chosen, eager in zip((index, other), expected, strict=True):
        logits = selected_logits(model, positions, input_ids, chosen)
        assert torch.allclose(logits, eager, atol=1e-5)
        cross_entropy(logits, labels).backward()
    assert graphs.frame_count == 1
