"""Tiny versions of the architectures whose head is restricted, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import ModelConfig
from trainer.data.tokenizer import Vocabulary
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL, MASKED, PERMUTED
from trainer.model.model_code import SHIPPED
from trainer.model.prediction_head import HEAD_MODULES, PROJECTIONS

VOCABULARY_SIZE, BLOCKS, SEQ_LEN, PREDICTIONS = 200, 3, 24, 4

_DROPOUT_FREE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PDROP_FREE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_SIZES: dict[str, dict[str, Any]] = {
    "albert": {**_BERT_LIKE, **_DROPOUT_FREE, "num_hidden_layers": 5, "num_hidden_groups": 2, "embedding_size": 16},
    "deberta-v2": {
        **_BERT_LIKE,
        **_DROPOUT_FREE,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "max_relative_positions": 8,
    },
    "electra": {**_BERT_LIKE, **_DROPOUT_FREE, "embedding_size": 16},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "eurobert": {**_BERT_LIKE, "num_key_value_heads": 2},
    "modernbert": {**_BERT_LIKE, "num_hidden_layers": 4, "local_attention": 8},
    "nezha": {**_BERT_LIKE, **_DROPOUT_FREE, "max_relative_position": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_PDROP_FREE},
    "gpt_neox": {**_BERT_LIKE, **_DROPOUT_FREE},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, **_PDROP_FREE},
    "llama": {**_BERT_LIKE, "num_key_value_heads": 2},
    "modernbert-decoder": {**_BERT_LIKE, "num_hidden_layers": 4, "local_attention": 8},
    "opt": {**_BERT_LIKE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen3": {**_BERT_LIKE, "num_key_value_heads": 2, "head_dim": 8},
    # Classes that are not known by name, and take all their sizes, or some, by names of their own.
    "convbert": {**_BERT_LIKE, "embedding_size": 32, "conv_kernel_size": 3},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "num_decoder_layers": 1},
    "layoutlm": {**_BERT_LIKE, "max_2d_position_embeddings": 64},
    "longformer": {**_BERT_LIKE, "attention_window": 8},
    "luke": {**_BERT_LIKE, "entity_vocab_size": 8, "entity_emb_size": 16},
    "mobilebert": {**_BERT_LIKE, "embedding_size": 16, "intra_bottleneck_size": 16},
    "perceiver": {
        "d_model": 32,
        "d_latents": 32,
        "num_latents": 8,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "qk_channels": 16,
        "v_channels": 32,
        "max_position_embeddings": SEQ_LEN,
    },
    "reformer": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "max_position_embeddings": SEQ_LEN,
        "axial_pos_shape": [4, 6],
        "axial_pos_embds_dim": [16, 16],
        "is_decoder": False,
    },
    "rembert": {**_BERT_LIKE, "input_embedding_size": 16, "output_embedding_size": 16},
    "roc_bert": {
        **_BERT_LIKE,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "roformer": {**_BERT_LIKE, "embedding_size": 32},
    "squeezebert": {**_BERT_LIKE, "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "xmod": {**_BERT_LIKE, "languages": ["en_XX"], "default_language": "en_XX"},
}
ARCHITECTURES = sorted((HEAD_MODULES.keys() - PROJECTIONS.keys()) | SHIPPED.keys())
CAUSAL_ARCHITECTURES = sorted(PROJECTIONS)


def family_of_type(model_type: str) -> str:
    if model_type == "xlnet":
        return PERMUTED
    return CAUSAL if model_type in (*PROJECTIONS, "gptj") else MASKED


def sizes(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **_SIZES.get(model_type, {**_BERT_LIKE, **_DROPOUT_FREE})}


def vocabulary(size: int = VOCABULARY_SIZE) -> Vocabulary:
    """Ids as in RoBERTa: <s> 0, <pad> 1, </s> 2, <mask> last."""
    return Vocabulary(
        size=size,
        begin_id=0,
        end_id=2,
        separator_id=2,
        mask_id=VOCABULARY_SIZE - 1,
        pad_id=1,
        special_ids=(0, 1, 2, 3, VOCABULARY_SIZE - 1),
        sha256="0" * 64,
    )


def write_config(folder: Any, model_type: str, **changes: Any) -> ModelConfig:
    """Settings that initialise a tiny model from a config.json in `folder`."""
    import json

    (folder / "config.json").write_text(json.dumps({**sizes(model_type), **changes}))
    return ModelConfig(config=str(folder), tokenizer="unused")


def tiny_model(folder: Any, model_type: str, seed: int = 0, family: str | None = None, **changes: Any):
    settings = write_config(folder, model_type, **changes)
    model = build_model(settings, vocabulary(), SEQ_LEN, seed, family or family_of_type(model_type)).model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a fresh model's biases and norms are constants, which would hide a mistake with them
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def lively_model(folder: Any, model_type: str) -> Any:
    """A tiny model whose tokens do attend to each other: at first weights are so small that all scores are near 0."""
    model = tiny_model(folder, model_type)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.mul_(4.0 if parameter.ndim >= 2 else 1.0)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of those that a backward pass has left."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 of the largest of all, and of the same parameters."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * largest, name


def masked_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids [B, S], prediction_index [B·k], labels [B·k] and the same labels at their places [B, S]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY_SIZE - 1, (BLOCKS, SEQ_LEN), generator=generator)
    tokens[:, 0], tokens[:, -1] = 0, 2
    places = torch.stack([1 + torch.randperm(SEQ_LEN - 2, generator=generator)[:PREDICTIONS] for _ in range(BLOCKS)])
    index = (places.sort(dim=1).values + SEQ_LEN * torch.arange(BLOCKS)[:, None]).flatten()
    labels = tokens.flatten()[index].clone()
    placed = torch.full((BLOCKS * SEQ_LEN,), -100)
    placed[index] = labels
    input_ids = tokens.flatten().clone()
    input_ids[index[::2]] = VOCABULARY_SIZE - 1
    return input_ids.view(BLOCKS, SEQ_LEN), index, labels, placed.view(BLOCKS, SEQ_LEN)


def preset(name: str = "roberta-base", **overrides) -> ModelConfig:
    return ModelConfig(preset=name, tokenizer="unused", overrides=overrides)


def tiny_roberta(**overrides) -> ModelConfig:
    return preset(**{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **overrides})


def saved(tmp_path, model_type: str, **changes):
    tiny_model(tmp_path, model_type, **changes).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def continued(folder, **overrides) -> ModelConfig:
    return ModelConfig(from_pretrained=str(folder), overrides=overrides)
