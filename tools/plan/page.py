"""A plan on one page, and as JSON. Every figure says whether it is exact, modelled, measured or assumed."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.plan.advice import GPU_COUNTS
from tools.plan.facts import Facts
from tools.plan.layouts import Layout
from tools.plan.run import RunPlan
from trainer.inputs.summary import describe_changes, why_without_steps
from trainer.schedule.run_length import describe_length

GIB = 2**30
_LABEL_WIDTH, _WIDTH = 12, 118


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print the page."""
    for title, lines, table in _sections(plan):
        console.print()
        console.print(title, style="bold")
        for label, text in lines:
            _print_line(label, text, console)
        if table is not None:
            console.print(table)
    console.print()
    console.print("What DeepSpeed gets", style="bold")
    _print_line("", json.dumps(plan.ds_config), console)
    console.print()
    _print_line("exact", "arithmetic; tests compare it with real runs.", console)
    _print_line("modelled", _MODELLED, console)
    _print_line("formulas", "docs/plan.md", console)


_MODELLED = (
    "memory is tested against measured memory on CPU, at every stage; on a GPU it is not measured yet. Times are a "
    "roofline, what is possible at best: launches, Python, stragglers, latency and overlap are not in them. `--bench "
    "FILE` puts a measurement in the place of the roofline."
)


def _print_line(label: str, text: str, console: Console) -> None:
    first = f"  {label:<{_LABEL_WIDTH}}"
    lines = textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
    for line in lines or [first]:
        console.print(line)


def _sections(plan: RunPlan) -> list[tuple[str, list[tuple[str, str]], Table | None]]:
    unit = plan.unit
    return [
        ("Run", _run(plan), None),
        ("Step", _step(plan), None),
        (f"Memory of a {unit}, GiB", [], _memory_table(plan)),
        ("Advice", _advice(plan), None),
        (f"The same batch on 1 to 1,024 {unit}s (modelled)", [], _scale_table(plan)),
    ]


def _run(plan: RunPlan) -> list[tuple[str, str]]:
    config, facts, batch = plan.facts.config, plan.facts, plan.facts.plan
    chosen, estimate = plan.chosen, plan.estimate
    options = plan.options
    model = f"{estimate.class_name}, {estimate.parameters + estimate.frozen:,} parameters"
    if estimate.frozen:
        model += f", {estimate.frozen:,} of them frozen"
    auto = (
        f" (auto: the largest that fits on {plan.device.name}, modelled)" if config.batch.micro_size == "auto" else ""
    )
    lines = [
        ("name", f"{config.run.name}, in {config.run.dir}"),
        (
            "on",
            f"{options.nodes:,} node{_s(options.nodes)} × {options.gpus_per_node} = {plan.world_size:,} × "
            f"{plan.device.name}, {config.train.precision}, {config.deepspeed}",
        ),
        ("model", f"{model}; {plan.flops_per_token / 1e9:.4g} GFLOP a token in training (exact)"),
        (
            "batch",
            f"{batch.global_size:,} sequences of {batch.seq_len} = {chosen.micro_size} micro × {plan.world_size:,} "
            f"ranks × {chosen.accumulation} accumulation{auto} (exact)",
        ),
    ]
    lines += _phases(plan)
    if facts.steps_known:
        lines.append(("length", _length(facts)))
        for line in describe_length(facts.config, facts.plan, max(facts.epochs.values(), default=None)):
            label, _, text = line.partition(": ")
            lines.append((label, text))
    else:
        lines.append(("length", f"{config.train.epochs:g} epochs of data that are not there yet: steps not known"))
    if facts.tokens is not None:
        epochs = ", ".join(f"{passes:.2f} epochs of {name}" for name, passes in facts.epochs.items())
        lines.append(("data", f"{facts.tokens:,} tokens; {epochs}"))
    return [*lines, *(("not known", text) for text in facts.unknown)]


