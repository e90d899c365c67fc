"""Rows of csv, parquet, arrow and hub data sets, through `datasets` in streaming mode: no copy on disk."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from tools.prepare.inputs import InputFile, Inputs
from tools.prepare.plan import Piece
from tools.prepare.readers import (
    INVALID_UTF8,
    NOT_TEXT,
    BadDocument,
    ReadSettings,
    ZstdReader,
    invalid_utf8,
    missing_field,
    open_input,
)
from trainer.errors import MaskwrightError, UserError

ROWS_A_BATCH = 1000


def read_table(piece: Piece, settings: ReadSettings) -> Iterator[tuple[str | BadDocument, int]]:
    """The text field of each row, in order, with the bytes consumed (estimated: a table has no byte positions)."""
    consumed = 0.0
    row_bytes = _bytes_a_row(piece) if settings.format == "parquet" else None
    try:
        for column in _columns(piece, settings):
            for value in column:
                text = _text_of(value, piece, settings)
                consumed = min(consumed + (row_bytes or (len(text) if isinstance(text, str) else 0)), piece.size)
                yield text, int(consumed)
    except (MaskwrightError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise invalid_utf8(piece.file.path, _first_invalid_byte(piece.file.path)) from error
    except Exception as error:  # pandas, pyarrow, datasets and every codec raise their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Cannot read '{piece.file.name}' as {settings.format}: {first_line}",
            where=piece.file.path,
            remedy="It is damaged, cut short or of another format; see --format.",
        ) from error


def find_hub_inputs(names: Sequence[str]) -> Inputs:
    """The training splits of hub data sets, named NAME or NAME:CONFIG (a local data set folder works as well).

    Raises:
        UserError: when a data set cannot be opened or has no split 'train'.
    """
    files, sources = [], []
    for source, name in enumerate(dict.fromkeys(names)):
        try:
            builder = _hub_builder(name)
            parts = builder.as_streaming_dataset(split="train").num_shards
        except Exception as error:  # the hub, the network and `datasets` raise a dozen kinds
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Cannot open the data set '{name}': {first_line}",
                where=name,
                remedy="Give its hub name, with :CONFIG if it has several; it needs a split called train.",
            ) from error
        size = int(builder.info.download_size or 0)
        label = os.path.basename(name.rstrip("/")) if os.path.isdir(name) else name
        files.append(InputFile(name, label, size, 0, source, parts, _hub_revision(builder)))
        sources.append({"name": label, "files": parts, "bytes": size})
    return Inputs("hub", tuple(files), tuple(sources))


def count_row_groups(path: str) -> int:
    """How many parts a parquet file can be cut into."""
    import pyarrow.parquet

    try:
        return max(1, pyarrow.parquet.ParquetFile(path).metadata.num_row_groups)
    except (OSError, ValueError):
        return 1  # damaged: the reader says so, with the name


def _bytes_a_row(piece: Piece) -> float | None:
    """Mean bytes on disk behind a row of a parquet file: its text is compressed, and beside it lie other columns."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(piece.file.path).num_rows
    except (OSError, ValueError):
        return None  # damaged: the reader says so, with the name
    return piece.file.size / rows if rows else None


def _text_of(value: Any, piece: Piece, settings: ReadSettings) -> str | BadDocument:
    """The text of a row; `value` is a UnicodeDecodeError where it has none."""
    if value is None or isinstance(value, str):
        return value or ""
    name, field = piece.file.name, settings.field
    if isinstance(value, UnicodeDecodeError):
        error = UserError(
            f"Not valid UTF-8: field '{field}' in a row of '{name}'.",
            where=piece.file.path,
            remedy="Write the file again from valid text.",
        )
        return BadDocument(INVALID_UTF8, lambda: error)
    error = UserError(
        f"Field '{field}' of '{name}' holds a {type(value).__name__}, not text.",
        where=f"--field {field}",
        remedy="Name the field that holds the text.",
    )
    return BadDocument(NOT_TEXT, lambda: error)


def _columns(piece: Piece, settings: ReadSettings) -> Iterator[list[Any]]:
    rows = _open_rows(piece, settings)
    for table in rows.with_format("arrow").iter(ROWS_A_BATCH):
        if settings.field not in table.column_names:
            raise missing_field(f"'{piece.file.name}'", settings.field, table.column_names)
        yield _values(table.column(settings.field))


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # written without a check: find the rows
        return [_decoded(raw) for raw in column.cast("binary").to_pylist()]


def _decoded(raw: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError as error:
        return error


def _open_rows(piece: Piece, settings: ReadSettings) -> Any:
    datasets = _quiet_datasets()
    path, field = piece.file.path, settings.field
    if settings.format == "hub":
        builder = _hub_builder(path)
        if _hub_revision(builder) != piece.file.revision:
            raise UserError(
                f"The data set '{path}' changed while it was read.", where=path, remedy="Run the same command again."
            )
        rows = builder.as_streaming_dataset(split="train")
        return rows.shard(piece.parts, piece.part) if piece.parts > 1 else rows
    options: dict[str, Any] = {}
    if settings.format == "csv":
        header = _csv_header(path)
        if field not in header:
            raise missing_field(f"'{piece.file.name}'", field, header)
        # Everything is text as it stands: "NA" stays "NA" and 1.50 stays 1.50.
        options["features"] = datasets.Features({name: datasets.Value("string") for name in header})
        options["keep_default_na"] = False
    if settings.format == "parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names
        if field not in names:
            raise missing_field(f"'{piece.file.name}'", field, names)
        options["columns"] = [field]
    rows = datasets.load_dataset(
        settings.format, data_files=[path], split="train", streaming=True, cache_dir=settings.scratch, **options
    )
    return rows.reshard().shard(piece.parts, piece.part) if piece.parts > 1 else rows


def _csv_header(path: str) -> list[str]:
    file, raw = open_input(path)
    with raw, file:
        return next(csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline="")), [])


def _first_invalid_byte(path: str) -> int:
    file, raw = open_input(path)
    offset = 0
    with raw, file:
        for line in file:  # a line end is never part of a longer UTF-8 sequence
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return offset


def _hub_builder(name: str) -> Any:
    datasets = _quiet_datasets()
    path, _, config = (name, "", "") if os.path.exists(name) else name.partition(":")
    return datasets.load_dataset_builder(path, config or None)


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
