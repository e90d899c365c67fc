from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tests.tiny_models import (
    ARCHITECTURES,
    BLOCKS,
    CAUSAL_ARCHITECTURES,
    PREDICTIONS,
    SEQ_LEN,
    masked_batch,
    preset,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.config import ModelConfig
from trainer.data.batch import RANKS
from trainer.model.build import constant_inputs
from trainer.model.classes import CAUSAL, PERMUTED, model_class
from trainer.model.forward import Forward
from trainer.model.frozen import freeze
from trainer.model.hf_config import DOCUMENT_ATTENTION_MODELS, build_config
from trainer.model.prediction_head import install
from trainer.sizing.flops import flops_per_token
from trainer.sizing.peak_flops import datasheet_peak, device_peak, matmul_peak_flops
from trainer.tracking.metrics import ThroughputMeter, as_json


@pytest.mark.parametrize("model_type", [*(name for name in ARCHITECTURES if name != "nezha"), *CAUSAL_ARCHITECTURES])
def test_three_times_what_the_forward_pass_does(model_type, tmp_path):
    input_ids, index, *_ = masked_batch()
    model = tiny_model(tmp_path, model_type, **far_sighted(model_type))
    positions = install(model)
    # The counter does not know the CPU's flash kernel; the plain one does the same products.
    with sdpa_kernel(SDPBackend.MATH), positions.select(index), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, **constant_inputs(model, SEQ_LEN, torch.device("cpu")))
    counted = flops_per_token(model, SEQ_LEN, PREDICTIONS / SEQ_LEN) * BLOCKS * SEQ_LEN
    assert counted == pytest.approx(3 * (counter.get_total_flops() - once_a_batch(model.config)), rel=1e-12)


def far_sighted(model_type):
    """Windows of local layers that see all of a block: what a mask hides is computed here, and not counted."""
    return {"local_attention": 4 * SEQ_LEN} if "modernbert" in model_type else {}


@pytest.mark.parametrize(("model_type", "seen"), [("modernbert", 9), ("modernbert-decoder", 4)])
def test_a_local_layer_counts_its_window(model_type, seen, tmp_path):
    model = tiny_model(tmp_path, model_type)  # a window of 8; two of its four layers are local
    config = model.config
    assert config.local_attention == 8 and config.layer_types.count("sliding_attention") == 2
    a_token = 3 * 4 * config.hidden_size  # of scores and their sums, in one layer, for each token that is attended to
    none, few, many = (flops_per_token(model, attended, 1.0) for attended in (0.0, 3.0, 24.0))
    assert few - none == 4 * a_token * 3 and many - none == a_token * (2 * 24 + 2 * seen)


def once_a_batch(config):
    """Of DeBERTa, the vectors of relative positions, for queries and for keys."""
    if config.model_type != "deberta-v2":
        return 0
    return config.num_hidden_layers * 2 * 2 * config.hidden_size**2 * 2 * config.position_buckets


LOWER = "the first layer and what is below"
FREEZES: dict[str, list[str]] = {
    "all but the head": ["bert.*"],
    "the layers": ["bert.encoder.*"],
    LOWER: ["bert.embeddings.*", "bert.encoder.layer.0.*"],
    "the last layer": ["bert.encoder.layer.1.*"],
    "all matrices of the layers": ["bert.encoder.*.weight"],
    "the embedding, and so the decoder": ["cls.predictions.decoder.weight"],
}


@pytest.mark.parametrize("name", FREEZES)
def test_of_frozen_weights_what_autograd_does_is_counted(name, tmp_path):
    """Forward and backward as the counter sees them; but key and value of the lowest layer count as if above query."""
    input_ids, index, *_ = masked_batch()
    model = tiny_model(tmp_path, "bert")
    freeze(model, FREEZES[name])
    positions = install(model)
    with sdpa_kernel(SDPBackend.MATH), positions.select(index), FlopCounterMode(display=False) as counter:
        logits = model(input_ids=input_ids, **constant_inputs(model, SEQ_LEN, torch.device("cpu"))).logits
        logits.sum().backward()
    counted = flops_per_token(model, SEQ_LEN, PREDICTIONS / SEQ_LEN) * BLOCKS * SEQ_LEN
    above_query = 2 * 2 * model.config.hidden_size**2 * BLOCKS * SEQ_LEN if name == LOWER else 0
    assert counted == pytest.approx(counter.get_total_flops() + above_query, rel=1e-12)


@pytest.mark.parametrize("model_type", ["modernbert", "gpt2", "albert", "roberta"])
def test_a_frozen_encoder_with_a_trained_embedding_takes_two_thirds_and_its_attention_all(model_type, tmp_path):
    model = tiny_model(tmp_path, model_type)
    matrices = flops_per_token(model, 0.0, 0.0)
    attention = flops_per_token(model, SEQ_LEN, 0.0) - matrices
    layers = {"modernbert": "model.layers.*", "gpt2": "transformer.h.*", "roberta": "roberta.encoder.*"}
    freeze(model, [layers.get(model_type, "albert.encoder.*")])
    frozen = flops_per_token(model, 0.0, 0.0)
    assert frozen == pytest.approx(2 / 3 * matrices, rel=1e-12)
    assert flops_per_token(model, SEQ_LEN, 0.0) - frozen == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("seq_len", [4, SEQ_LEN])
