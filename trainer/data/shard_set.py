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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.open_shard import OpenShard, ReadSettings, mebibytes
from trainer.data.quarantine import kept_stretches
from trainer.data.shards import check_sizes, read_manifest

MAX_OPEN_SHARDS = 128  # a window is about as large as one large shard; a batch seldom touches more than a few
_SIZE_CHECKS_AT_ONCE = 16


class Piece(NamedTuple):
    """Rows of a request that lie in one shard.

    Attributes:
        rows: slice or int64 [n] of the request.
        shard: number in the manifest.
        starts: int64 [n], first token of each within the shard.
        columns: where in the block these tokens go.
    """

    rows: Any
    shard: int
    starts: NDArray[np.int64]
    columns: slice

    @property
    def length(self) -> int:
        return self.columns.stop - self.columns.start


class ShardSet:
    """A data set opened for reading.

    At most MAX_OPEN_SHARDS files are open at once, each from its first use. Opening checks sizes, not content:
    `ReadSettings.verify` and `maskwright data verify` do.

    Args:
        folder: with a manifest.
        quarantine: parts to leave out, as `trainer.data.quarantine` describes them.
        settings: how to read.
        check: compare the sizes of all files with the manifest now. One rank does it for all.

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
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.dtype = np.dtype(self.manifest.dtype)
        self.settings = settings or ReadSettings()
        stretches = kept_stretches(self.manifest, quarantine, str(folder))
        self._shards, self._offsets, lengths = np.array(stretches, np.int64).reshape(-1, 3).T.copy()
        self._ends = np.cumsum(lengths)
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
        """Whole blocks of `payload` tokens; the tail that fills none is never read."""
        return self.tokens // payload

    def read_blocks(self, blocks: np.ndarray, payload: int) -> np.ndarray:
        """Gather blocks; fastest when they ascend, as `order.rank_share` hands them out.

        Args:
            blocks: int64 [B], block numbers below `block_count(payload)`.

        Returns:
            [B, payload] in the stored dtype.

        Raises:
            DamagedError: when a part that is read differs from its sum, or is not there.
        """
        out = np.empty((len(blocks), payload), self.dtype)
        for piece in self.pieces(blocks, payload):
            out[piece.rows, piece.columns] = self._shard(piece.shard).read(piece.starts, piece.length)
        return out

    def advise(self, blocks: np.ndarray, payload: int) -> None:
        """Tell the kernel that these blocks (int64 [B], ascending) will be read soon, by any process of the node."""
        for piece in self.pieces(blocks, payload):
            self._shard(piece.shard).advise(piece.starts, piece.length)

    def pieces(self, blocks: np.ndarray, payload: int) -> Iterator[Piece]:
        """Where blocks (int64 [B]) lie: runs of whole blocks in one shard, and the parts of those at a border."""
        starts = np.asarray(blocks, np.int64) * payload
        segments = np.searchsorted(self._ends, starts, side="right")
        inside = starts + payload <= self._ends[segments]
        shards, within = self._shards[segments], starts - self._segment_starts(segments) + self._offsets[segments]
        whole = np.flatnonzero(inside)
        for run in np.split(whole, np.flatnonzero(np.diff(shards[whole])) + 1):
            if len(run):
                contiguous = run[-1] - run[0] == len(run) - 1
                rows = slice(int(run[0]), int(run[-1]) + 1) if contiguous else run
                yield Piece(rows, int(shards[run[0]]), within[run], slice(0, payload))
        for row in np.flatnonzero(~inside).tolist():
            yield from self._pieces_of_crossing_block(row, int(starts[row]), int(segments[row]), payload)

    def _pieces_of_crossing_block(self, row: int, start: int, segment: int, payload: int) -> Iterator[Piece]:
        filled = 0
        while filled < payload:
            count = min(payload - filled, int(self._ends[segment]) - start - filled)
            if count:  # a shard may be empty
                first = start + filled - int(self._segment_starts(segment)) + int(self._offsets[segment])
                columns = slice(filled, filled + count)
                yield Piece(slice(row, row + 1), int(self._shards[segment]), np.array([first]), columns)
            filled += count
            segment += 1

    def _segment_starts(self, segments: Any) -> Any:
        return np.where(np.asarray(segments) > 0, self._ends[np.maximum(segments, 1) - 1], 0)

    def _shard(self, number: int) -> OpenShard:
        shard = self._open.get(number)
        if shard is None:
            entry = self.manifest.shards[number]
            checked = self._checked.setdefault(number, np.zeros(mebibytes(entry), np.bool_))
            shard = OpenShard(self.folder, entry, self.dtype, self.settings, checked)
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
