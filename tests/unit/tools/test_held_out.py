"""How much is held out where nobody says: enough to evaluate on, never too much, and the same each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.prepare.held_out import LEAST_BYTES, MOST_BYTES, fraction_of
from tools.prepare.worker import HASHES, choose_split, hash_document
from trainer.errors import UserError


def documents(count: int, size: int) -> dict[int, int]:
    """Hash → bytes of `count` different documents."""
    return {hash_document(f"{number}".encode()): size for number in range(count)}


def held_out(sizes: dict[int, int]) -> int:
    """Bytes that a preparation with the fraction puts aside."""
    fraction = fraction_of(sizes)
    assert 0.0 < fraction <= 1.0
    return sum(size for one, size in sizes.items() if one < fraction * HASHES)


@pytest.mark.parametrize(
    ("count", "size", "wanted"),
    [
        (50, 1000, 10_000),  # 50 kB: a fifth of it
        (200, 1000, LEAST_BYTES),  # 200 kB
        (1000, 1000, 50_000),  # 1 MB: a twentieth
        (1000, 12_000, 600_000),  # 12 MB
        (100_000, 1000, MOST_BYTES),  # 100 MB
    ],
)
def test_the_part_follows_the_size_of_the_text(count: int, size: int, wanted: int) -> None:
    assert wanted <= held_out(documents(count, size)) < wanted + size


@given(st.dictionaries(st.integers(0, HASHES - 1), st.integers(1, 2000), min_size=20, max_size=300))
def test_no_document_more_than_is_wanted_and_few_digits(sizes: dict[int, int]) -> None:
    total = sum(sizes.values())
    found = held_out(sizes)
    wanted = max(0.05 * total, min(LEAST_BYTES, 0.2 * total))
    last = max(one for one in sizes if one < fraction_of(sizes) * HASHES)
    assert wanted <= found and found - sizes[last] < wanted
    assert fraction_of(dict(reversed(sizes.items()))) == fraction_of(sizes), "the order of the text is nothing"


def test_the_fraction_is_a_short_number() -> None:
    assert len(str(fraction_of(documents(300, 500)))) <= 7


def test_documents_that_stand_twice_count_twice_and_stay_together() -> None:
    repeated = hash_document(b"0")
    sizes = {**documents(100, 1000), repeated: 30_000}
    assert (held_out(sizes) >= 30_000) == (choose_split(b"0", fraction_of(sizes)) == "validation")


@pytest.mark.parametrize("sizes", [documents(1, 50_000), documents(2, 1000) | {1: 90_000}])
def test_a_text_of_one_large_document_has_nothing_to_hold_out(sizes: dict[int, int]) -> None:
    with pytest.raises(UserError, match="too few documents") as caught:
        fraction_of(sizes)
    assert "data.text.documents=line" in caught.value.remedy
