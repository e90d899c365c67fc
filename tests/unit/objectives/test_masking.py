from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.blocks import IGNORED_LABEL
from trainer.data.order.permutation import GOLDEN, fold_key, mix64
from trainer.data.order.sample_order import ORDER_VERSION
from trainer.objectives.masking import Masking, predictions_per_block

GOLDEN_MASKS = json.loads((Path(__file__).parents[2] / "golden" / f"order_v{ORDER_VERSION}.json").read_text())["masks"]
BEGIN, PAD, END, MASK = 0, 1, 2, 4
SPECIAL = (0, 1, 2, 3, 4)


def masking(vocabulary_size: int = 1000, **options) -> Masking:
    defaults = {"mask_ratio": 0.15, "replace_mask": 0.8, "replace_random": 0.1}
    return Masking(**{**defaults, **options}, mask_id=MASK, vocabulary_size=vocabulary_size, special_ids=SPECIAL)


def some_blocks(rows: int, seq_len: int, vocabulary_size: int = 1000, separators: float = 0.02) -> np.ndarray:
    """int64 [rows, seq_len]: ordinary ids with separators among them, and both ends."""
    spread = mix64(np.arange(rows * seq_len)).reshape(rows, seq_len)
    tokens = (5 + spread % np.uint64(vocabulary_size - 5)).astype(np.int64)
    tokens[(spread >> np.uint64(40)) % np.uint64(1000) < np.uint64(round(1000 * separators))] = END
    tokens[:, 0], tokens[:, -1] = BEGIN, END
    return tokens


def numbers(rows: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + rows).astype(np.uint64)


@pytest.mark.parametrize(("ratio", "payload", "k"), [(0.15, 510, 76), (0.4, 510, 204), (0.3, 126, 38), (0.01, 6, 1)])
def test_predictions_per_block(ratio: float, payload: int, k: int):
    assert predictions_per_block(ratio, payload) == k


