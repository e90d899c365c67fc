"""The unit plan: which bytes of which files one worker turns into one shard.

A pure function of the inputs (their order, sizes and formats), never of the number of workers: that is what
makes the result byte-identical for any number of them, and lets an interrupted run keep its finished units.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from tools.prepare.pieces import InputFile, InputFiles, Piece

MINIMUM_UNIT_BYTES = 4 << 20
MAXIMUM_UNIT_BYTES = 1 << 30
UNITS_WANTED = 1024
EXPANSION_OF_COMPRESSED = 4  # bytes of text behind a compressed byte, roughly: it decides unit sizes only


@dataclass(frozen=True)
class Unit:
    """What one worker writes as one shard (one for each split)."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(piece.size for piece in self.pieces)

    @property
    def shard(self) -> str:
        """The name of the shard that it becomes."""
        return f"shard-{self.number:05d}"

    def describe(self) -> str:
        """Say what the unit is made of, in words."""
        first = self.pieces[0]
        if len(self.pieces) > 1:
            return f"{len(self.pieces):,} files from '{first.file.name}' to '{self.pieces[-1].file.name}'"
        if first.parts > 1:
            return f"part {first.part + 1:,} of {first.parts:,} of '{first.file.name}'"
        return f"bytes {first.start:,} to {first.end:,} of '{first.file.name}'"

    def identity(self, settings: dict[str, Any]) -> str:
        """Hash all that decides the unit's shards: settings, and name, size and mtime of its files.

        The content itself is not read: at terabytes that would cost as much as the work it saves.
        """
        pieces = []
        for piece in self.pieces:
            file = {key: value for key, value in asdict(piece.file).items() if key not in ("path", "source")}
            pieces.append({**asdict(piece), "file": file})
        return xxhash.xxh3_128_hexdigest(json.dumps([self.number, settings, pieces], sort_keys=True).encode())


def plan_units(inputs: InputFiles, documents: str) -> tuple[Unit, ...]:
    """Cut large inputs, group small ones that follow each other.

    A unit holds about total / 1,024 bytes of text, at least 4 MiB and at most 1 GiB. Compressed files, and files
    that are one document, are never cut.
    """
    total = sum(weight_of(file) for file in inputs.files)
    wanted = min(max(total // UNITS_WANTED, MINIMUM_UNIT_BYTES), MAXIMUM_UNIT_BYTES)
    units: list[tuple[Piece, ...]] = []
    group: list[Piece] = []
    group_weight = 0
    for file in inputs.files:
        weight = weight_of(file)
        pieces = list(_cut(file, inputs.format, documents, max(1, -(-weight // wanted))))
        if group and (len(pieces) > 1 or group_weight + weight > wanted):
            units.append(tuple(group))
            group, group_weight = [], 0
        if len(pieces) > 1:
            units += [(piece,) for piece in pieces]
        else:
            group += pieces
            group_weight += weight
    if group:
        units.append(tuple(group))
    return tuple(Unit(number, pieces) for number, pieces in enumerate(units))


def weight_of(file: InputFile) -> int:
    """Estimate the bytes of text in a file."""
    return file.size * (EXPANSION_OF_COMPRESSED if file.compressed else 1)


def _cut(file: InputFile, format: str, documents: str, wanted: int) -> Iterator[Piece]:
    if format == "hub":
        parts = file.parts
    elif wanted == 1 or file.compressed or documents == "file" or format in ("csv", "arrow"):
        parts = 1
    elif format == "parquet":
        from tools.prepare.tables import count_row_groups

        parts = min(wanted, count_row_groups(file.path))
    else:
        for number in range(wanted):
            yield Piece(file, number * file.size // wanted, (number + 1) * file.size // wanted)
        return
    for part in range(parts):
        yield Piece(file, part * file.size // parts, (part + 1) * file.size // parts, part, parts)
