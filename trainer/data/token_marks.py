"""Word and sentence starts: one bit a token, in a file beside NAME.tok for each mark.

`NAME.wrd` and `NAME.snt` have a bit for each token of NAME.tok, separators included, the first token in the lowest
bit of the first byte (`np.packbits(bitorder="little")`); the last byte is filled up with zeros. A bit is set where a
word, or a sentence, starts; it ends before the next set bit or the separator. The first content token of a document
starts both; a separator starts neither.

A data set has a mark in all of its shards or in none: `prepare --word-starts` and `--sentence-starts` write them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.manifest import SENTENCE_STARTS, STARTS_OF, TOKEN_MARKS, WORD_STARTS, Manifest, ShardEntry, mark_bytes
from trainer.errors import UserError
from trainer.runtime.files import sync_and_close

OPTION_OF_MARK = {WORD_STARTS: "--word-starts", SENTENCE_STARTS: "--sentence-starts"}
SETTING_OF_MARK = {WORD_STARTS: "word_starts", SENTENCE_STARTS: "sentence_starts"}  # in a manifest's settings
_WAITING_BITS = 1 << 16


class MarkWriter:
    """Packs bits into a file as they come, a few thousand at a time."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def append(self, bits: np.ndarray) -> None:
        """Add bool [n] for the next n tokens."""
        self._waiting.append(bits)
        self._count += len(bits)
        if self._count >= _WAITING_BITS:
            bits = np.concatenate(self._waiting)
            whole = len(bits) // 8 * 8
            self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
            self._waiting, self._count = [bits[whole:]], len(bits) - whole

    def close(self) -> None:
        """Write the rest; the file is durable on return."""
        if self._waiting:
            self._file.write(np.packbits(np.concatenate(self._waiting), bitorder="little").tobytes())
        sync_and_close(self._file)


def marks_of(manifest: Manifest) -> tuple[str, ...]:
    """List the marks that every shard of a data set has."""
    if not manifest.shards:
        return ()
    return tuple(mark for mark in TOKEN_MARKS if all(mark in entry.files for entry in manifest.shards))


def read_marks(folder: str | Path, entry: ShardEntry, mark: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Read where words or sentences start among the tokens [start, stop) of a shard; only the bytes needed are read.

    Args:
        mark: WORD_STARTS or SENTENCE_STARTS.
        stop: default the end of the shard.

    Returns:
        bool [stop − start].

    Raises:
        UserError: when the data set was prepared without this mark.
    """
    _check_marked(folder, entry, mark)
    stop = entry.tokens if stop is None else stop
    assert 0 <= start <= stop <= entry.tokens, f"tokens {start}..{stop} of {entry.tokens}"
    first = start // 8
    packed = np.fromfile(Path(folder) / f"{entry.name}.{mark}", np.uint8, mark_bytes(stop) - first, offset=first)
    return unpack_starts(packed, start - first * 8, stop - first * 8)


def check_marked(folder: str | Path, manifest: Manifest, mark: str) -> None:
    """Raise UserError when a data set was prepared without this mark."""
    for entry in manifest.shards:
        _check_marked(folder, entry, mark)


def _check_marked(folder: str | Path, entry: ShardEntry, mark: str) -> None:
    if mark not in entry.files:
        raise UserError(
            f"The data set has no {STARTS_OF[mark]} starts (no {entry.name}.{mark}).",
            where=str(folder),
            remedy=f"Prepare it again with {OPTION_OF_MARK[mark]}.",
        )


def unpack_starts(packed: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Unpack the bits [start, stop) of a packed mark, uint8, in memory or mapped: bool [stop − start]."""
    first = start // 8
    bits = np.unpackbits(packed[first : mark_bytes(stop)], bitorder="little")
    return bits[start - first * 8 : stop - first * 8].view(bool)


def unpack_stretches(packed: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Unpack stretches of equal length of a packed mark, uint8: bool [n, length].

    Args:
        starts: int64 [n], the first bit of each.
    """
    width = length // 8 + 2  # bytes, wherever in the first of them a stretch begins
    places = np.minimum((starts >> 3)[:, None] + np.arange(width), len(packed) - 1)
    bits = np.unpackbits(packed[places].reshape(-1), bitorder="little")
    windows = np.lib.stride_tricks.sliding_window_view(bits, length)
    return windows[np.arange(len(starts)) * width * 8 + (starts & 7)].view(bool)


def starts_at(packed: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Look up the bits of a packed mark at these tokens (int64): bool, shaped like `places`."""
    return (packed[places >> 3] >> (places & 7) & 1).astype(bool)
