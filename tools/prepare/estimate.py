"""How large the result will be, from a sample, before any of it is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.prepare.bad_documents import Losses
from tools.prepare.encode import Encoder
from tools.prepare.pieces import Piece, TextSettings
from tools.prepare.plan import Unit
from tools.prepare.readers import read_documents
from tools.prepare.summary import human_bytes
from trainer.errors import UserError

SAMPLED_UNITS = 4
SAMPLE_CHARACTERS = 1 << 17
_DOCUMENT_BYTES = 8  # one offset in NAME.doc
_HEADROOM = 1.05


@dataclass(frozen=True)
class Estimate:
    """Expected tokens and bytes of the shards."""

    tokens: float
    output_bytes: float


def estimate_output(
    units: Sequence[Unit],
    reading: TextSettings,
    encoder: Encoder,
    dtype: np.dtype,
    marks: int = 0,
    losses: Losses | None = None,
) -> Estimate:
    """Tokenize about 128 Ki characters from each of up to four units and extrapolate by bytes read.

    Args:
        marks: how many token marks there will be, of one bit a token.
        losses: as in `read_documents`.

    Raises:
        UserError: what is wrong with the input at those places.
    """
    tokens, documents, read_bytes = 0, 0, 0.0
    for index in np.linspace(0, len(units) - 1, min(SAMPLED_UNITS, len(units))).astype(int):
        texts, position = _sample(units[index].pieces[0], reading, losses)
        if texts:  # a piece within one huge document has none of its own
            tokens += sum(len(encoded.ids) for encoded in encoder.encode(texts)) + len(texts)
            documents += len(texts)
            read_bytes += position
    total = sum(unit.size for unit in units)
    scale = total / read_bytes if read_bytes else 0.0
    return Estimate(tokens * scale, (tokens * (dtype.itemsize + marks / 8) + documents * _DOCUMENT_BYTES) * scale)


def _sample(piece: Piece, reading: TextSettings, losses: Losses | None) -> tuple[list[str], float]:
    """Read about SAMPLE_CHARACTERS of the piece's documents, and compute the bytes on disk that they took."""
    texts, characters = [], 0
    for text, consumed in read_documents(piece, reading, losses):
        texts.append(text[:SAMPLE_CHARACTERS])
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            if len(texts) > 1 or piece.file.compressed:
                return texts, consumed * sum(map(len, texts)) / characters
            return texts, max(consumed, min(len(text), piece.file.size)) * len(texts[0]) / characters
    return texts, piece.size


def check_free_space(folder: Path, needed_bytes: float) -> None:
    """Raise UserError when the shards cannot fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed_bytes * _HEADROOM > free:
        raise UserError(
            f"The shards need about {human_bytes(needed_bytes)}, but only {human_bytes(free)} are free.",
            where=str(folder),
            remedy="Free some space, or choose an --output on another disk.",
        )
