"""Recipes: each is named where a user looks, validates, and trains its first steps with a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.console import make_console
from tests.commands import maskwright
from tests.ranks import losses
from tests.teachers import make_teacher
from tools.prepare import prepare
from trainer.config import Config
from trainer.config.file import load_config, recipe_names
from trainer.inputs.inputs import open_inputs

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


def _is_set(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name) is not None


@pytest.fixture(scope="module")
def words(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's text with its words marked, in two splits."""
    folder = tmp_path_factory.mktemp("words") / "data"
    prepare(
        [str(workspace / "text.txt")],
        str(workspace / "tokenizer"),
        str(folder),
        workers=1,
        validation_fraction=0.1,
        word_starts="tokenizer",
        console=make_console(),
    )
    return folder


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("demo", (1, 2)),
        ("roberta-base", (1, 8, 64)),
        ("roberta-base-fast", (1, 8, 64)),
        ("roberta-large", (1, 8, 64)),
        ("roberta-2026", (1, 8, 64)),
        ("bert-wwm-chinese", (1, 8, 16)),
        ("spanbert-base", (1, 8)),
        ("distilbert", (1, 8, 16)),
        ("electra-small", (1, 8)),
        ("deberta-v3-base", (1, 8, 16)),
        ("modernbert-base", (1, 8, 16)),
        ("bert-24h", (1, 8)),
        ("adapt", (1, 8, 16)),
        ("tapt", (1, 8, 32)),
    ],
)
def test_every_recipe_validates(
    name: str, ranks: tuple[int, ...], workspace: Path, words: Path, tmp_path: Path
) -> None:
    assert name in recipe_names()
    own = [f"model.tokenizer={workspace / 'tokenizer'}", f"data.train={words}", f"data.validation={words}"]
    if load_config(name).data.seq_len > 1024:  # of which the text has none to hold out
        own[-1] = "data.validation=null"
    if load_config(name).model.from_pretrained is not None:  # a name on the hub
        own.append("model.preset=bert-base")
    if load_config(name).objective.teacher is not None:  # another one
        own += with_tiny_teacher(tmp_path / "teacher", str(workspace / "tokenizer"))
    config = load_config(name, own)
    for world_size in ranks:  # what is thorough is the same for all of them
        plan = open_inputs(config, world_size, thorough=world_size == ranks[0]).plan
        assert plan.micro_size * plan.accumulation * world_size == config.batch.global_size


def with_tiny_teacher(folder: Path, tokenizer: str) -> list[str]:
    """Overrides for a recipe with a BERT for its teacher; its layers are numbered as those of the published one."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    make_teacher(folder, tokenizer, "bert-base", sizes)
    model = ["model.overrides={dim: 32, n_heads: 2, hidden_dim: 64}", f"model.layers_from.model={folder}"]
    return [*model, f"objective.teacher.model={folder}"]


def test_no_recipe_is_left_out_above() -> None:
    by_masks = ["bert-wwm-chinese", "demo", "roberta-base", "roberta-base-fast", "roberta-large", "spanbert-base"]
    others = ["adapt", "bert-24h", "deberta-v3-base", "distilbert", "electra-small", "modernbert-base", "tapt"]
    assert recipe_names() == sorted([*by_masks, *others, "roberta-2026"])
    shown = " ".join(CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output.split())
    shown = shown.replace("- ", "-")  # where a name was broken
    assert f"or a recipe: {', '.join(recipe_names())}." in shown


@pytest.mark.parametrize("name", recipe_names())
def test_the_first_steps_of_a_recipe(name: str, workspace: Path, words: Path, tmp_path: Path) -> None:
    done = maskwright("train", name, *tiny(name, workspace, words, tmp_path), "logging.every_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "run")
    assert len(found) == 6 and all(math.isfinite(loss) for loss in found)
