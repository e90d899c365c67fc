"""Batch arithmetic: who processes how many sequences in each step, and how long the run is."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from trainer.config import BatchConfig, DataConfig, TrainConfig
from trainer.config.base import LIMIT
from trainer.errors import UserError
from trainer.schedule.phases import Phase, Phases

_FOR_EVER = sys.maxsize


@dataclass(frozen=True)
class StepShape:
    """One optimizer step in sequences: global_size = micro_size × world_size × accumulation.

    The last step of a phase or of the run may have fewer sequences than its micro-batches have room for: the shapes
    of tensors stay, and what is left over is padding without predictions.

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
        """Sequences a rank, padding included."""
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
        limit: where the phase or the run ends, and no step reaches beyond; the last one is as small as it has to be.
            None in the last phase of a run that ends with a full step.
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
        earlier: the steps of other shapes and those up to the end of a run of epochs, in order from sample 0 on.
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
        """Find the shape of the step that begins at `sample`."""
        stretch = self._stretch_at(sample)
        if stretch is None:
            return self._last_shape
        shape, left = stretch.shape, math.inf if stretch.limit is None else stretch.limit - sample
        return shape if left >= shape.global_size else _smaller(shape, int(left))

    def runs(self, first_sample: int, steps: int = _FOR_EVER) -> Iterator[StepRun]:
        """Yield the next `steps` steps, those of equal shape together; as much work as there are different shapes."""
        sample, left = first_sample, steps
        while left > 0:
            shape = self.shape_at(sample)
            run = StepRun(sample, shape, min(left, self._steps_alike(sample, shape)))
            yield run
            sample, left = run.end_sample, left - run.steps

    def end_of(self, first_sample: int, steps: int) -> int:
        """Find where the next `steps` steps end."""
        return max((run.end_sample for run in self.runs(first_sample, steps)), default=first_sample)

    def tokens_ahead(self, sample: int, steps: int) -> int:
        """Count the positions of the next `steps` steps."""
        return sum(run.steps * run.shape.tokens for run in self.runs(sample, steps))

    @cached_property
    def sizes_vary(self) -> bool:
        """Whether some step has another length of blocks or another number of sequences than the full last ones."""
        return any(run.shape != self._last_shape for run in self.runs(0, self.total_steps))

    @cached_property
    def shape_count(self) -> int:
        """Different shapes of micro-batches in the run, each counted for training and for evaluation."""
        return 2 * len({(run.shape.micro_size, run.shape.seq_len) for run in self.runs(0, self.total_steps)})

    def describe(self) -> str:
        *_, last = self.runs(0, self.total_steps)
        stretch = self._stretch_at(last.first_sample)
        full = stretch.shape if stretch is not None else self._last_shape
        steps = f"{self.total_steps:,} step{'s' if self.total_steps > 1 else ''}"
        smaller = f", the last of {last.shape.global_size}" if last.shape.global_size < full.global_size else ""
        return f"{self._last_shape.describe()}, {steps}{smaller}"

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
    """List what `micro_size: auto` may be, ascending: all that every batch of the run divides into over the ranks.

    Those of a phase with a micro_size of its own do not count. Empty when there is none, which `plan_batch` refuses.
    """
    batches = [batch.global_size]
    if batch.warmup is not None:
        batches += [batch.warmup.start_size, batch.warmup.increment or batch.warmup.start_size]
    batches += [phase.global_size or batch.global_size for phase in data.phases if phase.micro_size is None]
    return _fitting_micro_sizes(math.gcd(*batches), world_size)


