"""What a loss compares with."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.test_shards import SEPARATOR, write_data_set
from tools import baselines
from tools.baselines import token_counts, unigram_cross_entropy
from trainer.errors import DamagedError, UserError

VOCABULARY = 1000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and validation data with other frequencies, in several shards and documents, one of them empty."""
    generator, made = np.random.default_rng(0), []
    for name, power in (("train", 2.0), ("validation", 1.7)):
        folder = tmp_path_factory.mktemp(name)
        documents = [(5 + 900 * generator.random(size) ** power).astype(int).tolist() for size in (3000, 1, 500, 4000)]
        write_data_set(folder, [documents[:2], [], documents[2:]])
        made.append(folder)
    return made[0], made[1]


def content(folder: Path) -> list[int]:
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob("*.tok"))]).tolist()
    return [token for token in tokens if token != SEPARATOR]


def test_it_is_the_mean_over_content_tokens_one_at_a_time(folders: tuple[Path, Path]) -> None:
    train, validation = (content(folder) for folder in folders)
    seen = Counter(train)
    costs = [-math.log((seen[token] + 1) / (len(train) + VOCABULARY)) for token in validation]
    found = unigram_cross_entropy(*folders, VOCABULARY)
    assert found == pytest.approx(sum(costs) / len(costs), rel=1e-12)
    assert found < math.log(VOCABULARY), "the tokens are not equally frequent"


def test_of_large_data_evenly_spread_stretches_are_counted(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, is_all = token_counts(folders[0], VOCABULARY)
    assert is_all
    monkeypatch.setattr(baselines, "_STRETCH", 100)
    assert (token_counts(folders[0], VOCABULARY)[0] == whole).all()
    monkeypatch.setattr(baselines, "MOST_TOKENS", 2000)
    part, is_all = token_counts(folders[0], VOCABULARY)
    assert not is_all and 1500 < part.sum() <= 2000 and (part <= whole).all()
    stream = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folders[0].glob("*.tok"))])
    assert part.sum() < whole.sum() == len(stream) and whole[SEPARATOR] == (stream == SEPARATOR).sum()


def test_what_is_no_data_set_or_not_whole_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        token_counts(tmp_path, VOCABULARY)
    write_data_set(tmp_path, [[[7, 8, 9]]])
    (tmp_path / "shard-00000.tok").write_bytes(b"\0\0")
    with pytest.raises(DamagedError, match=r"shard-00000"):
        token_counts(tmp_path, VOCABULARY)
