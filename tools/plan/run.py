"""`maskwright plan`: a run worked out before it is queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.plan.advice import Recommendation, best_of_each_stage, recommend, scale, when_nodes_double
from tools.plan.devices import Device, DeviceName, MeasuredStep, device_here, find_device, read_bench
from tools.plan.facts import Facts, gather_facts
from tools.plan.layouts import Layout, Layouts
from trainer.checkpoint.begun import as_begun
from trainer.config import Config
from trainer.config.base import LARGEST
from trainer.engine.deepspeed_config import compose, load_preset
from trainer.engine.state_size import checkpoint_bytes
from trainer.errors import UserError
from trainer.model.trained import rehearse_trained
from trainer.objectives.registry import family_of
from trainer.schedule.batch_plan import plan_batch
from trainer.schedule.phases import lay_out, with_micro_size
from trainer.sizing.memory_estimate import MemoryEstimate

STORAGE_GB_S = 1.0
"""Assumed where it is not given: what all ranks together write to the run folder, in GB a second."""
HOST_COPY_GB_S = 20.0
"""Assumed: what a GPU copies to its host's memory in a second, over PCIe 4 or later."""


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says; None where it says nothing."""

    nodes: int
    gpus_per_node: int
    device: DeviceName | None
    bench: str | None
    vocabulary_size: int | None
    network_gbit: float | None
    storage_gb_s: float | None


@dataclass(frozen=True)
class CheckpointCost:
    """Attributes:
    bytes: of one checkpoint.
    stall_seconds: how long training stands still for one.
    count: of them in the run; 0 when its length is not known.
    """

    bytes: int
    stall_seconds: float
    count: int
    basis: str


@dataclass(frozen=True)
class RunPlan:
    """Everything that is printed.

    Attributes:
        attention_shares: of the FLOPs of a token in each phase, what attention to the others takes.
        chosen: the layout of the config; with `batch.micro_size: auto` with the largest micro-batch that fits.
        by_stage: at each stage the config's micro-batch, or the chosen one's.
        best: at each stage the largest micro-batch that fits, if one does.
        table: the config's stage on 1 to 1,024 GPUs; None where the batch does not divide.
    """

    facts: Facts
    options: PlanOptions
    device: Device
    measured: MeasuredStep | None
    estimate: MemoryEstimate
    flops_per_token: float
    attention_shares: list[float]
    chosen: Layout
    by_stage: dict[int, Layout]
    best: dict[int, Layout | None]
    recommendation: Recommendation
    doubling: list[str]
    table: list[Layout | None]
    checkpoint: CheckpointCost
    ds_config: dict[str, Any]

    @property
    def world_size(self) -> int:
        return self.options.nodes * self.options.gpus_per_node

    @property
    def unit(self) -> str:
        """What a rank runs on."""
        return "GPU" if self.device.kind == "cuda" else "rank"

    @property
    def time_basis(self) -> str:
        return self.measured.basis if self.measured is not None else self.device.basis

    def days(self, layout: Layout) -> float | None:
        """Compute the days of training and saves; None when the length is not known."""
        if not self.facts.steps_known:
            return None
        saves = self.checkpoint.count * self.checkpoint.stall_seconds
        return (self.facts.total_tokens / layout.tokens_per_second + saves) / 86_400


def make_plan(config: Config, options: PlanOptions) -> RunPlan:
    """Work out a run; takes no memory for the model, and some seconds.

    Raises:
        UserError: as `validate`, but that tokenizer and data need not be there.
    """
    config = as_begun(config)
    _check_options(options)
    world_size = options.nodes * options.gpus_per_node
    precision = config.train.precision
    facts = gather_facts(config, world_size, options.vocabulary_size)
    device = find_device(options.device or device_here(), precision, options.gpus_per_node, options.network_gbit)
    measured = read_bench(options.bench, precision, device) if options.bench is not None else None
    preset = load_preset(config.deepspeed)
    lengths = [config.data.seq_len, *(phase.seq_len for phase in config.data.phases)]
    rehearse_trained(config, facts.vocabulary, lengths, family_of(config))
    estimate = MemoryEstimate(config, facts.vocabulary, preset, device.kind)
    layouts = Layouts(estimate, device, options.gpus_per_node, facts.attended_tokens[-1], measured)
    best = best_of_each_stage(layouts, world_size)
    own = layouts.stages[estimate.zero.stage]
    largest = best[own.stage]
    micro_size = config.batch.micro_size
    if micro_size == "auto":
        micro_size = largest.micro_size if largest is not None else 1
    chosen = layouts.layout(world_size, micro_size, own)
    batch = with_micro_size(config.batch, micro_size)
    phases = lay_out(config.data, batch)
    settled = plan_batch(batch, config.train, phases, world_size, [1] * len(phases))  # its steps do not matter here
    return RunPlan(
        facts=facts,
        options=options,
        device=device,
        measured=measured,
        estimate=estimate,
        flops_per_token=layouts.flops_per_token,
        attention_shares=[
            layouts.attention_share(attended, phase.seq_len)
            for attended, phase in zip(facts.attended_tokens, facts.phases, strict=True)
        ],
        chosen=chosen,
        by_stage={stage: layouts.layout(world_size, micro_size, zero) for stage, zero in layouts.stages.items()},
        best=best,
        recommendation=recommend(best, own.stage),
        doubling=when_nodes_double(layouts, chosen),
        table=scale(layouts, own.stage, micro_size),
        checkpoint=_checkpoint(config, facts, estimate, chosen, options),
        ds_config=compose(config, preset, settled),
    )


def _check_options(options: PlanOptions) -> None:
    """Refuse numbers that are slips: with them figures would overflow, or lists have no end."""
    bounds = {
        "--nodes": (options.nodes, 2**20),
        "--gpus-per-node": (options.gpus_per_node, 2**10),
        "--vocab-size": (options.vocabulary_size, 2**24),
        "--network-gbit": (options.network_gbit, LARGEST),
        "--storage-gb-s": (options.storage_gb_s, LARGEST),
    }
    for flag, (value, most) in bounds.items():
        if value is not None and not value <= most:  # a number that is none is not, either
            raise UserError(f"It must be at most {most:,.0f}.", where=f"{flag} {value}", remedy="Give another number.")


def _checkpoint(
    config: Config, facts: Facts, estimate: MemoryEstimate, layout: Layout, options: PlanOptions
) -> CheckpointCost:
    size = checkpoint_bytes(
        estimate.parameters, layout.stage, config.train.precision, estimate.frozen, estimate.matrices
    )
    if config.checkpoint.in_background:
        seconds = size / layout.world_size / (HOST_COPY_GB_S * 1e9)
        basis = f"copied to the hosts' memory at {HOST_COPY_GB_S:g} GB/s a rank (assumed)"
    else:
        rate = options.storage_gb_s or STORAGE_GB_S
        source = "as given" if options.storage_gb_s else "assumed"
        seconds, basis = size / (rate * 1e9), f"written at {rate:g} GB/s by all ranks together ({source})"
    every = facts.config.checkpoint.every_steps  # of the resolved one
    count = facts.plan.total_steps // every if isinstance(every, int) and facts.steps_known else 0
    return CheckpointCost(size, seconds, count, basis)
