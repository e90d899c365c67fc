"""The phases of a run: samples that are trained on in one way, those of `data.phases` and then the last.

A phase has one length of blocks, and may have a batch, a share of masks, sources, a rope theta and a rate of its own.

Samples are numbered through all phases, and where a phase ends is a function of the config alone. So the number of a
sample tells its phase, whatever ranks, batches and restarts led to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import BatchConfig, DataConfig, RopeTheta


@dataclass(frozen=True)
class Phase:
    """Samples that are trained on in one way.

    Attributes:
        seq_len: tokens a block.
        global_size, micro_size: sequences a full step, and a rank in one forward pass.
        first_sample: number of its first sample.
        end_sample: number of the sample after its last; None for the last phase.
        lr_factor: what the rate of the schedule is multiplied by.
        rope_theta: of the model; None where no phase changes it.
    """

    seq_len: int
    global_size: int
    micro_size: int
    first_sample: int
    end_sample: int | None
    lr_factor: float = 1.0
    rope_theta: RopeTheta | None = None


@dataclass(frozen=True)
class Phases:
    """All phases of a run, in order; one where a run has no `data.phases`."""

    all: tuple[Phase, ...]

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.all)

    def __getitem__(self, number: int) -> Phase:
        return self.all[number]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Return (first sample, seq_len) of each phase."""
        return [(phase.first_sample, phase.seq_len) for phase in self]

    def number_at(self, sample: int) -> int:
        """Find which phase a sample belongs to, counted from 0."""
        return bisect_right([phase.first_sample for phase in self], sample) - 1

    def rope_theta_after(self, samples: int) -> RopeTheta | None:
        """Find the theta of the last of the first `samples` samples: that of the model as it then is.

        Before the first one it is that of the first; None where no phase changes it.
        """
        return self[self.number_at(max(0, samples - 1))].rope_theta

    def evaluated_at(self, samples: int) -> dict[str, float]:
        """Say in metrics what an evaluation after so many samples is made with; nothing where there is one phase.

        Blocks have the length of the last phase, whichever the run is in; theta is the model's.
        """
        if len(self) == 1:
            return {}
        theta = self.rope_theta_after(samples)
        keys = {} if theta is None else theta.keys
        return {"eval/seq_len": self[-1].seq_len, **{f"eval/{key}": value for key, value in keys.items()}}

    def tokens(self, samples: int) -> int:
        """Count the positions of the first `samples` samples."""
        return tokens_before(self.lengths, samples)

    def sample_at(self, token: int) -> int:
        """Find the first sample that begins at position `token` of the run or after it."""
        return sample_at(self.lengths, token)


def with_micro_size(batch: BatchConfig, micro_size: int | None) -> BatchConfig:
    """Return `batch` with a number in the place of `micro_size: auto`; unchanged where there is none to put."""
    return (
        batch
        if batch.micro_size != "auto" or micro_size is None
        else batch.model_copy(update={"micro_size": micro_size})
    )


def lay_out(data: DataConfig, batch: BatchConfig) -> Phases:
    """Lay out the phases that a config asks for; `micro_size: auto` counts as 1, which stands for any.

    A phase is a whole number of its full steps: it ends with the first of them, counted from its start, that reaches
    `until_tokens`. Neither ranks nor a batch warm-up move the end.
    """
    laid: list[Phase] = []
    sample = token = 0
    micro_size = 1 if batch.micro_size == "auto" else batch.micro_size
    for settings in data.phases:
        size = settings.global_size or batch.global_size
        steps = max(0, -(-(settings.until_tokens - token) // (size * settings.seq_len)))
        end = sample + steps * size
        micro = settings.micro_size or micro_size
        laid.append(Phase(settings.seq_len, size, micro, sample, end, settings.lr_factor))
        sample, token = end, token + steps * size * settings.seq_len
    return Phases((*laid, Phase(data.seq_len, batch.global_size, micro_size, sample, None)))


def with_thetas(phases: Phases, data: DataConfig, own: RopeTheta) -> Phases:
    """Give each phase its theta: its own or, where it names none, the model's."""
    thetas = [
        RopeTheta(
            settings.rope_theta or own.base,
            own.local if settings.local_rope_theta is None else settings.local_rope_theta,
        )
        for settings in data.phases
    ]
    return Phases(tuple(replace(phase, rope_theta=theta) for phase, theta in zip(phases, [*thetas, own], strict=True)))


def changes(stages: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Leave out what changes nothing of stages given as (start, value)."""
    return [stage for number, stage in enumerate(stages) if not number or stage[1] != stages[number - 1][1]]


def tokens_before(phases: Sequence[tuple[int, int]], samples: int) -> int:
    """Count the positions of the first `samples` samples, of phases given as (first sample, seq_len)."""
    ends = [first for first, _ in phases[1:]]
    return sum(
        (min(end, samples) - first) * seq_len
        for (first, seq_len), end in zip(phases, [*ends, samples], strict=True)
        if first < samples
    )


def sample_at(phases: Sequence[tuple[int, int]], token: int) -> int:
    """Find the first sample that begins at position `token` or after it, of phases given as (first sample, seq_len)."""
    for number, (first, seq_len) in enumerate(phases):
        distance = max(0, token - tokens_before(phases, first))
        sample = first + -(-distance // seq_len)
        if number + 1 == len(phases) or sample < phases[number + 1][0]:
            return sample
    raise AssertionError("the last phase has no end")
