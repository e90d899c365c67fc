"""The recipes adapt and tapt: one command on raw text, with a part of it held out by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

from tests.commands import assert_one_card, maskwright
from tests.conftest import write_text
from tests.preparing import quiet_console, read_token_documents
from tests.ranks import TINY_ROBERTA, losses, metrics, train
from tools.baselines import unigram_cross_entropy
from tools.convert import convert
from tools.prepare import prepare
from tools.report.gather import gather
from tools.validate import validate
from trainer.config import Config
from trainer.config.file import load_config
from trainer.data.manifest import SPLITS, read_data_manifest
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

KINDS: dict[str, Any] = {
    "bert": (BertForMaskedLM, BertConfig, {}),
    "roformer": (RoFormerForMaskedLM, RoFormerConfig, {"embedding_size": 32}),
}
FIT = ["data.seq_len=32", "data.workers=0", "batch.micro_size=8", "train.precision=fp32", "optimizer.lr=5e-3"]
"""What makes a recipe fit a model of 34 positions that has learnt nothing yet."""


def made(kind: str, workspace: Path, folder: Path) -> Path:
    """A tiny model with the workspace's tokenizer, as a checkpoint to go on from."""
    model_class, config_class, fields = KINDS[kind]
    torch.manual_seed(0)
    model_class(config_class(**{**TINY_ROBERTA, **fields, "vocab_size": 500, "pad_token_id": 1})).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(workspace / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("bert", workspace, tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 50 kB in a folder of two files, in which a tenth of the documents stand twice."""
    folder = tmp_path_factory.mktemp("text") / "texts"
    folder.mkdir()
    paragraphs = write_text(folder / "a.txt", documents=240, seed=4).read_text().split("\n\n")
    (folder / "b.txt").write_text("\n\n".join(paragraphs[:24]) + "\n")
    return folder


def config_of(recipe: str, model: Path, data: Path, run_dir: Path, *overrides: str) -> Config:
    given = [f"model.from_pretrained={model}", f"data.train={data}", f"run.dir={run_dir}"]
    return load_config(recipe, [*given, *FIT, *overrides])


def evaluations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["eval/loss"] for line in metrics(run_dir) if "eval/loss" in line}


def prepared(run_dir: Path) -> Path:
    """The one data set beside a run."""
    [folder] = [path for path in (run_dir.parent / "text-cache").iterdir() if path.is_dir()]
    return folder


def documents(folder: Path) -> list[tuple[int, ...]]:
    """The tokens of each document of a data set."""
    return [tuple(document) for document in read_token_documents(folder)]


def test_one_command_adapts_a_model_to_50_kb_of_text(model: Path, text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "out"
    given = [f"model.from_pretrained={model}", f"data.train={text}", f"run.dir={run_dir}", *FIT]
    checked = maskwright("validate", "adapt", *given)
    assert checked.returncode == EXIT_FINISHED, checked.stderr
    done = maskwright("train", "adapt", *given)
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    for line in (f"held out of {text} for evaluation: about ", "LITTLE TEXT: ", "train.min_steps makes 100 of them"):
        assert line in checked.stdout and line in done.stdout
    found = evaluations(run_dir)
    assert list(found) == list(range(0, 101, 10)), "before the first step, ten times, and at the end"
    assert found[100] < found[0] - 0.5
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (resolved["eval"]["every_steps"], resolved["checkpoint"]["every_steps"]) == (10, 10)
    assert (resolved["data"]["validation"], resolved["schedule"]["warmup_steps"]) == ("auto", 6)
    splits, size = [prepared(run_dir) / split for split in SPLITS], 500
    [record] = gather([str(run_dir)])
    assert record.unigram == unigram_cross_entropy(*splits, size), "the report finds what was prepared"

    convert(str(run_dir), str(tmp_path / "adapted"), "float32", "5GB", quiet_console())
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapted", output_loading_info=True)
    assert all("pooler" in name or name.startswith("classifier") for name in report["missing_keys"]), report


def test_the_part_is_held_out_the_same_for_any_ranks_and_over_a_resume(model: Path, text: Path, tmp_path: Path) -> None:
    runs = {ranks: tmp_path / f"{ranks}" / "run" for ranks in (1, 2)}
    for (ranks, run_dir), steps in zip(runs.items(), (4, 1), strict=True):
        config = config_of("adapt", model, text, run_dir, f"train.min_steps={steps}", "train.epochs=0.01")
        assert train(config, ranks) == EXIT_FINISHED
    one, two = (prepared(run_dir) for run_dir in runs.values())
    assert one.name == two.name
    for split in ("train", "validation"):
        assert (one / split / "manifest.json").read_bytes() == (two / split / "manifest.json").read_bytes()

    held_out, trained_on = documents(one / "validation"), documents(one / "train")
    assert held_out and not set(held_out) & set(trained_on)
    assert len(held_out) + len(trained_on) == 264 and len({*held_out, *trained_on}) == 240
    sizes = [read_data_manifest(one / split).statistics["text_bytes"] for split in ("validation", "train")]
    assert 0.2 <= sizes[0] / sum(sizes) < 0.25

    without = ["eval.every_steps=null", "eval.patience=null", "checkpoint.keep_best=false"]
    longer = config_of("adapt", model, text, runs[1], "train.min_steps=6", "train.epochs=0.01", *without)
    assert train(longer, 2, resume="must") == EXIT_FINISHED
    assert len(losses(runs[1])) == 6, "without an evaluation, it is the same data that it goes on with"


def test_tapt_takes_a_line_or_a_row_for_a_sample(model: Path, tmp_path: Path) -> None:
    texts = write_text(tmp_path / "block.txt", documents=300, seed=8).read_text().split("\n\n")
    lines = [text.split(".")[0] for text in texts]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    for name in ("lines.txt", "rows.jsonl"):
        run_dir = tmp_path / name.partition(".")[0] / "run"
        length = ("train.min_steps=20", "train.epochs=0.01")
        config = config_of("tapt", model, tmp_path / name, run_dir, *length, "logging.every_steps=1")
        assert any(line.startswith("documents: 2") for line in train_and_describe(config))
        assert {*documents(prepared(run_dir) / "train")}.isdisjoint(documents(prepared(run_dir) / "validation"))
        found = evaluations(run_dir)
        assert found[max(found)] < found[0]
    assert losses(tmp_path / "lines" / "run") == losses(tmp_path / "rows" / "run")


def train_and_describe(config: Config) -> list[str]:
    assert train(config) == EXIT_FINISHED
    return validate(config, 1)


def test_a_class_that_cannot_keep_documents_apart_says_what_to_set(workspace: Path, text: Path, tmp_path: Path) -> None:
    model = made("roformer", workspace, tmp_path / "model")
    given = [f"model.from_pretrained={model}", f"data.train={text}", f"run.dir={tmp_path / 'run'}", *FIT]
    assert_one_card(maskwright("validate", "tapt", *given), EXIT_USER_MISTAKE, "data.samples=stream")
    stream = config_of("tapt", model, text, tmp_path / "run", "data.samples=stream", "train.steps=1")
    assert train(stream) == EXIT_FINISHED


def test_validation_data_of_ones_own_take_nothing_from_the_text(model: Path, text: Path, tmp_path: Path) -> None:
    own = write_text(tmp_path / "own.txt", documents=20, seed=9)
    config = config_of("adapt", model, text, tmp_path / "run", f"data.validation={own}", "train.steps=1")
    assert train(config) == EXIT_FINISHED
    names = {path.name.split("-")[0]: path for path in (tmp_path / "text-cache").iterdir() if path.is_dir()}
    assert len(documents(names["texts"])) == 264 and len(documents(names["own.txt"])) == 20


def test_of_several_sources_the_first_is_held_out_of(model: Path, text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt", documents=50, seed=9)
    sources = f"data.train=[{{path: {text}}}, {{path: {other}}}]"
    assert train(config_of("adapt", model, text, tmp_path / "run", sources, "train.steps=1")) == EXIT_FINISHED
    names = {path.name.split("-")[0]: path for path in (tmp_path / "text-cache").iterdir() if path.is_dir()}
    assert documents(names["texts"] / "validation")
    assert len(documents(names["other.txt"])) == 50


def test_prepared_data_have_a_part_held_out_or_are_refused(
    model: Path, text: Path, workspace: Path, tmp_path: Path
) -> None:
    notes = validate(config_of("adapt", model, workspace / "data", tmp_path / "run"), 1)
    assert any(note.startswith("validation: ") for note in notes)
    whole = tmp_path / "whole"
    prepare([str(text)], str(workspace / "tokenizer"), str(whole), workers=1)
    given = [f"model.from_pretrained={model}", f"data.train={whole}", f"run.dir={tmp_path / 'run'}", *FIT]
    refused = maskwright("train", "adapt", *given)
    assert_one_card(refused, EXIT_USER_MISTAKE, "of which nothing is held out", "data.validation=auto")


@pytest.mark.parametrize("command", ["validate", "train", "plan"])
def test_a_text_that_is_too_small_is_a_card(command: str, model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    given = [f"model.from_pretrained={model}", f"data.train={small}", f"run.dir={tmp_path / 'run'}", *FIT]
    small.write_text("One document, which cannot be cut in two.\n" * 40)
    words = ["too few documents", "data.text.documents=line"]
    if command == "plan":  # which reckons without what is not there
        assert words[0] in maskwright(command, "adapt", *given).stdout
        return
    assert_one_card(maskwright(command, "adapt", *given), EXIT_USER_MISTAKE, *words)
    small.write_text("A little.\n\nA bit more.\n\nThe end.\n\nOr not.\n\nNow.\n")
    assert_one_card(maskwright(command, "adapt", *given), EXIT_USER_MISTAKE, "block")
    shutil.rmtree(tmp_path / "text-cache", ignore_errors=True)
