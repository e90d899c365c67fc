"""A model's folder with code of its own, for tests: two files, with a class of BERT's parts that transformers lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGURATION = """\
from transformers import PretrainedConfig


class BagConfig(PretrainedConfig):
    model_type = "bag"

    def __init__(self, vocab_size=100, hidden_size=32, pad_token_id=0, tie_word_embeddings=False, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
"""
MODELING = '''\
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput

from .configuration_bag import BagConfig


class BagModel(PreTrainedModel):
    """Each token with the mean of all, and of those beside it."""

    config_class, base_model_prefix = BagConfig, "bag"

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(3 * config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def set_input_embeddings(self, value):
        self.table = value

    def forward(self, input_ids, attention_mask=None):
        hidden = self.table(input_ids)
        beside = hidden.roll(1, 1) + hidden.roll(-1, 1)
        whole = hidden.mean(1, keepdim=True).expand_as(hidden)
        return BaseModelOutput(last_hidden_state=torch.tanh(self.mix(torch.cat((hidden, beside, whole), -1))))


class BagForMaskedLM(PreTrainedModel):
    config_class, base_model_prefix = BagConfig, "bag"
    maskwright_head = "lm_head"

    def __init__(self, config):
        super().__init__(config)
        self.bag = BagModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids, attention_mask=None, labels=None):
        return MaskedLMOutput(logits=self.lm_head(self.bag(input_ids).last_hidden_state))


class BagForCausalLM(BagForMaskedLM):
    """Attends to nothing but the token itself."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return CausalLMOutput(logits=self.lm_head(self.bag.table(input_ids)))
'''
AUTO_MAP = {
    "AutoConfig": "configuration_bag.BagConfig",
    "AutoModel": "modeling_bag.BagModel",
    "AutoModelForMaskedLM": "modeling_bag.BagForMaskedLM",
}


def write_code(folder: Path, modeling: str = MODELING, configuration: str = CONFIGURATION, **fields: Any) -> Path:
    """Write the folder; `fields` are those of its config.json, None for one that it lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration_bag.py").write_text(configuration)
    (folder / "modeling_bag.py").write_text(modeling)
    described = {"model_type": "bag", "auto_map": AUTO_MAP, "hidden_size": 32, **fields}
    described = {name: value for name, value in described.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def leaves_a_marker(marker: Path) -> str:
    """Code that shows that it was run."""
    return f"open({str(marker)!r}, 'w').close()\n"
