"""Permutation language modelling: what is shown, what is predicted and in which order."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from transformers import XLNetTokenizer

from tests.unit.data.test_rows import BEGIN, END, VOCABULARY
from trainer.config import ObjectiveConfig
from trainer.data.batch import RANKS, Batch
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.data.manifest import WORD_STARTS
from trainer.data.tokenizer import Vocabulary, read_vocabulary
from trainer.objectives.plm import CARD, TERM, PermutedSamples
from trainer.sizing.made_up import made_up_batch

SEQ_LEN = 32


def samples_of(**settings: Any) -> PermutedSamples:
    return PermutedSamples(ObjectiveConfig.model_validate({"name": "plm", **settings}), VOCABULARY, SEQ_LEN)


def blocks_of(count: int, seed: int = 1, words: int = 0) -> Blocks:
    """Ordinary tokens; with words of so many tokens."""
    tokens = np.random.default_rng(seed).integers(10, 900, (count, SEQ_LEN - 2))
    starts = np.broadcast_to(np.arange(SEQ_LEN - 2) % max(1, words) == 0, tokens.shape)
    return Blocks(tokens, {WORD_STARTS: starts} if words else {})


def numbers(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


def parts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, S], ranks [B, S], positions within blocks [B, k] and labels [B, k]."""
    tokens, ranks = batch.inputs["input_ids"].numpy(), batch.inputs[RANKS].numpy()
    assert batch.prediction_index is not None
    places = batch.prediction_index.numpy().reshape(len(tokens), -1) - np.arange(len(tokens))[:, None] * SEQ_LEN
    return tokens, ranks, places, batch.labels[TERM].numpy().reshape(places.shape)


