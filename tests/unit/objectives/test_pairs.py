"""Rows of pairs, from data sets: what is read, composed, masked and left without a label."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_block_reader import write_marked
from tests.unit.data.test_rows import BEGIN, END, MASK, SEPARATOR, VOCABULARY
from tests.unit.data.test_shards import stream_of
from trainer.config import ObjectiveConfig, PairConfig
from trainer.data.batch import Batch
from trainer.data.block_reader import BlockReader, block_count
from trainer.data.blocks import IGNORED_LABEL, View
from trainer.data.dataset import ShardSet
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS
from trainer.objectives.masking import predictions_per_block
from trainer.objectives.pairs import PairedSamples, view_of
from trainer.sizing.made_up import made_up_batch

SEQ_LEN = 24
PAYLOAD = SEQ_LEN - 3
MARKS = (WORD_STARTS, SENTENCE_STARTS)
every_task = pytest.mark.parametrize("task", ["nsp", "sop"])


def some_shards(seed: int = 1, shards: int = 3, documents: int = 40) -> list[list[list[int]]]:
    """Ids from 5 on, of which those below 10, one in five, start a sentence and a word."""
    generator = np.random.default_rng(seed)

    def document() -> list[int]:
        ids = np.where(generator.random(40) < 0.2, generator.integers(5, 10, 40), generator.integers(10, 900, 40))
        return [5, *ids[: generator.integers(0, 40)].tolist()]

    return [[document() for _ in range(documents)] for _ in range(shards)]


@pytest.fixture(scope="module")
def shards() -> list[list[list[int]]]:
    return some_shards()


@pytest.fixture(scope="module")
def data(shards: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("pairs")
    write_marked(folder, shards, MARKS)
    return ShardSet(folder)


def samples_of(task: Any, scheme: Any = "token", **settings: Any) -> PairedSamples:
    pair = PairConfig(task=task)
    return PairedSamples(ObjectiveConfig(pair=pair, scheme=scheme, **settings), pair, VOCABULARY, SEQ_LEN)


def batch_of(data: ShardSet, samples: PairedSamples, first: int = 0, partner_at: int = 7) -> Batch:
    """All blocks of a data set; partners so many blocks away."""
    count = block_count(data, samples)
    numbers = np.arange(count)
    partners = [(numbers + partner_at) % count] if samples.view.partner else []
    return samples.make_batch(BlockReader(data, samples).read(numbers, *partners), first + numbers.astype(np.uint64), 5)


def rows_of(batch: Batch, task: str) -> list[tuple[list[int], list[int], list[int], int]]:
    """A, B, types and label of each row, masks taken back."""
    ids = batch.inputs["input_ids"].clone().flatten()
    told = batch.labels["mlm"] != IGNORED_LABEL
    assert batch.prediction_index is not None
    ids[batch.prediction_index[told]] = batch.labels["mlm"][told]
    rows = []
    for row, types, label in zip(
        ids.view(-1, SEQ_LEN).tolist(),
        batch.inputs["token_type_ids"].tolist(),
        batch.labels[task].tolist(),
        strict=True,
    ):
        second = types.index(1)
        assert types == [0] * second + [1] * (SEQ_LEN - second)
        assert row[0] == BEGIN and row[second - 1] == row[-1] == END
        rows.append((row[1 : second - 1], row[second:-1], types, label))
    return rows


def borders_of(stream: list[int], first: int, length: int, documents: set[int]) -> list[int]:
    """Where sentences start in a block that are no document's first, nor its own first token."""
    return [at for at in range(1, length) if 3 <= stream[first + at] < 10 and first + at not in documents]


def document_starts(shards: list[list[list[int]]]) -> set[int]:
    lengths = [len(document) + 1 for documents in shards for document in documents]
    return set(np.cumsum([0, *lengths]).tolist())


def test_a_row_is_cut_where_a_sentence_starts_and_b_follows_or_is_of_the_partner(
    data: ShardSet, shards: list[list[list[int]]]
) -> None:
    stream, documents = stream_of(shards), document_starts(shards)
    seen = set()
    found = rows_of(batch_of(data, samples_of("nsp")), "nsp")
    for block, (a, b, _, label) in enumerate(found):
        own = stream[block * PAYLOAD :][:PAYLOAD]
        partner = (block + 7) % len(found)
        theirs = borders_of(stream, partner * PAYLOAD, PAYLOAD, documents)
        seen.add(label)
        assert a == own[: len(a)] and len(a) + len(b) == PAYLOAD
        if label == IGNORED_LABEL:
            assert b == []
            continue
        assert len(a) in borders_of(stream, block * PAYLOAD, PAYLOAD, documents)
        if label == 0:
            assert b == own[len(a) :]
        else:
            read = stream[partner * PAYLOAD :][: 2 * PAYLOAD]
            assert b in [read[at : at + len(b)] for at in theirs]
    assert seen == {0, 1, IGNORED_LABEL}


