from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_models import (
    ARCHITECTURES,
    CAUSAL_ARCHITECTURES,
    PREDICTIONS,
    SEQ_LEN,
    family_of_type,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.data.batch import Batch, Documents
from trainer.model.build import build_model, constant_inputs
from trainer.model.hf_config import DOCUMENT_ATTENTION_MODELS, build_config
from trainer.model.prediction_head import install
from trainer.objectives.language_model import LanguageModelLoss
from trainer.sizing.flops import flops_per_token
from trainer.sizing.meta_trace import StepTracer, meta_model

BLOCKS = 4


def tracer(
    tmp_path, model_type, device_type="cpu", dtype=torch.float32, documents=False, checkpointing=False, **changes
):
    settings = write_config(tmp_path, model_type, **changes)
    config = build_config(settings, vocabulary(), SEQ_LEN, family_of_type(model_type))
    return StepTracer(meta_model(config, dtype), device_type, LanguageModelLoss("mlm"), documents, checkpointing)


def batch_of(blocks: int, documents: bool = False, predictions: int = PREDICTIONS) -> Batch:
    ids, index = torch.zeros(blocks, SEQ_LEN, dtype=torch.int64), torch.zeros(blocks * predictions, dtype=torch.int64)
    return Batch({"input_ids": ids}, {"mlm": index}, index, documents=Documents(ids, ids) if documents else None)


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *CAUSAL_ARCHITECTURES])
def test_every_architecture_is_traced(model_type, device_type, dtype, tmp_path):
    traced = tracer(tmp_path, model_type, device_type, dtype).trace(batch_of(BLOCKS, predictions=SEQ_LEN))
    model = tiny_model(tmp_path, model_type)
    counted = flops_per_token(model, SEQ_LEN, 1.0) * BLOCKS * SEQ_LEN
    # Flash attention computes one of its products once more in the backward pass.
    assert counted <= traced.flops <= 1.2 * counted
    weights = sum(parameter.numel() for parameter in model.parameters()) * (4 if dtype is torch.float32 else 2)
    assert traced.logits_bytes > 0 or model_type == "nezha", "whose peak, of so small a model, is in its attention"
    assert traced.logits_bytes < traced.activations <= traced.with_gradients <= traced.activations + weights
    assert traced.adding >= weights


def test_the_flops_are_those_that_torch_counts_in_a_real_pass(tmp_path):
    changes = {"attention_probs_dropout_prob": 0.1}  # which takes the plain attention on CPU, known to the counter
    traced = tracer(tmp_path, "roberta", **changes).trace(batch_of(BLOCKS))
    model = build_model(write_config(tmp_path, "roberta", **changes), vocabulary(), SEQ_LEN, seed=0).model
    positions, index = install(model), torch.arange(BLOCKS * PREDICTIONS)
    with FlopCounterMode(display=False) as counter:
        with positions.select(index):
            inputs = constant_inputs(model, SEQ_LEN, torch.device("cpu"))
            output = model(input_ids=torch.zeros(BLOCKS, SEQ_LEN, dtype=torch.int64), **inputs)
        output.logits.sum().backward()
    assert traced.flops == counter.get_total_flops()


def test_memory_grows_with_the_batch_and_falls_with_checkpointing(tmp_path):
    deep = {"num_hidden_layers": 12}
    plain = tracer(tmp_path, "roberta", **deep)
    two, four, eight = (plain.trace(batch_of(size)).activations for size in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)
    less = tracer(tmp_path, "roberta", checkpointing=True, **deep).trace(batch_of(8))
    assert less.activations < eight / 2
    assert less.flops > plain.trace(batch_of(8)).flops


@pytest.mark.parametrize("model_type", sorted(DOCUMENT_ATTENTION_MODELS))
def test_document_attention_is_traced_with_its_mask(model_type, tmp_path):
    without = tracer(tmp_path, model_type, "cuda").trace(batch_of(BLOCKS))
    within = tracer(tmp_path, model_type, "cuda", documents=True).trace(batch_of(BLOCKS, documents=True))
    assert within.activations > without.activations


def test_a_roofline_takes_the_longer_of_arithmetic_and_traffic(tmp_path):
    traced = tracer(tmp_path, "roberta").trace(batch_of(BLOCKS))
    moved = sum(count * size for (_, size), count in traced.kernels.items())
    assert traced.seconds(1e9, 1e30) == pytest.approx(traced.flops / 1e9)
    assert traced.seconds(1e30, 1e9) == pytest.approx(moved / 1e9)
    assert traced.seconds(1e9, 1e9) >= max(traced.flops, moved) / 1e9
