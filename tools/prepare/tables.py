"""Rows of parquet and arrow files through pyarrow, and of hub data sets through `datasets`: no copy on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tools.prepare.bad_documents import INVALID_UTF8, NOT_TEXT, BadDocument
from tools.prepare.compression import (
    DAMAGED,
    compression_of,
    explain_codec_error,
    explain_os_error,
    is_codec_error,
    open_input,
)
from tools.prepare.fields import MISSING, follow, missing_field, not_text_remedy
from tools.prepare.hub import divide_evenly, hub_rows, one_line
from tools.prepare.paths import shown
from tools.prepare.pieces import Piece, TextSettings
from trainer.errors import MaskwrightError, UserError

ROWS_A_BATCH = 1000
_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGICS = (b"ARROW1", b"\xff\xff\xff\xff")  # a file; a stream


def read_table(piece: Piece, settings: TextSettings) -> Iterator[tuple[str | BadDocument, int]]:
    """Read the text field of each row, in order, with the bytes consumed (estimated: a table has no byte positions)."""
    consumed = 0.0
    try:
        row_bytes = _bytes_a_row(piece) if settings.format == "parquet" else None
        for column in _columns(piece, settings):
            for value in _values(column):
                text = _text_of(value, piece, settings)
                consumed = min(consumed + (row_bytes or (len(text) if isinstance(text, str) else 0)), piece.size)
                yield text, int(consumed)
    except (MaskwrightError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow, datasets and every codec raise their own
        raise _explain(piece, settings, error) from error


def count_row_groups(path: str) -> int:
    """Count the parts that a parquet file can be cut into."""
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            return max(1, pyarrow.parquet.read_metadata(file).num_row_groups)
    except (OSError, ValueError, NotImplementedError):
        return 1  # the reader says what is wrong with it, with the name


def _bytes_a_row(piece: Piece) -> float | None:
    """Compute the mean bytes on disk behind a row of a parquet file.

    Its text is compressed, and beside it lie other columns.
    """
    import pyarrow.parquet

    with _open(piece.file.path) as file:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    return piece.file.size / rows if rows else None


def _text_of(value: Any, piece: Piece, settings: TextSettings) -> str | BadDocument:
    """Read the text of a row; bytes are UTF-8."""
    if value is None or isinstance(value, str):
        return value or ""
    name, field = shown(piece.file.name), settings.field
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            error = UserError(
                f"Not valid UTF-8: field '{field}' in a row of '{name}'.",
                where=shown(piece.file.path),
                remedy="Write the file again from valid text.",
            )
            return BadDocument(INVALID_UTF8, lambda: error, len(value))
    error = UserError(
        f"Field '{field}' of '{name}' holds a {type(value).__name__}, not text.",
        where=settings.names("field", field),
        remedy=not_text_remedy(field, value, settings.names),
    )
    return BadDocument(NOT_TEXT, lambda: error)


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # written without a check
        return column.cast("binary").to_pylist()


def _columns(piece: Piece, settings: TextSettings) -> Iterator[Any]:
    """Read the column of the text, some rows at a time."""
    if settings.format == "parquet":
        yield from _parquet_columns(piece, settings)
    elif settings.format == "arrow":
        yield from _arrow_columns(piece, settings)
    else:
        for table in hub_rows(piece).with_format("arrow").iter(ROWS_A_BATCH):
            yield _at(table, _path_in(table.schema, piece, settings))


def _parquet_columns(piece: Piece, settings: TextSettings) -> Iterator[Any]:
    import pyarrow.parquet

    with _open(piece.file.path) as source, pyarrow.parquet.ParquetFile(source) as file:
        path = _path_in(file.schema_arrow, piece, settings)
        groups = list(divide_evenly(file.metadata.num_row_groups, piece.part, piece.parts))
        column = [".".join(path)]
        for batch in file.iter_batches(ROWS_A_BATCH, row_groups=groups, columns=column, use_threads=False):
            yield _at(batch, path)


def _arrow_columns(piece: Piece, settings: TextSettings) -> Iterator[Any]:
    import pyarrow

    with _open(piece.file.path) as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
            schema, batches = stream.schema, iter(stream)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(source)
            schema, batches = file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        path = _path_in(schema, piece, settings)
        for batch in batches:
            column = _at(batch, path)
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                large = pyarrow.types.is_large_string(column.type)
                column = column.cast(pyarrow.large_binary() if large else pyarrow.binary())
            column.validate(full=True)  # offsets of a damaged file point anywhere
            for first in range(0, len(column), ROWS_A_BATCH):
                yield column.slice(first, ROWS_A_BATCH)


def _open(path: str) -> Any:
    """Open a file for pyarrow; a compressed one is decompressed in memory."""
    import pyarrow

    if not compression_of(path):
        return pyarrow.OSFile(os.fsencode(path), "rb")
    file, raw = open_input(path)
    with raw, file:
        return pyarrow.BufferReader(file.read())


def _path_in(schema: Any, piece: Piece, settings: TextSettings) -> tuple[str, ...]:
    """Find the names that lead to the text field, from the column to the struct fields within it."""
    import pyarrow

    def step(part: tuple[tuple[str, ...], Any], name: str) -> Any:
        path, kind = part
        if not isinstance(kind, (pyarrow.Schema, pyarrow.StructType)):
            return MISSING
        index = kind.get_field_index(name)
        return ((*path, name), kind.field(index).type) if index >= 0 else MISSING

    found = follow(((), schema), settings.field, step)
    if found is MISSING:
        raise missing_field(f"'{shown(piece.file.name)}'", settings.field, schema.names, settings.names)
    return found[0]


def _at(table: Any, path: Sequence[str]) -> Any:
    import pyarrow.compute

    column = table.column(path[0])
    if len(path) == 1:
        return column
    return pyarrow.compute.call_function("struct_field", [column], pyarrow.compute.StructFieldOptions(list(path[1:])))


def _explain(piece: Piece, settings: TextSettings, error: Exception) -> UserError:
    """Explain to a user why a table cannot be read; damage is said only of what looks like it."""
    path, problem = piece.file.path, f"Cannot read '{shown(piece.file.name)}' as {settings.format}: {one_line(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(path, error)
    if isinstance(error, MemoryError):
        remedy = "Use fewer workers, or write the file with smaller row groups."
    elif settings.format == "hub":
        remedy = "Check the network and the data set, and run the same command again."
    elif compression_of(path) and is_codec_error(error) and type(error).__module__.partition(".")[0] != "pyarrow":
        return explain_codec_error(path, error)
    elif isinstance(error, NotImplementedError):
        remedy = "Write it again in a way that pyarrow reads, such as parquet with zstd or snappy."
    elif "crypt" in str(error):
        remedy = "It is encrypted: decrypt it first."
    else:
        remedy = _remedy_of_table(path, settings)
    return UserError(problem, where=shown(path), remedy=remedy)


def _remedy_of_table(path: str, settings: TextSettings) -> str:
    file, raw = open_input(path)
    with raw, file:
        start = file.read(8)
    magics = (_PARQUET_MAGIC,) if settings.format == "parquet" else _ARROW_MAGICS
    if not start.startswith(magics):
        return f"It is no {settings.format} file, whatever its name says; see {settings.names('format')}."
    if settings.format == "parquet" and not compression_of(path):
        with open(path, "rb") as raw:
            raw.seek(-len(_PARQUET_MAGIC), os.SEEK_END)
            if raw.read() == _PARQUET_MAGIC:
                return "If another program reads it, write it again with that; if none does, it is damaged."
    return DAMAGED
