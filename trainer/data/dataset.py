"""A data set opened for reading: blocks of tokens by number.

The shards in the order of the manifest are one stream of tokens, cut into blocks. What a quarantine leaves out is not
part of the stream: the stream then consists of segments, stretches of shards.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import read_data_manifest
from trainer.data.quarantine import kept_stretches
from trainer.data.shard_checks import check_sizes
from trainer.data.shard_reader import OpenShard, ReadSettings, mebibytes

MAX_OPEN_SHARDS = 128  # a window is about as large as one large shard; a batch seldom touches more than a few
_SIZE_CHECKS_AT_ONCE = 16


class ShardSet:
    """A data set opened for reading.

    At most MAX_OPEN_SHARDS files are open at once, each from its first use. Opening checks sizes, not content:
    `ReadSettings.verify` and `maskwright data verify` do.

    Args:
        folder: with a manifest.
        quarantine: parts to leave out, as `trainer.data.quarantine` describes them.
        settings: how to read.
        check: compare the sizes of all files with the manifest now. One rank does it for all.
        vocabulary_size: of the model that reads; default the manifest's. An id beyond it is damage.

    Raises:
        UserError: for a folder that is no data set, or a quarantine that names what is not there.
        DamagedError: for a file that is missing or of another size.
    """

    def __init__(
        self,
        folder: str | Path,
        quarantine: Sequence[str] = (),
        settings: ReadSettings | None = None,
        check: bool = True,
        vocabulary_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_data_manifest(folder)
        self.dtype = np.dtype(self.manifest.dtype)
        self.vocabulary_size = vocabulary_size or self.manifest.vocabulary_size
        self.settings = settings or ReadSettings()
        stretches = kept_stretches(self.manifest, quarantine, str(folder))
        self._shards, self._offsets, lengths = np.array(stretches, np.int64).reshape(-1, 3).T.copy()
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._checked: dict[int, NDArray[np.bool_]] = {}
        if check:
            self._check_sizes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_checked": {}}  # a worker opens the files itself

    @property
    def tokens(self) -> int:
        """Tokens of the stream; fewer than the manifest's when some are in quarantine."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which token is where in the stream."""
        if self.tokens == self.manifest.tokens:
            return self.manifest.fingerprint
        segments = [self._shards.tolist(), self._offsets.tolist(), self._ends.tolist()]
        return hashlib.sha256(json.dumps([self.manifest.fingerprint, segments]).encode()).hexdigest()

    def block_count(self, payload: int) -> int:
        """Count the whole blocks of `payload` tokens; the tail that fills none is never read."""
        return self.tokens // payload

    def read_blocks(self, blocks: np.ndarray, payload: int) -> np.ndarray:
        """Gather blocks, int64 [B] below `block_count(payload)`; see `read`."""
        return self.read(np.asarray(blocks, np.int64) * payload, payload)

    def read(self, starts: NDArray[np.int64], length: int) -> np.ndarray:
        """Gather stretches of equal length; fastest when they ascend, as `order.rank_share` hands blocks out.

        Args:
            starts: int64 [B], first token of each stretch in the stream; all of its tokens lie within.

        Returns:
            [B, length] in the stored dtype.

        Raises:
            DamagedError: when a part that is read differs from its sum, or is not there.
        """
        if (within := self.in_one_shard(starts, length)) is not None:
            shard, offsets = within
            return self._shard(shard).read(offsets, length)
        out = np.empty((len(starts), length), self.dtype)
        for rows, columns, shard, offsets in self._stretches(starts, length):
            out[rows, columns] = self._shard(shard).read(offsets, columns.stop - columns.start)
        return out

    def advise(self, starts: NDArray[np.int64], length: int) -> None:
        """Tell the kernel that these stretches (as for `read`, ascending) will be read soon, by whomever."""
        for _, columns, shard, offsets in self._stretches(starts, length):
            self._shard(shard).advise(offsets, columns.stop - columns.start)

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield what the stream consists of: shard, token offset in the shard, tokens, first token in the stream."""
        lengths = self._ends - self._starts
        columns = (self._shards, self._offsets, lengths, self._starts)
        yield from zip(*(column.tolist() for column in columns), strict=True)

    def pieces(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Find where the tokens of stretches lie: one piece for each segment that a stretch draws from.

        Args:
            starts: as for `read`.

        Returns:
            int64 [n, 4]: row (the stretch's place in `starts`), shard, token offset in the shard, tokens. The pieces of
            a row stand together and in the order of their tokens; the rows are in order.
        """
        stops = starts + length
        first = np.searchsorted(self._ends, starts, side="right")
        counts = np.searchsorted(self._ends, stops, side="left") - first + 1
        rows = np.repeat(np.arange(len(starts)), counts)
        segments = first[rows] + np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        begins = np.maximum(starts[rows], self._starts[segments])
        lengths = np.minimum(stops[rows], self._ends[segments]) - begins
        offsets = begins - self._starts[segments] + self._offsets[segments]
        return np.stack([rows, self._shards[segments], offsets, lengths], axis=1)

    def in_one_shard(self, starts: NDArray[np.int64], length: int) -> tuple[int, NDArray[np.int64]] | None:
        """Find shard and offsets of stretches that all lie in one segment, as those of a small batch mostly do."""
        if not len(starts):
            return None
        segment = int(np.searchsorted(self._ends, starts.min(), side="right"))
        if int(starts.max()) + length > int(self._ends[segment]):
            return None
        return int(self._shards[segment]), starts + int(self._offsets[segment] - self._starts[segment])

    def _stretches(
        self, starts: NDArray[np.int64], length: int
    ) -> Iterator[tuple[slice, slice, int, NDArray[np.int64]]]:
        """Yield the pieces, runs of whole stretches in one shard taken together: (rows, columns, shard, offsets)."""
        rows, shards, offsets, lengths = self.pieces(starts, length).T
        columns = (np.cumsum(lengths) - lengths) % length  # the pieces of each row add up to a stretch
        whole = lengths == length
        alike = (shards[1:] == shards[:-1]) & whole[1:] & whole[:-1]
        firsts = np.flatnonzero(np.r_[True, ~alike]) if len(rows) else []
        for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=False):
            yield (
                slice(int(rows[first]), int(rows[end - 1]) + 1),
                slice(int(columns[first]), int(columns[first] + lengths[first])),
                int(shards[first]),
                offsets[first:end],
            )

    def _shard(self, number: int) -> OpenShard:
        shard = self._open.get(number)
        if shard is None:
            entry = self.manifest.shards[number]
            checked = self._checked.setdefault(number, np.zeros(mebibytes(entry), np.bool_))
            shard = OpenShard(self.folder, entry, self.dtype, self.vocabulary_size, self.settings, checked)
            self._open[number] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return shard

    def _check_sizes(self) -> None:
        entries = [self.manifest.shards[number] for number in np.unique(self._shards).tolist()]
        with ThreadPoolExecutor(_SIZE_CHECKS_AT_ONCE) as pool:  # a parallel file system is slow, but not one at a time
            for _ in pool.map(lambda entry: check_sizes(self.folder, entry), entries):
                pass
