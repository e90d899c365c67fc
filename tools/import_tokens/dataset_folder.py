"""A tokenized data set of the library `datasets`, as `Dataset.save_to_disk` writes it: a row is a document."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from tools.import_tokens.source import Chunk, TokenSource
from trainer.errors import UserError, nearest

ROWS_A_CHUNK = 1000
_BYTES_A_TOKEN = 4  # of an arrow file, roughly: for sizes of shards and free space only


class DatasetFolder(TokenSource):
    """A folder of `save_to_disk` with a column of lists of ids."""

    format = "datasets"

    def __init__(self, path: str, name: str, field: str) -> None:
        """Open the folder.

        Raises:
            UserError: when it cannot be opened, or has no such column of integers.
        """
        self.field = field
        self._rows = _open(path)
        _check_column(self._rows, field, path)
        files = [os.path.join(path, file) for file in sorted(os.listdir(path)) if file.endswith(".arrow")]
        super().__init__(path, name, [*files, os.path.join(path, "state.json")], len(self._rows))
        self.tokens = self.size // _BYTES_A_TOKEN

    def cut(self, limit: int) -> list[tuple[int, int]]:
        parts = max(1, min(-(-self.tokens // limit), self.documents))
        borders = [number * self.documents // parts for number in range(parts + 1)]
        return list(itertools.pairwise(borders)) if self.documents else []

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        compute: Any = import_module("pyarrow.compute")

        rows = self._rows.select_columns([self.field]).with_format("arrow")
        for start in range(first, last, ROWS_A_CHUNK):
            column = rows[start : min(last, start + ROWS_A_CHUNK)].column(self.field)
            lengths = compute.list_value_length(column).to_numpy()
            tokens = compute.list_flatten(column)
            if column.null_count or tokens.null_count:
                raise UserError(
                    f"Rows {start:,} to {start + len(column) - 1:,} of '{self.name}' hold a null in '{self.field}'.",
                    where=self.path,
                    remedy="Filter such rows out and save the data set again.",
                )
            yield Chunk(start, tokens.to_numpy(), np.cumsum(lengths, dtype=np.int64), np.arange(1, len(lengths) + 1))


def _open(path: str) -> Any:
    datasets: Any = import_module("datasets")
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # datasets and pyarrow raise a dozen kinds
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Cannot open the data set folder '{os.path.basename(path)}': {first_line}",
            where=path,
            remedy="It must be a folder that Dataset.save_to_disk wrote; copy it again if it is not whole.",
        ) from error


def _check_column(rows: Any, field: str, path: str) -> None:
    if field not in rows.column_names:
        raise UserError(
            f"The data set has no column '{field}'.{nearest(field, rows.column_names)}",
            where=path,
            remedy=f"Its columns are {', '.join(rows.column_names)}; name that of the ids with --field.",
        )
    import pyarrow

    kind = rows.data.schema.field(field).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not is_list or not pyarrow.types.is_integer(kind.value_type):
        raise UserError(
            f"Column '{field}' holds {kind}, not lists of ids.",
            where=path,
            remedy="Text is tokenized with `maskwright prepare`; name the column of the ids with --field.",
        )
