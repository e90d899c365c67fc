from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import permutation
from trainer.data.order.sample_order import ORDER_VERSION, SampleOrder, rank_share
from trainer.errors import UserError

GOLDEN_ORDER = json.loads((Path(__file__).parents[2] / "golden" / f"order_v{ORDER_VERSION}.json").read_text())
BITS = 2**64 - 1
Recipe = dict[str, Any]


def one_source(blocks: int, chunk: int = 1024, window: int = 1024, seed: int = 0) -> SampleOrder:
    return SampleOrder([blocks], [1.0], seed, chunk, window)


def recipe_of_one(blocks: int) -> Recipe:
    """The arguments behind `one_source(blocks)`, all of them."""
    settings = {"seed": 0, "chunk_blocks": 1024, "window_chunks": 1024, "mixture_block": 2**16, "changes": []}
    return {"blocks": [blocks], "weights": [1.0], **settings}


# The definition once more, in plain Python integers and one sample at a time.


def plain_mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & BITS
    return x ^ x >> 31


def plain_key(*parts: int) -> int:
    key = 0x6A09E667F3BCC908
    for part in parts:
        key = plain_mix64((key ^ part) + 0x9E3779B97F4A7C15 & BITS)
    return key


def plain_permute(i: int, n: int, key: int) -> int:
    half = 0 if n == 1 else next(bits for bits in range(3, 33) if 4**bits >= n)
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for turn in range(1, 7):
            hashed = plain_mix64(right ^ (key + turn * 0x9E3779B97F4A7C15 & BITS))
            left, right = right, left ^ hashed & (1 << half) - 1
        i = left << half | right
        if i < n:
            return i


def plain_places(weights: list[float], size: int) -> list[int]:
    """Hamilton's method, in exact fractions."""
    quotas = [Fraction(weight) * size / sum(map(Fraction, weights)) for weight in weights]
    places = [int(quota) for quota in quotas]
    for source in sorted(range(len(quotas)), key=lambda source: places[source] - quotas[source])[: size - sum(places)]:
        places[source] += 1
    return places


def plain_visit(recipe: Recipe, t: int) -> tuple[int, int]:
    """Source of sample t and number of the visit to it."""
    stages = [(0, recipe["weights"]), *recipe["changes"], (2**64, [])]
    visits, q = [0] * len(recipe["blocks"]), 0
    for (start, weights), (end, _) in itertools.pairwise(stages):
        whole, rest = divmod(end - start, recipe["mixture_block"])
        for size, count in ((recipe["mixture_block"], whole), (rest, 1 if rest else 0)):
            places = plain_places(weights, size)
            before, j = divmod(t - start, size or 1)
            if before < count:
                if size in places:
                    return places.index(size), visits[places.index(size)] + before * size + j
                rank, source = plain_permute(j, size, plain_key(1, recipe["seed"], q + before)), 0
                while rank >= places[source]:
                    rank -= places[source]
                    source += 1
                return source, visits[source] + before * places[source] + rank
            visits = [n + count * more for n, more in zip(visits, places, strict=True)]
            start, q = start + count * size, q + count
    raise AssertionError("past the last sample")


def plain_locate(recipe: Recipe, t: int) -> tuple[int, int]:
    source, visit = plain_visit(recipe, t)
    return source, plain_block(recipe, source, visit)