def _phases(plan: RunPlan) -> list[tuple[str, str]]:
    """Say of each phase what it changes, and what attention costs there."""
    config, phases, batch = plan.facts.config, plan.facts.phases, plan.facts.plan
    if len(phases) == 1:
        return []
    runs = groupby(batch.runs(0, batch.total_steps), key=lambda run: run.shape.phase)
    steps = {number: sum(run.steps for run in of_phase) for number, of_phase in runs}
    lines = []
    for number, (phase, share) in enumerate(zip(phases, plan.attention_shares, strict=True)):
        parts = [f"blocks of {phase.seq_len:,}, {phase.global_size:,} a step"]
        if phase.end_sample is not None:
            parts.append(f"up to token {phases.tokens(phase.end_sample):,}")
        if plan.facts.steps_known:
            parts.append(f"{steps[number]:,} steps" if number in steps else why_without_steps(phase))
        parts += describe_changes(config, phases, number)
        parts.append(f"attention is {share:.1%} of the FLOPs")
        lines.append((f"phase {number + 1}", "; ".join(parts)))
    return lines


def _length(facts: Facts) -> str:
    steps, each = facts.plan.total_steps, facts.plan.tokens_per_step
    how = f"{steps:,} steps, up to {each:,} tokens each:" if facts.plan.sizes_vary else f"{steps:,} steps × {each:,} ="
    return f"{how} {facts.total_tokens:,} tokens (exact)"


def _step(plan: RunPlan) -> list[tuple[str, str]]:
    chosen, time = plan.chosen, plan.chosen.time
    word = "measured, scaled" if plan.measured is not None else "modelled"
    parts = f"passes {_ms(time.passes)}, traffic {_ms(time.traffic)}, update {_ms(time.update)}"
    if plan.measured is not None:
        parts = f"passes and update {_ms(time.passes)}, and traffic, which is modelled, {_ms(time.traffic)}"
    if time.iterations:
        parts += f", Muon's iterations {_ms(time.iterations)} ({time.iterations / time.seconds:.1%})"
    days = plan.days(chosen)
    saves, speed = plan.checkpoint, chosen.tokens_per_second
    lines = [
        ("time", f"{_ms(time.seconds)}: {parts} ({word})"),
        (
            "speed",
            f"{_tokens(speed)} tokens/s, {_tokens(speed / plan.world_size)} a {plan.unit} ({word})",
        ),
    ]
    if days is not None:
        lines.append(
            ("run", f"{_duration(days * 86_400)}, {days * 24 * plan.world_size:,.3g} {plan.unit} hours ({word})")
        )
    sent = chosen.wire.sent_bytes(plan.world_size)
    lines += [
        (
            "wire",
            f"each {plan.unit} sends {_bytes(sent)} a step: {chosen.wire.elements / plan.estimate.parameters:.3g} × "
            f"the {'trained ' if plan.estimate.frozen else ''}parameters × {chosen.wire.bytes_per_element} bytes × "
            f"(ranks − 1) / ranks ({'exact' if chosen.wire.is_exact else 'modelled'})",
        ),
        (
            "checkpoint",
            f"{_bytes(saves.bytes)} each (exact to a few MB), {_duration(saves.stall_seconds)} of stall: {saves.basis}"
            + (f"; {saves.count:,} in the run" if saves.count else ""),
        ),
        ("figures", plan.time_basis),
    ]
    if plan.measured is not None:
        lines.append(("", f"traffic and memory: {plan.device.basis}"))
    return lines


