"""Batch arithmetic: who processes how many sequences in each step, and how long the run is."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from trainer.config import BatchConfig, DataConfig, TrainConfig
from trainer.errors import UserError
from trainer.phases import Phase, Phases

_FOR_EVER = sys.maxsize


@dataclass(frozen=True)
class StepShape:
    """One optimizer step in sequences: global_size = micro_size × world_size × accumulation.

    Attributes:
        seq_len: tokens a sequence.
        phase: which phase of the run, counted from 0.
    """

    global_size: int
    micro_size: int
    world_size: int
    accumulation: int
    seq_len: int
    phase: int

    @property
    def tokens(self) -> int:
        return self.global_size * self.seq_len

    @property
    def rank_size(self) -> int:
        """Sequences a rank."""
        return self.micro_size * self.accumulation

    def describe(self) -> str:
        return (
            f"{self.global_size} sequences a step = {self.micro_size} micro × {self.world_size} ranks × "
            f"{self.accumulation} accumulation; {self.tokens:,} tokens a step"
        )


@dataclass(frozen=True)
class Stretch:
    """Steps of one shape that others follow.

    Attributes:
        end: a step that begins before this sample, and not in an earlier stretch, has the shape.
        limit: where the phase ends, and no step reaches beyond; the last one is as small as it has to be. None in
            the last phase.
    """

    end: int
    limit: int | None
    shape: StepShape


@dataclass(frozen=True)
class StepRun:
    """`steps` steps of one shape, one after the other, from `first_sample` on."""

    first_sample: int
    shape: StepShape
    steps: int

    @property
    def end_sample(self) -> int:
        return self.first_sample + self.steps * self.shape.global_size


@dataclass(frozen=True)
class BatchPlan:
    """Sizes in sequences: global_size = micro_size × world_size × accumulation.

    They are those of every step or, with a batch warm-up or phases, of the steps that follow these; `shape_at` has the
    sizes of any step. They depend on the samples consumed, and on nothing else that changes in a run.

    Attributes:
        total_steps: length of the run.
        earlier: the steps of other shapes, in order from sample 0 on.
        phase: the last one, counted from 0.
    """

    global_size: int
    micro_size: int
    world_size: int
    accumulation: int
    seq_len: int
    total_steps: int
    earlier: tuple[Stretch, ...] = ()
    phase: int = 0

    @property
    def rank_size(self) -> int:
        """Sequences a rank in one full step."""
        return self.micro_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.global_size * self.seq_len

    @property
    def end_sample(self) -> int:
        """Samples that the whole run consumes."""
        return self.end_of(0, self.total_steps)

    def shape_at(self, sample: int) -> StepShape:
        """The step that begins at `sample`.

        Raises:
            UserError: when what is left of a phase does not divide over the ranks, which the steps of one config do not
                come to.
        """
        stretch = self._stretch_at(sample)
        if stretch is None:
            return self._last_shape
        shape, left = stretch.shape, math.inf if stretch.limit is None else stretch.limit - sample
        return shape if left >= shape.global_size else _rest_of_phase(shape, int(left))

    def runs(self, first_sample: int, steps: int = _FOR_EVER) -> Iterator[StepRun]:
        """The next `steps` steps, those of equal shape together; as much work as there are different shapes."""
        sample, left = first_sample, steps
        while left > 0:
            shape = self.shape_at(sample)
            run = StepRun(sample, shape, min(left, self._steps_alike(sample, shape)))
            yield run
            sample, left = run.end_sample, left - run.steps

    def end_of(self, first_sample: int, steps: int) -> int:
        """Where the next `steps` steps end.

        Raises:
            UserError: as `shape_at`, for the first step that cannot be divided.
        """
        return max((run.end_sample for run in self.runs(first_sample, steps)), default=first_sample)

    def tokens_ahead(self, sample: int, steps: int) -> int:
        """Positions of the next `steps` steps."""
        return sum(run.steps * run.shape.tokens for run in self.runs(sample, steps))

    def describe(self) -> str:
        return f"{self._last_shape.describe()}, {self.total_steps:,} steps"

    @property
    def _last_shape(self) -> StepShape:
        sizes = (self.global_size, self.micro_size, self.world_size, self.accumulation)
        return StepShape(*sizes, self.seq_len, self.phase)

    def _stretch_at(self, sample: int) -> Stretch | None:
        number = bisect_right(self.earlier, sample, key=lambda stretch: stretch.end)
        return self.earlier[number] if number < len(self.earlier) else None

    def _steps_alike(self, sample: int, shape: StepShape) -> int:
        stretch = self._stretch_at(sample)
        if stretch is None:
            return _FOR_EVER
        steps = -(-(stretch.end - sample) // shape.global_size)
        return steps if stretch.limit is None else min(steps, (stretch.limit - sample) // shape.global_size)


def micro_sizes(data: DataConfig, batch: BatchConfig, world_size: int) -> list[int]:
    """What `micro_size: auto` may be, ascending: all that every batch of the run divides into over the ranks.

    Those of a phase with a micro_size of its own do not count. Empty when there is none, which `plan_batch` refuses.
    """
    batches = [batch.global_size]
    if batch.warmup is not None:
        batches += [batch.warmup.start_size, batch.warmup.increment or batch.warmup.start_size]
    batches += [phase.global_size or batch.global_size for phase in data.phases if phase.micro_size is None]
    return _fitting_micro_sizes(math.gcd(*batches), world_size)


def plan_batch(
    batch: BatchConfig, train: TrainConfig, phases: Phases, world_size: int, epoch_blocks: Sequence[int]
) -> BatchPlan:
    """Derive accumulation and the number of steps.

    Args:
        epoch_blocks: blocks in one pass over the training data, in each phase, for `train.epochs`.

    Raises:
        UserError: when a global batch does not divide into micro-batches over the ranks.
    """
    shapes = [_full_shape(phase, number, len(phases), world_size) for number, phase in enumerate(phases)]
    earlier = [
        stretch
        for phase, shape in zip(phases, shapes, strict=True)
        for stretch in _stretches(phase, shape, phases, batch)
    ]
    last = shapes[-1]
    sizes = (last.global_size, last.micro_size, world_size, last.accumulation)
    plan = BatchPlan(*sizes, last.seq_len, 0, tuple(earlier), last.phase)
    if train.steps is not None:
        total_steps = train.steps
    elif train.tokens is not None:
        total_steps = _steps_to(plan, Fraction(train.tokens), [Fraction(phase.seq_len) for phase in phases])
    else:
        assert train.epochs is not None
        passes = [Fraction(1, max(1, blocks)) for blocks in epoch_blocks]
        total_steps = _steps_to(plan, Fraction(str(train.epochs)), passes)  # 0.1 is a tenth, as it was written
    return replace(plan, total_steps=total_steps)


def _steps_to(plan: BatchPlan, target: Fraction, each: Sequence[Fraction]) -> int:
    """The fewest steps, at least one, whose sequences come to `target`, where one of phase p counts `each[p]`."""
    steps, done = 0, Fraction(0)
    for run in plan.runs(0):
        a_step = run.shape.global_size * each[run.shape.phase]
        needed = max(0, math.ceil((target - done) / a_step))
        if needed <= run.steps:
            return max(1, steps + needed)
        steps, done = steps + run.steps, done + run.steps * a_step
    raise AssertionError("the last steps go on for ever")


def _stretches(phase: Phase, full: StepShape, phases: Phases, batch: BatchConfig) -> Iterator[Stretch]:
    """Those of one phase: warm-up sizes below its full one and, if another phase follows, its full steps."""
    begin, limit = phase.first_sample, phase.end_sample
    for end_token, size in _warmup_sizes(batch):
        if size >= full.global_size:
            break
        end = phases.sample_at(end_token)
        end = end if limit is None else min(end, limit)
        if end > begin:
            yield Stretch(end, limit, _warmup_shape(full, size, batch))
            begin = end
    if limit is not None and limit > begin:
        yield Stretch(limit, limit, full)


def _warmup_sizes(batch: BatchConfig) -> Iterator[tuple[int, int]]:
    """(position at which it gives way to the next, sequences a step) of each size below the full one."""
    if batch.warmup is not None:
        increment = batch.warmup.increment or batch.warmup.start_size
        count = (batch.global_size - batch.warmup.start_size) // increment
        for number in range(count):
            yield -(-(number + 1) * batch.warmup.tokens // count), batch.warmup.start_size + number * increment


def _full_shape(phase: Phase, number: int, phases: int, world_size: int) -> StepShape:
    shape = _divide(phase.global_size, phase.micro_size, world_size, phase.seq_len, number)
    if shape is not None:
        return shape
    where = "batch" if number == phases - 1 else f"data.phases[{number}]"
    per_pass = phase.micro_size * world_size
    fitting = _fitting_micro_sizes(phase.global_size, world_size)
    below, above = phase.global_size // per_pass * per_pass, -(-phase.global_size // per_pass) * per_pass
    sizes = " or ".join(str(size) for size in (below, above) if size)
    micro = f", or {where}.micro_size to one of {fitting}" if fitting else ""
    raise UserError(
        f"{where}.global_size {phase.global_size} does not divide into micro-batches of {phase.micro_size} "
        f"on {_ranks(world_size)} ({phase.micro_size} × {world_size} = {per_pass} sequences a pass).",
        where=f"{where}.global_size={phase.global_size}, {where}.micro_size={phase.micro_size}, ranks={world_size}",
        remedy=f"Set {where}.global_size to {sizes}{micro}.",
    )


def _warmup_shape(full: StepShape, size: int, batch: BatchConfig) -> StepShape:
    shape = _divide(size, full.micro_size, full.world_size, full.seq_len, full.phase)
    if shape is not None:
        return shape
    warmup = batch.warmup
    assert warmup is not None
    # A phase may have its own, also where the batch's is to be found.
    micro = "batch" if batch.micro_size in (full.micro_size, "auto") else f"data.phases[{full.phase}]"
    per_pass = full.micro_size * full.world_size
    raise UserError(
        f"A batch of the warm-up, {size} sequences, does not divide into micro-batches of {full.micro_size} on "
        f"{_ranks(full.world_size)} ({full.micro_size} × {full.world_size} = {per_pass} sequences a pass).",
        where=f"batch.warmup.start_size={warmup.start_size}, {micro}.micro_size={full.micro_size}, "
        f"ranks={full.world_size}",
        remedy=f"Set batch.warmup.start_size and increment to multiples of {per_pass}, or a smaller "
        f"{micro}.micro_size.",
    )


def _rest_of_phase(shape: StepShape, left: int) -> StepShape:
    rest = _divide(left, shape.micro_size, shape.world_size, shape.seq_len, shape.phase)
    if rest is not None:
        return rest
    fitting = _fitting_micro_sizes(left, shape.world_size)
    micro = f"set the phase's micro_size to one of {fitting}, or " if fitting else ""
    raise UserError(
        f"The last step of the phase with blocks of {shape.seq_len} would have {left} sequences, which do not divide "
        f"into micro-batches of {shape.micro_size} on {_ranks(shape.world_size)}: an earlier start had batches of "
        "another size.",
        where=f"data.phases[{shape.phase}]",
        remedy=f"Use the batch sizes of the earlier start, {micro}move until_tokens.",
    )


def _divide(global_size: int, micro_size: int, world_size: int, seq_len: int, phase: int) -> StepShape | None:
    accumulation, rest = divmod(global_size, micro_size * world_size)
    return None if rest else StepShape(global_size, micro_size, world_size, accumulation, seq_len, phase)


def _fitting_micro_sizes(global_size: int, world_size: int) -> list[int]:
    return [size for size in range(1, global_size + 1) if global_size % (size * world_size) == 0]


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"
