"""A plan worked through: how long the order takes, whether it is exact, how local its reads are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.machine import describe_machine, machine_line, peak_resident_bytes, resident_bytes
from tools.progress import StepProgress
from tools.simulate.exactness import Exactness, check_exactness
from tools.simulate.locality import Locality, measure_locality
from tools.simulate.plan import SimulatedPlan

FAR_SAMPLE = 10**12  # where a cold start is tried when the plan itself starts at 0


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        cold_sample: the sample that the cold start located.
        cold_seconds: from nothing to the place of that sample: the order built, one sample located.
        batch_seconds: to locate a global batch from there on.
        epochs: passes over each source at the end of the run.
        locality_samples: samples that the locality is over.
        peak_bytes: largest resident memory of the process less what it had after its imports: manifests, order, and
            the bookkeeping of these checks.
    """

    plan: SimulatedPlan
    machine: dict[str, Any]
    cold_sample: int
    cold_seconds: float
    batch_seconds: float
    epochs: list[float]
    exactness: Exactness
    locality: list[Locality]
    locality_samples: int
    peak_bytes: int

    def to_json(self) -> str:
        plan = self.plan
        facts = {
            "sources": [self._describe_source(number) for number in range(len(plan.sources))],
            "tokens": sum(source.tokens for source in plan.sources),
            "blocks": sum(plan.blocks(len(plan.phases) - 1)),
            "phases": [self._describe_phase(number) for number in range(len(plan.phases))],
            **{name: getattr(plan.data, name) for name in _DATA_FIELDS},
            **{name: getattr(plan, name) for name in _PLAN_FIELDS},
            "cold_sample": self.cold_sample,
            "cold_seconds": self.cold_seconds,
            "batch_seconds": self.batch_seconds,
            "each_sample_once": self.exactness.each_sample_once,
            **asdict(self.exactness),
            "locality_samples": self.locality_samples,
            "locality": [asdict(row) for row in self.locality],
            "peak_bytes": self.peak_bytes,
            "machine": self.machine,
        }
        return json.dumps(facts, indent=1, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the same for a person."""
        for label, text in self._lines():
            console.print(f"{label:<18}{text}")
        table = Table(box=None, pad_edge=False)
        for heading in ("readers", "blocks a step", "pages read over bytes used", "worst reader"):
            table.add_column(heading, justify="right")
        for row in self.locality:
            table.add_row(f"{row.readers:,}", f"{row.blocks_a_step:,}", f"{row.mean:.2f}", f"{row.worst:.2f}")
        console.print(f"\nLocality over {self.locality_samples:,} samples of one window, 4 KiB pages, readahead off:")
        console.print(table)
        console.print("A reader is a rank, or a node whose ranks share a page cache.")

    def _lines(self) -> list[tuple[str, str]]:
        plan, found = self.plan, self.exactness
        shards = sum(len(source.shard_tokens) for source in plan.sources)
        tokens = sum(source.tokens for source in plan.sources)
        consumed = plan.phases.tokens(plan.end_sample)
        return [
            ("data", f"{tokens:,} tokens in {shards:,} shards of {len(plan.sources):,} source(s)"),
            *(("blocks", self._blocks_line(number)) for number in range(len(plan.phases))),
            ("run", f"to sample {plan.end_sample:,}: {consumed:,} tokens, {self._epochs()}"),
            (
                "cold start",
                f"{self.cold_seconds * 1e3:.1f} ms to build the order and locate sample {self.cold_sample:,}",
            ),
            ("a global batch", f"{self.batch_seconds * 1e3:.1f} ms to locate {plan.global_size:,} samples"),
            ("each sample once", _verdict(plan, found)),
            ("chunks a batch", f"{found.chunks_a_batch:,.1f} on average"),
            ("peak memory", f"{self.peak_bytes / 1e6:.0f} MB beyond the imports (manifests, order and these checks)"),
            ("machine", machine_line(self.machine)),
        ]

    def _blocks_line(self, number: int) -> str:
        data, blocks, phase = self.plan.data, self.plan.blocks(number), self.plan.phases[number]
        chunks = sum(-(-count // data.chunk_blocks) for count in blocks)
        windows = sum(-(-count // (data.chunk_blocks * data.window_chunks)) for count in blocks)
        until = "" if phase.end_sample is None else f", up to sample {phase.end_sample:,}"
        return f"{sum(blocks):,} of {self.plan.payload(number)} tokens, {chunks:,} chunks, {windows:,} windows{until}"

    def _describe_phase(self, number: int) -> dict[str, Any]:
        phase = self.plan.phases[number]
        return {
            "seq_len": phase.seq_len,
            "first_sample": phase.first_sample,
            "end_sample": phase.end_sample,
            "blocks": sum(self.plan.blocks(number)),
        }

    def _describe_source(self, number: int) -> dict[str, Any]:
        source = self.plan.sources[number]
        return {
            "name": source.name,
            "tokens": source.tokens,
            "shards": len(source.shard_tokens),
            "blocks": self.plan.blocks(len(self.plan.phases) - 1)[number],
            "epochs": self.epochs[number],
        }

    def _epochs(self) -> str:
        if len(self.epochs) == 1:
            return f"{self.epochs[0]:.4g} epochs"
        named = [f"{source.name} {epochs:.4g}" for source, epochs in zip(self.plan.sources, self.epochs, strict=True)]
        return f"epochs: {', '.join(named)}"


_DATA_FIELDS = ("seq_len", "chunk_blocks", "window_chunks")
_PLAN_FIELDS = ("seed", "ranks", "global_size", "steps", "total_steps", "first_sample")


def simulate(make_plan: Callable[[], SimulatedPlan], console: Console) -> Simulation:
    """Work a plan through.

    Args:
        make_plan: called first; what it reads counts as memory of the simulation.
        console: for progress.
    """
    machine, before = describe_machine(), resident_bytes()
    plan = make_plan()
    cold_sample = plan.first_sample or FAR_SAMPLE
    started = time.perf_counter()
    order = plan.order()
    order.locate(np.array([cold_sample]))
    cold_seconds = time.perf_counter() - started
    started = time.perf_counter()
    order.locate(np.arange(cold_sample, cold_sample + plan.global_size))
    batch_seconds = time.perf_counter() - started
    with StepProgress(console, "Checking steps", plan.steps) as progress:
        exactness = check_exactness(plan, order, lambda done: progress.show(done, f"{done:,} of {plan.steps:,} steps"))
    locality, locality_samples = measure_locality(plan, order)
    return Simulation(
        plan=plan,
        machine=machine,
        cold_sample=cold_sample,
        cold_seconds=cold_seconds,
        batch_seconds=batch_seconds,
        epochs=order.epochs(plan.end_sample),
        exactness=exactness,
        locality=locality,
        locality_samples=locality_samples,
        peak_bytes=max(0, peak_resident_bytes() - before),
    )


def _verdict(plan: SimulatedPlan, found: Exactness) -> str:
    what = (
        f"{found.samples:,} samples over {plan.ranks:,} ranks × {plan.steps:,} steps from sample {plan.first_sample:,}"
    )
    if found.each_sample_once:
        return f"yes: {what}; no block twice in an epoch; {found.own_calls:,} shares asked of single ranks agree"
    return (
        f"NO: {what}; {found.misplaced:,} not with one rank, {found.repeated_blocks:,} blocks repeated in an epoch, "
        f"{found.differing_shares:,} of {found.own_calls:,} shares of single ranks differ"
    )