def plan_batch(
    batch: BatchConfig,
    train: TrainConfig,
    phases: Phases,
    world_size: int,
    epoch_blocks: Sequence[int],
    whole_steps: bool = False,
) -> BatchPlan:
    """Derive accumulation and the number of steps.

    Args:
        epoch_blocks: blocks in one pass over the training data, in each phase, for `train.epochs`.
        whole_steps: round epochs up to full steps, as runs did before their last step could be smaller.

    A run of epochs or tokens with fewer than `train.min_steps` is one of so many steps.

    Raises:
        UserError: when a global batch does not divide into micro-batches over the ranks, or the run is longer than
            sample numbers reach.
    """
    shapes = [_full_shape(phase, number, len(phases), world_size) for number, phase in enumerate(phases)]
    end = None
    if train.epochs is not None and not whole_steps:
        end = _end_of_epochs(phases, epoch_blocks, Fraction(str(train.epochs)))  # 0.1 is a tenth, as it was written
    earlier = [
        stretch
        for phase, shape in zip(phases, shapes, strict=True)
        for part in _cut_at(end, phase)
        for stretch in _stretches(part, shape, phases, batch)
    ]
    last = shapes[-1]
    sizes = (last.global_size, last.micro_size, world_size, last.accumulation)
    plan = BatchPlan(*sizes, last.seq_len, 0, tuple(earlier), last.phase)
    if train.steps is not None:
        total_steps = train.steps
    elif train.tokens is not None:
        total_steps = _steps_to(plan, Fraction(train.tokens), [Fraction(phase.seq_len) for phase in phases])
    elif end is not None:
        total_steps = _steps_to(plan, Fraction(end), [Fraction(1)] * len(phases))
    else:
        passes = [Fraction(1, max(1, blocks)) for blocks in epoch_blocks]
        total_steps = _steps_to(plan, Fraction(str(train.epochs)), passes)
    plan = replace(plan, total_steps=total_steps)
    _check_length(train, plan)
    if train.steps is None and total_steps < (train.min_steps or 0):
        length = {"steps": train.min_steps, "tokens": None, "epochs": None}
        return plan_batch(batch, train.model_copy(update=length), phases, world_size, epoch_blocks, whole_steps)
    return plan


def _check_length(train: TrainConfig, plan: BatchPlan) -> None:
    if plan.end_sample >= LIMIT:
        name = next(name for name in ("steps", "tokens", "epochs") if getattr(train, name) is not None)
        raise UserError(
            f"The run would take {plan.end_sample:.2g} sequences; their numbers end at {LIMIT:.2g}.",
            where=f"train.{name}={getattr(train, name)}, batch.global_size={plan.global_size}",
            remedy=f"Set a smaller train.{name}.",
        )


def _end_of_epochs(phases: Phases, epoch_blocks: Sequence[int], epochs: Fraction) -> int:
    """Find the sample after the last one of so many passes, those of all phases together."""
    done = Fraction(0)
    for phase, blocks in zip(phases, epoch_blocks, strict=True):
        a_pass = max(1, blocks)
        end = phase.first_sample + math.ceil((epochs - done) * a_pass)
        if phase.end_sample is None or end <= phase.end_sample:
            return end
        done += Fraction(phase.end_sample - phase.first_sample, a_pass)
    raise AssertionError("the last phase has no end")


def _cut_at(end: int | None, phase: Phase) -> Iterator[Phase]:
    """Yield the phase as it is, or in two parts where the run ends within it.

    The second part is for runs that go on behind samples which a rollback has passed over.
    """
    if end is None or end <= phase.first_sample or (phase.end_sample is not None and end >= phase.end_sample):
        yield phase
    else:
        yield replace(phase, end_sample=end)
        yield replace(phase, first_sample=end)


def _steps_to(plan: BatchPlan, target: Fraction, each: Sequence[Fraction]) -> int:
    """Count the fewest steps, at least one, whose sequences come to `target`, where one of phase p counts `each[p]`."""
    steps, done = 0, Fraction(0)
    for run in plan.runs(0):
        a_step = run.shape.global_size * each[run.shape.phase]
        needed = max(0, math.ceil((target - done) / a_step))
        if needed <= run.steps:
            return max(1, steps + needed)
        steps, done = steps + run.steps, done + run.steps * a_step
    raise AssertionError("the last steps go on for ever")


def _stretches(phase: Phase, full: StepShape, phases: Phases, batch: BatchConfig) -> Iterator[Stretch]:
    """Yield the stretches of a phase or a part: warm-up sizes below its full one and, if it ends, its full steps."""
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
    """Yield (position at which it gives way to the next, sequences a step) of each size below the full one."""
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


def _smaller(shape: StepShape, size: int) -> StepShape:
    """Make a step of the last `size` sequences, fewer than a full one has, in as few micro-batches as hold them."""
    return replace(shape, global_size=size, accumulation=-(-size // (shape.micro_size * shape.world_size)))


def _divide(global_size: int, micro_size: int, world_size: int, seq_len: int, phase: int) -> StepShape | None:
    accumulation, rest = divmod(global_size, micro_size * world_size)
    return None if rest else StepShape(global_size, micro_size, world_size, accumulation, seq_len, phase)


def _fitting_micro_sizes(global_size: int, world_size: int) -> list[int]:
    return divisors(global_size // world_size) if global_size % world_size == 0 else []


def divisors(number: int) -> list[int]:
    """List all divisors of a positive number, ascending; as much work as its root is large."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"
