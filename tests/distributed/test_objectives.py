"""What holds for every objective on real ranks: one table, so that a new objective is one more line of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig

from tests.elastic_matrix import run_in_turn
from tests.objective_cases import CASES
from tests.preparing import prepare_text
from tests.ranks import losses, train
from tests.teachers import make_teacher
from tools.convert import convert
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.errors import EXIT_FINISHED
from trainer.model.classes import auto_class_of
from trainer.model.source import load_vocabulary
from trainer.model.trained import build_trained
from trainer.objectives.registry import family_of

OTHER_LAYOUT: dict[str, Any] = {
    "deepspeed": "zero3",
    "batch": {"micro_size": 2},
}  # two micro-batches on each of two ranks
every_case = pytest.mark.parametrize("name", CASES)
SHARING = ("mlm and sop", "rtd", "rtd, disentangled")
"""Where layers, or two models, share weights: more than a tied head, whose gradients a stage has to add up."""
MODELS = (
    *("mlm", "mlm by words, documents, code of its own", "mlm and nsp", "mlm and sop", "mlm, taught"),
    *("clm", "plm", "rtd", "rtd, disentangled", "rtd, documents"),
)
"""Cases without those that differ from another one in masks or blocks alone, and have its model."""


@pytest.fixture(scope="module")
def marked(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The workspace's text with its words and sentences marked."""
    folder, marks = tmp_path_factory.mktemp("marked"), {"word_starts": "tokenizer", "sentence_starts": "rules"}
    return str(prepare_text(workspace / "text.txt", workspace, folder / "data", **marks))


@pytest.fixture(scope="module")
def teacher_of(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the teacher of a case, once."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(name: str) -> str:
        case = CASES[name]
        assert case.teacher is not None
        family = family_of(case.config("unused", "unused", "unused"))
        if not (folder / name).exists():
            make_teacher(folder / name, str(workspace / "tokenizer"), case.preset, case.teacher, family)
        return str(folder / name)

    return make


@pytest.fixture
def config_of(workspace: Path, marked: str, teacher_of: Any, tmp_path: Path) -> Any:
    def make(case: str, run: str, dropout: float = 0.0, **sections: Any) -> Config:
        sections |= {"train": {"steps": 4, **sections.get("train", {})}, "checkpoint": {"every_steps": 2}}
        if CASES[case].teacher is not None:
            sections["objective"] = {"teacher": {**CASES[case].objective["teacher"], "model": teacher_of(case)}}
        return CASES[case].config(str(workspace / "tokenizer"), marked, str(tmp_path / run), dropout, **sections)

    return make


def lose_the_last(config: Config) -> None:
    """As if the run had been killed before its last checkpoint."""
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / f"step-{config.train.steps:08d}")


def losses_of(config: Config, ranks: int = 1) -> list[float]:
    assert train(config, ranks) == EXIT_FINISHED
    return losses(Path(config.run.dir))


@every_case
def test_a_run_depends_on_no_layout_and_what_comes_out_is_what_was_trained(
    name: str, config_of: Any, tmp_path: Path
) -> None:
    clean = losses_of(config_of(name, "one"))
    assert clean[-1] < clean[0], "it learns"
    proven = convert(str(tmp_path / "one"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert (proven.difference_from_training, proven.difference_after_reload) == (0, 0)
    has_code = "auto_map" in json.loads((tmp_path / "model" / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=has_code)
    auto_class = getattr(transformers, "AutoModelForMaskedLM" if has_code else auto_class_of(loaded))
    _, report = auto_class.from_pretrained(tmp_path / "model", output_loading_info=True, trust_remote_code=has_code)
    assert not any(report.values())

    two = config_of(name, "two", **OTHER_LAYOUT)
    found = losses_of(two, 2)
    assert found == pytest.approx(clean, abs=1e-5, rel=0)
    lose_the_last(two)
    assert losses_of(two, 2) == found, "the same layout: to the bit"
    lose_the_last(two)
    assert losses_of(config_of(name, "two", deepspeed="zero1")) == pytest.approx(clean, abs=1e-5, rel=0)


@pytest.mark.parametrize("name", SHARING)
def test_every_stage_has_the_same_losses(name: str, config_of: Any) -> None:
    clean = losses_of(config_of(name, "one"))
    stages = [config_of(name, stage, deepspeed=stage) for stage in ("zero0", "zero2")]
    run_in_turn(2, stages)
    for config in stages:
        assert losses(Path(config.run.dir)) == pytest.approx(clean, abs=1e-5, rel=0), config.deepspeed


@pytest.mark.parametrize("name", MODELS)
def test_frozen_layers_keep_every_bit_and_what_comes_out_is_what_was_trained(
    name: str, config_of: Any, tmp_path: Path
) -> None:
    layers = {"gpt2": "transformer.h.*", "xlnet-base": "transformer.layer.*"}.get(CASES[name].preset, "*.encoder.*")
    config = config_of(name, "run", deepspeed="zero2", train={"precision": "bf16"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"frozen": [layers]})})
    found = losses_of(config, 2)
    assert found[-1] < found[0]
    built = build_trained(config, load_vocabulary(config), family_of(config))
    before = {weight: value for weight, value in built.module.named_parameters() if weight in built.frozen}
    frozen = ZeroFiles(tmp_path / "run" / "checkpoints" / "step-00000004").frozen
    assert frozen.keys() == before.keys() and len(frozen) > 5
    assert all(torch.equal(frozen[weight], before[weight]) for weight in frozen)
    proven = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert (proven.difference_from_training, proven.difference_after_reload) == (0, 0)


@pytest.mark.parametrize(
    ("name", "stage"),
    [*((name, "zero2") for name in CASES), *((name, stage) for name in SHARING for stage in ("zero0", "zero1"))],
)
def test_a_resume_is_bit_equal_with_dropout(name: str, stage: str, config_of: Any) -> None:
    config = config_of(name, "run", dropout=0.1, deepspeed=stage)
    clean = losses_of(config, 2)
    lose_the_last(config)
    assert losses_of(config, 2) == clean
