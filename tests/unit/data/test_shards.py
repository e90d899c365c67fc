"""The shard format: what is written comes back, blocks cross shard borders, damage is located."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.dataset import ShardSet
from trainer.data.manifest import SUM_BYTES, Manifest, read_data_manifest, split_folder, token_dtype
from trainer.data.shard_checks import check_sizes, document_starts, verify_shard
from trainer.data.shard_writer import ShardWriter
from trainer.errors import DamagedError, UserError

SEPARATOR = 2


def write_data_set(folder: Path, shards: list[list[list[int]]], vocabulary_size: int = 1000) -> Manifest:
    """Shards of documents of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocabulary_size)
    entries = []
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder, f"shard-{number:05d}", dtype, SEPARATOR)
        for document in documents:
            writer.add_document(document)
        entries.append(writer.close())
    manifest = Manifest(
        dtype=dtype.str,
        tokenizer_sha256="0" * 64,
        vocabulary_size=vocabulary_size,
        separator_id=SEPARATOR,
        tokens=sum(entry.tokens for entry in entries),
        documents=sum(entry.documents for entry in entries),
        shards=tuple(entries),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def stream_of(shards: list[list[list[int]]]) -> list[int]:
    return [token for documents in shards for document in documents for token in [*document, SEPARATOR]]


def three_mebibytes(folder: Path) -> Manifest:
    return write_data_set(folder, [[list(range(1000)) * 1536]], 100_000)  # 4 bytes a token: 5.9 MiB


documents = st.lists(st.lists(st.integers(0, 999), max_size=12), max_size=6)


@settings(deadline=None)  # a busy disk syncs slowly
@given(shards=st.lists(documents, min_size=1, max_size=4), payload=st.integers(1, 40), wide=st.booleans())
def test_blocks_are_consecutive_views_of_the_stream_across_shards(
    shards: list[list[list[int]]], payload: int, wide: bool, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("data")
    manifest = write_data_set(folder, shards, 100_000 if wide else 1000)
    data, stream = ShardSet(folder), stream_of(shards)
    assert data.tokens == manifest.tokens == len(stream)
    assert data.block_count(payload) == len(stream) // payload
    blocks = np.arange(data.block_count(payload))[::-1]  # in any order
    expected = [stream[block * payload : (block + 1) * payload] for block in blocks]
    found = data.read_blocks(blocks, payload)
    assert found.dtype == ("<u4" if wide else "<u2")
    assert found.tolist() == expected
    for entry, written in zip(manifest.shards, shards, strict=True):
        starts = document_starts(folder, entry).tolist()
        tokens = np.fromfile(folder / f"{entry.name}.tok", data.dtype).tolist()
        assert [tokens[a : b - 1] for a, b in itertools.pairwise(starts)] == written
        assert verify_shard(folder, entry) == []


def test_a_block_may_span_several_shards(tmp_path: Path):
    shards = [[[1, 1]], [[3]], [], [[4]], [[5, 5, 5]]]
    write_data_set(tmp_path, shards)
    assert ShardSet(tmp_path).read_blocks(np.array([0]), 9).tolist() == [stream_of(shards)[:9]]


@pytest.mark.parametrize(("size", "dtype"), [(3, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (250_002, "<u4")])
def test_ids_take_two_bytes_as_long_as_they_fit(size: int, dtype: str, tmp_path: Path):
    assert token_dtype(size).str == dtype
    write_data_set(tmp_path, [[[size - 1, 0]]], size)
    assert ShardSet(tmp_path).read_blocks(np.array([0]), 3).tolist() == [[size - 1, 0, SEPARATOR]]


def test_the_manifest_comes_back_and_says_what_decides_the_tokens(tmp_path: Path):
    manifest = write_data_set(tmp_path / "a", [[[5, 6]], [[7]]])
    assert read_data_manifest(tmp_path / "a") == manifest
    assert write_data_set(tmp_path / "b", [[[5, 6]], [[7]]]).fingerprint == manifest.fingerprint
    assert write_data_set(tmp_path / "c", [[[5, 6]], [[8]]]).fingerprint != manifest.fingerprint
    assert write_data_set(tmp_path / "d", [[[5], [7]], [[7]]]).fingerprint != manifest.fingerprint


def test_a_shard_has_its_names_only_when_it_is_whole(tmp_path: Path):
    writer = ShardWriter(tmp_path, "shard-00000", np.dtype("<u2"), SEPARATOR)
    writer.add_document([5, 6])
    assert not (tmp_path / "shard-00000.tok").exists()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"shard-00000.{suffix}" for suffix in ("doc", "sum", "tok")
    ]


def test_two_writers_of_a_shard_do_not_mix_their_bytes(tmp_path: Path):
    """As on a file system without locks, where nothing keeps two processes from the same shard."""
    writers = [ShardWriter(tmp_path, "shard-00000", np.dtype("<u2"), SEPARATOR) for _ in range(2)]
    for document in ([5, 6], [7]):
        for writer in writers:
            writer.add_document(document)
    writers[0].add_document([8])
    entry = writers[0].close()
    assert verify_shard(tmp_path, entry) == []
    last = writers[1].close()
    assert verify_shard(tmp_path, last) == [] and (last.tokens, last.documents) == (5, 2)
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file is left"


def test_a_path_where_nothing_is_is_said_to_be_one(tmp_path: Path):
    with pytest.raises(UserError, match="there is nothing at this path") as caught:
        read_data_manifest(tmp_path / "no-such.txt")
    assert caught.value.remedy.startswith("Correct the path.")


def test_a_folder_without_a_manifest_is_no_data_set_and_the_split_inside_is_named(tmp_path: Path):
    write_data_set(tmp_path / "data" / "train", [[[1]]])
    with pytest.raises(UserError, match="has no manifest") as caught:
        ShardSet(tmp_path / "data")
    assert f"Did you mean {tmp_path / 'data' / 'train'}?" in caught.value.remedy
    assert split_folder(tmp_path / "data", "train") == tmp_path / "data" / "train"
    assert split_folder(tmp_path / "data" / "train", "train") == tmp_path / "data" / "train"
    assert split_folder(tmp_path / "nosuch", "train") == tmp_path / "nosuch"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "maskwright-shards", "version": 99}', '{"format": "other"}']
)
def test_a_manifest_that_cannot_be_read_is_damage(content: str, tmp_path: Path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match="Cannot read the manifest"):
        read_data_manifest(tmp_path)


