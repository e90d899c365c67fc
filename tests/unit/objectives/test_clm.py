"""Causal language modelling: what is shown and what is to be told, by definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_rows import BEGIN, END, VOCABULARY, some_documents
from tests.unit.data.test_shards import stream_of, write_data_set
from trainer.data.batch import Batch
from trainer.data.block_reader import BlockReader, block_count
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.dataset import ShardSet
from trainer.data.tokenizer import Vocabulary
from trainer.objectives.clm import TERM, CausalSamples

SEQ_LEN = 16


def batch_of(shards: ShardSet, samples: CausalSamples) -> Batch:
    """All blocks of a data set in one batch."""
    count = block_count(shards, samples)
    blocks = BlockReader(shards, samples).read(np.arange(count))
    return samples.make_batch(blocks, np.arange(count, dtype=np.uint64), seed=5)


def shown_and_told(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    shown = batch.inputs["input_ids"].numpy()
    return shown, batch.labels[TERM].numpy().reshape(shown.shape)


@pytest.fixture(scope="module")
def documents() -> list[list[list[int]]]:
    return [some_documents(30, seed, longest=25) for seed in (1, 2)]


@pytest.fixture(scope="module")
def shards(documents: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("clm")
    write_data_set(folder, documents)
    return ShardSet(folder)


def test_each_token_of_the_stream_is_told_once_from_the_one_before_it(
    shards: ShardSet, documents: list[list[list[int]]]
) -> None:
    shown, told = shown_and_told(batch_of(shards, CausalSamples(VOCABULARY, SEQ_LEN)))
    stream = stream_of(documents)
    whole = len(shown) * SEQ_LEN
    assert whole == (len(stream) - 1) // SEQ_LEN * SEQ_LEN
    assert shown.reshape(-1).tolist() == stream[:whole]
    assert told.reshape(-1).tolist() == stream[1 : whole + 1]


@given(tokens=st.integers(0, 200), seq_len=st.integers(3, 40))
def test_a_block_needs_the_token_after_it(tokens: int, seq_len: int) -> None:
    view = CausalSamples(VOCABULARY, seq_len).view
    count = view.block_count(tokens)
    assert count * seq_len + 1 <= tokens or count == 0
    assert (count + 1) * seq_len + 1 > tokens


def test_within_documents_a_separator_begins_the_document_that_follows_it(
    shards: ShardSet, documents: list[list[list[int]]]
) -> None:
    samples = CausalSamples(VOCABULARY, SEQ_LEN, document_attention=True)
    batch = batch_of(shards, samples)
    assert batch.documents is not None
    starts = batch.documents.positions.numpy() == 0
    lengths = [len(document) + 1 for of_shard in documents for document in of_shard]
    first_tokens = np.cumsum([0, *lengths])[:-1]
    expected = np.zeros(starts.size + 1, np.bool_)
    expected[first_tokens[first_tokens > 0] - 1] = True  # separators, a document's last token in the stream
    expected = expected[:-1].reshape(starts.shape)
    expected[:, 0] = True
    assert np.array_equal(starts, expected)
    count = block_count(shards, samples)
    read = BlockReader(shards, samples).read_marks(np.arange(count))
    assert np.array_equal(samples.document_starts(read), expected)


def test_a_row_of_documents_tells_each_token_after_a_begin_token_and_its_end(tmp_path: Path) -> None:
    write_data_set(tmp_path, [[[7, 8], [9], [500, 8, 7, 9, 7]], [[8] * 20]])
    samples = CausalSamples(VOCABULARY, SEQ_LEN, whole_documents=True)
    batch = batch_of(ShardSet(tmp_path), samples)
    shown, told = shown_and_told(batch)
    first = [BEGIN, 7, 8, END, BEGIN, 9, END, BEGIN, 500, 8, 7, 9, 7, END]
    assert shown[0].tolist()[:14] == first
    no = IGNORED_LABEL
    assert told[0].tolist() == [7, 8, END, no, 9, END, no, 500, 8, 7, 9, 7, END, no, no, no]
    assert shown[1].tolist() == [BEGIN] + [8] * 14 + [END]
    assert told[1].tolist() == [8] * 15 + [no], "of the document goes on in the next row; no end is told"
    assert told[2].tolist() == [no] + [8] * 5 + [END] + [no] * 9, "the first token was told in the row before"
    assert batch.documents is not None
    begun = [np.flatnonzero(row == 0).tolist() for row in batch.documents.positions.numpy()]
    assert begun == [[0, 4, 7, 14], [0], [0, 1, 8]], "a piece that goes on has its begin token apart"


def test_of_documents_of_any_length_each_token_and_each_end_is_told_once(tmp_path: Path) -> None:
    """Also of those that fill a row, or several, to the last token, and over the border of two shards."""
    shards = [[[5 + number] * length for number, length in enumerate(range(1, 60))], some_documents(40, 3, longest=50)]
    write_data_set(tmp_path, shards)
    _, told = shown_and_told(batch_of(ShardSet(tmp_path), CausalSamples(VOCABULARY, SEQ_LEN, whole_documents=True)))
    documents = [document for of_shard in shards for document in of_shard]
    assert told[told != IGNORED_LABEL].tolist() == [token for document in documents for token in [*document, END]]


def test_one_token_serves_as_begin_and_end_where_a_tokenizer_has_one(tmp_path: Path) -> None:
    write_data_set(tmp_path, [[[7, 8], [9]]])
    alone = Vocabulary(1000, END, END, END, None, None, (END,), "", lacking=("mask", "pad"))
    shown, told = shown_and_told(batch_of(ShardSet(tmp_path), CausalSamples(alone, 10, whole_documents=True)))
    no = IGNORED_LABEL
    assert shown.tolist() == [[END, 7, 8, END, END, 9, END, END, END, END]]
    assert told.tolist() == [[7, 8, END, no, 9, END, no, no, no, no]]


@pytest.mark.parametrize("whole_documents", [False, True])
def test_what_a_trial_and_a_probe_are_given_has_the_shape_of_training(whole_documents: bool) -> None:
    samples = CausalSamples(VOCABULARY, SEQ_LEN, whole_documents=whole_documents)
    from trainer.sizing.made_up import made_up_batch

    batch = made_up_batch(samples, 3, token=7)
    assert batch.inputs["input_ids"].shape == (3, SEQ_LEN) and batch.labels[TERM].shape == (3 * SEQ_LEN,)
    assert batch.prediction_index is None and batch.head_rows == 3 * SEQ_LEN
