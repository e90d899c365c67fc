"""Source after source into shards: linked where the file is what a shard holds, else converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tools.import_tokens.clean import Cleaner
from tools.import_tokens.source import FlatFile, TokenSource
from tools.import_tokens.write import (
    Report,
    ShardRecord,
    ShardSettings,
    link_shard,
    possible_link,
    read_shard_record,
    write_shard,
)
from tools.prepare.estimate import check_free_space
from trainer.errors import UserError

SHARD_TOKENS = 1 << 28


@dataclass
class TokenConversion:
    """Shards of all sources so far.

    Attributes:
        link: None links where that is possible, True always or not at all, False never.
        identity: what decides the shards besides their documents: settings and tokenizer.
        on_progress: called with the bytes read so far, of all sources.
        converted: for each source that was not linked, its name and why.
    """

    cleaner: Cleaner
    settings: ShardSettings
    link: bool | None
    identity: dict[str, Any]
    on_progress: Callable[[int], None]
    records: list[ShardRecord] = field(default_factory=list)
    converted: list[tuple[str, str]] = field(default_factory=list)
    _read_bytes: int = 0

    def add(self, source: TokenSource) -> None:
        """Link or convert one source; shards that an interrupted run finished are kept.

        Raises:
            UserError: when it must be linked and cannot be.
        """
        linked = None
        if self.link is not False and not self.settings.validation_fraction:
            linked, reason = self._linked(source)
            if linked is None and self.link:
                raise UserError(
                    f"'{source.name}' cannot be linked: {reason}.",
                    where=source.path,
                    remedy="Leave --link out to convert it.",
                )
            if linked is None and isinstance(source, FlatFile):
                self.converted.append((source.name, reason))
        if linked is not None:
            self.records.append(linked)
        else:
            self._convert(source)
        self._read_bytes += source.size

    def _linked(self, source: TokenSource) -> tuple[ShardRecord | None, str]:
        """Link the source as a shard; else return None and why it has to be converted."""
        number, identity = len(self.records), self._identity(source, 0, source.documents, "linked")
        record = self._kept(number, identity)
        if record is not None:
            return record, ""
        if not isinstance(source, FlatFile):
            return None, "it is not a flat file of tokens"
        if _same_bytes(source.dtype) != self.settings.dtype or not source.documents:
            return None, f"its tokens are {source.dtype.name}, those of this vocabulary {self.settings.dtype.name}"
        link = possible_link(Path(source.path), self.settings.work_folder, symbolic=bool(self.link))
        if link is None:
            return None, "the file system of the output cannot link to it"
        report = self._report(source, 0, source.documents)
        result = link_shard(source, number, identity, self.cleaner, self.settings, link, report)
        if isinstance(result, int):
            return None, f"its document {result:,} (counted from 0) is not a content and one separator"
        return result, ""

    def _convert(self, source: TokenSource) -> None:
        ranges = source.cut(SHARD_TOKENS)
        check_free_space(self.settings.work_folder, source.tokens * self.settings.dtype.itemsize)
        for first, last in ranges:
            number, identity = len(self.records), self._identity(source, first, last, "converted")
            record = self._kept(number, identity)
            if record is None:
                report = self._report(source, first, last)
                record = write_shard(source, (first, last), number, identity, self.cleaner, self.settings, report)
            self.records.append(record)

    def _kept(self, number: int, identity: str) -> ShardRecord | None:
        """Read the record of a shard that is finished and whole; None when it is to be written."""
        record = read_shard_record(self.settings.work_folder, number)
        if record is None or record.identity != identity or not record.is_whole(self.settings.folders):
            return None
        return record

    def _report(self, source: TokenSource, first: int, last: int) -> Report:
        """Make a function that turns the share of documents [first, last) that is done into bytes of all sources."""

        def report(share: float) -> None:
            documents = first + share * (last - first)
            self.on_progress(self._read_bytes + int(source.size * documents / source.documents))

        return report

    def _identity(self, source: TokenSource, first: int, last: int, how: str) -> str:
        decisive = [self.identity, source.name, source.size, source.mtime_ns, first, last, how]
        return xxhash.xxh3_128_hexdigest(repr(decisive).encode())


def _same_bytes(dtype: np.dtype) -> np.dtype:
    """Find the unsigned type that stores an id in the same bytes."""
    return np.dtype(dtype.str.replace("i", "u"))
