"""Masks of words, n-grams and spans: whole or not at all, as often and as long as the papers say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.objectives.test_masking import END, MASK, SPECIAL, numbers, some_blocks
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.order.permutation import GOLDEN, KeyPurpose, fold_key, mix64
from trainer.objectives.masking import Masking, predictions_per_block
from trainer.objectives.units import NGRAM_LENGTHS, SPAN_LENGTHS, break_at, group_words, last_start

GOLDEN_MASKS = Path(__file__).parents[2] / "golden" / "units_v1.json"
SCHEMES: dict[str, dict] = {
    "word": {},
    "ngram": {"lengths": NGRAM_LENGTHS},
    "span": {"lengths": SPAN_LENGTHS, "by_unit": True},
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
M64 = 2**64


def masking_of(scheme: str, **options) -> Masking:
    defaults = {"mask_ratio": 0.15, "replace_mask": 0.8, "replace_random": 0.1, "vocabulary_size": 1000}
    return Masking(**{**defaults, **SCHEMES[scheme], **options}, mask_id=MASK, special_ids=SPECIAL)


def some_marks(rows: int, seq_len: int, shares: Sequence[float] = (0.6, 0.2, 0.1, 0.06, 0.04), seed: int = 7):
    """bool [rows, seq_len]: starts of words of 1, 2, 3, … tokens, as often as `shares` say."""
    generator = np.random.default_rng(seed)
    lengths = generator.choice(np.arange(1, len(shares) + 1), (rows, seq_len), p=np.asarray(shares) / np.sum(shares))
    starts = np.zeros((rows, 2 * seq_len), bool)
    places = np.minimum(np.cumsum(lengths, axis=1), 2 * seq_len - 1)
    np.put_along_axis(starts, places, True, axis=1)
    return np.ascontiguousarray(starts[:, :seq_len])


def words_in(row: np.ndarray, marks: np.ndarray) -> list[list[int]]:
    """The positions of each word of a row, without special tokens: one position at a time."""
    words: list[list[int]] = []
    for position, token in enumerate(row.tolist()):
        if token in SPECIAL:
            continue
        if marks[position] or position == 0 or row[position - 1] in SPECIAL or not words:
            words.append([])
        words[-1].append(position)
    return words


def key_of(seed: int, sample: int) -> int:
    return int(fold_key(KeyPurpose.MASKING, seed, np.array([sample], np.uint64))[0])


def draw(key: int, counter: int) -> int:
    return int(mix64(np.array([(key + counter * int(GOLDEN)) % M64], np.uint64))[0])


def units_in(row: np.ndarray, marks: np.ndarray, key: int, lengths: Sequence[float]) -> list[list[list[int]]]:
    """The words of each unit of a row, by the definition: lengths from the left, shifted, cut at special tokens."""
    if not lengths:
        return [[word] for word in words_in(row, marks)]
    chances = [round(chance * 65536) for chance in np.cumsum(lengths) / np.sum(lengths)]
    border, borders = -((draw(key, (3 << 16) - 1) >> 48) * len(lengths) >> 16), set()
    for number in range(len(row) + len(lengths)):
        drawn = draw(key, (3 << 16) + number) >> 48
        border += 1 + next((place for place, chance in enumerate(chances[:-1]) if drawn < chance), len(chances) - 1)
        borders.add(border)
    units: list[list[list[int]]] = []
    number = -1  # of the word; special tokens are words as well
    content = {word[0]: word for word in words_in(row, marks)}
    for position, token in enumerate(row.tolist()):
        if token in SPECIAL:
            number += 1
        elif position in content:
            number += 1
            if row[position - 1] in SPECIAL or number in borders or not units:
                units.append([])
            units[-1].append(content[position])
    return units


@every_scheme
def test_the_definition_one_position_at_a_time(scheme: str) -> None:
    tokens, marks, seed = some_blocks(20, 96, separators=0.03), some_marks(20, 96), 11
    masking = masking_of(scheme, mask_ratio=0.2)
    k = predictions_per_block(0.2, 94)
    shown, index, labels = masking.apply(tokens, numbers(20, 500), seed, marks)
    for number, row in enumerate(tokens):
        key = key_of(seed, 500 + number)
        units = units_in(row, marks[number], key, masking.lengths)
        first = {unit[0][0]: unit for unit in units}
        order = sorted(first, key=lambda start: draw(key, start) >> 16)
        expected: dict[int, int] = {}
        for word, start in ((word, unit) for unit in order for word in first[unit]):
            if len(expected) + len(word) > k:
                break
            expected |= dict.fromkeys(word, start)
        found = {
            int(i) % 96
            for i, label in zip(index[number * k :][:k], labels[number * k :][:k], strict=True)
            if label != IGNORED_LABEL
        }
        assert found == set(expected)
        for position, start in expected.items():
            drawn = draw(key, (start if masking.by_unit else position) + (1 << 16))
            if drawn >> 32 < round(0.8 * 2**32):
                assert shown[number, position] == MASK
            elif drawn >> 32 >= round(0.9 * 2**32):
                assert shown[number, position] == row[position]
            else:
                assert shown[number, position] == 5 + ((drawn & 0xFFFFFFFF) * 995 >> 32)
        untouched = [position for position in range(96) if position not in expected]
        assert (shown[number, untouched] == row[untouched]).all()


@given(
    scheme=st.sampled_from(list(SCHEMES)),
    rows=st.integers(1, 5),
    seq_len=st.integers(8, 160),
    ratio=st.floats(0.01, 0.99),
    separators=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_words_are_predicted_whole_or_not_at_all_and_at_most_k(
    scheme: str, rows: int, seq_len: int, ratio: float, separators: float, density: float, seed: int
) -> None:
    tokens = some_blocks(rows, seq_len, separators=separators)
    marks = np.random.default_rng(seed % 2**32).random((rows, seq_len)) < density
    k = predictions_per_block(ratio, seq_len - 2)
    shown, index, labels = masking_of(scheme, mask_ratio=ratio).apply(tokens, numbers(rows), seed, marks)
    assert index.shape == labels.shape == (rows * k,)
    for number in range(rows):
        counted = labels[number * k :][:k] != IGNORED_LABEL
        found = (index[number * k :][:k] - number * seq_len)[counted]
        assert (np.diff(found) > 0).all() and (labels[number * k :][:k][counted] == tokens[number, found]).all()
        chosen = set(found.tolist())
        assert not [word for word in words_in(tokens[number], marks[number]) if 0 < len(chosen & {*word}) < len(word)]
        fits = [word for word in words_in(tokens[number], marks[number]) if len(word) <= k]
        assert bool(chosen) or not fits or min(map(len, fits)) > 1
    assert ((shown == tokens) | np.isin(np.arange(tokens.size).reshape(tokens.shape), index)).all()


@every_scheme
def test_a_sample_has_its_masks_whatever_stands_beside_it(scheme: str) -> None:
    tokens, marks = some_blocks(40, 512), some_marks(40, 512)
    masking = masking_of(scheme)
    shown, index, labels = masking.apply(tokens, numbers(40), 3, marks)
    one_by_one = [masking.apply(tokens[i : i + 1], numbers(1, i), 3, marks[i : i + 1]) for i in range(40)]
    assert np.array_equal(shown, np.concatenate([each[0] for each in one_by_one]))
    assert np.array_equal(labels, np.concatenate([each[2] for each in one_by_one]))
    assert np.array_equal(index.reshape(40, -1) % 512, np.stack([each[1] for each in one_by_one]))


@every_scheme
def test_golden_masks(scheme: str) -> None:
    content = hashlib.sha256()
    for array in masking_of(scheme).apply(some_blocks(64, 512), numbers(64, 1000), 42, some_marks(64, 512)):
        content.update(array.astype("<i8").tobytes())
    assert content.hexdigest() == json.loads(GOLDEN_MASKS.read_text())[scheme]


def first_fit(words: list[list[int]], k: int, generator: np.random.Generator) -> set[int]:
    """BERT's own way (create_pretraining_data.py): words in random order, each taken that fits."""
    chosen: set[int] = set()
    for place in generator.permutation(len(words)):
        if len(chosen) + len(words[place]) <= k:
            chosen |= {*words[place]}
    return chosen