def test_nezhas_vectors_of_distances_have_no_gradient_to_compute(seq_len, tmp_path):
    model = tiny_model(tmp_path, "nezha")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=masked_batch()[0][:, :seq_len])
    config = model.config
    distances = 2 * min(config.max_relative_position, seq_len - 1) + 1
    relative = 4 * distances * config.hidden_size * config.num_hidden_layers * BLOCKS * seq_len
    counted = flops_per_token(model, seq_len, 1.0) * BLOCKS * seq_len
    assert counted == pytest.approx(3 * counter.get_total_flops() - relative, rel=1e-12)


def test_xlnet_is_counted_without_the_product_that_chooses_positions(tmp_path):
    input_ids, index, *_ = masked_batch()
    ranks = torch.full((BLOCKS * SEQ_LEN,), -1)
    ranks[index] = torch.arange(PREDICTIONS).repeat(BLOCKS)
    model = tiny_model(tmp_path, "xlnet")
    forward = Forward(model, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        forward({"input_ids": input_ids, RANKS: ranks.view(BLOCKS, SEQ_LEN)}, index)
    config = model.config
    choosing = 2 * 2 * PREDICTIONS * SEQ_LEN * config.d_model * BLOCKS * config.n_layer  # there and back
    counted = flops_per_token(model, SEQ_LEN, PREDICTIONS / SEQ_LEN) * BLOCKS * SEQ_LEN
    assert counted == pytest.approx(3 * (counter.get_total_flops() - choosing), rel=1e-12)


def test_xlnet_formula():
    config = build_config(preset("xlnet-base"), vocabulary(32_000), 512, PERMUTED)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    width, inner, layers = 768, 3072, 12
    content = layers * (12 * width**2 + 4 * width * inner + 16 * 512 * width)
    predicted = layers * (4 * width**2 + 4 * width * inner) + 2 * width * 32_000
    assert flops_per_token(model, 512, 85 / 512) == 3 * (content + 85 / 512 * predicted)


@pytest.mark.parametrize("model_type", sorted(DOCUMENT_ATTENTION_MODELS))
def test_document_attention_counts_what_the_documents_alone_would_take(model_type, tmp_path):
    model = tiny_model(tmp_path, model_type, **far_sighted(model_type))
    lengths = [7, 1, 13, 3]
    assert sum(lengths) == SEQ_LEN
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in lengths:
            model(input_ids=masked_batch()[0][:, :length])
    attended = sum(length**2 for length in lengths) / SEQ_LEN
    counted = flops_per_token(model, attended, 1.0) * BLOCKS * SEQ_LEN
    assert counted == pytest.approx(3 * counter.get_total_flops(), rel=1e-12)


def test_a_token_passes_through_its_experts_alone(tmp_path):
    """Mixtral's are bare parameters, which no counter of modules sees: 3 matrices of two of four experts a layer."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    settings = write_config(tmp_path, "mixtral", **sizes)
    config = build_config(settings, vocabulary(), SEQ_LEN, CAUSAL)
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = layers * (
        4 * width**2 + 2 * 3 * width * inner
    )  # attention and experts; their choice is too little to count
    assert flops_per_token(model, 0.0, 0.0) == 3 * 2 * matrices


def test_a_full_head_counts_every_position(tmp_path):
    model = tiny_model(tmp_path, "mpnet")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=masked_batch()[0])
    assert flops_per_token(model, SEQ_LEN, 1.0) * BLOCKS * SEQ_LEN == pytest.approx(3 * counter.get_total_flops())


@pytest.mark.parametrize(
    ("preset", "ratio", "gigaflops"),
    [
        ("roberta-base", 1.0, 0.801),
        ("roberta-base", 0.15, 0.602),
        ("roberta-large", 1.0, 2.278),
        ("roberta-large", 0.15, 2.010),
    ],
)
def test_roberta_formula(preset, ratio, gigaflops):
    config = build_config(ModelConfig(preset=preset, tokenizer="unused"), vocabulary(50_265), 512)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    flops = flops_per_token(model, 512, ratio)
    width, layers = config.hidden_size, config.num_hidden_layers
    matrices = layers * (8 * width**2 + 4 * width * config.intermediate_size)
    head = 2 * width**2 + 2 * width * 50_265
    assert flops == 3 * (matrices + 4 * layers * 512 * width + ratio * head)
    assert flops / 1e9 == pytest.approx(gigaflops, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "number_format", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA RTX A4000", "bf16", None),
    ],
)
def test_datasheet_peaks(name, number_format, teraflops):
    peak = datasheet_peak(name, number_format)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_peak_of_a_cpu_is_not_guessed():
    peak, label = device_peak(torch.device("cpu"), torch.float32)
    assert math.isnan(peak) and "not known" in label
    assert 1e8 < matmul_peak_flops(torch.device("cpu"), torch.float32, seconds=0.05) < 1e14, "for benchmarks"


def test_mfu_counts_the_flops_of_each_phase_and_is_null_without_a_peak():
    for peak, shares in ((1e6, (1.0, 3.0)), (math.nan, None)):
        meter = ThroughputMeter([75.0, 275.0], 200.0, peak)
        found = []
        for phase in (0, 1):
            meter.restart()
            meter.trained(64, 8, phase)
            values = meter.read()
            found.append(values["throughput/mfu"] / values["throughput/tokens_per_second"] * 1e4)
        if shares is None:
            assert as_json({"throughput/mfu": found[0]}) == {"throughput/mfu": None}
        else:
            assert found == pytest.approx(shares)
