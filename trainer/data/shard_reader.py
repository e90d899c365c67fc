"""One shard opened for reading: mapped or by pread, its parts compared with their sums when they are first read."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from trainer.data.manifest import SUM_BYTES, ShardEntry
from trainer.errors import DamagedError, MaskwrightError
from trainer.runtime.files import file_hash


@dataclass(frozen=True)
class ReadSettings:
    """How token files are read.

    Attributes:
        method: "mmap", or "pread" for file systems on which mapping is slow or unsafe.
        verify: compare each MiB of a token file with its sum when a process first reads from it, and a file of
            document borders with its checksum.
    """

    method: Literal["mmap", "pread"] = "mmap"
    verify: bool = False


class OpenShard:
    """The tokens of one shard.

    Readahead is off: blocks come in random order from one window, so what the kernel would read beyond them is
    mostly what another rank needs. `advise` says ahead of time what will be read instead.

    Args:
        vocabulary_size: ids from it on are damage: a model has no row for them.
        checked: bool [mebibytes], which MiB this process has found whole; kept by the caller, for a shard may be
            closed and opened again.

    Raises:
        DamagedError: when the file of the sums is not the manifest's, or cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        entry: ShardEntry,
        dtype: np.dtype,
        vocabulary_size: int,
        settings: ReadSettings,
        checked: NDArray[np.bool_],
    ) -> None:
        self._path = folder / f"{entry.name}.tok"
        self._entry, self._dtype, self._item = entry, dtype, dtype.itemsize
        self._vocabulary_size, self._checked = vocabulary_size, checked
        self._checks_ids_read = not settings.verify and vocabulary_size <= np.iinfo(dtype).max
        self._sums = _read_sums(folder, entry) if settings.verify and not checked.all() else None
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._tokens = self._map() if settings.method == "mmap" and entry.tokens else None
        self._stretches: dict[int, np.ndarray] = {}

    def close(self) -> None:
        self._tokens, self._stretches = None, {}  # the mapping ends with its last view
        os.close(self._file)

    def read(self, starts: NDArray[np.int64], length: int) -> np.ndarray:
        """Read stretches of equal length.

        Args:
            starts: int64 [n], first token of each stretch within the shard.
            length: tokens a stretch; all of them lie within the shard.

        Returns:
            [n, length] in the stored dtype.

        Raises:
            DamagedError: when a MiB that is read differs from its sum, an id is beyond the vocabulary, or the file is
                shorter than recorded.
        """
        if self._sums is not None:
            self._verify(starts, length)
        tokens = self._pread(starts, length) if self._tokens is None else self._gather(self._tokens, starts, length)
        if self._checks_ids_read and tokens.size:
            self._check_ids(tokens, int(starts.min()) * self._item // SUM_BYTES)
        return tokens

    def _gather(self, tokens: np.ndarray, starts: NDArray[np.int64], length: int) -> np.ndarray:
        if length not in self._stretches:  # two lengths or so: the block's, and parts of it at the shard's ends
            shape = (len(tokens) - length + 1, length)
            self._stretches[length] = as_strided(tokens, shape, tokens.strides * 2, writeable=False)
        return self._stretches[length][starts]

    def advise(self, starts: NDArray[np.int64], length: int) -> None:
        """Ask the kernel to have these stretches in memory soon; returns at once. `starts` int64 [n] ascend."""
        first, end = starts * self._item, (starts + length) * self._item
        apart = np.flatnonzero(first[1:] > end[:-1] + mmap.PAGESIZE) + 1
        for start, stop in zip(first[np.r_[0, apart]].tolist(), end[np.r_[apart - 1, -1]].tolist(), strict=True):
            os.posix_fadvise(self._file, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _map(self) -> np.ndarray:
        try:
            mapped = mmap.mmap(self._file, self._entry.tokens * self._item, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than that
            raise _unreadable(self._path, error) from None
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, self._dtype)

    def _pread(self, starts: NDArray[np.int64], length: int) -> np.ndarray:
        out = np.empty((len(starts), length), self._dtype)
        buffer, size = out.data.cast("B"), length * self._item
        for row, offset in enumerate((starts * self._item).tolist()):
            self._read_into(buffer[row * size : (row + 1) * size], offset)
        return out

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        try:
            while buffer and (count := os.preadv(self._file, [buffer], offset)):
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise _unreadable(self._path, error) from None
        if buffer:
            raise DamagedError(
                f"{self._path.name} ends at byte {offset:,}; its manifest says {self._entry.files['tok'][0]:,} bytes.",
                where=str(self._path),
                remedy="Copy the data set again, or prepare it again.",
            )

    def _verify(self, starts: NDArray[np.int64], length: int) -> None:
        """Check the MiB of each stretch that this process has not checked yet; a stretch lies in one or two."""
        assert self._sums is not None and length * self._item <= SUM_BYTES
        ends = np.concatenate([starts * self._item, (starts + length) * self._item - 1]) // SUM_BYTES
        for number in np.unique(ends[~self._checked[ends]]).tolist():
            start = number * SUM_BYTES
            part = bytearray(min(SUM_BYTES, self._entry.files["tok"][0] - start))
            self._read_into(memoryview(part), start)
            if xxhash.xxh3_64_intdigest(part) != int(self._sums[number]):
                raise DamagedError(
                    f"MiB {number} of {self._path.name} (bytes {start:,}..{start + len(part):,}) differs from its sum.",
                    where=str(self._path),
                    remedy="Copy the shard again from where it is whole (`maskwright data verify` lists all damage), "
                    f"or leave this part out on purpose: quarantine: ['{self._entry.name}:{number}'] beside the path "
                    "in data.train, in a new run.",
                )
            self._check_ids(np.frombuffer(part, self._dtype), number)
            self._checked[number] = True

    def _check_ids(self, tokens: np.ndarray, number: int) -> None:
        """Raise DamagedError for an id beyond the vocabulary; `number` is the MiB, or the first one, read from."""
        largest = int(tokens.max())
        if largest >= self._vocabulary_size:
            raise DamagedError(
                f"{self._path.name} holds the id {largest:,} (seen from MiB {number} on), and the vocabulary ends at "
                f"{self._vocabulary_size - 1:,}.",
                where=str(self._path),
                remedy="Prepare the data set again with the tokenizer of the run; `maskwright data verify` lists all "
                "damage.",
            )


def mebibytes(entry: ShardEntry) -> int:
    """Count the sums that a shard has."""
    return -(-entry.files["tok"][0] // SUM_BYTES)


def _read_sums(folder: Path, entry: ShardEntry) -> NDArray[np.uint64]:
    path = folder / f"{entry.name}.sum"
    try:
        whole = file_hash(path) == entry.files["sum"][1]
        sums = np.fromfile(path, "<u8")
    except OSError as error:
        raise _unreadable(path, error) from None
    if not whole or len(sums) != mebibytes(entry):
        raise DamagedError(
            f"{path.name} differs from its checksum in the manifest.",
            where=str(path),
            remedy="Copy the shard again; `maskwright data verify` lists all damage.",
        )
    return sums


def _unreadable(path: Path, error: Exception) -> MaskwrightError:
    reason = getattr(error, "strerror", None) or str(error)
    kind = DamagedError if isinstance(error, (FileNotFoundError, ValueError)) else MaskwrightError
    return kind(
        f"Cannot read {path.name}: {reason}.",
        where=str(path),
        remedy="Check the file system, and the data with `maskwright data verify`; then start the same command again.",
    )