def _advice(plan: RunPlan) -> list[tuple[str, str]]:
    found = plan.recommendation
    lines = []
    if found.layout is None:
        lines.append(("take", found.reason))
    else:
        take = found.layout
        lines.append(
            (
                "take",
                f"stage {take.stage}, batch.micro_size={take.micro_size}, accumulation {take.accumulation}: "
                f"{take.memory.peak / GIB:.1f} GiB, {_ms(take.time.seconds)} a step (modelled)",
            )
        )
        lines += [("because" if number == 0 else "", text) for number, text in enumerate(found.reason.split("; "))]
    if not plan.chosen.fits:
        lines.append(
            (
                "mind",
                f"as configured it does not fit: {plan.chosen.memory.peak / GIB:.1f} of "
                f"{plan.device.usable_bytes / GIB:.1f} GiB (modelled)",
            )
        )
    label = "more nodes"
    for text in plan.doubling:
        lines.append((label, text))
        label = ""
    return lines


def _memory_table(plan: RunPlan) -> Table:
    headings = ["stage", "weights", "optimizer", "gradients", "buckets", "activations", "logits", "peak", "fits"]
    table = _table([*headings, "sends a step", "step", "largest micro"])
    for stage, layout in plan.by_stage.items():
        memory, best = layout.memory, plan.best[stage]
        logits = plan.estimate.step(layout.micro_size).logits_bytes
        parts = (
            memory.weights,
            memory.optimizer,
            memory.gradients,
            memory.buckets,
            memory.activations - logits,
            logits,
        )
        table.add_row(
            f"{stage}{' *' if layout.zero is plan.chosen.zero else ''}",
            *(f"{part / GIB:.2f}" for part in parts),
            f"{memory.peak / GIB:.2f}",
            "yes" if layout.fits else "NO",
            _bytes(layout.wire.sent_bytes(layout.world_size)),
            _ms(layout.time.seconds),
            "none" if best is None else str(best.micro_size),
        )
    usable, whole = plan.device.usable_bytes / GIB, plan.device.memory_bytes / GIB
    host = plan.chosen.memory.host
    offloaded = f"; {host / GIB:.2f} GiB of each rank's state in host memory" if host else ""
    teacher = plan.estimate.teacher
    taught = f" {teacher.weight_bytes / GIB:.2f} GiB of the weights are the teacher's." if teacher is not None else ""
    table.caption = (
        f"  * as configured; micro-batch {plan.chosen.micro_size}. Modelled, without torch.compile.{taught} "
        f"Usable: {usable:.1f} of {whole:.1f} GiB{offloaded}."
    )
    table.caption_justify = "left"
    return table


