"""Named architectures: what `model.preset` stands for.

The vocabulary size and the special ids are not here: they come from the tokenizer.

Sources: RoBERTa, arXiv:1907.11692, table 9 (514 positions, because position ids start after the padding id);
BERT, arXiv:1810.04805, section 3; ALBERT, arXiv:1909.11942, table 1, without dropout but before the head for pairs, as
version 2 of google-research/albert; DistilBERT, arXiv:1910.01108, section 3, with learnt positions as in the published
distilbert-base-uncased; ModernBERT, arXiv:2412.13663, table 4; GPT-2, Radford et al. 2019, table 2 (its smallest), and
a model of characters for a text of some megabytes, of the size that Karpathy's nanoGPT has for one;
XLNet, arXiv:1906.08237, section 3 (its base has the sizes of BERT's), as published: xlnet-base-cased has no memory;
ELECTRA, arXiv:2003.10555, table 6 (of its small with the published configuration's width of 256); DeBERTa-v3,
arXiv:2111.09543, its base, with the published configuration's relative positions (256 buckets) and no others;
NEZHA, arXiv:1909.00204 (its base has the sizes of BERT's), with the distances of its published configuration.
Fields the papers leave open (epsilons, biases, initialisation) are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_BERT = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
_ELECTRA = {
    "model_type": "electra",
    **_BERT,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_ROBERTA = {**_BERT, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "roberta-base": {"model_type": "roberta", **_ROBERTA, **_BASE},
        "roberta-large": {"model_type": "roberta", **_ROBERTA, **_LARGE},
        "bert-base": {
            "model_type": "bert",
            **_BERT,
            **_BASE,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
        "albert-base": {
            "model_type": "albert",
            **_BASE,
            "embedding_size": 128,
            "num_hidden_groups": 1,
            "inner_group_num": 1,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout_prob": 0.1,
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
        "distilbert": {
            "model_type": "distilbert",
            "dim": 768,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 3072,
            "activation": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
            "sinusoidal_pos_embds": False,
        },
        "electra-small": {
            **_ELECTRA,
            "embedding_size": 128,
            "hidden_size": 256,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        "electra-base": {**_ELECTRA, **_BASE, "embedding_size": 768},
        "deberta-v3-base": {
            "model_type": "deberta-v2",
            **_BERT,
            **_BASE,
            "max_position_embeddings": 512,
            "type_vocab_size": 0,
            "layer_norm_eps": 1e-7,
            "relative_attention": True,
            "max_relative_positions": -1,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        "gpt2": {**_GPT2, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
        "gpt2-small-char": {**_GPT2, "n_positions": 256, "n_embd": 384, "n_layer": 6, "n_head": 6},
        "xlnet-base": {
            "model_type": "xlnet",
            "d_model": 768,
            "n_layer": 12,
            "n_head": 12,
            "d_inner": 3072,
            "ff_activation": "gelu",
            "dropout": 0.1,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "attn_type": "bi",
            "mem_len": None,
        },
        "nezha-base": {
            "model_type": "nezha",
            **_BERT,
            **_BASE,
            "max_position_embeddings": 512,
            "max_relative_position": 64,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
        "modernbert-base": {
            "model_type": "modernbert",
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "hidden_activation": "gelu",
            "max_position_embeddings": 8192,
            "global_attn_every_n_layers": 3,
            "local_attention": 128,
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
            "norm_eps": 1e-5,
            "norm_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "decoder_bias": True,
            "attention_dropout": 0.0,
            "mlp_dropout": 0.0,
            "embedding_dropout": 0.0,
            "initializer_range": 0.02,
            "initializer_cutoff_factor": 2.0,
        },
    }
)
"""Name → fields of the Hugging Face config, `model_type` among them."""
