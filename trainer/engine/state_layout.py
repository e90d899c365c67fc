"""Where the parameters lie that an optimizer updates as flat tensors: arithmetic, without ranks or DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

_ALIGNMENT = 2  # elements that the parts of stages 1 and 2 begin at multiples of


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


def planned(shapes: Sequence[tuple[int, ...]], stage: int, ranks: int) -> FlatLayout:
    """Lay out the parameters of a group as DeepSpeed 0.19.8 does at a ZeRO stage, before there is an engine.

    Stage 0 leaves them whole on all ranks, stages 1 and 2 cut the group into a part a rank, and stage 3 each parameter.
    """
    sizes = [math.prod(shape) for shape in shapes]
    part = -(-sum(sizes) // (_ALIGNMENT * ranks)) * _ALIGNMENT  # of a rank, at stages 1 and 2
    pieces, place = [], 0
    for number, size in enumerate(sizes):
        own = -(-size // ranks)  # of a rank, at stage 3
        for rank in range(ranks):
            if stage == 0:
                begin, end, start, flat = 0, size, 0, number
            elif stage == 3:
                begin, end, start, flat = min(rank * own, size), min((rank + 1) * own, size), place, 0
            else:
                begin, end = (min(max(edge * part - place, 0), size) for edge in (rank, rank + 1))
                start, flat = place + begin - rank * part, 0
            if begin < end:
                pieces.append(Piece(number, rank, flat, begin, start, end - begin))
        place += own if stage == 3 else size
    return FlatLayout(tuple(map(tuple, shapes)), tuple(pieces))
