from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_shards import write_data_set
from trainer.config import ObjectiveConfig
from trainer.data.block_reader import BlockReader, block_count
from trainer.data.blocks import DOCUMENT_STARTS, IGNORED_LABEL
from trainer.data.dataset import ShardSet
from trainer.data.rows import fill_rows, row_index
from trainer.data.tokenizer import Vocabulary
from trainer.errors import DamagedError
from trainer.objectives.mlm import MaskedSamples

BEGIN, PAD, END, MASK, SEPARATOR = 0, 1, 2, 4, 2
VOCABULARY = Vocabulary(1000, BEGIN, END, SEPARATOR, MASK, PAD, (BEGIN, PAD, END, 3, MASK), "")
SEQ_LEN = 16


def samples(seq_len: int = SEQ_LEN) -> MaskedSamples:
    return MaskedSamples(ObjectiveConfig(), VOCABULARY, seq_len, whole_documents=True)


def greedy(documents: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """The definition: rows of pieces, each row as many as fit, up to a document without a token."""
    most = seq_len - 2
    rows: list[list[list[int]]] = []
    used = seq_len
    for piece in (document[at : at + most] for document in documents for at in range(0, len(document) or 1, most)):
        if not piece:
            used = seq_len
            continue
        if used + len(piece) + 2 > seq_len:
            rows.append([])
            used = 0
        rows[-1].append(piece)
        used += len(piece) + 2
    return rows


def shown(row: list[list[int]], seq_len: int) -> list[int]:
    tokens = [token for piece in row for token in (BEGIN, *piece, END)]
    return tokens + [PAD] * (seq_len - len(tokens))


def some_documents(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    # Ids that look like separators stand in the text, too.
    return [generator.choice([END, 7, 8, 9, 500], generator.integers(1, longest)).tolist() for _ in range(count)]


@given(lengths=st.lists(st.integers(3, SEQ_LEN), max_size=200))
def test_rows_are_filled_as_one_piece_after_the_other_fits(lengths: list[int]):
    first, used = [], SEQ_LEN
    for number, length in enumerate(lengths):
        if used + length > SEQ_LEN:
            first.append(number)
            used = 0
        used += length
    assert fill_rows(np.array(lengths, np.int64), np.zeros(len(lengths), np.int64), SEQ_LEN).tolist() == first


DOCUMENTS = st.lists(st.lists(st.integers(5, 900), max_size=40), min_size=1, max_size=9)


@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=3), seq_len=st.sampled_from([8, 16, 33]), data=st.data())
def test_any_documents_in_any_order_of_rows(
    shards: list[list[list[int]]], seq_len: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("rows")
    write_data_set(folder, shards)
    expected = [row for documents in shards for row in greedy(documents, seq_len)]
    opened, objective = ShardSet(folder), samples(seq_len)
    assert block_count(opened, objective) == len(expected)
    order = data.draw(st.permutations(range(len(expected))))
    if order:
        framed = objective._frame(BlockReader(opened, objective).read(np.array(order)), VOCABULARY)
        assert framed.tokens.tolist() == [shown(expected[number], seq_len) for number in order]
        assert framed.starts[DOCUMENT_STARTS][:, 0].all()
        assert framed.contents.tolist() == [sum(map(len, expected[number])) for number in order]


@pytest.mark.parametrize("seq_len", [8, 16, 64, 200])
def test_rows_show_every_document_once_between_begin_and_end(seq_len: int, tmp_path: Path):
    shards = [some_documents(count, seed) for seed, count in enumerate((30, 1, 12))]
    write_data_set(tmp_path, shards)
    data, objective = ShardSet(tmp_path), samples(seq_len)
    expected = [row for documents in shards for row in greedy(documents, seq_len)]  # no row crosses shards
    assert block_count(data, objective) == len(expected)

    found = BlockReader(data, objective).read(np.arange(len(expected))[::-1])
    framed = objective._frame(found, VOCABULARY)
    assert framed.tokens[::-1].tolist() == [shown(row, seq_len) for row in expected]
    assert framed.contents[::-1].tolist() == [sum(map(len, row)) for row in expected]
    starts = [np.cumsum([0, *(len(piece) + 2 for piece in row)]) for row in expected]
    of_documents = [np.flatnonzero(row).tolist() for row in framed.starts[DOCUMENT_STARTS][::-1]]
    assert of_documents == [[place for place in row.tolist() if place < seq_len] for row in starts], "padding is one"

    index = row_index(data, seq_len)
    assert index.documents == 43
    assert index.cut == sum(len(document) > seq_len - 2 for documents in shards for document in documents)
    assert index.positions == (framed.tokens != PAD).sum()


def test_a_share_of_the_text_is_predicted_and_nothing_of_the_frame(tmp_path: Path):
    write_data_set(tmp_path, [[[7] * 20, [8] * 10, [9] * 3]])
    objective = MaskedSamples(ObjectiveConfig(mask_ratio=0.3), VOCABULARY, 64, whole_documents=True)
    blocks = BlockReader(ShardSet(tmp_path), objective).read(np.zeros(64, np.int64))
    batch = objective.make_batch(blocks, np.arange(64, dtype=np.uint64), seed=0)
    labels = batch.labels["mlm"].view(64, -1)
    assert ((labels != IGNORED_LABEL).sum(1) == round(0.3 * 33)).all()
    assert labels.shape[1] == round(0.3 * 62), "the shape of a full row"
    assert set(labels.unique().tolist()) == {IGNORED_LABEL, 7, 8, 9}
    padding = batch.inputs["input_ids"][:, 39:]
    assert (padding == PAD).all() and padding.shape[1] == 64 - 39


def test_what_a_quarantine_cuts_is_left_out(tmp_path: Path):
    mebibyte = (1 << 20) // 2
    documents = [[5 + number % 900] * 999 for number in range(mebibyte * 2 // 1000)]
    write_data_set(tmp_path, [documents])
    whole = row_index(ShardSet(tmp_path), 1024)
    index = row_index(ShardSet(tmp_path, ["shard-00000:0"]), 1024)
    assert whole.documents == len(documents) == len(whole)
    left = [number for number in range(len(documents)) if number * 1000 >= mebibyte]
    assert index.documents == len(left)
    first = BlockReader(ShardSet(tmp_path, ["shard-00000:0"]), samples(1024)).read(np.array([0, len(left) - 1]))
    assert first.tokens[:, 0].tolist() == [documents[left[0]][0], documents[left[-1]][0]]


def test_offsets_that_do_not_ascend_are_damage(tmp_path: Path):
    write_data_set(tmp_path, [[[5] * 4] * 8])
    (tmp_path / "shard-00000.doc").write_bytes(np.array([0, 5, 7, 10, 2, 20, 22, 35, 40], "<u8").tobytes())
    with pytest.raises(DamagedError, match=r"The document offsets in shard-00000.doc do not ascend"):
        row_index(ShardSet(tmp_path), SEQ_LEN)
