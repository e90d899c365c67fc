"""datatrove's tokenized files: `X.ds`, the tokens, `X.ds.index`, where documents end, and `X.ds.metadata`.

As datatrove/pipeline/tokens/tokenizer.py writes them: X.ds holds little-endian uint16 or uint32 tokens; the index
holds one uint64 for each document, its end in tokens; the metadata's first line is `TOKENIZER|BYTES A TOKEN`, its
second the number of tokens. With `eos_token` each document ends with that token. X.ds.loss is a mask of the tokens to
learn from.
"""

from __future__ import annotations

import os

import numpy as np

from tools.import_tokens.source import FlatFile, does_not_fit, in_windows, not_of_the_format
from trainer.errors import UserError


class DatatroveFile(FlatFile):
    """`X.ds` with `X.ds.index`, and `X.ds.metadata` where there is one.

    Attributes:
        tokenizer_name: the tokenizer that the metadata names; empty when it names none.
    """

    format = "datatrove"

    def __init__(self, path: str, name: str) -> None:
        """Open and check the index against the token file.

        Raises:
            UserError: when there is no index.
            DamagedError: when the two do not fit each other.
        """
        index_path = path + ".index"
        if not os.path.isfile(index_path):
            raise UserError(
                f"'{name}' has no '{os.path.basename(index_path)}', so it is not known where its documents end.",
                where=path,
                remedy="Copy the .index file as well, or write the data again with save_index=True.",
            )
        if os.path.getsize(index_path) % 8:
            raise does_not_fit(index_path, f"{os.path.getsize(index_path):,} bytes are not numbers of 8 bytes")
        documents = os.path.getsize(index_path) // 8
        self._ends = np.memmap(index_path, "<u8", "r") if documents else np.zeros(0, "<u8")
        tokens = _last_end(self._ends, index_path)
        self.tokenizer_name, stated_width = _read_metadata(path + ".metadata")
        width = stated_width or _width_that_fits(path, tokens)
        if os.path.getsize(path) != tokens * width:
            problem = f"it has {os.path.getsize(path):,} bytes; its index says {tokens:,} tokens of {width} bytes"
            raise does_not_fit(path, problem)
        super().__init__(name, path, [index_path], np.dtype(f"<u{width}"), documents)
        if os.path.isfile(path + ".loss"):
            self.notes.append(f"{name}: its .loss mask is left out; masked language modelling chooses its own tokens.")

    def document_starts(self, first: int, last: int) -> np.ndarray:
        ends = np.asarray(self._ends[max(0, first - 1) : last]).astype(np.int64)
        return ends if first else np.concatenate([np.zeros(1, np.int64), ends])


def _last_end(ends: np.ndarray, index_path: str) -> int:
    before = 0
    for part in in_windows(len(ends)):
        window = np.asarray(ends[part]).astype(np.int64)
        if window[0] < before or (np.diff(window) < 0).any():
            raise does_not_fit(index_path, "its document ends are not in order")
        before = int(window[-1])
    return before


def _read_metadata(path: str) -> tuple[str, int]:
    """Read the tokenizer's name and the bytes a token, as far as the metadata says."""
    if not os.path.isfile(path):
        return "", 0
    with open(path, encoding="utf-8", errors="replace") as file:
        first_line = file.readline().strip()
    if "|" not in first_line:  # before tokens of 4 bytes were supported
        return first_line, 0
    name, _, width = first_line.rpartition("|")
    if width not in ("2", "4"):
        raise not_of_the_format(path, DatatroveFile.format, f"it says {width!r} bytes a token, not 2 or 4")
    return ("" if name.startswith("Unknown Tokenizer") else name), int(width)


def _width_that_fits(path: str, tokens: int) -> int:
    width = os.path.getsize(path) / tokens if tokens else 2
    return int(width) if width in (2, 4) else 2
