"""Document borders: what the .doc files say, for any cut of documents into shards and blocks."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.test_shards import SEPARATOR, stream_of, write_data_set
from trainer.data import shard_parts
from trainer.data.dataset import ShardSet
from trainer.data.documents import DocumentBorders, cumulative_lengths, length_counts, positions_in_documents
from trainer.errors import DamagedError

documents = st.lists(st.lists(st.sampled_from([5, 6, SEPARATOR]), max_size=9), max_size=6)


def starts_in(shards: list[list[list[int]]]) -> list[bool]:
    """For each token of the stream, whether it begins a document."""
    return [place == 0 for documents in shards for document in documents for place in range(len(document) + 1)]


@settings(deadline=None, max_examples=60)  # each writes and syncs files
@given(shards=st.lists(documents, min_size=1, max_size=5), payload=st.integers(1, 40))
def test_a_block_is_cut_where_documents_begin_and_nowhere_else(
    shards: list[list[list[int]]], payload: int, tmp_path_factory: pytest.TempPathFactory
):
    """Documents of one token, separators within documents, empty shards, blocks over several shards: all of it."""
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder, shards)
    data = ShardSet(folder)
    blocks = np.arange(data.block_count(payload))[::-1]
    expected = np.array(starts_in(shards)[: len(blocks) * payload], bool).reshape(len(blocks), payload)[::-1].copy()
    expected[:, :1] = True
    found = DocumentBorders(data).starts(blocks * payload, payload)
    assert found.dtype == np.bool_ and found.shape == (len(blocks), payload)
    np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=60)  # each writes and syncs files
@given(shards=st.lists(documents, min_size=1, max_size=5), payload=st.integers(1, 40))
def test_pieces_lead_to_the_tokens_that_are_read(
    shards: list[list[list[int]]], payload: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder, shards)
    data, streams = ShardSet(folder), [stream_of([documents]) for documents in shards]
    blocks = np.arange(data.block_count(payload))[::-1]
    rows: list[list[int]] = [[] for _ in blocks]
    for row, shard, offset, length in data.pieces(blocks * payload, payload).tolist():
        assert length > 0
        rows[row] += streams[shard][offset : offset + length]
    assert rows == data.read_blocks(blocks, payload).tolist()


@pytest.mark.parametrize("before", range(11))
def test_a_border_at_every_place_of_a_block(before: int, tmp_path: Path):
    write_data_set(tmp_path, [[[7] * before, [8] * 30]])  # with its separator the first has before + 1 tokens
    starts = DocumentBorders(ShardSet(tmp_path)).starts(np.array([0]), 10)
    assert np.flatnonzero(starts[0]).tolist() == ([0, before + 1] if before < 9 else [0])


def test_open_files_are_bounded_and_a_copy_for_a_worker_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_parts, "_MAPPED_FILES", 3)
    write_data_set(tmp_path, [[[5] * 19]] * 8)
    found = DocumentBorders(ShardSet(tmp_path))
    for block in (0, 1, 2, 3, 4, 3, 5, 6, 7, 0):
        assert found.starts(np.array([block]) * 20, 20).sum() == 1
    assert list(found._borders._maps) == [6, 7, 0]
    copy = pickle.loads(pickle.dumps(found))
    assert not copy._borders._maps
    assert copy.starts(np.array([7]) * 20, 20).sum() == 1


@pytest.mark.parametrize(
    "damaged", [[0, 3, 17, 25, 26, 27, 32, 0, 40], [0, 5, 7, 10, 2, 20, 22, 35, 40], [0, 4, 8, 13, 23, 0, 30, 32, 40]]
)
def test_offsets_that_lead_out_of_the_block_are_damage(damaged: list[int], tmp_path: Path):
    write_data_set(tmp_path, [[[5] * 4] * 8])
    (tmp_path / "shard-00000.doc").write_bytes(np.array(damaged, "<u8").tobytes())
    with pytest.raises(DamagedError, match=r"The document offsets in shard-00000.doc do not ascend"):
        DocumentBorders(ShardSet(tmp_path)).starts(np.arange(4) * 10, 10)


def test_positions_restart_and_lengths_add_up():
    starts = np.array([[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]], bool)
    positions = positions_in_documents(starts)
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 0]]
    assert positions.dtype == np.int64
    lengths = cumulative_lengths(starts)
    assert lengths.tolist() == [0, 2, 3, 6, 12, 13, 17, *[18] * 10]  # 7 documents, and empty ones to make 16
    assert lengths.dtype == np.int32


@pytest.mark.parametrize(("documents", "length"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64)])
def test_batches_come_in_few_shapes(documents: int, length: int):
    starts = np.zeros((1, 64), bool)
    starts[0, :documents] = True
    lengths = cumulative_lengths(starts)
    assert len(lengths) == length + 1
    assert (np.diff(lengths) > 0).sum() == documents
    assert lengths[-1] == 64


@pytest.mark.parametrize("seq_len", [2, 8, 31, 64])
def test_the_lengths_of_a_batch_have_no_more_shapes_than_is_said(seq_len: int) -> None:
    for blocks in (1, 2, 3, 4, 5, 16):
        shapes = set()
        for documents in range(blocks, blocks * seq_len + 1):
            starts = np.zeros((blocks, seq_len), bool)
            starts[:, 0] = True
            starts.reshape(-1)[np.flatnonzero(~starts)[: documents - blocks]] = True
            shapes.add(cumulative_lengths(starts).shape)
        assert len(shapes) <= length_counts(seq_len)