def test_words_of_each_length_come_as_often_as_in_berts_own_way() -> None:
    rows, seq_len = 4000, 512
    tokens, marks = some_blocks(rows, seq_len, separators=0.0), some_marks(rows, seq_len)
    k = predictions_per_block(0.15, seq_len - 2)
    _, index, labels = masking_of("word").apply(tokens, numbers(rows), 1, marks)
    predicted = np.zeros(tokens.size, bool)
    predicted[index[labels != IGNORED_LABEL]] = True
    predicted = predicted.reshape(tokens.shape)
    generator, ours, theirs, all_words = np.random.default_rng(5), Counter(), Counter(), Counter()
    for number in range(rows):
        words = words_in(tokens[number], marks[number])
        chosen = first_fit(words, k, generator)
        for word in words:
            all_words[len(word)] += 1
            ours[len(word)] += bool(predicted[number, word[0]])
            theirs[len(word)] += word[0] in chosen
    for length in range(1, 5):
        assert ours[length] / theirs[length] == pytest.approx(1.0, abs=0.02), f"words of {length}"
    assert ours[5] / theirs[5] == pytest.approx(1.0, abs=0.035), "a few thousand of them are chosen"
    assert predicted.sum() / (rows * k) > 0.99


@pytest.mark.parametrize(
    ("lengths", "published"),
    [
        (NGRAM_LENGTHS, [0.545, 0.273, 0.182]),
        (SPAN_LENGTHS, [0.224, 0.179, 0.143, 0.115, 0.092, 0.073, 0.059, 0.047, 0.038, 0.030]),
    ],
)
def test_units_are_as_long_as_the_papers_say(lengths: Sequence[float], published: list[float]) -> None:
    """Chi-squared over units that no end of a row cuts; arXiv:1909.11942 and 1907.10529."""
    rows, seq_len = 4000, 512
    words = np.ones((rows, seq_len), bool)
    breaks = np.zeros_like(words)
    breaks[:, 0] = True
    starts = group_words(words, breaks, fold_key(KeyPurpose.MASKING, 9, numbers(rows)), lengths)
    counts = Counter[int]()
    for row in starts:
        # One unit a row, that of a fixed word, would favour long ones: all those that begin in a fixed stretch do not.
        begins = np.flatnonzero(row)
        counts.update(np.diff(begins)[(begins[:-1] >= 100) & (begins[:-1] < 400)].tolist())
    total = sum(counts.values())
    expected = np.asarray(published) / np.sum(published)
    assert set(counts) == set(range(1, len(published) + 1))
    for length, share in enumerate(expected, 1):
        assert counts[length] / total == pytest.approx(share, rel=0.02, abs=0.002)
    exact = total * np.asarray(lengths) / np.sum(lengths)
    squared = sum((counts[length] - n) ** 2 / n for length, n in enumerate(exact, 1))
    assert squared < {3: 13.8, 10: 27.9}[len(lengths)], "p = 0.001"


