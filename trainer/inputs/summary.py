"""What a run will be, in a few lines: for `validate`, and at the head of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from trainer.config import Config
from trainer.data.batch import Samples
from trainer.data.dataset import ShardSet
from trainer.data.order.mixture import describe_mixture
from trainer.data.order.run_order import RunOrder
from trainer.data.rows import row_index
from trainer.schedule.batch_plan import BatchPlan
from trainer.schedule.mask_ratio import describe_ratio
from trainer.schedule.phases import Phase, Phases
from trainer.schedule.run_length import describe_length

LITTLE_FILLED = 0.7
MANY_MICRO_BATCHES = 32
"""From so many on the sum of their gradients in bf16 is off by one per cent and more (docs/decisions.md)."""


def summarize_run(
    config: Config,
    plan: BatchPlan,
    order: RunOrder,
    stage: int,
    source_tokens: Sequence[int],
    validation_blocks: int | None,
) -> list[str]:
    """Describe a run in a few lines: data, batch, engine, validation.

    Args:
        stage: of ZeRO.
        source_tokens: of each source.
        validation_blocks: None without evaluation.
    """
    epochs = order.epochs(plan.end_sample)
    only = f"; {epochs[0]:.2f} epochs" if len(epochs) == 1 else f" from {len(epochs)} sources"
    blocks = f" in {sum(order.orders[0].blocks):,} blocks of {plan.seq_len}" if len(order.phases) == 1 else ""
    lines = [f"data: {sum(source_tokens):,} tokens{blocks}{only}"]
    if len(epochs) > 1:
        lines += describe_mixture(config.data, order, source_tokens, epochs)
    if len(order.phases) > 1:
        lines += _describe_phases(config, plan, order)
    lines += [f"batch: {plan.describe()}", *_describe_warmup(config, plan, order)]
    lines += describe_length(config, plan, max(epochs))
    lines += _describe_mask_ratios(config, plan, order)
    lines.append(f"deepspeed: {config.deepspeed} (stage {stage}), {config.train.precision}")
    lines += _describe_accumulation(config, plan)
    if validation_blocks is not None:
        ratio = config.eval.mask_ratio
        masked = "" if ratio is None else f", {ratio} of their tokens predicted"
        lines.append(
            f"validation: {min(config.eval.samples, validation_blocks):,} of {validation_blocks:,} blocks{masked}"
        )
    if config.train.profile is not None and config.train.profile.start > plan.total_steps:
        lines.append(f"profile: the run ends before step {config.train.profile.start:,}, so nothing is profiled")
    return lines


def describe_rows(sources: Sequence[ShardSet], objective: Samples) -> str:
    """Say how full the rows of documents are, with a remedy where much of them is padding."""
    indices = [row_index(source, objective.seq_len) for source in sources]
    documents, cut = sum(each.documents for each in indices), sum(each.cut for each in indices)
    rows = sum(map(len, indices))
    fill = sum(each.positions for each in indices) / max(1, rows * objective.seq_len)
    line = f"documents: {documents:,} in {rows:,} rows of {objective.seq_len}, {fill:.1%} filled"
    if cut:
        line += f"; {cut:,} are longer than {objective.view.payload:,} tokens, and cut into pieces"
    if fill < LITTLE_FILLED:
        line += "; THE REST IS PADDING: another data.seq_len fills them better, or data.samples=stream wholly"
    return line


def _describe_mask_ratios(config: Config, plan: BatchPlan, order: RunOrder) -> list[str]:
    ratios = config.objective.mask_ratios
    if len(ratios) == 1:  # or phases have theirs, which their lines say
        return []
    late = [token for token, _ in ratios if order.phases.sample_at(token) >= plan.end_sample]
    ends = f"; the run ends before token {late[0]:,}" if late else ""
    return [f"masks: share of the tokens that is predicted {describe_ratio(ratios, 'token')}{ends}"]


def _describe_accumulation(config: Config, plan: BatchPlan) -> list[str]:
    """Warn where many gradients are added up in bf16."""
    most = max(shape.accumulation for shape in (plan, *(stretch.shape for stretch in plan.earlier)))
    in_bf16 = config.train.precision == "bf16" and config.train.gradient_accumulation_dtype is None
    if not in_bf16 or most < MANY_MICRO_BATCHES:
        return []
    return [
        f"  a step adds up the gradients of {most} micro-batches in bf16; measured once, that of 32 was 1 % off, "
        "of 256 3.6 %. train.gradient_accumulation_dtype=fp32 adds them exactly, for 4 more bytes a parameter; a "
        "larger batch.micro_size makes fewer of them"
    ]


def _describe_phases(config: Config, plan: BatchPlan, order: RunOrder) -> list[str]:
    """Describe blocks, steps and passes of each phase; the last one's full steps are those of the batch line.

    And what else the phases change, for each of them.
    """
    runs = groupby(plan.runs(0, plan.total_steps), key=lambda run: run.shape.phase)
    steps = {number: sum(run.steps for run in of_phase) for number, of_phase in runs}
    passes = order.epochs_in_phases(plan.end_sample)
    lines = []
    for number, (phase, one) in enumerate(zip(order.phases, order.orders, strict=True)):
        line = f"  phase {number + 1}: {sum(one.blocks):,} blocks of {phase.seq_len}"
        if number not in steps:
            lines.append(f"{line}; {why_without_steps(phase)}")
            continue
        if phase.end_sample is not None:
            line += f", up to token {order.phases.tokens(phase.end_sample):,}"
        line += f"; {steps[number]:,} steps"
        if len(one.blocks) == 1:
            line += f", {passes[number][0]:.2f} epochs"
        if phase.end_sample is not None:
            line += f", of {phase.global_size} sequences in micro-batches of {phase.micro_size}"
        lines.append("; ".join([line, *describe_changes(config, order.phases, number)]))
    return lines


def why_without_steps(phase: Phase) -> str:
    """Say why a run makes no step of one of its phases."""
    if phase.end_sample == phase.first_sample:
        return "it has no step, as the last one before reaches its until_tokens"
    return "the run ends before it begins"


def describe_changes(config: Config, phases: Phases, number: int) -> list[str]:
    """Say of a phase which share it masks, its rope theta and its rate, each if some phase has another one."""
    settings, phase, parts = config.data.phases, phases[number], list[str]()
    if any(each.mask_ratio is not None for each in settings):
        ((_, last),) = config.objective.mask_ratios
        own = settings[number].mask_ratio if number < len(settings) else last
        parts.append(f"masks {last if own is None else own:g}")
    if phase.rope_theta is not None:
        parts.append(f"rope theta {phase.rope_theta}")
    if any(each.lr_factor != 1 for each in phases):
        parts.append(f"rate × {phase.lr_factor:g}")
    return parts


def _describe_warmup(config: Config, plan: BatchPlan, order: RunOrder) -> list[str]:
    warmup = config.batch.warmup
    if warmup is None:
        return []
    end = order.phases.sample_at(warmup.tokens)
    steps = sum(run.steps for run in plan.runs(0, plan.total_steps) if run.first_sample < end)
    ends = "" if end < plan.end_sample else "; the run ends before"
    return [
        f"batch warm-up: from {warmup.start_size} sequences a step by {warmup.increment or warmup.start_size} to "
        f"{config.batch.global_size} at token {warmup.tokens:,}: {steps:,} steps{ends}"
    ]
