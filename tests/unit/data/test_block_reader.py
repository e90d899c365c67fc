"""Blocks with what is marked in them, over any cut of documents into shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_shards import SEPARATOR, flip, stream_of
from trainer.data.block_reader import MarkedTokens
from trainer.data.dataset import ShardSet
from trainer.data.manifest import MANIFEST, SENTENCE_STARTS, WORD_STARTS, Manifest
from trainer.data.shard_reader import ReadSettings
from trainer.data.shard_writer import ShardWriter
from trainer.errors import DamagedError, UserError


def write_marked(folder: Path, shards: list[list[list[int]]], marks: tuple[str, ...] = (WORD_STARTS,)) -> Manifest:
    """A data set in which the tokens below 10 start a word."""
    entries = []
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder, f"shard-{number:05}", np.dtype("<u2"), SEPARATOR, marks)
        for document in documents:
            ids = np.asarray(document, "<u2")
            writer.add_document(ids, dict.fromkeys(marks, ids < 10))
        entries.append(writer.close())
    tokens, documents = (sum(getattr(entry, name) for entry in entries) for name in ("tokens", "documents"))
    manifest = Manifest("<u2", "", 1000, SEPARATOR, tokens, documents, tuple(entries))
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


@given(
    shards=st.lists(
        st.lists(st.lists(st.integers(3, 20), min_size=1, max_size=40), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    payload=st.integers(1, 30),
)
def test_the_marks_of_a_block_are_those_of_its_tokens(
    shards: list[list[list[int]]], payload: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data")
    write_marked(folder, shards)
    data, stream = ShardSet(folder), np.asarray(stream_of(shards))
    blocks = np.arange(data.block_count(payload))[::-1]
    if not len(blocks):
        return
    found = MarkedTokens(data, WORD_STARTS).starts(blocks * payload, payload)
    expected = np.stack([stream[block * payload :][:payload] for block in blocks])
    assert found.dtype == bool
    assert np.array_equal(found, (expected < 10) & (expected != SEPARATOR))


def test_a_copy_for_a_worker_reads_the_same(tmp_path: Path) -> None:
    write_marked(tmp_path, [[[5, 12, 13] * 20]])
    words = MarkedTokens(ShardSet(tmp_path), WORD_STARTS)
    copy = pickle.loads(pickle.dumps(words))
    assert copy.starts(np.array([1, 0]), 20).tolist() == words.starts(np.array([1, 0]), 20).tolist()


def test_a_data_set_without_marks_is_a_card_with_the_option(tmp_path: Path) -> None:
    write_marked(tmp_path, [[[5, 12]]])
    with pytest.raises(UserError, match=r"The data set has no sentence starts \(no shard-00000\.snt\)") as error:
        MarkedTokens(ShardSet(tmp_path), SENTENCE_STARTS)
    assert "--sentence-starts" in error.value.remedy


def test_a_flipped_mark_is_damage_where_reads_are_verified(tmp_path: Path) -> None:
    write_marked(tmp_path, [[[5, 12, 13] * 20]])
    flip(tmp_path / "shard-00000.wrd", 3, 1)
    MarkedTokens(ShardSet(tmp_path), WORD_STARTS).starts(np.array([0]), 20)
    with pytest.raises(DamagedError, match=r"shard-00000\.wrd differs from its checksum"):
        MarkedTokens(ShardSet(tmp_path, settings=ReadSettings(verify=True)), WORD_STARTS).starts(np.array([0]), 20)
