"""Rows of parquet and arrow files through pyarrow, and of hub data sets through `datasets`: no copy on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from tools.prepare.bad_documents import INVALID_UTF8, NOT_TEXT, BadDocument
from tools.prepare.compression import (
    DAMAGED,
    ZstdReader,
    compression_of,
    explain_codec_error,
    explain_os_error,
    is_codec_error,
    open_input,
)
from tools.prepare.fields import MISSING, follow, missing_field
from tools.prepare.inputs import InputFile, Inputs
from tools.prepare.paths import shown
from tools.prepare.plan import Piece
from tools.prepare.readers import ReadSettings, not_text_remedy
from trainer.errors import MaskwrightError, UserError

ROWS_A_BATCH = 1000
_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGICS = (b"ARROW1", b"\xff\xff\xff\xff")  # a file; a stream
_MESSAGE_CHARACTERS = 600


def read_table(piece: Piece, settings: ReadSettings) -> Iterator[tuple[str | BadDocument, int]]:
    """The text field of each row, in order, with the bytes consumed (estimated: a table has no byte positions)."""
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


def find_hub_inputs(names: Sequence[str]) -> Inputs:
    """Splits of hub data sets, named NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (a local data set folder works as well).

    Without a split it is `train`; CONFIG may be empty.

    Raises:
        UserError: when a data set cannot be opened or has no such split.
    """
    files, sources = [], []
    for source, name in enumerate(dict.fromkeys(names)):
        try:
            builder, split = _hub_builder(name)
            parts = builder.as_streaming_dataset(split=split).num_shards
        except Exception as error:  # the hub, the network and `datasets` raise a dozen kinds
            raise UserError(
                f"Cannot open the data set '{name}': {_message(error)}",
                where=name,
                remedy="Give its name on the hub, or its folder: NAME, NAME:CONFIG if it has several, and "
                "NAME:CONFIG:SPLIT for another split than train (NAME::SPLIT without a config).",
            ) from error
        size = int(builder.info.download_size or 0)
        label = shown(os.path.basename(name.rstrip("/"))) if os.path.exists(_hub_name(name)[0]) else name
        files.append(InputFile(name, label, size, 0, source, parts, _hub_revision(builder)))
        sources.append({"name": label, "files": parts, "bytes": size})
    return Inputs("hub", tuple(files), tuple(sources))


def count_row_groups(path: str) -> int:
    """How many parts a parquet file can be cut into."""
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            return max(1, pyarrow.parquet.read_metadata(file).num_row_groups)
    except (OSError, ValueError, NotImplementedError):
        return 1  # the reader says what is wrong with it, with the name


def _bytes_a_row(piece: Piece) -> float | None:
    """Mean bytes on disk behind a row of a parquet file: its text is compressed, and beside it lie other columns."""
    import pyarrow.parquet

    with _open(piece.file.path) as file:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    return piece.file.size / rows if rows else None


def _text_of(value: Any, piece: Piece, settings: ReadSettings) -> str | BadDocument:
    """The text of a row; bytes are UTF-8."""
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


def _columns(piece: Piece, settings: ReadSettings) -> Iterator[Any]:
    """The column of the text, some rows at a time."""
    if settings.format == "parquet":
        yield from _parquet_columns(piece, settings)
    elif settings.format == "arrow":
        yield from _arrow_columns(piece, settings)
    else:
        for table in _hub_rows(piece).with_format("arrow").iter(ROWS_A_BATCH):
            yield _at(table, _path_in(table.schema, piece, settings))


def _parquet_columns(piece: Piece, settings: ReadSettings) -> Iterator[Any]:
    import pyarrow.parquet

    with _open(piece.file.path) as source, pyarrow.parquet.ParquetFile(source) as file:
        path = _path_in(file.schema_arrow, piece, settings)
        groups = list(_share(file.metadata.num_row_groups, piece.part, piece.parts))
        column = [".".join(path)]
        for batch in file.iter_batches(ROWS_A_BATCH, row_groups=groups, columns=column, use_threads=False):
            yield _at(batch, path)


def _arrow_columns(piece: Piece, settings: ReadSettings) -> Iterator[Any]:
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


def _share(count: int, part: int, parts: int) -> range:
    """The numbers of part `part` of `parts` of `count` things: neighbours, the first parts one larger."""
    each, more = divmod(count, parts)
    first = part * each + min(part, more)
    return range(first, first + each + (part < more))


def _open(path: str) -> Any:
    """A file that pyarrow reads; a compressed one is decompressed in memory."""
    import pyarrow

    if not compression_of(path):
        return pyarrow.OSFile(os.fsencode(path), "rb")
    file, raw = open_input(path)
    with raw, file:
        return pyarrow.BufferReader(file.read())


def _path_in(schema: Any, piece: Piece, settings: ReadSettings) -> tuple[str, ...]:
    """The names that lead to the text field, from the column to the struct fields within it."""
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


def _explain(piece: Piece, settings: ReadSettings, error: Exception) -> UserError:
    """What a user is told when a table cannot be read; damage is said only of what looks like it."""
    path, problem = piece.file.path, f"Cannot read '{shown(piece.file.name)}' as {settings.format}: {_message(error)}"
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


def _remedy_of_table(path: str, settings: ReadSettings) -> str:
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


def _message(error: Exception) -> str:
    """A foreign message on one line, and not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "…"


def _hub_rows(piece: Piece) -> Any:
    name = piece.file.path
    builder, split = _hub_builder(name)
    if _hub_revision(builder) != piece.file.revision:
        raise UserError(
            f"The data set '{name}' changed while it was read.", where=name, remedy="Run the same command again."
        )
    rows = builder.as_streaming_dataset(split=split)
    return rows.shard(piece.parts, piece.part) if piece.parts > 1 else rows


def _hub_name(name: str) -> tuple[str, str, str]:
    """The parts of NAME:CONFIG:SPLIT; those that are not given are empty."""
    if os.path.exists(name):
        return name, "", ""
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return path, config, split


def _hub_builder(name: str) -> tuple[Any, str]:
    """The builder of a data set, and the split that is meant."""
    datasets = _quiet_datasets()
    path, config, split = _hub_name(name)
    return datasets.load_dataset_builder(path, config or None), split or "train"


def _hub_revision(builder: Any) -> str:
    """Hash of the resolved files: for the hub they carry the commit, for a local folder their times."""
    files = builder.config.data_files or {}
    found = [(split, list(files[split]), getattr(files[split], "origin_metadata", None)) for split in sorted(files)]
    return xxhash.xxh3_128_hexdigest(repr(found).encode())


def _quiet_datasets() -> Any:
    from importlib import import_module

    from fsspec.compression import register_compression

    datasets: Any = import_module("datasets")
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # reading a local file asks nothing of the network
    register_compression("zstd", lambda file, mode="rb": io.BufferedReader(ZstdReader(file)), "zst", force=True)
    return datasets
