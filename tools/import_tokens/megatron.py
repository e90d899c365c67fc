"""Megatron-LM's indexed data sets: `X.bin`, the tokens, and `X.idx`, where sequences and documents lie.

The index, little-endian, as megatron/core/datasets/indexed_dataset.py writes it: the magic MMIDIDX and two zero
bytes; uint64 version, 1; uint8 code of the token type; uint64 number of sequences s; uint64 number of entries
d of the document index, one more than there are documents; int32 [s] lengths in tokens; int64 [s] pointers in bytes;
int64 [d] document index: the sequence that each document starts with, and last s. Multimodal data sets add int8 [s]
modes. A document has one sequence, or one for each sentence (`--split-sentences`, as for BERT).
"""

from __future__ import annotations

import os
import struct

import numpy as np

from tools.import_tokens.source import FlatFile, does_not_fit, in_windows, not_of_the_format
from trainer.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"  # fairseq's format, Megatron's `--dataset-impl lazy` of old
_COUNTS = struct.Struct("<QBQQ")  # version, type, sequences, entries of the document index
_HEADER_BYTES = len(_MAGIC) + _COUNTS.size
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point


class MegatronFile(FlatFile):
    """`prefix.bin` with `prefix.idx`."""

    format = "megatron"

    def __init__(self, prefix: str, name: str) -> None:
        """Open and check the index against the token file.

        Raises:
            UserError: when a file is missing, or is of another format.
            DamagedError: when the two do not fit each other.
        """
        self._index_path, token_path = prefix + ".idx", prefix + ".bin"
        for path, other in ((self._index_path, token_path), (token_path, self._index_path)):
            if not os.path.isfile(path):
                raise UserError(
                    f"There is no '{os.path.basename(path)}' beside '{os.path.basename(other)}'.",
                    where=path,
                    remedy="A Megatron data set is a .bin and an .idx of the same name: copy both.",
                )
        dtype, self._sequences, entries = self._read_header()
        self._map(entries)
        super().__init__(name, token_path, [self._index_path], dtype, entries - 1)
        self._check()

    def document_starts(self, first: int, last: int) -> np.ndarray:
        return self._sequence_starts(np.asarray(self._document_index[first : last + 1]))

    def sequence_ends(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.asarray(self._document_index[first : last + 1])
        return self._sequence_starts(np.arange(index[0] + 1, index[-1] + 1)), index[1:] - index[0]

    def _sequence_starts(self, sequences: np.ndarray) -> np.ndarray:
        """Find where sequences start, in tokens; that after the last one is the end of the file."""
        starts = np.full(len(sequences), self.tokens, np.int64)
        inside = sequences < self._sequences
        starts[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def _read_header(self) -> tuple[np.dtype, int, int]:
        with open(self._index_path, "rb") as file:
            header = file.read(_HEADER_BYTES)
        if header.startswith(_LEGACY_MAGIC):
            problem = "it is an index of the old format (TNTIDX); write the data with Megatron's mmap format"
            raise not_of_the_format(self._index_path, self.format, problem)
        if not header.startswith(_MAGIC):
            raise not_of_the_format(self._index_path, self.format, "it does not begin with MMIDIDX")
        if len(header) < _HEADER_BYTES:
            raise does_not_fit(self._index_path, "it ends within its header")
        version, code, sequences, entries = _COUNTS.unpack(header[len(_MAGIC) :])
        if version != 1:
            raise not_of_the_format(self._index_path, self.format, f"it is of version {version}, only 1 is known")
        if code not in _TYPES:
            raise not_of_the_format(self._index_path, self.format, f"type {code} of its tokens is not an integer's")
        return np.dtype(_TYPES[code]), sequences, entries

    def _map(self, entries: int) -> None:
        size = os.path.getsize(self._index_path)
        expected = _HEADER_BYTES + self._sequences * 12 + entries * 8
        if size == expected + self._sequences and self._sequences:
            raise not_of_the_format(self._index_path, self.format, "it is multimodal; only text can be imported")
        if size != expected or not entries:
            problem = (
                f"its header says {self._sequences:,} sequences and {entries - 1:,} documents, which take {expected:,} "
                f"bytes, but it has {size:,}"
            )
            raise does_not_fit(self._index_path, problem)
        place = _HEADER_BYTES
        self._lengths = _map_array(self._index_path, "<i4", self._sequences, place)
        self._pointers = _map_array(self._index_path, "<i8", self._sequences, place + self._sequences * 4)
        self._document_index = _map_array(self._index_path, "<i8", entries, place + self._sequences * 12)

    def _check(self) -> None:
        """Check that the index describes all of the token file, from its start to its end, without a gap."""
        end = 0
        for part in in_windows(self._sequences):
            lengths, pointers = np.asarray(self._lengths[part], np.int64), np.asarray(self._pointers[part])
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            if (lengths < 0).any() or not np.array_equal(pointers, np.concatenate([[end], ends[:-1]])):
                raise does_not_fit(self._index_path, "its sequences do not follow each other in the token file")
            end = int(ends[-1])
        size = os.path.getsize(self.path)
        if size != end:
            raise does_not_fit(self.path, f"it has {size:,} bytes; its index says {end:,}")
        before = 0
        for part in in_windows(self.documents + 1):
            index = np.asarray(self._document_index[part])
            if index[0] < before or (np.diff(index) < 0).any():
                raise does_not_fit(self._index_path, "the documents of its index are not in order")
            before = int(index[-1])
        if self._document_index[0] != 0 or before != self._sequences:
            problem = (
                f"its documents are sequences {int(self._document_index[0]):,} to {before:,} of {self._sequences:,}"
            )
            raise does_not_fit(self._index_path, problem)


def _map_array(path: str, dtype: str, count: int, offset: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
