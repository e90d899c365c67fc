"""Every registered objective, and what it needs to train a tiny model: one table for the tests of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from trainer.config import Config
from trainer.config.file import parse_config

_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_ENCODER_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class ObjectiveCase:
    """One way to train.

    Attributes:
        objective: the section of the config.
        preset: of the model, made tiny by `sizes`.
        dropouts: fields of the model's config that are dropouts.
        sections: others of the config.
        teacher: sizes of the teacher, of the preset, where the objective has one.
    """

    objective: Mapping[str, Any]
    preset: str = "roberta-base"
    sizes: Mapping[str, Any] = field(default_factory=lambda: _BERT)
    dropouts: tuple[str, ...] = _ENCODER_DROPOUT
    sections: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] | None = None

    def raw(self, tokenizer: str, data: str, run_dir: str, dropout: float = 0.0, **sections: Any) -> dict[str, Any]:
        """Write a config of a dozen steps; `sections` are merged over it."""
        overrides = {**self.sizes, **dict.fromkeys(self.dropouts, dropout)}
        raw: dict[str, Any] = {
            "run": {"dir": run_dir, "seed": 3},
            "objective": dict(self.objective),
            "model": {"preset": self.preset, "tokenizer": tokenizer, "overrides": overrides},
            "data": {"train": data, "seq_len": 32, "workers": 0, "chunk_blocks": 8, "window_chunks": 4},
            "batch": {"global_size": 8, "micro_size": 4},
            "optimizer": {"lr": 5.0e-3},
            "schedule": {"warmup_steps": 3},
            "train": {"steps": 8, "precision": "fp32"},
            "checkpoint": {"every_steps": 4, "keep_last": 9},
            "eval": {"every_steps": None},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
        for changes in (self.sections, sections):
            for name, section in changes.items():
                raw[name] = {**raw[name], **section} if isinstance(section, Mapping) else section
        return raw

    def config(self, tokenizer: str, data: str, run_dir: str, dropout: float = 0.0, **sections: Any) -> Config:
        return parse_config(self.raw(tokenizer, data, run_dir, dropout, **sections), "test")


_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
_PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

CASES: Mapping[str, ObjectiveCase] = MappingProxyType(
    {
        "mlm": ObjectiveCase({"name": "mlm"}),
        "mlm by words": ObjectiveCase({"name": "mlm", "scheme": "word"}),
        "mlm by spans": ObjectiveCase({"name": "mlm", "scheme": "span", "replace_by": "unit"}),
        "mlm, documents": ObjectiveCase({"name": "mlm"}, sections={"data": {"samples": "documents"}}),
        "mlm by words, documents, code of its own": ObjectiveCase(
            {"name": "mlm", "scheme": "word"},
            preset="nezha-base",
            sizes={**_BERT, "max_relative_position": 5},
            sections={"data": {"samples": "documents"}},
        ),
        "mlm and nsp": ObjectiveCase({"name": "mlm", "pair": {"task": "nsp"}}, preset="bert-base"),
        "mlm and sop": ObjectiveCase(
            {"name": "mlm", "scheme": "ngram", "pair": {"task": "sop", "weight": 0.5}},
            preset="albert-base",
            sizes={**_BERT, "embedding_size": 16, "num_hidden_layers": 2},
        ),
        "clm": ObjectiveCase({"name": "clm"}, "gpt2", _GPT2, _PDROPS),
        "clm, documents": ObjectiveCase({"name": "clm"}, "gpt2", _GPT2, _PDROPS, {"data": {"samples": "documents"}}),
        "mlm, taught": ObjectiveCase(
            {"name": "mlm", "scheme": "span", "teacher": {"model": "unused"}}, teacher={**_BERT, "num_hidden_layers": 2}
        ),
        "mlm, taught at all tokens": ObjectiveCase(
            {"name": "mlm", "teacher": {"model": "unused", "positions": "all", "temperature": 3.0}},
            sections={"data": {"samples": "documents"}},
            teacher={**_BERT, "num_hidden_layers": 2},
        ),
        "clm, taught": ObjectiveCase(
            {"name": "clm", "teacher": {"model": "unused", "cosine": 0.0}},
            "gpt2",
            _GPT2,
            _PDROPS,
            teacher={**_GPT2, "n_embd": 48, "n_layer": 2},
        ),
        "plm": ObjectiveCase(
            {"name": "plm", "mask_ratio": 0.17, "scheme": "ngram"},
            "xlnet-base",
            {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64},
            ("dropout",),
        ),
        "rtd": ObjectiveCase(
            {"name": "rtd", "replace_mask": 0.85, "replace_random": 0.0},
            "electra-small",
            {**_BERT, "embedding_size": 16},
        ),
        "rtd, disentangled": ObjectiveCase(
            {"name": "rtd", "generator": {"share": "disentangled", "weight": 10.0}},
            "deberta-v3-base",
            {**_BERT, "num_hidden_layers": 2},
        ),
        "rtd, documents": ObjectiveCase(
            {"name": "rtd", "scheme": "word", "generator": {"share": "nothing", "overrides": {"hidden_size": 16}}},
            "bert-base",
            _BERT,
            sections={"data": {"samples": "documents"}},
        ),
    }
)