def test_an_exchange_is_of_whole_sentences_between_the_first_border_and_the_last(
    data: ShardSet, shards: list[list[list[int]]]
) -> None:
    stream, documents = stream_of(shards), document_starts(shards)
    seen = set()
    for block, (a, b, _, label) in enumerate(rows_of(batch_of(data, samples_of("sop")), "sop")):
        own, borders = stream[block * PAYLOAD :][:PAYLOAD], borders_of(stream, block * PAYLOAD, PAYLOAD, documents)
        seen.add(label)
        if label == IGNORED_LABEL:
            assert len(borders) < 3 and (a, b) == (own, [])
        elif label == 0:
            assert len(a) in borders[1:-1] and a + b == own
        else:
            first, last = borders[0], borders[-1]
            exchanged = [(own[:first] + own[cut:last], own[first:cut] + own[last:]) for cut in borders[1:-1]]
            assert (a, b) in exchanged
    assert seen == {0, 1, IGNORED_LABEL}


@every_task
@pytest.mark.parametrize("scheme", ["token", "word", "ngram", "span"])
def test_the_composed_row_is_masked_as_any(task: str, scheme: str, data: ShardSet) -> None:
    samples = samples_of(task, scheme, mask_ratio=0.3)
    batch = batch_of(data, samples)
    rows, k = batch.rows, predictions_per_block(0.3, PAYLOAD)
    assert samples.head_rows == k and batch.head_rows == rows * k and batch.labels["mlm"].shape == (rows * k,)
    assert batch.prediction_index is not None
    places = (batch.prediction_index % SEQ_LEN).numpy().reshape(rows, k)
    told = (batch.labels["mlm"] != IGNORED_LABEL).numpy().reshape(rows, k)
    assert told.sum(axis=1).max() == k and (scheme != "token" or (told.sum(axis=1) == k).mean() > 0.9)
    plain = rows_of(batch, task)
    for row, (a, b, types, _) in enumerate(plain):
        masked = set(places[row][told[row]].tolist())
        assert not masked & {0, types.index(1) - 1, SEQ_LEN - 1}, "special tokens are not told"
        if scheme == "token":
            continue
        # A word is masked whole or not at all; it ends before a mark, a separator, and the end of its segment.
        whole = [BEGIN, *a, END, *b, END]
        for place in sorted(masked):
            following = place + 1
            ends = whole[following] < 10 or whole[place] == SEPARATOR
            assert following in masked or ends or _is_joined(a, b, following)


def _is_joined(a: list[int], b: list[int], place: int) -> bool:
    return place in (1 + len(a), 2 + len(a) + len(b))


@every_task
def test_a_row_is_the_same_in_any_batch_and_another_at_another_visit(task: str, data: ShardSet) -> None:
    samples = samples_of(task)
    reader = BlockReader(data, pickle.loads(pickle.dumps(samples)))
    numbers, partners = np.array([3, 9, 4]), np.array([5, 2, 11])
    given = [partners] if task == "nsp" else []
    whole = samples.make_batch(reader.read(numbers, *given), numbers.astype(np.uint64), 5)
    for row in range(3):
        one = [each[row : row + 1] for each in (numbers, *given)]
        alone = samples.make_batch(reader.read(*one), numbers[row : row + 1].astype(np.uint64), 5)
        for name in ("input_ids", "token_type_ids"):
            assert alone.inputs[name][0].tolist() == whole.inputs[name][row].tolist()
        assert alone.labels[task].tolist() == whole.labels[task][row : row + 1].tolist()
    visits = [batch_of(data, samples, first=start).labels[task].tolist() for start in (0, 10**6)]
    assert visits[0] != visits[1]
    shapes = {batch_of(data, samples, first=start).shapes for start in (0, 1000, 2000)}
    assert len(shapes) == 1


@every_task
def test_masks_do_not_tell_the_label(task: str, data: ShardSet) -> None:
    samples = samples_of(task)
    counts, changed, rows = np.zeros(SEQ_LEN), np.zeros(SEQ_LEN), 0
    for visit in range(60):
        batch = batch_of(data, samples, first=visit * 1000)
        labels = batch.labels[task].numpy()
        shown = batch.inputs["input_ids"].numpy()[labels != IGNORED_LABEL] == MASK
        labels = labels[labels != IGNORED_LABEL]
        counts, changed, rows = counts + shown.sum(axis=0), changed + shown[labels == 1].sum(axis=0), rows + len(labels)
    there = counts > 50
    deviation = (changed[there] - counts[there] / 2) / (0.5 * counts[there] ** 0.5)
    assert rows > 2000 and abs(deviation).max() < 5


