from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import permutation
from trainer.data.order.permutation import GOLDEN, fold_key, mix64, permute

BITS = 2**64 - 1


def pair_chi_square(first: np.ndarray, second: np.ndarray, n: int, bins: int = 32) -> float:
    """χ² of value pairs in [0, n) against the uniform distribution over bins × bins cells."""
    cells = (first.astype(np.int64) * bins // n) * bins + second.astype(np.int64) * bins // n
    counts = np.bincount(cells, minlength=bins * bins)
    expected = len(first) / bins**2
    return float(((counts - expected) ** 2 / expected).sum())


def serial_pair_mean(n: int, pairs: int = 100_000, keys: int = 20) -> float:
    """Mean χ² over keys of the disjoint pairs (π(2i), π(2i+1)) of the first `pairs`."""
    values = []
    for key in range(keys):
        permuted = permute(np.arange(2 * pairs), n, fold_key(99, n, key)).reshape(-1, 2)
        values.append(pair_chi_square(permuted[:, 0], permuted[:, 1], n))
    return float(np.mean(values))


def test_mix64_is_the_splitmix64_finaliser():
    # the published first outputs of SplitMix64 from seed 1234567
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GOLDEN
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(states).tolist() == expected


def test_mix64_keeps_its_input_and_shape():
    x = np.arange(6, dtype=np.uint64).reshape(2, 3)
    before = x.copy()
    assert mix64(x).shape == (2, 3)
    assert np.array_equal(x, before)


def test_every_input_bit_moves_every_output_bit_half_of_the_time():
    x = mix64(np.arange(4096))
    for bit in range(64):
        flipped = mix64(x) ^ mix64(x ^ (np.uint64(1) << np.uint64(bit)))
        rates = np.unpackbits(flipped.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert np.abs(rates - 0.5).max() < 5 * 0.5 / math.sqrt(4096)


def test_fold_key_depends_on_every_part_and_on_their_order():
    keys = [fold_key(*parts) for parts in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**64 - 1,))]
    assert len(set(keys)) == len(keys)


def test_fold_key_of_scalars_is_a_scalar():
    assert type(fold_key(1, np.int64(2))) is np.uint64


def test_fold_key_broadcasts_scalars_and_arrays():
    folded = fold_key(7, np.array([1, 2, 3]), np.uint64(2**63))
    assert folded.dtype == np.uint64
    assert folded.tolist() == [int(fold_key(7, i, 2**63)) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1023, 1024, 1025, 3 * 1024 + 5, 4**7, 4**7 + 1, 99_991]
)
def test_a_bijection_at_the_awkward_sizes(n: int):
    for key in (0, 1, BITS):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 20_000), key=st.integers(0, BITS))
def test_a_bijection_for_any_size_and_key(n: int, key: int):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(
    elements=st.lists(
        st.integers(1, 2**63).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n), st.integers(0, BITS))),
        min_size=1,
        max_size=20,
    )
)
def test_each_element_in_a_permutation_of_its_own(elements: list[tuple[int, int, int]]):
    index, n, key = (np.array(column, np.uint64) for column in zip(*elements, strict=True))
    alone = [int(permute(*element)[0]) for element in elements]
    assert permute(index, n, key).tolist() == alone
    assert all(value < size for value, size in zip(alone, n.tolist(), strict=True))


@pytest.mark.parametrize("n", [2**40, 2**40 + 1, 3 * 2**41 + 7, 2**62 + 1, 2**63])
def test_huge_sizes_stay_in_range_and_collide_nowhere(n: int):
    index = np.concatenate([np.arange(5000), n // 2 + np.arange(5000), n - 1 - np.arange(5000)]).astype(np.uint64)
    values = permute(index, n, 5)
    assert len(np.unique(values)) == len(index)
    assert values.max() < n
    assert 0.48 < values.astype(float).mean() / n < 0.52  # spread over all of it, 8 standard errors wide


def test_an_index_outside_is_refused():
    with pytest.raises(AssertionError):
        permute(np.array([3]), 3, 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(n: int):
    keys = 60_000
    key = fold_key(11, n, np.arange(keys))
    columns = [permute(np.full(keys, i), n, key).astype(np.int64) for i in range(n)]
    code = sum(column * n**i for i, column in enumerate(columns))
    possible = [sum(value * n**i for i, value in enumerate(order)) for order in permutations(range(n))]
    counts = np.array([np.count_nonzero(code == value) for value in possible])
    assert counts.sum() == keys
    expected, freedom = keys / len(possible), len(possible) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2**20, 10**6 + 3, 2**40 + 7])
def test_serial_pairs_like_a_true_random_permutation(n: int):
    # 32 × 32 cells with free margins: 1,023 degrees of freedom, so mean 1,023 and σ √2046 = 45.2 for one key, 10.1 for
    # the mean over 20 (somewhat less where the pairs use up a fifth of the values). The bound is 4 of these.
    assert abs(serial_pair_mean(n) - 1023) < 4 * 45.2 / math.sqrt(20)


def test_the_pair_test_tells_a_weak_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(permutation, "ROUNDS", 2)
    assert serial_pair_mean(2**20, keys=2) > 5000
