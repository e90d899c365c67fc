"""Where the parameters lie that an optimizer updates as flat tensors: arithmetic, without ranks or DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter, on one rank.

    Attributes:
        parameter: its number among those of the layout.
        flat: number of the flat tensor, of those of the layout.
        begin: of the first element in the flattened parameter.
        start: of the first element in the flat tensor.
    """

    parameter: int
    rank: int
    flat: int
    begin: int
    start: int
    length: int

    def of(self, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        """View its elements in this rank's flat tensors."""
        return flats[self.flat][self.start : self.start + self.length]


@dataclass(frozen=True)
class FlatLayout:
    """The parameters of some flat tensors, and the pieces of them that each rank holds.

    Attributes:
        shapes: of the parameters.
        pieces: of all ranks, by parameter and rank.
    """

    shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> FlatLayout:
        """Describe a parameter that is its own flat tensor, with nobody else who holds any of it."""
        return cls((tuple(tensor.shape),), (Piece(0, 0, 0, 0, 0, tensor.numel()),))

    def own(self, rank: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.rank == rank]

    def is_whole(self, piece: Piece) -> bool:
        """Tell whether a piece is all of its parameter."""
        return piece.length == math.prod(self.shapes[piece.parameter])


def joined(layouts: Sequence[FlatLayout]) -> FlatLayout:
    """Put together the layouts of flat tensors that are updated together."""
    shapes: list[tuple[int, ...]] = []
    pieces: list[Piece] = []
    for flat, layout in enumerate(layouts):
        before = len(shapes)
        pieces += (replace(piece, parameter=piece.parameter + before, flat=flat) for piece in layout.pieces)
        shapes += layout.shapes
    return FlatLayout(tuple(shapes), tuple(pieces))
