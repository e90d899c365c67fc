"""Data sets of the Hugging Face hub, by their names; their rows are read from its cache."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import xxhash

from tools.prepare.compression import (
    ZstdReader,
)
from tools.prepare.paths import shown
from tools.prepare.pieces import InputFile, InputFiles, Piece
from trainer.errors import UserError

_MESSAGE_CHARACTERS = 600


def find_hub_inputs(names: Sequence[str]) -> InputFiles:
    """Find splits of hub data sets, named NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (a local data set folder works, too).

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
                f"Cannot open the data set '{name}': {one_line(error)}",
                where=name,
                remedy="Give its name on the hub, or its folder: NAME, NAME:CONFIG if it has several, and "
                "NAME:CONFIG:SPLIT for another split than train (NAME::SPLIT without a config).",
            ) from error
        size = int(builder.info.download_size or 0)
        label = shown(os.path.basename(name.rstrip("/"))) if os.path.exists(_hub_name(name)[0]) else name
        files.append(InputFile(name, label, size, 0, source, parts, _hub_revision(builder)))
        sources.append({"name": label, "files": parts, "bytes": size})
    return InputFiles("hub", tuple(files), tuple(sources))


def hub_rows(piece: Piece) -> Any:
    name = piece.file.path
    builder, split = _hub_builder(name)
    if _hub_revision(builder) != piece.file.revision:
        raise UserError(
            f"The data set '{name}' changed while it was read.", where=name, remedy="Run the same command again."
        )
    rows = builder.as_streaming_dataset(split=split)
    return rows.shard(piece.parts, piece.part) if piece.parts > 1 else rows


def _hub_name(name: str) -> tuple[str, str, str]:
    """Split NAME:CONFIG:SPLIT into its parts; those that are not given are empty."""
    if os.path.exists(name):
        return name, "", ""
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return path, config, split


def _hub_builder(name: str) -> tuple[Any, str]:
    """Load the builder of a data set, and find the split that is meant."""
    datasets = _quiet_datasets()
    path, config, split = _hub_name(name)
    return datasets.load_dataset_builder(path, config or None), split or "train"


def _hub_revision(builder: Any) -> str:
    """Hash the resolved files: for the hub they carry the commit, for a local folder their times."""
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


def divide_evenly(count: int, part: int, parts: int) -> range:
    """Give the numbers of part `part` of `parts` of `count` things: neighbours, the first parts one larger."""
    each, more = divmod(count, parts)
    first = part * each + min(part, more)
    return range(first, first + each + (part < more))


def one_line(error: Exception) -> str:
    """Write a foreign message on one line, and not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "…"
