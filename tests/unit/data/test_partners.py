"""The partner of a sample: another block of its window, by definition, uniformly, and always the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_order import Recipe, one_source, plain_block, plain_key, plain_visit, recipes
from trainer.data.order.sample_order import SampleOrder


def plain_partner(recipe: Recipe, t: int) -> int:
    """What another visit of the window sees."""
    source, visit = plain_visit(recipe, t)
    blocks, window = recipe["blocks"][source], recipe["chunk_blocks"] * recipe["window_chunks"]
    number, i = divmod(visit % blocks, window)
    length = min(blocks - number * window, window)
    other = (i + 1 + plain_key(8, recipe["seed"], t) % (length - 1)) % length if length > 1 else i
    return plain_block(recipe, source, visit - i + other)


@given(recipe=recipes(), samples=st.lists(st.integers(0, 500) | st.integers(0, 2**62), min_size=1, max_size=20))
def test_a_partner_is_the_definition(recipe: Recipe, samples: list[int]):
    found = SampleOrder(**recipe).partners(np.array(samples)).tolist()
    assert found == [plain_partner(recipe, t) for t in samples]


@given(recipe=recipes(), start=st.integers(0, 10**6))
def test_a_partner_is_another_block_of_the_window(recipe: Recipe, start: int):
    order, samples = SampleOrder(**recipe), start + np.arange(300)
    sources, blocks = order.locate(samples)
    partners = order.partners(samples)
    shuffled = np.random.default_rng(0).permutation(300)
    assert np.array_equal(order.partners(samples[shuffled]), partners[shuffled])
    window = recipe["chunk_blocks"] * recipe["window_chunks"]
    _, visits = order.locate_visits(samples.astype(np.uint64))
    for t, source, block, partner in zip(samples, sources, blocks, partners, strict=True):
        count = recipe["blocks"][source]
        visit = int(visits[int(t) - start])
        first = visit - visit % count % window
        length = min(window, count - (first % count))
        assert 0 <= partner < count and (partner != block) == (length > 1)


def test_every_other_block_of_the_window_is_a_partner_alike():
    order = one_source(70, chunk=5, window=4, seed=3)
    samples = np.arange(70 * 3000)
    inside = samples % 70 < 20  # the first window of every epoch
    _, blocks = order.locate(samples)
    partners = order.partners(samples)
    windows = blocks[inside].reshape(3000, 20)
    place = np.argmax(windows[:, None, :] == partners[inside].reshape(3000, 20, 1), axis=2)
    assert (np.take_along_axis(windows, place, axis=1) == partners[inside].reshape(3000, 20)).all()
    distance = (place - np.arange(20)) % 20
    counts = np.bincount(distance.ravel(), minlength=20)
    assert counts[0] == 0
    expected = counts[1:].mean()
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 18 + 5 * 36**0.5


def test_golden_partners():
    golden = json.loads((Path(__file__).parents[2] / "golden" / "pairs_v1.json").read_text())
    order = SampleOrder([70_001, 900], [1.0, 0.5], 7, 64, 16)
    partners = order.partners(10**9 + np.arange(50_000))
    assert hashlib.sha256(partners.astype("<i8").tobytes()).hexdigest() == golden["partners"]
