"""Writes shards: flat token files, written once; `trainer.data.manifest` says what is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.data.manifest import SUFFIXES, ShardEntry, is_shard_name
from trainer.data.shard_checks import mebibyte_sums
from trainer.data.token_marks import MarkWriter
from trainer.runtime.files import file_hash, sync_and_close, sync_folder, unique_token, write_synced

_SEPARATOR_STARTS_NOTHING = np.zeros(1, bool)


class ShardWriter:
    """Writes one shard under temporary names, and gives it its names when it is whole.

    The temporary names are its own: two processes that write the same shard cannot mix their bytes, and the shard
    is that of one of them.

    Args:
        marks: suffixes of the token marks to write beside the tokens.
    """

    def __init__(
        self, folder: str | Path, name: str, dtype: np.dtype, separator_id: int, marks: Sequence[str] = ()
    ) -> None:
        self.folder, self.name, self.dtype = Path(folder), name, np.dtype(dtype)
        self._separator = np.array([separator_id], self.dtype)
        self._starts, self._tokens = [0], 0
        self._unique = unique_token()
        self._file = open(self._temporary("tok"), "wb")
        self._marks = {mark: MarkWriter(self._temporary(mark)) for mark in marks}

    def add_document(self, ids: list[int] | np.ndarray, starts: Mapping[str, np.ndarray] | None = None) -> None:
        """Append one document's content tokens and the separator.

        Args:
            ids: [n].
            starts: for each mark of this shard bool [n]; the separator gets a zero.
        """
        self._file.write(np.ascontiguousarray(ids, self.dtype).data)  # no copy: it may be gigabytes
        self._file.write(self._separator.tobytes())
        self._tokens += len(ids) + 1
        self._starts.append(self._tokens)
        for mark, writer in self._marks.items():
            assert starts is not None and len(starts[mark]) == len(ids)
            writer.append(starts[mark])
            writer.append(_SEPARATOR_STARTS_NOTHING)

    def close(self) -> ShardEntry:
        """Write `.doc` and `.sum`, sync, rename; the shard then exists. Returns its manifest entry."""
        sync_and_close(self._file)
        for writer in self._marks.values():
            writer.close()
        write_synced(self._temporary("doc"), np.array(self._starts, "<u8").tobytes())
        sums = mebibyte_sums(self._temporary("tok"))
        write_synced(self._temporary("sum"), sums.tobytes())
        files = {}
        for suffix in (*SUFFIXES, *self._marks):
            temporary = self._temporary(suffix)
            files[suffix] = (temporary.stat().st_size, file_hash(temporary))
            os.replace(temporary, self.folder / f"{self.name}.{suffix}")
        sync_folder(self.folder)
        return ShardEntry(self.name, self._tokens, len(self._starts) - 1, files)

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".{self.name}.{suffix}.{self._unique}.tmp"


def remove_shard(folder: Path, name: str) -> None:
    """Remove the files of a shard, if there are any."""
    assert is_shard_name(name)
    for path in folder.glob(f"{name}.*"):
        path.unlink(missing_ok=True)