def plain_block(recipe: Recipe, source: int, visit: int) -> int:
    seed, chunk = recipe["seed"], recipe["chunk_blocks"]
    window_blocks = chunk * recipe["window_chunks"]
    blocks = recipe["blocks"][source]
    epoch, y = divmod(visit, blocks)
    epoch_key = plain_key(2, seed, source, epoch)
    window, i = divmod(y, min(blocks, window_blocks))
    start = window * window_blocks
    length = min(blocks - start, window_blocks)
    position = start + plain_permute(i, length, plain_key(epoch_key, window))
    slot, within = divmod(position, chunk)
    full = blocks // chunk
    return (plain_permute(slot, full, epoch_key) if slot < full else full) * chunk + within


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Arguments of SampleOrder: up to five sources whose weights change up to three times."""
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.3]), min_size=sources, max_size=sources).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 400), max_size=3)))
    return {
        "blocks": draw(st.lists(st.integers(1, 300), min_size=sources, max_size=sources)),
        "weights": draw(weights),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "chunk_blocks": draw(st.integers(1, 40)),
        "window_chunks": draw(st.integers(1, 12)),
        "mixture_block": draw(st.integers(1, 100)),
        "changes": [(start, draw(weights)) for start in starts],
    }


@given(recipe=recipes(), samples=st.lists(st.integers(0, 500) | st.integers(0, 2**62), min_size=1, max_size=20))
def test_locate_is_the_definition(recipe: Recipe, samples: list[int]):
    sources, blocks = SampleOrder(**recipe).locate(np.array(samples))
    assert list(zip(sources.tolist(), blocks.tolist(), strict=True)) == [plain_locate(recipe, t) for t in samples]


@pytest.mark.parametrize(
    ("blocks", "chunk", "window"),
    [
        (1, 1024, 1024),
        (2, 1024, 1024),
        (7, 1024, 1024),  # N < B
        (1023, 1024, 1024),
        (1024, 1024, 1024),  # one chunk
        (1025, 1024, 1024),  # a last chunk of one block
        (3 * 1024 + 5, 1024, 1024),
        (3 * 1024 + 5, 1024, 2),  # a short last window with a short last chunk in it
        (4 * 1024, 1024, 2),  # N a multiple of the window
        (4097, 1, 1),
        (997, 10, 7),
        (997, 1000, 10**15),
    ],
)
def test_every_block_once_an_epoch(blocks: int, chunk: int, window: int):
    order = one_source(blocks, chunk, window)
    for epoch in (0, 1, 2, 10**9):
        sources, located = order.locate(epoch * blocks + np.arange(blocks))
        assert not sources.any()
        assert np.array_equal(np.sort(located), np.arange(blocks))


@given(
    blocks=st.integers(1, 5000),
    chunk=st.integers(1, 700),
    window=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
)
def test_every_block_once_an_epoch_for_any_sizes(blocks: int, chunk: int, window: int, seed: int, epoch: int):
    located = one_source(blocks, chunk, window, seed).locate(epoch * blocks + np.arange(blocks))[1]
    assert np.array_equal(np.sort(located), np.arange(blocks))


@given(recipe=recipes(), samples=st.integers(0, 3000))
@settings(max_examples=50)
def test_every_block_once_an_epoch_of_each_source_also_when_weights_change(recipe: Recipe, samples: int):
    recipe = {**recipe, "changes": [(start, weights) for start, weights in recipe["changes"] if start < samples]}
    order = SampleOrder(**recipe)
    whole = samples + -(samples - order.spans[-1].start) % order.spans[-1].size  # to the end of a mixture block
    sources, blocks = order.locate(np.arange(whole))
    for source, (count, visits) in enumerate(zip(order.blocks, order.visits(whole), strict=True)):
        times = np.bincount(blocks[sources == source], minlength=count)
        whole_epochs, begun = divmod(visits, count)
        assert len(times) == count
        assert np.count_nonzero(times == whole_epochs + 1) == begun
        assert np.count_nonzero(times == whole_epochs) == count - begun


def test_weights_change_at_the_very_sample_and_the_past_stays():
    before = SampleOrder([5000, 700], [3.0, 1.0], 3, 16, 8, 100)
    after = SampleOrder([5000, 700], [3.0, 1.0], 3, 16, 8, 100, changes=[(1234, [1.0, 1.0]), (2000, [0.0, 1.0])])
    old, new = before.locate(np.arange(3000)), after.locate(np.arange(3000))
    assert np.array_equal(old[0][:1200], new[0][:1200]) and np.array_equal(old[1][:1200], new[1][:1200])
    assert np.bincount(new[0][1200:1234]).tolist() == [26, 8]  # the short mixture block, by largest remainder
    assert np.bincount(new[0][1234:2000]).tolist() == [383, 383]
    assert (new[0][2000:] == 1).all()


def test_a_block_stays_in_its_window():
    chunk, window = 16, 8
    order = one_source(1000, chunk, window)
    blocks = order.locate(np.arange(1000))[1]
    for start in range(0, 1000, chunk * window):
        in_window = blocks[start : start + chunk * window]
        assert len(np.unique(in_window // chunk)) == math.ceil(len(in_window) / chunk)


def test_a_batch_draws_from_the_whole_window():
    blocks = one_source(10**8).locate(10**12 + np.arange(8192))[1]
    assert len(np.unique(blocks // 1024)) > 1000


def test_epochs_and_seeds_differ():
    order = one_source(5000)
    prefixes = [order.locate(epoch * 5000 + np.arange(50))[1] for epoch in range(4)]
    prefixes.append(one_source(5000, seed=1).locate(np.arange(50))[1])
    assert all((a != b).mean() > 0.8 for i, a in enumerate(prefixes) for b in prefixes[:i])


def test_chunks_move_from_epoch_to_epoch():
    order = one_source(64 * 1024, chunk=1024, window=1)
    first, second = (order.locate(epoch * 64 * 1024 + np.arange(0, 64 * 1024, 1024))[1] // 1024 for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(64))
    assert (first != second).sum() > 50


def whole_epoch_pair_mean(seeds: int) -> float:
    """Mean χ² over seeds of all serial pairs of an epoch of 65,536 blocks, the last followed by the first."""
    blocks, bins, values = 65_536, 32, []
    for seed in range(seeds):
        located = one_source(blocks, seed=seed).locate(blocks + np.arange(blocks))[1]
        cells = located * bins // blocks * bins + np.roll(located, -1) * bins // blocks
        expected = blocks / bins**2
        values.append(((np.bincount(cells, minlength=bins**2) - expected) ** 2 / expected).sum())
    return float(np.mean(values))


def test_serial_pairs_like_a_true_random_permutation():
    # Over a whole epoch every bin is met equally often, first and second: both margins of the 32 × 32 cells are fixed,
    # which leaves 31² = 961 degrees of freedom, σ √1922 = 43.8 for one seed, 9.8 for the mean of 20. The bound is 4 σ.
    assert abs(whole_epoch_pair_mean(20) - 961) < 4 * 43.8 / math.sqrt(20)


def test_the_pair_test_tells_a_weak_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(permutation, "ROUNDS", 1)
    assert whole_epoch_pair_mean(2) > 1400


def test_more_than_four_billion_samples_and_blocks():
    blocks = 3 * 2**33 + 12_345  # 13 T tokens of 510 a block
    order = one_source(blocks)
    start = 5 * 2**32
    located = order.locate(start + np.arange(100_000))[1]
    assert len(np.unique(located)) == 100_000
    assert located.min() >= 0 and located.max() < blocks and located.max() > 2**33
    for t in (0, 2**32 - 1, 2**32, blocks - 1, blocks, 7 * blocks + 5, 2**62):
        assert order.locate(np.array([t]))[1][0] == plain_locate(recipe_of_one(blocks), t)[1]


@given(recipe=recipes(), cuts=st.lists(st.integers(0, 500), max_size=4), start=st.integers(0, 2**50))
def test_independent_of_batching(recipe: Recipe, cuts: list[int], start: int):
    order = SampleOrder(**recipe)
    samples = start + np.arange(500)
    whole = order.locate(samples)
    parts = [order.locate(part) for part in np.split(samples, sorted(cuts))]
    for i in (0, 1):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(order.locate(samples[shuffled])[1], whole[1][shuffled])


def test_a_far_seek_is_as_quick_as_the_start():
    order = SampleOrder([10**10, 10**9], [0.9, 0.1], 0, 1024, 1024)
    far = 10**12
    larger = order.locate(far - 50_000 + np.arange(100_000))
    began = time.perf_counter()
    sources, blocks = order.locate(far + np.arange(256))
    assert time.perf_counter() - began < 60  # milliseconds; a replay of 10^12 samples would take days
    assert np.array_equal(sources, larger[0][50_000:50_256])
    assert np.array_equal(blocks, larger[1][50_000:50_256])


def test_places_by_largest_remainder():
    assert SampleOrder([9, 9, 9], [1, 1, 1], 0, 4, 4, 100).spans[0].places == (34, 33, 33)
    assert SampleOrder([9, 9, 9], [0.5, 0.25, 0.25], 0, 4, 4, 10).spans[0].places == (5, 3, 2)
    assert SampleOrder([9, 9], [2, 6], 0, 4, 4, 8).spans[0].places == (2, 6)


def test_each_mixture_block_holds_the_exact_shares():
    order = SampleOrder([10**6, 50, 10**5], [0.7, 0.1, 0.2], 3, 1024, 1024, 1000)
    for q in (0, 1, 10**9):
        sources = order.locate(q * 1000 + np.arange(1000))[0]
        assert np.bincount(sources).tolist() == [700, 100, 200]


def test_sources_interleave_evenly():
    order = SampleOrder([10**6, 10**6], [0.5, 0.5], 0, 1024, 1024)
    sources = order.locate(np.arange(order.mixture_block))[0].reshape(64, -1)
    assert np.abs(sources.mean(axis=1) - 0.5).max() < 5 * 0.5 / math.sqrt(1024)


def test_a_weight_that_rounds_to_no_place():
    order = SampleOrder([1000, 1000, 1000], [1.0, 1e-6, 1.0], 0, 64, 4, 1024)
    assert order.spans[0].places == (512, 0, 512)
    assert 1 not in order.locate(np.arange(4096))[0]
    assert order.epochs(4096) == [2.048, 0.0, 2.048]


def test_one_source_that_holds_all_places_is_walked_like_a_single_one():
    order = SampleOrder([777, 0], [1.0, 0.0], 5, 64, 4)
    sources, blocks = order.locate(np.arange(2000))
    assert not sources.any()
    assert np.array_equal(blocks, one_source(777, 64, 4, 5).locate(np.arange(2000))[1])
    assert order.epochs(1554) == [2.0, 0.0]
    second = SampleOrder([0, 777], [0.0, 1.0], 5, 64, 4).locate(np.arange(2000))
    assert (second[0] == 1).all() and np.array_equal(np.bincount(second[1][:777]), np.ones(777))


@given(recipe=recipes(), samples=st.integers(0, 3000))
def test_epochs_counts_what_was_visited(recipe: Recipe, samples: int):
    order = SampleOrder(**recipe)
    sources = order.locate(np.arange(samples))[0]
    visits = np.bincount(sources, minlength=len(order.blocks))
    assert order.epochs(samples) == [int(v) / n for v, n in zip(visits, order.blocks, strict=True)]


def test_a_data_set_smaller_than_one_block_is_the_users_mistake():
    with pytest.raises(UserError, match="smaller than one block") as caught:
        one_source(0)
    assert caught.value.where == "data.train"
    with pytest.raises(UserError, match="data set number 2"):
        SampleOrder([5, 0], [1.0, 1e-9], 0, 4, 4)


def test_no_samples():
    sources, blocks = one_source(10).locate(np.array([], np.int64))
    assert len(sources) == len(blocks) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_batch_by_address(world_size: int):
    order = SampleOrder([500, 90], [0.5, 0.5], 0, 16, 8)
    samples = 10**10 + np.arange(240)  # more visits than source 1 has blocks: equal addresses occur
    sources, blocks = order.locate(samples)
    shares = [rank_share(samples, sources, blocks, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {240 // world_size}
    together = np.concatenate(shares)
    assert np.array_equal(np.sort(together), np.arange(240))
    address = list(zip(sources[together], blocks[together], samples[together], strict=True))
    assert address == sorted(address)


def test_describe_is_plain_json_that_differs_for_another_order():
    settings = {"blocks": [500, 90], "weights": [0.5, 0.25], "seed": 7, "chunk_blocks": 16, "window_chunks": 8}
    described = SampleOrder(**settings).describe()
    assert json.loads(json.dumps(described)) == described
    assert described == SampleOrder(**{**settings, "weights": [2, 1]}).describe()
    changes = [{"blocks": [501, 90]}, {"weights": [0.5, 0.3]}, {"seed": 8}, {"chunk_blocks": 8}, {"window_chunks": 4}]
    for change in [*changes, {"mixture_block": 64}, {"changes": [(9, [1, 1])]}]:
        assert SampleOrder(**{**settings, **change}).describe() != described


@pytest.mark.parametrize("name", GOLDEN_ORDER["order"])
def test_golden_order(name: str):
    golden = GOLDEN_ORDER["order"][name]
    digest = hashlib.sha256()
    for array in SampleOrder(**golden["settings"]).locate(golden["start"] + np.arange(100_000)):
        digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == golden["sha256"]
