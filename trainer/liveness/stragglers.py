"""Which ranks hold up the others: a pure function of the time that each spends by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.runtime.plain_text import listed

OWN_PHASES = ("data", "forward")
"""What a rank does without waiting for others: reading its data, and forward passes (but for ZeRO-3's weights).
All other time of a step looks alike on all ranks, because the fast ones wait in it for the slow one."""
SMALLEST_SHARE = 0.05
"""Of all time: who loses less than that is no straggler, however many times slower in something short."""
_NAMED = 3


@dataclass(frozen=True)
class Straggler:
    """A rank that takes longer than the others.

    Attributes:
        seconds: that it spent in the phase.
        usual: that the median rank spent.
    """

    rank: int
    phase: str
    seconds: float
    usual: float


def find_stragglers(seconds: np.ndarray, wall_seconds: float, ratio: float) -> list[Straggler]:
    """Find ranks that spent over `ratio` times the median in a phase, and at least SMALLEST_SHARE of all time more.

    Args:
        seconds: [ranks, phases of OWN_PHASES], in the same interval.
        wall_seconds: of that interval.

    Returns:
        those that lose most first. Of an even number of ranks the median is the lower one: of two, the faster.
    """
    median = np.sort(seconds, axis=0)[(len(seconds) - 1) // 2]
    lost = seconds - median
    slow = (seconds > ratio * median) & (lost > SMALLEST_SHARE * wall_seconds)
    found = sorted(zip(*np.nonzero(slow), strict=True), key=lambda place: -lost[place])
    return [
        Straggler(int(rank), OWN_PHASES[phase], float(seconds[rank, phase]), float(median[phase]))
        for rank, phase in found
    ]


class StragglerWatch:
    """Rank 0's account of the ranks' own time, from one report to the next.

    Args:
        every_seconds: between two reports at least.
        nodes: the node of each rank.
        now: when the account begins, in seconds of any steady clock.
    """

    def __init__(self, every_seconds: float, ratio: float, nodes: Sequence[str], now: float) -> None:
        self._every_seconds, self._ratio, self._nodes = every_seconds, ratio, nodes
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._seconds, self._since = np.zeros((len(self._nodes), len(OWN_PHASES))), now

    def add(self, seconds: Sequence[Sequence[float]], now: float) -> str:
        """Count each rank's seconds in OWN_PHASES; returns the line to show, or an empty one."""
        self._seconds += np.asarray(seconds)
        wall_seconds = now - self._since
        if wall_seconds < self._every_seconds:
            return ""
        found = find_stragglers(self._seconds, wall_seconds, self._ratio)
        self._begin(now)
        if not found:
            return ""
        names = listed([self._describe(straggler, wall_seconds) for straggler in found], _NAMED, "; ")
        return f"stragglers of the last {wall_seconds:,.0f} s: {names}"

    def _describe(self, found: Straggler, wall_seconds: float) -> str:
        times = f"{found.seconds / found.usual:.1f} times" if found.usual > 0 else "longer than"
        share = (found.seconds - found.usual) / wall_seconds
        return (
            f"rank {found.rank} on {self._nodes[found.rank]} takes {times} the median in phase {found.phase} "
            f"({found.seconds:.1f} s against {found.usual:.1f} s, {share:.0%} of the time)"
        )
