"""Teachers for tests: tiny models of a preset, with weights large enough to have an opinion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.config import ModelConfig
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.model.build import build_model
from trainer.model.classes import MASKED


def make_teacher(
    folder: Path, tokenizer: str, preset: str, sizes: Mapping[str, Any], family: str = MASKED, seed: int = 11
) -> str:
    """Write a teacher with its tokenizer, as save_pretrained does; returns its folder."""
    loaded = load_tokenizer(tokenizer)
    settings = ModelConfig(preset=preset, tokenizer=tokenizer, overrides=dict(sizes))
    model = build_model(settings, read_vocabulary(loaded, tokenizer), 8, seed, family).model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((0.2 if weight.ndim > 1 else 0.05) * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    return str(folder)
