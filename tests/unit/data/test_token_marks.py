"""Token marks: the bits that were written come back for any range, and damage to them is damage to the shard."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.test_shards import SEPARATOR, flip
from trainer.data import token_marks as token_marks
from trainer.data.manifest import SENTENCE_STARTS, TOKEN_MARKS, WORD_STARTS, Manifest, ShardEntry, mark_bytes
from trainer.data.shard_checks import check_sizes, verify_shard
from trainer.data.shard_writer import ShardWriter
from trainer.data.token_marks import marks_of, read_marks, starts_at, unpack_starts
from trainer.errors import DamagedError, UserError


def write_shard(folder: Path, documents: list[list[bool]], marks: tuple[str, ...] = TOKEN_MARKS) -> ShardEntry:
    """A shard whose documents have these word starts; the sentence starts are their opposite."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "shard-00000", np.dtype("<u2"), SEPARATOR, marks)
    for document in documents:
        words = np.array(document, bool)
        writer.add_document(np.full(len(document), 7), {WORD_STARTS: words, SENTENCE_STARTS: ~words})
    return writer.close()


@settings(deadline=None)  # it syncs files
@given(
    documents=st.lists(st.lists(st.booleans(), max_size=30), max_size=12),
    waiting=st.integers(1, 40),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_range_of_bits_comes_back(
    documents: list[list[bool]], waiting: int, ends: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_marks, "_WAITING_BITS", waiting)
        entry = write_shard(folder, documents)
    words = [bit for document in documents for bit in [*document, False]]
    sentences = [bit for document in documents for bit in [*(not bit for bit in document), False]]
    start, stop = sorted(round(end * len(words)) for end in ends)
    for mark, expected in ((WORD_STARTS, words), (SENTENCE_STARTS, sentences)):
        path = folder / f"shard-00000.{mark}"
        assert path.read_bytes() == np.packbits(np.array(expected, bool), bitorder="little").tobytes()
        assert path.stat().st_size == mark_bytes(entry.tokens) == entry.files[mark][0]
        found = read_marks(folder, entry, mark, start, stop)
        assert found.dtype == bool and found.tolist() == expected[start:stop]
        assert read_marks(folder, entry, mark).tolist() == expected
        packed = np.fromfile(path, np.uint8)
        assert unpack_starts(packed, start, stop).tolist() == expected[start:stop]
        places = np.arange(start, stop)[::-1]
        assert starts_at(packed, places).tolist() == expected[start:stop][::-1]


def test_a_shard_without_marks_is_what_it_was(tmp_path: Path) -> None:
    entry, plain = write_shard(tmp_path / "with", [[True, False]]), write_shard(tmp_path / "plain", [[True, False]], ())
    assert list(entry.files) == ["tok", "doc", "sum", "wrd", "snt"]
    assert list(plain.files) == ["tok", "doc", "sum"]
    assert plain.files == {suffix: entry.files[suffix] for suffix in plain.files}
    assert sorted(path.suffix for path in (tmp_path / "plain").iterdir()) == [".doc", ".sum", ".tok"]


def test_marks_that_are_not_there_are_named_with_the_option(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, [[True, False]], (WORD_STARTS,))
    assert read_marks(tmp_path, entry, WORD_STARTS).tolist() == [True, False, False]
    with pytest.raises(UserError, match=r"no sentence starts \(no shard-00000\.snt\)") as caught:
        read_marks(tmp_path, entry, SENTENCE_STARTS)
    assert "--sentence-starts" in caught.value.remedy


def test_a_data_set_has_the_marks_that_all_its_shards_have(tmp_path: Path) -> None:
    both, words = write_shard(tmp_path / "a", [[True]]), write_shard(tmp_path / "b", [[True]], (WORD_STARTS,))

    def marks(*entries: ShardEntry) -> tuple[str, ...]:
        return marks_of(Manifest("<u2", "", 1000, SEPARATOR, 0, 0, entries))

    assert marks(both, both) == (WORD_STARTS, SENTENCE_STARTS)
    assert marks(both, words) == (WORD_STARTS,)
    assert marks() == ()


@pytest.mark.parametrize("mark", TOKEN_MARKS)
def test_damage_to_a_mark_is_found(mark: str, tmp_path: Path) -> None:
    entry = write_shard(tmp_path, [[True, False] * 50])
    path = tmp_path / f"shard-00000.{mark}"
    flip(path, 3, 5)
    assert verify_shard(tmp_path, entry) == [f"shard-00000.{mark}: content differs from its checksum"]
    os.truncate(path, 5)
    with pytest.raises(DamagedError, match=rf"shard-00000\.{mark} has 5 bytes; its manifest says 13"):
        check_sizes(tmp_path, entry)
    path.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        check_sizes(tmp_path, entry)
