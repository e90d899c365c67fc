"""Bring together the matrices whose pieces lie on several ranks, each on one of them, and take the results back.

Which rank that is follows from the layout alone, so that all ranks choose alike. A matrix that one rank holds does not
travel; of one that a cut runs through, one of the ranks that hold a piece gets the others. Where all ranks hold all
matrices (stage 0) they share the work, and only results travel. A step takes two collectives at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed

from trainer.engine.newton_schulz import iteration_flops
from trainer.engine.state_layout import FlatLayout, Piece


def choose_owners(layout: FlatLayout, ranks: int) -> list[int]:
    """Choose for each parameter one of the ranks that hold a piece of it, so that the ranks' work is about even.

    Those that have no choice come first, and then the expensive ones; of equals the lowest rank takes it.
    """
    holders: list[list[int]] = [[] for _ in layout.shapes]
    for piece in layout.pieces:
        holders[piece.parameter].append(piece.rank)
    costs = [iteration_flops(shape) for shape in layout.shapes]
    loads, owners = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: (len(holders[number]) > 1, -costs[number])):
        owner = min(holders[number], key=lambda rank: (loads[rank], rank))
        owners[number] = owner
        loads[owner] += costs[number]
    return owners


def pieces_away(layout: FlatLayout, ranks: int) -> list[tuple[Piece, bool]]:
    """List the pieces that lie elsewhere than their matrix is computed: where its result has to go.

    Returns:
        with each whether it is needed there as well, because that rank does not hold all of the matrix.
    """
    owners = choose_owners(layout, ranks)
    is_there = [piece.rank == owners[piece.parameter] for piece in layout.pieces]
    have_all = {p.parameter for p, there in zip(layout.pieces, is_there, strict=True) if there and layout.is_whole(p)}
    return [
        (piece, piece.parameter not in have_all)
        for piece, there in zip(layout.pieces, is_there, strict=True)
        if not there
    ]


class MatrixExchange:
    """The way of the matrices of one layout, there and back.

    Args:
        layout: of matrices.
        dtype: that they travel in, and are computed in.
        device: of the collectives.
    """

    def __init__(self, layout: FlatLayout, rank: int, ranks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layout, self._dtype, self._device = layout, dtype, device
        owners, away = choose_owners(layout, ranks), pieces_away(layout, ranks)
        self.owned = [number for number, owner in enumerate(owners) if owner == rank]
        """Numbers of the matrices that this rank computes."""
        self._gathered = _Way([piece for piece, is_needed in away if is_needed], owners, rank, ranks)
        self._returned = _Way([piece for piece, _ in away], owners, rank, ranks)
        self._here = [piece for piece in layout.own(rank) if owners[piece.parameter] == rank]

    def gather(self, flats: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Collect the matrices that this rank computes, by number, in their shapes; every rank calls it.

        Args:
            flats: this rank's flat tensors.
        """
        parts: dict[int, list[tuple[int, torch.Tensor]]] = {number: [] for number in self.owned}
        for piece in self._here:
            parts[piece.parameter].append((piece.begin, piece.of(flats).to(self._device, self._dtype)))
        way = self._gathered
        if way.is_used:
            sent = self._joined([piece.of(flats) for piece in way.outwards])
            arrived = sent.new_empty(sum(way.inwards_sizes))
            torch.distributed.all_to_all_single(arrived, sent, way.inwards_sizes, way.outwards_sizes)
            for piece, part in zip(way.inwards, arrived.split([piece.length for piece in way.inwards]), strict=True):
                parts[piece.parameter].append((piece.begin, part))
        return {number: _put_together(parts[number]).view(self._layout.shapes[number]) for number in self.owned}

    def give_back(self, results: Mapping[int, torch.Tensor], flats: Sequence[torch.Tensor]) -> None:
        """Write the results into the flat tensors, each piece where it lies; every rank calls it.

        Args:
            results: by number, of the matrices that this rank computes.
        """
        rows = {number: result.reshape(-1) for number, result in results.items()}
        for piece in self._here:
            piece.of(flats).copy_(rows[piece.parameter][piece.begin : piece.begin + piece.length])
        way = self._returned
        if way.is_used:
            sent = self._joined([rows[each.parameter][each.begin : each.begin + each.length] for each in way.inwards])
            arrived = sent.new_empty(sum(way.outwards_sizes))
            torch.distributed.all_to_all_single(arrived, sent, way.outwards_sizes, way.inwards_sizes)
            for piece, part in zip(way.outwards, arrived.split([each.length for each in way.outwards]), strict=True):
                piece.of(flats).copy_(part)

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        return torch.cat([nothing, *(part.to(self._device, self._dtype) for part in parts)])


class _Way:
    """Pieces that lie elsewhere than their matrix is computed, as one rank sees them.

    Attributes:
        is_used: whether any rank has such.
        outwards: this rank's pieces of matrices that others compute, and `outwards_sizes` of each rank's in elements.
        inwards: pieces on other ranks of the matrices that this one computes, and `inwards_sizes`.
    """

    def __init__(self, pieces: Sequence[Piece], owners: Sequence[int], rank: int, ranks: int) -> None:
        self.is_used = bool(pieces)
        outwards = [piece for piece in pieces if piece.rank == rank]
        inwards = [piece for piece in pieces if owners[piece.parameter] == rank]
        # Both ends list the pieces of a pair of ranks by parameter, and a rank has one piece of a parameter.
        self.outwards = sorted(outwards, key=lambda piece: (owners[piece.parameter], piece.parameter))
        self.inwards = sorted(inwards, key=lambda piece: (piece.rank, piece.parameter))
        self.outwards_sizes, self.inwards_sizes = [0] * ranks, [0] * ranks
        for piece in outwards:
            self.outwards_sizes[owners[piece.parameter]] += piece.length
        for piece in inwards:
            self.inwards_sizes[piece.rank] += piece.length


def _put_together(parts: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Put the parts of a matrix, each with its begin, end to end; one that is whole is not copied."""
    if len(parts) == 1:
        return parts[0][1]
    return torch.cat([part for _, part in sorted(parts, key=lambda found: found[0])])


def sent_elements(layout: FlatLayout, ranks: int) -> float:
    """Count the elements that a rank sends in a step, there and back, on the average of all."""
    return sum(piece.length * (1 + is_needed) for piece, is_needed in pieces_away(layout, ranks)) / ranks