def test_a_manifest_with_a_field_too_many_or_too_few_is_damage(tmp_path: Path):
    write_data_set(tmp_path, [[[1]]])
    path = tmp_path / "manifest.json"
    whole: dict[str, Any] = json.loads(path.read_text())
    for raw in ({**whole, "extra": 1}, {key: value for key, value in whole.items() if key != "tokens"}):
        path.write_text(json.dumps(raw))
        with pytest.raises(DamagedError):
            read_data_manifest(tmp_path)


@pytest.mark.parametrize("suffix", ["tok", "doc", "sum"])
def test_a_file_of_another_size_or_missing_is_damage_at_once(suffix: str, tmp_path: Path):
    manifest = write_data_set(tmp_path, [[[1, 2, 3]]])
    path = tmp_path / f"shard-00000.{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DamagedError, match=f"{path.name} has {size - 1} bytes; its manifest says {size}"):
        ShardSet(tmp_path)
    assert verify_shard(tmp_path, manifest.shards[0]) == [f"{path.name}: {size - 1} bytes instead of {size}"]
    path.unlink()
    with pytest.raises(DamagedError, match=f"{path.name} is missing"):
        check_sizes(tmp_path, manifest.shards[0])
    assert verify_shard(tmp_path, manifest.shards[0]) == [f"{path.name}: missing"]


@given(place=st.integers(0, 6_147_999), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found_and_its_mebibyte_named(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    manifest = read_data_manifest(folder) if folder.is_dir() else three_mebibytes(folder)
    path = folder / "shard-00000.tok"
    place %= path.stat().st_size
    flip(path, place, bit)
    try:
        first = place // SUM_BYTES * SUM_BYTES
        expected = f"{path.name}: content differs from its checksum in bytes {first:,}..{first + SUM_BYTES:,}"
        assert verify_shard(folder, manifest.shards[0]) == [expected]
        ShardSet(folder)  # opening looks at sizes alone: terabytes are not read at every start
    finally:
        flip(path, place, bit)
    assert verify_shard(folder, manifest.shards[0]) == []


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_progress_counts_every_byte(tmp_path: Path):
    manifest = write_data_set(tmp_path, [[[1, 2, 3]]])
    seen: list[int] = []
    verify_shard(tmp_path, manifest.shards[0], seen.append)
    assert sum(seen) == sum(path.stat().st_size for path in tmp_path.glob("shard-*"))


def test_a_worker_maps_the_files_itself(tmp_path: Path):
    write_data_set(tmp_path, [[[1, 2, 3]]])
    data = ShardSet(tmp_path)
    first = data.read_blocks(np.array([0]), 2)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).read_blocks(np.array([0]), 2).tolist() == first.tolist()