def _scale_table(plan: RunPlan) -> Table:
    table = _table(
        [f"{plan.unit}s", "nodes", "micro × acc.", "GiB", "step", "traffic", "tokens/s", "efficiency", "run"]
    )
    one = next((layout for layout in plan.table if layout is not None), None)
    for count, layout in zip(GPU_COUNTS, plan.table, strict=True):
        nodes = -(-count // plan.options.gpus_per_node)
        if layout is None or one is None:
            table.caption, table.caption_justify = "  Beyond these the global batch does not divide.", "left"
            break
        efficiency = layout.tokens_per_second / count / (one.tokens_per_second / one.world_size)
        days = plan.days(layout)
        table.add_row(
            f"{count:,}",
            f"{nodes:,}",
            f"{layout.micro_size} × {layout.accumulation}",
            f"{layout.memory.peak / GIB:.2f}{'' if layout.fits else ' NO'}",
            _ms(layout.time.seconds),
            f"{layout.time.traffic_share:.0%}",
            _tokens(layout.tokens_per_second),
            f"{efficiency:.0%}",
            "" if days is None else _duration(days * 86_400),
        )
    return table


def _table(headings: list[str]) -> Table:
    table = Table(box=None, pad_edge=True, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def to_json(plan: RunPlan) -> str:
    """Write the same for a program, as JSON: bytes, seconds and elements."""
    facts, batch = plan.facts, plan.facts.plan
    content = {
        "run": {
            "name": facts.config.run.name,
            "nodes": plan.options.nodes,
            "gpus_per_node": plan.options.gpus_per_node,
            "ranks": plan.world_size,
            "precision": facts.config.train.precision,
            "deepspeed": facts.config.deepspeed,
            "global_size": batch.global_size,
            "micro_size": plan.chosen.micro_size,
            "accumulation": plan.chosen.accumulation,
            "seq_len": batch.seq_len,
            **_phases_json(plan),
            "steps": batch.total_steps if facts.steps_known else None,
            "tokens": facts.total_tokens if facts.steps_known else None,
            "data_tokens": facts.tokens,
            "epochs": facts.epochs,
            "unknown": facts.unknown,
            "basis": "exact",
        },
        "model": {
            "class": plan.estimate.class_name,
            "parameters": plan.estimate.parameters + plan.estimate.frozen,
            "frozen": plan.estimate.frozen,
            "flops_per_token": plan.flops_per_token,
            "basis": "exact",
        },
        "device": asdict(plan.device),
        "measured": asdict(plan.measured) if plan.measured is not None else None,
        "chosen": _layout_json(plan, plan.chosen),
        "by_stage": {str(stage): _layout_json(plan, layout) for stage, layout in plan.by_stage.items()},
        "largest_micro_size": {
            str(stage): None if layout is None else layout.micro_size for stage, layout in plan.best.items()
        },
        "recommended": {
            "layout": None if plan.recommendation.layout is None else _layout_json(plan, plan.recommendation.layout),
            "reason": plan.recommendation.reason,
        },
        "more_nodes": plan.doubling,
        "by_gpus": {
            str(count): None if layout is None else _layout_json(plan, layout)
            for count, layout in zip(GPU_COUNTS, plan.table, strict=True)
        },
        "checkpoint": asdict(plan.checkpoint),
        "deepspeed": plan.ds_config,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _phases_json(plan: RunPlan) -> dict[str, Any]:
    config, phases = plan.facts.config, plan.facts.phases
    if len(phases) == 1:
        return {}
    ratios = [phase.mask_ratio for phase in config.data.phases]
    found = [
        {
            "seq_len": phase.seq_len,
            "global_size": phase.global_size,
            "first_token": phases.tokens(phase.first_sample),
            "lr_factor": phase.lr_factor,
            "mask_ratio": ratio if ratio is not None else config.objective.mask_ratio,
            **({} if phase.rope_theta is None else phase.rope_theta.keys),
            "attention_share_of_flops": share,
        }
        for phase, ratio, share in zip(phases, [*ratios, None], plan.attention_shares, strict=True)
    ]
    return {"phases": found}


def _layout_json(plan: RunPlan, layout: Layout) -> dict[str, Any]:
    word = "modelled" if plan.measured is None else "measured, scaled by FLOPs; traffic modelled"
    return {
        "stage": layout.stage,
        "ranks": layout.world_size,
        "micro_size": layout.micro_size,
        "accumulation": layout.accumulation,
        "memory_bytes": {
            **asdict(layout.memory),
            "logits": plan.estimate.step(layout.micro_size).logits_bytes,
            "peak": layout.memory.peak,
            "basis": "modelled",
        },
        "fits": layout.fits,
        "wire": {
            "gradient_elements": layout.wire.gradients,
            "weight_elements": layout.wire.weights,
            "matrix_elements": layout.wire.matrices,
            "sent_bytes_per_rank": layout.wire.sent_bytes(layout.world_size),
            "basis": "exact" if layout.wire.is_exact else "modelled",
        },
        "step_seconds": {**asdict(layout.time), "total": layout.time.seconds, "basis": word},
        "tokens_per_second": layout.tokens_per_second,
        "days": plan.days(layout),
    }


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _ms(seconds: float) -> str:
    if seconds >= 100:
        return _duration(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.2g} s"


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e7 else f"{count / 1e6:,.2f} M" if count >= 1e6 else f"{_count(count)}"


def _count(count: float) -> str:
    return f"{count:,.0f}"


def _bytes(count: float) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count / 1e3:.3g} kB" if count else "nothing"