def test_a_partner_holds_no_token_of_the_block_and_ends_with_the_stream(
    data: ShardSet, shards: list[list[list[int]]]
) -> None:
    stream, samples = stream_of(shards), samples_of("nsp")
    count = block_count(data, samples)
    assert samples.view == View(PAYLOAD, partner=True) and count == len(stream) // PAYLOAD
    blocks = np.repeat(np.arange(count), 3)
    partners = np.concatenate([np.array([block - 1, block, block + 1]) % count for block in range(count)])
    read = BlockReader(data, samples).read(blocks, partners)
    marks = BlockReader(data, samples).read_marks(blocks, partners).partner
    assert read.partner is not None and read.partner.lengths is not None and marks is not None
    for row, (block, partner, length) in enumerate(
        zip(blocks.tolist(), partners.tolist(), read.partner.lengths.tolist(), strict=True)
    ):
        there = stream[partner * PAYLOAD :][: 2 * PAYLOAD]
        expected = 0 if partner == block else PAYLOAD if partner + 1 == block else len(there)
        assert length == expected
        assert read.partner.tokens[row, :length].tolist() == there[:length]
        starts = read.partner.starts[SENTENCE_STARTS][row, :length]
        assert starts.tolist() == [3 <= token < 10 for token in there[:length]]
        assert np.array_equal(marks.starts[SENTENCE_STARTS][row, :length], starts)
    assert read.partner.tokens.shape == (len(blocks), 2 * PAYLOAD)


def test_a_block_alone_in_its_window_has_no_label(data: ShardSet) -> None:
    batch = batch_of(data, samples_of("nsp"), partner_at=0)
    assert set(batch.labels["nsp"].tolist()) == {IGNORED_LABEL} and batch.count("mlm") > 0


@pytest.mark.parametrize(
    ("documents", "why"),
    [
        ([[5, *[20] * 9]] * 60, "one sentence a document"),
        ([[5]] * 300, "documents of one token"),
        ([[5, *[20] * 900]], "a sentence longer than a block"),
    ],
)
@every_task
def test_what_gives_no_pair_is_trained_as_masked_tokens(
    documents: list[list[int]], why: str, task: str, tmp_path: Path
) -> None:
    write_marked(tmp_path, [documents], MARKS)
    batch = batch_of(ShardSet(tmp_path), samples_of(task), partner_at=3)
    assert set(batch.labels[task].tolist()) == {IGNORED_LABEL}, why
    assert all(len(a) == PAYLOAD and b == [] for a, b, _, _ in rows_of(batch, task))
    assert batch.count("mlm") >= batch.rows


@every_task
@pytest.mark.parametrize("scheme", ["token", "word"])
def test_what_a_trial_and_a_probe_are_given_has_the_shape_of_training(task: str, scheme: str, data: ShardSet) -> None:
    samples = samples_of(task, scheme)
    made, real = made_up_batch(samples, 3, token=7), batch_of(data, samples)
    assert made.inputs.keys() == real.inputs.keys() and made.labels.keys() == real.labels.keys()
    assert made.inputs["token_type_ids"].sum(dim=1).tolist() == [PAYLOAD - PAYLOAD // 2 + 1] * 3
    assert made.count("mlm") == 3 * samples.head_rows and made.count(task) == 3
    assert made.head_rows == 3 * samples.head_rows
    assert samples.document_starts(BlockReader(data, samples_of("sop")).read(np.arange(2))).sum() == 2


def test_shares_in_stages_give_each_sample_its_own(data: ShardSet) -> None:
    pair = PairConfig(task="sop")
    samples = PairedSamples(ObjectiveConfig(pair=pair), pair, VOCABULARY, SEQ_LEN, ratios=((0, 0.5), (20, 0.2)))
    batch = batch_of(data, samples)
    told = (batch.labels["mlm"] != IGNORED_LABEL).view(batch.rows, -1).sum(dim=1)
    first, later = (predictions_per_block(ratio, PAYLOAD) for ratio in (0.5, 0.2))
    assert samples.head_rows == first and samples.shape_count == 2
    assert told[:20].max() == first and set(told[20:].tolist()) == {later}


def test_a_pair_reads_a_partner_for_nsp_alone() -> None:
    assert view_of(PairConfig(task="nsp"), 128) == View(125, partner=True)
    assert view_of(PairConfig(task="sop"), 128) == View(125)
