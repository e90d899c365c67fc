"""What the numbers and names of a data manifest must satisfy; types are checked before (`trainer.runtime.typed_json`).

A number that is changed in a manifest would move every later block without a word, and a name could lead out of the
folder. The checks cost nothing: they read no shard.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.token_marks import START_PLANES, plane_bytes

if TYPE_CHECKING:
    from trainer.data.shard_writer import Manifest, ShardEntry

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_OFFSET_BYTES = _SUM_BYTES = 8  # of an entry of NAME.doc and NAME.sum
_NEEDED = ("tok", "doc", "sum")
_SHOWN_CHARACTERS = 60


def is_shard_name(name: str) -> bool:
    """Whether files called NAME.tok, NAME.doc, … lie in the folder of the manifest, whatever the name."""
    return _NAME.fullmatch(name) is not None


def check_entry(entry: ShardEntry, item_bytes: int | None = None) -> None:
    """Raise ValueError when an entry contradicts itself.

    Args:
        item_bytes: a token; None where it is not known.
    """
    if not is_shard_name(entry.name):
        raise ValueError(f"shards: {entry.name[:_SHOWN_CHARACTERS]!r} cannot be the name of a shard")
    unknown = sorted(entry.files.keys() - {*_NEEDED, *START_PLANES})
    lacking = [suffix for suffix in _NEEDED if suffix not in entry.files]
    if unknown or lacking:
        problem = f"has no .{lacking[0]}" if lacking else f"has a .{unknown[0][:_SHOWN_CHARACTERS]}"
        raise ValueError(f"shards: {entry.name} {problem}")
    if entry.documents > entry.tokens or (entry.tokens and not entry.documents):
        raise ValueError(f"shards: {entry.name} has {entry.documents:,} documents in {entry.tokens:,} tokens")
    sizes = {suffix: size for suffix, (size, _) in entry.files.items()}
    expected = {"doc": (entry.documents + 1) * _OFFSET_BYTES, "sum": -(-sizes["tok"] >> 20) * _SUM_BYTES}
    expected |= {plane: plane_bytes(entry.tokens) for plane in START_PLANES if plane in sizes}
    if item_bytes is not None:
        expected["tok"] = entry.tokens * item_bytes
    for suffix, size in expected.items():
        if sizes[suffix] != size:
            held = f"{entry.tokens:,} tokens and {entry.documents:,} documents"
            raise ValueError(f"shards: {entry.name}.{suffix}: {sizes[suffix]:,} bytes, but {size:,} hold {held}")


def check_manifest(manifest: Manifest, dtype: np.dtype) -> None:
    """Raise ValueError when a manifest contradicts itself.

    Args:
        dtype: in which a vocabulary of this size is stored.
    """
    if manifest.dtype != dtype.str:
        found = repr(manifest.dtype[:_SHOWN_CHARACTERS])
        raise ValueError(f"dtype is {found}, but a vocabulary of {manifest.vocabulary_size:,} has {dtype.str}")
    for entry in manifest.shards:
        check_entry(entry, dtype.itemsize)
    if len({entry.name for entry in manifest.shards}) < len(manifest.shards):
        raise ValueError("shards: two have the same name")
    for name in ("tokens", "documents"):
        counted, said = sum(getattr(entry, name) for entry in manifest.shards), getattr(manifest, name)
        if counted != said:
            raise ValueError(f"{name} is {said:,}, but the shards have {counted:,}")
    if manifest.separator_id > np.iinfo(dtype).max:
        raise ValueError(f"separator_id is {manifest.separator_id:,}, which {dtype.str} cannot hold")
    for source in manifest.sources:
        if not isinstance(source.get("name"), str) or not _is_count(source.get("bytes")):
            raise ValueError("sources: each must have a name and bytes")
    for name in manifest.tokenizer_files:
        if not is_shard_name(name):
            raise ValueError(f"tokenizer_files: {name[:_SHOWN_CHARACTERS]!r} cannot be the name of a file")
    longest = manifest.statistics.get("longest_document_tokens", 0)
    if not _is_count(longest) or longest > manifest.tokens:
        raise ValueError(f"statistics.longest_document_tokens is {str(longest)[:_SHOWN_CHARACTERS]}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
