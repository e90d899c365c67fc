"""What a plan comes to: the layout to take and why, and what gives way when nodes are added."""

from __future__ import annotations

from dataclasses import dataclass

from tools.plan.layouts import Layout, Layouts
from trainer.schedule.batch_plan import micro_sizes

GPU_COUNTS = tuple(2**power for power in range(11))  # 1 to 1,024
# What a higher stage has to gain: its many small collectives and its work on the host are not in the model.
_SAME = 1.10
_POOR_GAIN = 1.5  # of twice the GPUs


@dataclass(frozen=True)
class Recommendation:
    layout: Layout | None
    """None when no stage has room for a single block."""
    reason: str


def best_of_each_stage(layouts: Layouts, world_size: int) -> dict[int, Layout | None]:
    """Find at each stage the largest micro-batch that fits; None where none does."""
    best: dict[int, Layout | None] = {}
    for stage, zero in layouts.stages.items():
        size = layouts.largest_micro_size(world_size, zero)
        best[stage] = None if size is None else layouts.layout(world_size, size, zero)
    return best


def recommend(best: dict[int, Layout | None], configured: int) -> Recommendation:
    """Recommend the largest micro-batch of the configured stage.

    Where that is beaten by more than 10 %, recommend that of the lowest stage that is not.
    """
    fitting = [layout for layout in best.values() if layout is not None]
    if not fitting:
        return Recommendation(
            None, "nothing fits: use activation checkpointing, a shorter data.seq_len or a smaller model"
        )
    fastest = min(layout.time.seconds for layout in fitting)
    good = [layout for layout in fitting if layout.time.seconds <= _SAME * fastest]
    chosen = next((layout for layout in good if layout.stage == configured), good[0])
    reason = [f"micro-batch {chosen.micro_size} is the largest that divides and fits"]
    too_large = [str(stage) for stage, layout in best.items() if layout is None]
    if too_large:
        reason.append(f"stage {' and '.join(too_large)} has no room for one block")
    for other in fitting:
        if other is not chosen:
            time = other.time.seconds / chosen.time.seconds
            sends = other.wire.elements / max(1, chosen.wire.elements)
            reason.append(
                f"stage {other.stage} with its own largest takes {time:.2f} × the time and sends {sends:.2g} × as much"
            )
    return Recommendation(chosen, "; ".join(reason))


def _sizes(layouts: Layouts, world_size: int) -> list[int]:
    return micro_sizes(layouts.config.data, layouts.config.batch, world_size)


def scale(layouts: Layouts, stage: int, largest: int, world_sizes: tuple[int, ...] = GPU_COUNTS) -> list[Layout | None]:
    """Lay out a stage at each number of GPUs with the largest micro-batch up to `largest` that divides, else None.

    The global batch is that of the config throughout: what changes is how it is divided.
    """
    zero, rows = layouts.stages[stage], []
    for world_size in world_sizes:
        sizes = [size for size in _sizes(layouts, world_size) if size <= largest]
        rows.append(layouts.layout(world_size, sizes[-1], zero) if sizes else None)
    return rows


def when_nodes_double(layouts: Layouts, layout: Layout) -> list[str]:
    """Say what happens with twice the ranks, and what gives way first as they go on doubling."""
    global_size = layouts.config.batch.global_size
    lines, current, shrunk = [], layout, False
    for doublings in range(1, 13):
        world_size = layout.world_size * 2**doublings
        (doubled,) = scale(layouts, layout.stage, layout.micro_size, (world_size,))
        if doubled is None:
            lines.append(
                f"{world_size:,} ranks: the global batch of {global_size:,} does not divide; it would have to grow, "
                "and the learning rate with it"
            )
            break
        gain = current.time.seconds / doubled.time.seconds
        shrinks = doubled.micro_size < current.micro_size
        if doublings == 1 or (shrinks and not shrunk) or gain < _POOR_GAIN:
            lines.append(_doubled(doubled, gain, shrinks))
        shrunk = shrunk or shrinks
        if gain < _POOR_GAIN:
            break
        current = doubled
    return lines


def _doubled(layout: Layout, gain: float, shrinks: bool) -> str:
    micro = f"the micro-batch falls to {layout.micro_size}" if shrinks else f"micro-batch {layout.micro_size}"
    verdict = ", no longer worth it" if gain < _POOR_GAIN else ""
    return (
        f"{layout.world_size:,} ranks: {gain:.2f} × as fast as half as many{verdict}; {micro}, accumulation "
        f"{layout.accumulation}, {layout.time.traffic_share:.0%} of a step is traffic"
    )
