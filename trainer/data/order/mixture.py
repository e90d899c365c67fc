"""How several sources are mixed: their weights over time, and how often each is seen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from trainer.config import DataConfig
from trainer.data.order.run_order import RunOrder, phase_seed
from trainer.data.order.sample_order import SampleOrder
from trainer.errors import UserError
from trainer.schedule.phases import Phases, changes


def mixture_order(
    data: DataConfig, phases: Phases, blocks: Sequence[Sequence[int]], tokens: Sequence[int], seed: int
) -> RunOrder:
    """Make the order that a config asks for.

    Args:
        blocks: whole blocks of each source, in each phase.
        tokens: of each source; with a temperature T its weight is tokens^(1/T) (Arivazhagan et al., arXiv:1907.05019).
        seed: of the run.

    Raises:
        UserError: when a source that has a weight has no block.
    """
    stages = weight_stages(data, phases, tokens)
    if data.stages:
        _check_stages(data, [start for start, _ in stages[1:]])
    orders = []
    for number, (phase, counts) in enumerate(zip(phases, blocks, strict=True)):
        begun = max(place for place, (start, _) in enumerate(stages) if start <= phase.first_sample)
        later = [
            (start - phase.first_sample, weights)
            for start, weights in stages[begun + 1 :]
            if phase.end_sample is None or start < phase.end_sample
        ]
        orders.append(
            SampleOrder(
                counts,
                stages[begun][1],
                seed=phase_seed(seed, number),
                chunk_blocks=data.chunk_blocks,
                window_chunks=data.window_chunks,
                mixture_block=data.mixture_block,
                changes=later,
            )
        )
    return RunOrder(phases, orders, seed)


def _check_stages(data: DataConfig, starts: Sequence[int]) -> None:
    """Refuse two stages that begin with the same block; `starts` are their first samples."""
    for number, (first, second) in enumerate(itertools.pairwise(starts)):
        if first == second:
            before, stage = data.stages[number], data.stages[number + 1]
            raise UserError(
                f"The stages from token {before.from_tokens:,} and from token {stage.from_tokens:,} would begin with "
                "the same block.",
                where=f"data.stages[{number + 1}].from_tokens={stage.from_tokens}",
                remedy=f"Let them begin a block ({data.seq_len} tokens) apart at least, or leave one of them out.",
            )


def weight_stages(data: DataConfig, phases: Phases, tokens: Sequence[int]) -> list[tuple[int, list[float]]]:
    """List the weights of the sources over the run, as (first sample, weights), the first from 0 on."""
    if data.temperature is not None:
        # One token at least: a source of which nothing is left has a weight, and is refused as one without a block.
        weights = [max(1, count) ** (1 / data.temperature) for count in tokens]
    else:
        weights = [1.0 if source.weight is None else source.weight for source in data.train]
    labels = [source.label for source in data.train]
    if any(phase.weights is not None for phase in data.phases):
        of_phases = [
            weights if phase.weights is None else [phase.weights.get(label, 0.0) for label in labels]
            for phase in data.phases
        ]
        # Of two that begin with the same sample the first has none.
        begun = {phase.first_sample: each for phase, each in zip(phases, [*of_phases, weights], strict=True)}
        return changes(list(begun.items()))
    later = [
        (phases.sample_at(stage.from_tokens), [stage.weights.get(label, 0.0) for label in labels])
        for stage in data.stages
    ]
    return [(0, weights), *later]


def check_epochs(data: DataConfig, order: RunOrder, total_samples: int) -> None:
    """Refuse a run that passes over a source more often than its `max_epochs`.

    Raises:
        UserError: with the numbers of each such source.
    """
    epochs = order.epochs(total_samples)
    over = [
        (number, source.label, seen, source.max_epochs)
        for number, (source, seen) in enumerate(zip(data.train, epochs, strict=True))
        if source.max_epochs is not None and seen > source.max_epochs
    ]
    if over:
        passes = "; ".join(
            f"'{label}' ({order.orders[-1].blocks[number]:,} blocks) {seen:.2f} times, at most {limit:g} are allowed"
            for number, label, seen, limit in over
        )
        raise UserError(
            f"The run would pass over {passes}.",
            where=", ".join(f"data.train[{number}].max_epochs" for number, *_ in over),
            remedy="Lower the weight or train for less, add text, or raise max_epochs.",
        )


def describe_mixture(data: DataConfig, order: RunOrder, tokens: Sequence[int], epochs: Sequence[float]) -> list[str]:
    """Say of each source its share of the samples at every stage, and how often the run passes over it."""
    lines = []
    stages = weight_stages(data, order.phases, tokens)
    for number, (source, passes) in enumerate(zip(data.train, epochs, strict=True)):
        shares = [
            f"{weights[number] / sum(weights):.2%}"
            + (f" from token {order.phases.tokens(start):,} on" if start else "")
            for start, weights in stages
        ]
        lines.append(f"  {source.label}: {', '.join(shares)}; {passes:.2f} epochs")
    return lines