@pytest.mark.parametrize("words", [0, 4])
def test_the_tokens_themselves_are_shown_and_the_predicted_ones_have_an_order(words: int) -> None:
    samples = samples_of(mask_ratio=0.3, scheme="word" if words else "token")
    blocks = blocks_of(50, words=words)
    tokens, ranks, places, labels = parts(samples.make_batch(blocks, numbers(50), seed=7))
    assert np.array_equal(tokens[:, :-2], blocks.tokens)
    assert (tokens[:, -2] == END).all() and (tokens[:, -1] == BEGIN).all()
    assert places.shape == (50, samples.head_rows) == (50, 9)
    for row in range(50):
        counted = labels[row] != IGNORED_LABEL
        assert np.array_equal(tokens[row, places[row, counted]], labels[row, counted])
        assert (places[row, ~counted] == SEQ_LEN - 1).all(), "of <cls>, which is never predicted"
        predicted = np.flatnonzero(ranks[row] >= 0)
        assert np.array_equal(predicted, np.sort(places[row, counted])) and predicted.max() < SEQ_LEN - 2
        assert sorted(ranks[row, predicted]) == list(range(counted.sum()))
        if words:
            assert set(Counter(predicted // words).values()) <= {words, 2}, (
                "whole words, of which the last has two tokens"
            )
            assert not counted.all(), "9 positions are no whole words"


def test_each_order_is_equally_likely() -> None:
    samples = samples_of(mask_ratio=4 / 30)
    count = 24_000
    blocks = Blocks(np.full((count, SEQ_LEN - 2), 50))
    _, ranks, places, _ = parts(samples.make_batch(blocks, numbers(count), seed=11))
    orders = Counter(map(tuple, np.take_along_axis(ranks, places, axis=1).tolist()))
    found = np.array([orders[order] for order in permutations(range(4))])
    assert found.sum() == count
    assert ((found - count / 24) ** 2 / (count / 24)).sum() < 49.7, "χ² of 23 degrees of freedom, one in a thousand"


def test_an_order_does_not_depend_on_the_places() -> None:
    """The mean rank of every position, of which the one at the left end is predicted as often as any."""
    samples = samples_of(mask_ratio=0.3)
    count = 20_000
    _, ranks, *_ = parts(samples.make_batch(Blocks(np.full((count, SEQ_LEN - 2), 50)), numbers(count), seed=2))
    predicted = ranks[:, :-2] >= 0
    assert abs(predicted.mean(axis=0) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / count)
    means = ranks[:, :-2].sum(axis=0, where=predicted) / predicted.sum(axis=0)
    assert abs(means - 4.0).max() < 5 * np.sqrt((81 - 1) / 12 / (0.3 * count))


@pytest.mark.parametrize(
    ("settings", "words"), [({}, 0), ({"scheme": "ngram", "lengths": [1, 0.5, 1 / 3, 0.25, 0.2]}, 2)]
)
def test_a_batch_is_a_pure_function_of_seed_and_sample(settings: dict[str, Any], words: int) -> None:
    samples, blocks = samples_of(mask_ratio=0.3, **settings), blocks_of(20, words=words)
    whole = parts(samples.make_batch(blocks, numbers(20), seed=7))
    for row in range(20):
        starts = {mark: marked[row : row + 1] for mark, marked in blocks.starts.items()}
        alone = samples.make_batch(Blocks(blocks.tokens[row : row + 1], starts), numbers(1, row), seed=7)
        for one, of_whole in zip(parts(alone), whole, strict=True):
            assert np.array_equal(one[0], of_whole[row])
    again = parts(samples.make_batch(blocks, numbers(20, 20), seed=7))
    assert np.array_equal(again[0], whole[0])
    assert (again[1] != whole[1]).any(axis=1).all(), "other positions and another order at each visit"


def test_of_the_same_positions_the_order_is_new_at_each_visit() -> None:
    samples = samples_of(mask_ratio=0.9)
    blocks = Blocks(np.full((200, SEQ_LEN - 2), 50))
    _, ranks, *_ = parts(samples.make_batch(blocks, numbers(200), seed=7))
    assert len({tuple(row) for row in ranks.tolist()}) == 200


def test_the_positions_are_those_that_mlm_would_mask() -> None:
    """Of the content, token by token: the same draws, at places that are one further to the left."""
    samples = samples_of(mask_ratio=0.3)
    tokens, index, labels = samples.masking.apply(
        np.pad(blocks_of(5).tokens, ((0, 0), (0, 2)), constant_values=END), numbers(5), 7
    )
    _, _, places, found = parts(samples.make_batch(blocks_of(5), numbers(5), seed=7))
    assert np.array_equal(places.reshape(-1) + np.repeat(np.arange(5), 9) * SEQ_LEN, index)
    assert np.array_equal(found.reshape(-1), labels) and (tokens[:, -2:] == END).all()


def test_stages_of_the_share_have_room_for_the_largest() -> None:
    samples = PermutedSamples(ObjectiveConfig(name="plm"), VOCABULARY, SEQ_LEN, ratios=((0, 0.3), (10, 0.1)))
    _, _, _, labels = parts(samples.make_batch(blocks_of(20), numbers(20), seed=7))
    assert (labels != IGNORED_LABEL).sum(axis=1).tolist() == [9] * 10 + [3] * 10
    assert samples.head_rows == 9 and samples.shape_count == 2


def test_what_a_trial_and_a_probe_are_given_has_the_shape_of_training() -> None:
    samples = samples_of(mask_ratio=0.3, scheme="word")
    batch = made_up_batch(samples, 3, token=50)
    assert batch.shapes == samples.make_batch(blocks_of(3, words=2), numbers(3), seed=7).shapes
    tokens, ranks, places, labels = parts(batch)
    assert np.array_equal(np.take_along_axis(tokens, places, axis=1), labels)
    assert places[0, 0] == 0 and places[0, -1] == SEQ_LEN - 1
    assert np.take_along_axis(ranks, places, axis=1)[0].tolist() == [4, 0, 5, 1, 6, 2, 7, 3, 8]


def test_a_tokenizer_of_xlnets_own_type_ends_what_it_reads_as_a_block_ends() -> None:
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    pieces = [*((name, 0.0) for name in special), ("▁", -1.0), *((f"▁{letter}", -2.0) for letter in "abcdefgh")]
    tokenizer = XLNetTokenizer(vocab=pieces)
    known = read_vocabulary(tokenizer, "test")
    text = np.array([[10, 11, 12, 13, 14, 15]])
    samples = PermutedSamples(ObjectiveConfig(name="plm"), known, text.shape[1] + 2)
    batch = samples.make_batch(Blocks(text), numbers(1), seed=7)
    assert batch.inputs["input_ids"][0].tolist() == tokenizer("a b c d e f").input_ids == [*text[0], 4, 3]


def test_neither_mask_nor_padding_token_is_needed() -> None:
    bare = Vocabulary(1000, BEGIN, END, END, None, None, (BEGIN, END), "", lacking=("mask", "pad"))
    PermutedSamples(ObjectiveConfig(name="plm"), bare, SEQ_LEN).make_batch(blocks_of(3), numbers(3), seed=7)


def test_the_card_says_how_much_was_predicted() -> None:
    settings = {"mask_ratio": 0.1667, "scheme": "ngram"}
    assert CARD.settings(settings, 10) == (
        "plm, 16.7% of tokens in n-grams of whole words in a random order, new at each visit"
    )


@pytest.mark.parametrize("key", ["replace_mask", "replace_random", "replace_by"])
def test_what_replaces_tokens_is_of_no_use(key: str) -> None:
    value = "unit" if key == "replace_by" else 0.05
    with pytest.raises(ValueError, match=f"{key} does nothing with name plm"):
        ObjectiveConfig.model_validate({"name": "plm", "scheme": "word", key: value})


def test_golden_orders() -> None:
    """A change breaks every run that was started before."""
    batch = samples_of(mask_ratio=0.3).make_batch(Blocks(np.full((64, SEQ_LEN - 2), 50)), numbers(64, 1000), seed=20)
    found = hashlib.sha256(batch.inputs[RANKS].numpy().astype("<i8").tobytes()).hexdigest()
    assert found == "68e3c5a21d1e59bc6af6e2ce68efab59acdd4b9664e975811edd3a1b631fa06b"
