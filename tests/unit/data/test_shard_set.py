"""Reading a data set: quarantine, damage at the first read, pread, and how many files are open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.unit.data.test_shards import SEPARATOR, flip, stream_of, write_data_set
from trainer.data import dataset as shard_set
from trainer.data.dataset import ShardSet
from trainer.data.manifest import SUM_BYTES
from trainer.data.shard_reader import ReadSettings
from trainer.errors import DamagedError, UserError

METHODS: tuple[Literal["mmap", "pread"], ...] = ("mmap", "pread")
TOKENS_A_MEBIBYTE = SUM_BYTES // 2
PAYLOAD = 510


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 2.9, 0 and 1.2 MiB, two bytes a token."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    shards = [[generator.integers(5, 1000, 4999).tolist() for _ in range(count)] for count in (300, 0, 125)]
    write_data_set(folder, shards)
    return folder


def stream(folder: Path) -> np.ndarray:
    return np.concatenate([np.fromfile(folder / f"shard-{number:05d}.tok", "<u2") for number in range(3)])


def all_blocks(data: ShardSet) -> np.ndarray:
    return data.read_blocks(np.arange(data.block_count(PAYLOAD)), PAYLOAD)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verify", [False, True])
def test_every_way_of_reading_gives_the_stream(folder: Path, method: Literal["mmap", "pread"], verify: bool):
    data = ShardSet(folder, settings=ReadSettings(method, verify))
    expected = stream(folder)
    assert np.array_equal(all_blocks(data).reshape(-1), expected[: data.block_count(PAYLOAD) * PAYLOAD])
    shuffled = np.random.default_rng(1).permutation(data.block_count(PAYLOAD))
    assert np.array_equal(data.read_blocks(shuffled, PAYLOAD), all_blocks(data)[shuffled])


@pytest.mark.parametrize(
    ("quarantine", "left_out"),
    [
        (["shard-00000:1"], [(0, 1, 2)]),
        (["shard-00000:0-1", "shard-00002:1"], [(0, 0, 2), (2, 1, 2)]),
        (["shard-00000:2", "shard-00000:1-2"], [(0, 1, 3)]),
        (["shard-00002", "shard-00001"], [(2, 0, 2)]),
    ],
)
def test_a_quarantine_closes_the_stream_over_the_gap(
    folder: Path, quarantine: list[str], left_out: list[tuple[int, int, int]]
):
    expected = []
    for number in range(3):
        tokens = np.fromfile(folder / f"shard-{number:05d}.tok", "<u2")
        keep = np.ones(len(tokens), np.bool_)
        for shard, first, end in left_out:
            if shard == number:
                keep[first * TOKENS_A_MEBIBYTE : end * TOKENS_A_MEBIBYTE] = False
        expected.append(tokens[keep])
    joined = np.concatenate(expected)
    data = ShardSet(folder, quarantine)
    assert data.tokens == len(joined) < data.manifest.tokens
    assert np.array_equal(all_blocks(data).reshape(-1), joined[: data.block_count(PAYLOAD) * PAYLOAD])
    assert data.fingerprint != ShardSet(folder).fingerprint == data.manifest.fingerprint


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("shrd-00001:1", "'shrd-00001', which is no shard. Did you mean 'shard-00001'?"),
        ("shard-00000:3", "outside the shard, whose last MiB is 2"),
        ("shard-00000:2-1", "outside the shard"),
        ("shard-00000:x", "Cannot read the quarantine 'shard-00000:x'"),
        ("", "Cannot read the quarantine"),
    ],
)
def test_a_quarantine_of_what_is_not_there_is_the_users_mistake(folder: Path, entry: str, words: str):
    with pytest.raises(UserError, match="quarantine") as caught:
        ShardSet(folder, [entry])
    assert words in caught.value.problem


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_stops_the_first_read_of_its_mebibyte_and_no_other(
    folder: Path, method: Literal["mmap", "pread"], tmp_path: Path
):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "shard-00000.tok"
    flip(path, SUM_BYTES + 5, 3)
    data = ShardSet(tmp_path / "data", settings=ReadSettings(method, verify=True))
    data.read_blocks(np.array([0, 100, 2500]), PAYLOAD)
    touching = TOKENS_A_MEBIBYTE // PAYLOAD  # begins in MiB 0 and ends in MiB 1
    for blocks in ([touching], [0, touching + 1], [2 * TOKENS_A_MEBIBYTE // PAYLOAD]):
        with pytest.raises(DamagedError, match=r"MiB 1 of shard-00000\.tok \(bytes 1,048,576\.\.2,097,152\)") as caught:
            data.read_blocks(np.array(blocks), PAYLOAD)
    assert caught.value.where == str(path)
    assert "quarantine: ['shard-00000:1']" in caught.value.remedy
    assert all_blocks(ShardSet(tmp_path / "data", ["shard-00000:1"], ReadSettings(method, verify=True))).size


def test_shards_that_have_changed_places_are_found(folder: Path, tmp_path: Path):
    generator = np.random.default_rng(0)
    write_data_set(tmp_path, [[generator.integers(5, 1000, 999).tolist()] for _ in range(2)])
    for suffix in ("tok", "doc", "sum"):
        first, second = (tmp_path / f"shard-{number:05d}.{suffix}" for number in range(2))
        first.rename(tmp_path / "other")
        second.rename(first)
        (tmp_path / "other").rename(second)
    data = ShardSet(tmp_path, settings=ReadSettings(verify=True))  # the sizes are right
    with pytest.raises(DamagedError, match=r"shard-00000\.sum differs from its checksum in the manifest"):
        data.read_blocks(np.array([0]), PAYLOAD)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_cut_short_after_the_start_is_damage_where_it_is_read_by_pread(
    method: Literal["mmap", "pread"], tmp_path: Path
):
    write_data_set(tmp_path, [[[7] * 9999]])
    data = ShardSet(tmp_path, settings=ReadSettings(method))
    os.truncate(tmp_path / "shard-00000.tok", 1000)
    expected = {"pread": "ends at byte 1,000; its manifest says 20,000 bytes", "mmap": "Cannot read shard-00000.tok"}
    with pytest.raises(DamagedError, match=expected[method]):
        data.read_blocks(np.array([0]), PAYLOAD)


def test_a_file_that_has_gone_is_damage(tmp_path: Path):
    write_data_set(tmp_path, [[[7] * 999]])
    data = ShardSet(tmp_path)
    (tmp_path / "shard-00000.tok").unlink()
    with pytest.raises(DamagedError, match=r"Cannot read shard-00000\.tok: No such file"):
        data.read_blocks(np.array([0]), PAYLOAD)


def test_only_some_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = [[[number] * 50] for number in range(5, 25)]
    write_data_set(tmp_path, shards)
    monkeypatch.setattr(shard_set, "MAX_OPEN_SHARDS", 3)
    data = ShardSet(tmp_path, settings=ReadSettings(verify=True))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        found = data.read_blocks(np.arange(data.block_count(17)), 17).reshape(-1)
        assert found.tolist() == stream_of(shards)[: len(found)]
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3  # the file, and the mapping's own descriptor
    assert SEPARATOR in found


def test_advice_changes_nothing_that_is_read(tmp_path: Path):
    write_data_set(tmp_path, [[[5] * 3000], [[6] * 3000]])
    data = ShardSet(tmp_path)
    data.advise(np.array([0, 1, 1, 5, 10]) * PAYLOAD, PAYLOAD)
    data.advise(np.array([], np.int64), PAYLOAD)
    assert all_blocks(data).reshape(-1).tolist() == [*[5] * 3000, SEPARATOR, *[6] * 2609]


def test_one_rank_checks_the_sizes_for_all(tmp_path: Path):
    write_data_set(tmp_path, [[[7] * 999]])
    os.truncate(tmp_path / "shard-00000.doc", 3)
    with pytest.raises(DamagedError):
        ShardSet(tmp_path)
    assert ShardSet(tmp_path, check=False).tokens == 1000
