"""Inputs, tokenizers and data sets for the tests of `prepare`, `tokenizer train` and `data import`."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.conftest import write_text
from tools.import_tokens import ImportSummary, import_tokens
from tools.prepare import Job, PrepareOptions, PrepareSummary, open_job, prepare, readers
from tools.prepare.pieces import Piece
from tools.prepare.plan import plan_units
from tools.tokenizer import train_tokenizer
from trainer.data.manifest import read_data_manifest
from trainer.data.shard_checks import document_starts

UNIT_BYTES = 16384
CHINESE = (
    "我来到北京清华大学。今天天气很好，我们去公园看花。",
    "他说：“你真的吃过饭了吗？”大家都笑了！然后他们坐火车回家。",
    "中国有很多历史悠久的城市……比如西安、洛阳和南京。",
    "用电脑学习自然语言处理，要先分词，再训练模型。Hello world 2016年。",
)
"""Four documents of Chinese."""


def prepare_text(text: Path, workspace: Path, output: Path, **options: Any) -> Path:
    """Prepare a text with the workspace's tokenizer, by one worker; returns the output."""
    prepare([str(text)], str(workspace / "tokenizer"), str(output), workers=1, console=quiet_console(), **options)
    return output


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = write_text(folder / "text.txt", documents=200, seed=3)
    return train_tokenizer([str(text)], folder / "tokenizer", "bytelevel-bpe", 400, quiet_console())


@pytest.fixture(scope="session")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 400 Chinese lines in three files and a wordpiece tokenizer."""
    folder = tmp_path_factory.mktemp("chinese")
    (folder / "texts").mkdir()
    for number in range(3):
        lines = [f"{CHINESE[line % 4]}{line}{CHINESE[line % 3]}" for line in range(150 * number, 150 * number + 150)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    train_tokenizer([str(folder / "texts")], folder / "tokenizer", "wordpiece", 600, quiet_console())
    return folder


@pytest.fixture
def run_prepare(tokenizer: Path) -> Callable[..., PrepareSummary]:
    def run(inputs: list[Path], output: Path, **options) -> PrepareSummary:
        options = {"workers": 1, "console": quiet_console(), **options}
        return prepare([str(path) for path in inputs], str(tokenizer), str(output), **options)

    return run


@pytest.fixture
def make_job(tokenizer: Path) -> Callable[..., Job]:
    def make(inputs: list[Path], output: Path, **options) -> Job:
        return open_job([str(path) for path in inputs], str(tokenizer), str(output), PrepareOptions(**options))

    return make


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 4 KiB, so that a small input has many."""
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 4096)


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of UNIT_BYTES in this process, for inputs that take several workers some time."""
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", UNIT_BYTES)


def records(job: Job) -> list[str]:
    """The names of the records of finished units."""
    return sorted(path.name for path in job.work_folder.glob("unit-*.json"))


def quiet_console() -> Console:
    return Console(file=io.StringIO(), markup=False)


def read_token_documents(folder: Path) -> list[list[int]]:
    """The content tokens of every document of a data set, in order."""
    manifest, documents = read_data_manifest(folder), []
    for entry in manifest.shards:
        tokens = np.fromfile(folder / f"{entry.name}.tok", manifest.dtype)
        starts = document_starts(folder, entry).astype(int)
        documents += [tokens[a : b - 1].tolist() for a, b in itertools.pairwise(starts)]
    return documents


def folder_hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_text_pieces(inputs, documents: str, cuts: list[int]) -> list[str]:
    """The documents of a single text file, read in pieces cut at the given bytes."""
    (unit,) = plan_units(inputs, "file")
    (whole,) = unit.pieces
    borders = [0, *sorted(cut for cut in cuts if cut < whole.end), whole.end]
    settings = readers.TextSettings("text", documents, "text", "")
    pieces = [Piece(whole.file, a, b) for a, b in itertools.pairwise(borders)]
    return [text for piece in pieces for text, _ in readers.read_documents(piece, settings)]


Importer = Callable[..., ImportSummary]


@pytest.fixture
def run_import(tokenizer: Path) -> Importer:
    def run(inputs: Path | list[Path], output: Path, **options) -> ImportSummary:
        paths = inputs if isinstance(inputs, list) else [inputs]
        options = {"console": quiet_console(), **options}
        return import_tokens([str(path) for path in paths], str(tokenizer), str(output), **options)

    return run


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> list[list[int]]:
    """The contents of 60 documents of text."""
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=60, seed=5)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return [loaded(text, add_special_tokens=False).input_ids for text in path.read_text().strip().split("\n\n")]


@pytest.fixture
def prepared(tmp_path: Path, run_prepare) -> Path:
    """The same documents, prepared from their text."""
    path = write_text(tmp_path / "text.txt", documents=60, seed=5)
    run_prepare([path], tmp_path / "prepared")
    return tmp_path / "prepared"