@every_scheme
def test_each_place_is_predicted_as_often_to_both_ends_of_a_block(scheme: str) -> None:
    rows, seq_len = 8000, 512
    tokens = some_blocks(rows, seq_len, separators=0.0)
    _, index, labels = masking_of(scheme).apply(tokens, numbers(rows), 2, some_marks(rows, seq_len))
    chances = np.bincount(index[labels != IGNORED_LABEL] % seq_len, minlength=seq_len)[1:-1] / rows
    assert chances.mean() == pytest.approx(predictions_per_block(0.15, 510) / 510, rel=0.02)
    edges = np.concatenate([chances[:6], chances[-6:]])
    assert edges.mean() == pytest.approx(chances.mean(), rel=0.03)
    assert (np.abs(chances - chances.mean()) < 5 * np.sqrt(0.15 * 0.85 / rows)).all()


@every_scheme
def test_no_unit_goes_on_over_a_separator(scheme: str) -> None:
    tokens = np.full((1, 66), 7)
    tokens[0, 0], tokens[0, 33], tokens[0, 65] = SPECIAL[0], END, END
    marks = np.zeros((1, 66), bool)  # nothing is marked: each document is one word
    breaks = break_at(np.isin(tokens, SPECIAL))
    assert np.flatnonzero(breaks[0]).tolist() == [0, 1, 33, 34, 65]
    assert last_start(marks | breaks)[0, [1, 32, 34, 64]].tolist() == [1, 1, 34, 34]
    seen = set()
    for sample in range(50):
        _, index, labels = masking_of(scheme, mask_ratio=0.5).apply(tokens, numbers(1, sample), 0, marks)
        seen.add(tuple(index[labels != IGNORED_LABEL].tolist()))
    assert seen == {tuple(range(1, 33)), tuple(range(34, 65))}, "the whole of one document, never a part of both"
