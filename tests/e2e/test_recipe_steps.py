"""Each recipe trains: its first steps, with its model made tiny and everything else as it says where a CPU can."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.commands import maskwright
from tests.e2e.test_documentation import with_tiny_teacher
from tests.ranks import losses
from trainer.config.file import load_config, recipe_names

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LENGTH = 32


def tiny(name: str, workspace: Path, words: Path, folder: Path) -> list[str]:
    """Overrides under which a recipe's first steps take a moment."""
    config = load_config(name)
    own = [
        f"run.dir={folder / 'run'}",
        f"model.tokenizer={workspace / 'tokenizer'}",
        f"data.train={words}",
        f"data.validation={words}",
        "data.workers=0",
        f"data.seq_len={2 * LENGTH}",
        "batch.global_size=4",
        "batch.micro_size=2",
        "model.compile=false",
        "checkpoint.every_steps=null",
        "checkpoint.every_minutes=null",
        "eval.every_steps=2",
        "eval.samples=4",
        *(f"{key}=null" for key in ("train.tokens", "train.epochs", "train.min_steps") if _is_set(config, key)),
        "train.steps=6",
        "schedule.warmup_steps=2",
        *(f"schedule.{key}=null" for key in ("warmup_fraction", "warmup_tokens") if _is_set(config, f"schedule.{key}")),
    ]
    if config.schedule.decay_tokens is not None:
        own += ["schedule.decay_tokens=null", "schedule.decay_steps=2"]
    if config.data.phases:
        tokens, phases = 0, []
        for phase in config.data.phases:  # two steps each, in blocks of half the length where they are shorter
            length = LENGTH if phase.seq_len < config.data.seq_len else 2 * LENGTH
            tokens += 2 * 4 * length
            changes = phase.model_dump(mode="json", exclude_none=True)
            phases.append({**changes, "seq_len": length, "until_tokens": tokens, "global_size": 4, "micro_size": 2})
        own.append(f"data.phases={json.dumps(phases)}")
    if config.model.from_pretrained is not None:
        own.append("model.preset=bert-base")
    if config.objective.teacher is not None:
        return own + with_tiny_teacher(folder / "teacher", str(workspace / "tokenizer"))
    if config.objective.generator is not None:
        own.append(f"objective.generator.overrides={json.dumps(SIZES)}")
    return [*own, f"model.overrides={json.dumps({**SIZES, 'max_position_embeddings': 2 * LENGTH + 2})}"]


def _is_set(config: Any, key: str) -> bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name) is not None


@pytest.mark.parametrize("name", recipe_names())
def test_the_first_steps_of_a_recipe(name: str, workspace: Path, words: Path, tmp_path: Path) -> None:
    done = maskwright("train", name, *tiny(name, workspace, words, tmp_path), "logging.every_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "run")
    assert len(found) == 6 and all(math.isfinite(loss) for loss in found)
