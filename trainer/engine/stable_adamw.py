"""StableAdamW: AdamW whose steps are shorter with a parameter whose gradient its second moment did not foresee.

Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (arXiv:2304.13013),
algorithm 2: with û the second moment, corrected for its bias, over all elements of a parameter

    RMS_t = sqrt(mean(g_t^2 / max(û_t, eps^2)))        lr_t = lr / max(1, RMS_t)

and AdamW's update and decay by lr_t. (The paper corrects by decay rates that change with the step, which comes to
Adam's û.) The state is AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed

from trainer.engine.flat_optimizer import FlatOptimizer, Flats, adamw_settings, kernels
from trainer.engine.grad_norm import sum_of_squares
from trainer.engine.state_layout import FlatLayout, Piece
from trainer.engine.state_size import ELEMENTS_AT_ONCE


class StableAdamW(FlatOptimizer):
    """torch's groups of AdamW; a parameter that lies on several ranks takes one sum over them, of all such together."""

    def update(self, flats: Flats, group: Mapping[str, Any]) -> None:
        """Update each piece by the kernel of AdamW, with the learning rate of its parameter."""
        pieces = flats.layout.own(self.place.rank)
        sums = [total for few in _in_turn(pieces) for total in _square_ratios(few, flats, group)]
        whole = self._over_ranks(flats.layout, pieces, sums)
        counts = [math.prod(flats.layout.shapes[piece.parameter]) for piece in pieces]
        for piece, total, count in zip(pieces, whole, counts, strict=True):
            root = (total / count).sqrt().float()
            kernels._fused_adamw_(
                [piece.of(flats.weights)],
                [piece.of(flats.gradients)],
                [piece.of(flats.moments["exp_avg"])],
                [piece.of(flats.moments["exp_avg_sq"])],
                [],
                [flats.steps[piece.flat]],
                **adamw_settings(group),
                lr=group["lr"] / root.clamp(min=1.0),
            )

    def _over_ranks(
        self, layout: FlatLayout, pieces: Sequence[Piece], sums: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Sum over the ranks what belongs to parameters of which they hold parts; a collective if there are such.

        Args:
            sums: fp64 [], of this rank's pieces.

        Returns:
            those of their whole parameters.
        """
        parts = sorted({piece.parameter for piece in layout.pieces if not layout.is_whole(piece)})
        if not parts:
            return sums
        numbers = {parameter: number for number, parameter in enumerate(parts)}
        totals = torch.zeros(len(parts), dtype=torch.float64, device=self.place.device)
        for piece, total in zip(pieces, sums, strict=True):
            if (number := numbers.get(piece.parameter)) is not None:
                totals[number] = total
        torch.distributed.all_reduce(totals)
        # To where the state is: that is the host, if it is offloaded.
        found = totals.to(sums[0].device).unbind() if sums else ()
        return [
            found[numbers[piece.parameter]] if piece.parameter in numbers else total
            for piece, total in zip(pieces, sums, strict=True)
        ]


def _square_ratios(pieces: Sequence[Piece], flats: Flats, group: Mapping[str, Any]) -> list[torch.Tensor]:
    """Sum g^2 / max(û, eps^2) over each piece, with the second moment as this step will leave it; fp64 []."""
    decay = group["betas"][1]
    gradients = [piece.of(flats.gradients) for piece in pieces]
    second = kernels._foreach_mul([piece.of(flats.moments["exp_avg_sq"]) for piece in pieces], decay)
    kernels._foreach_addcmul_(second, gradients, gradients, value=1 - decay)
    for tensor, piece in zip(second, pieces, strict=True):
        tensor.div_(1 - decay ** flats.steps[piece.flat])
    # The square of an eps below 1e-23 is nought in fp32, and so would be the bound for what never had a gradient.
    kernels._foreach_clamp_min_(second, max(group["eps"] ** 2, torch.finfo(torch.float32).tiny))
    kernels._foreach_rsqrt_(second)
    kernels._foreach_mul_(second, gradients)
    return [sum_of_squares([tensor]) for tensor in second]


def _in_turn(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Divide pieces, in their order, into some of up to ELEMENTS_AT_ONCE together, or one that has more."""
    few: list[Piece] = []
    for piece in pieces:
        if few and sum(each.length for each in few) + piece.length > ELEMENTS_AT_ONCE:
            yield few
            few = []
        few.append(piece)
    if few:
        yield few
