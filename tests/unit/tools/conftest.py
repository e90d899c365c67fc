from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import write_text
from tools.prepare import Job, PrepareSummary, open_job, prepare, readers
from tools.prepare.plan import Piece, plan_units
from tools.tokenizer import train_tokenizer
from trainer.data.shards import document_starts, read_manifest

UNIT_BYTES = 16384


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = write_text(folder / "text.txt", documents=200, seed=3)
    return train_tokenizer([str(text)], folder / "tokenizer", "bytelevel-bpe", 400, quiet_console())


@pytest.fixture
def run_prepare(tokenizer: Path) -> Callable[..., PrepareSummary]:
    def run(inputs: list[Path], output: Path, **options) -> PrepareSummary:
        options = {"workers": 1, "console": quiet_console(), **options}
        return prepare([str(path) for path in inputs], str(tokenizer), str(output), **options)

    return run


@pytest.fixture
def make_job(tokenizer: Path) -> Callable[..., Job]:
    def make(inputs: list[Path], output: Path, **options) -> Job:
        return open_job([str(path) for path in inputs], str(tokenizer), str(output), **options)

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
    manifest, documents = read_manifest(folder), []
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
    settings = readers.ReadSettings("text", documents, "text", "")
    pieces = [Piece(whole.file, a, b) for a, b in itertools.pairwise(borders)]
    return [text for piece in pieces for text, _ in readers.read_documents(piece, settings)]