@given(
    rows=st.integers(1, 6),
    seq_len=st.integers(8, 200),
    ratio=st.floats(0.01, 0.99),
    separators=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    start=st.integers(0, 2**63),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_holds_for_every_mask(rows: int, seq_len: int, ratio: float, separators: float, start: int, seed: int):
    tokens = some_blocks(rows, seq_len, separators=separators)
    before = tokens.copy()
    k = predictions_per_block(ratio, seq_len - 2)
    input_ids, index, labels = masking(mask_ratio=ratio).apply(tokens, numbers(rows, start), seed)

    assert np.array_equal(tokens, before)
    assert input_ids.shape == tokens.shape and index.shape == labels.shape == (rows * k,)
    assert input_ids.dtype == index.dtype == labels.dtype == np.int64
    eligible = ~np.isin(tokens, SPECIAL)
    untouched = np.ones(rows * seq_len, bool)
    for row in range(rows):
        places, wanted = index[row * k : (row + 1) * k], labels[row * k : (row + 1) * k]
        predicted = min(k, int(eligible[row].sum()))
        real, padding = places[:predicted], places[predicted:]
        assert (np.diff(real) > 0).all()
        assert (real // seq_len == row).all() and eligible.reshape(-1)[real].all()
        assert np.array_equal(wanted[:predicted], tokens.reshape(-1)[real])
        assert (padding == row * seq_len).all() and (wanted[predicted:] == IGNORED_LABEL).all()
        untouched[real] = False
    assert np.array_equal(input_ids.reshape(-1)[untouched], tokens.reshape(-1)[untouched])
    changed = input_ids != tokens
    assert not np.isin(input_ids[changed], [i for i in SPECIAL if i != MASK]).any()


def test_the_definition_one_position_at_a_time():
    tokens = some_blocks(3, 64)
    samples = numbers(3, 10**12)
    input_ids, index, labels = masking().apply(tokens, samples, 9)
    k = predictions_per_block(0.15, 62)
    for row, t in enumerate(samples):
        key = fold_key(3, 9, t)
        draws = mix64(key + np.arange(64, dtype=np.uint64) * GOLDEN).tolist()
        second_draws = mix64(key + np.arange(2**16, 2**16 + 64, dtype=np.uint64) * GOLDEN).tolist()
        ranked = sorted((draws[p] >> 16, p) for p in range(64) if tokens[row, p] not in SPECIAL)
        chosen = sorted(p for _, p in ranked[:k])
        assert (index[row * k : (row + 1) * k] - row * 64).tolist() == chosen
        for p, label in zip(chosen, labels[row * k : (row + 1) * k], strict=True):
            share = (second_draws[p] >> 32) / 2**32
            drawn = 5 + ((second_draws[p] & 2**32 - 1) * 995 >> 32)
            assert input_ids[row, p] == (MASK if share < 0.8 else drawn if share < 0.9 else label)


def test_a_mask_does_not_depend_on_the_rest_of_the_batch():
    tokens, samples = some_blocks(300, 128), numbers(300, 2**40)
    k = predictions_per_block(0.15, 126)
    input_ids, index, labels = masking().apply(tokens, samples, 1)
    for row in (0, 17, 299):
        alone = masking().apply(tokens[row : row + 1], samples[row : row + 1], 1)
        assert np.array_equal(alone[0][0], input_ids[row])
        assert np.array_equal(alone[1], index[row * k : (row + 1) * k] - row * 128)
        assert np.array_equal(alone[2], labels[row * k : (row + 1) * k])


def test_new_masks_at_each_visit_and_for_each_seed():
    tokens = np.repeat(some_blocks(1, 512), 2, axis=0)
    index = masking().apply(tokens, np.array([5, 5 + 10**9], np.uint64), 0)[1].reshape(2, -1)
    other_seed = masking().apply(tokens[:1], np.array([5], np.uint64), 1)[1]
    chance = 76 * 76 / 500
    for a, b in ((index[0], index[1] - 512), (index[0], other_seed)):
        assert abs(len(np.intersect1d(a, b)) - chance) < 5 * math.sqrt(chance)


def test_shares_of_mask_random_and_unchanged():
    tokens, samples = some_blocks(500, 512, vocabulary_size=50_000), numbers(500)
    input_ids, index, labels = masking(50_000).apply(tokens, samples, 0)
    shown, count = input_ids.reshape(-1)[index], len(index)
    for seen, share in ((shown == MASK, 0.8), (shown == labels, 0.1), ((shown != MASK) & (shown != labels), 0.1)):
        assert abs(seen.sum() - share * count) < 5 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize(("mask", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.7, 0.3)])
def test_shares_at_their_limits(mask: float, random: float):
    tokens = some_blocks(100, 512, vocabulary_size=50_000)
    input_ids, index, labels = masking(50_000, replace_mask=mask, replace_random=random).apply(tokens, numbers(100), 0)
    shown = input_ids.reshape(-1)[index]
    if mask in (0.0, 1.0):
        assert (shown == MASK).mean() == mask
    unchanged = (shown == labels).mean()
    assert unchanged == 1.0 if mask + random == 0 else unchanged < 1e-3  # a random draw may hit the original


def chi_square_excess(counts: np.ndarray) -> float:
    """How many standard deviations χ² against uniform lies above its mean."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_positions_are_uniform():
    # k of P are drawn without replacement, so a count varies by 1 − k/P of a free one: χ² is divided by that.
    rows, k = 4000, predictions_per_block(0.15, 510)
    tokens = some_blocks(rows, 512, separators=0)
    index = masking().apply(tokens, numbers(rows, 10**10), 0)[1]
    counts = np.bincount(index % 512, minlength=512)[1:-1]
    expected, freedom = rows * k / 510, 509
    chi_square = ((counts - expected) ** 2 / expected).sum() / (1 - k / 510)
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_neighbouring_positions_are_chosen_independently():
    rows, k, payload = 4000, predictions_per_block(0.15, 510), 510
    index = masking().apply(some_blocks(rows, 512, separators=0), numbers(rows), 0)[1].reshape(rows, k)
    neighbours = (np.diff(index, axis=1) == 1).sum()
    expected = rows * (payload - 1) * k * (k - 1) / (payload * (payload - 1))
    assert abs(neighbours - expected) < 5 * math.sqrt(expected)


def test_random_tokens_are_uniform_over_the_ordinary_vocabulary():
    tokens = np.full((4000, 128), 7)
    input_ids, index, _ = masking(200, replace_mask=0.0, replace_random=1.0).apply(tokens, numbers(4000), 0)
    counts = np.bincount(input_ids.reshape(-1)[index], minlength=200)
    assert not counts[list(SPECIAL)].any()
    assert abs(chi_square_excess(np.delete(counts, SPECIAL))) < 5


def test_an_empty_batch():
    input_ids, index, labels = masking().apply(np.empty((0, 64), np.int64), numbers(0), 0)
    assert input_ids.shape == (0, 64) and len(index) == len(labels) == 0


@pytest.mark.parametrize("name", GOLDEN_MASKS)
def test_golden_masks(name: str):
    golden = GOLDEN_MASKS[name]
    options = golden["settings"]
    tokens = some_blocks(golden["rows"], golden["seq_len"], options["vocabulary_size"], golden["separators"])
    digest = hashlib.sha256()
    for array in masking(**options).apply(tokens, numbers(golden["rows"], golden["start"]), golden["seed"]):
        digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == golden["sha256"]
