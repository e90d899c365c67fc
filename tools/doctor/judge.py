"""What is wrong with the nodes of a job, and which are: a pure function of what they told."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.doctor.lines import DoctorReport, Line
from tools.prepare.summary import human_bytes

CLOCK_SKEW_S = 2.0
SLOW_SHARE = 0.25
"""A node whose ways to both neighbours have less than this of the median speed is bad; of two, none can be told."""
USUAL_SHARE = 0.3
"""Of the nominal speed of the interface; one TCP connection seldom carries more than 10 Gbit/s."""
_TCP_MBIT = 10_000


@dataclass(frozen=True)
class NodeFacts:
    """What a node told.

    Attributes:
        lines: its own findings (fields of Line).
        told_at: its clock, at a moment that is the same for all.
        seen: ranks whose files it sees in the run folder.
        traffic: fields of traffic.Traffic.
        took_part: whether it told the last three.
    """

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    interface: dict[str, Any]
    lines: list[dict[str, Any]]
    took_part: bool = True
    told_at: float = 0.0
    seen: list[int] = field(default_factory=list)
    traffic: dict[str, Any] = field(default_factory=dict)


def judge(names: Sequence[str], facts: Mapping[int, NodeFacts], answer_s: float) -> DoctorReport:
    """Write the lines about all nodes, and name those that should be left out: those of a fail that is theirs alone.

    Args:
        facts: by rank; who is missing has not answered.
    """
    partners = {rank: fact for rank, fact in facts.items() if fact.took_part}
    lines = [
        *_answers(names, facts, answer_s),
        *_same(names, facts, "versions", _versions, "Make it the same environment on all nodes."),
        *_same(names, facts, "devices", _devices, "Look at nvidia-smi on that node, and drain it if a GPU is lost."),
        *_own_lines(names, facts),
        *_shared_folder(names, partners),
        *_clocks(names, partners),
        *_traffic(names, partners),
    ]
    bad = {line.node for line in lines if line.state == "fail" and line.node}
    return DoctorReport(lines, [name for name in names if name in bad])


def _answers(names: Sequence[str], facts: Mapping[int, NodeFacts], answer_s: float) -> list[Line]:
    remedy = "Look whether it is up, and whether it reaches the first node (MASTER_ADDR)."
    lines = []
    for rank, name in enumerate(names):
        if rank not in facts:
            lines.append(Line("fail", "answer", f"none in {answer_s:.0f} s", remedy, name))
        elif not facts[rank].took_part:
            lines.append(Line("fail", "answer", "it fell silent while the nodes talked to each other", remedy, name))
    return lines or [Line("ok", "answer", f"from all {len(names)} nodes")]


def _versions(fact: NodeFacts) -> dict[str, str]:
    return fact.versions


def _devices(fact: NodeFacts) -> dict[str, str]:
    kinds = Counter(f"{device['name']} of {human_bytes(device['total_bytes'])}" for device in fact.devices)
    return {"GPUs": " and ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())) or "none"}


def _same(
    names: Sequence[str],
    facts: Mapping[int, NodeFacts],
    topic: str,
    values_of: Callable[[NodeFacts], dict[str, str]],
    remedy: str,
) -> list[Line]:
    """Compare what should be the same on all nodes; most of them, else the first one, have it right."""
    values = {rank: values_of(fact) for rank, fact in facts.items()}
    lines, usual = [], {}
    for key in sorted({key for found in values.values() for key in found}):
        counts = Counter(values[rank].get(key, "missing") for rank in sorted(values))
        usual[key] = counts.most_common(1)[0][0]  # of equally many the one that is met first
        for rank in sorted(values):
            own = values[rank].get(key, "missing")
            if own != usual[key]:
                finding = f"{key} {own}, on the others {usual[key]}"
                lines.append(Line("fail", topic, finding, remedy, names[rank]))
    text = ", ".join(f"{key} {value}" for key, value in usual.items())
    return lines or [Line("ok", topic, f"the same on all: {text}")]


def _own_lines(names: Sequence[str], facts: Mapping[int, NodeFacts]) -> list[Line]:
    """Collect what each node found by itself: once what is well and alike on all, the rest with the node's name."""
    lines: list[Line] = []
    well: dict[str, list[list[str]]] = {}
    for rank in sorted(facts):
        own = [Line(**{**found, "node": names[rank]}) for found in facts[rank].lines]
        lines += [line for line in own if line.state != "ok"]
        for name in dict.fromkeys(line.name for line in own):
            of_name = [line for line in own if line.name == name]
            if all(line.state == "ok" for line in of_name):
                well.setdefault(name, []).append([line.finding for line in of_name])
    for name, found in well.items():
        alike = all(findings == found[0] for findings in found)
        lines += [Line("ok", name, finding) for finding in (found[0] if alike else [f"well on {len(found)} nodes"])]
    return lines


def _shared_folder(names: Sequence[str], facts: Mapping[int, NodeFacts]) -> list[Line]:
    """Check that each node sees the others' files; those outside the largest group that does are the bad ones."""
    if not facts:
        return []
    groups = [
        {other for other in facts if other in facts[rank].seen and rank in facts[other].seen} for rank in sorted(facts)
    ]
    largest = max(groups, key=len)  # of equally large ones that of the first node
    remedy = "Give a run.dir on a file system that all nodes mount, at the same path."
    lines = []
    for rank in sorted(facts):
        if rank not in largest:
            unseen = ", ".join(names[other] for other in sorted(largest) if other not in facts[rank].seen)
            finding = f"it does not see what {unseen} wrote" if unseen else "the others do not see what it wrote"
            lines.append(Line("fail", "shared folder", finding, remedy, names[rank]))
    return lines or [Line("ok", "shared folder", f"all {len(facts)} nodes see each other's files")]


def _clocks(names: Sequence[str], facts: Mapping[int, NodeFacts]) -> list[Line]:
    if not facts:
        return []
    usual = statistics.median_low(fact.told_at for fact in facts.values())
    skews = {rank: fact.told_at - usual for rank, fact in facts.items()}
    remedy = "Have its clock synchronised (chronyc tracking)."
    lines = [
        Line("warn", "clock", f"{skew:+.1f} s off the others", remedy, names[rank])
        for rank, skew in sorted(skews.items())
        if abs(skew) > CLOCK_SKEW_S
    ]
    return lines or [Line("ok", "clock", f"within {max(map(abs, skews.values())):.2f} s of each other")]


def _traffic(names: Sequence[str], facts: Mapping[int, NodeFacts]) -> list[Line]:
    """Check the sums, and the speed of each node's ways to its neighbours in the ring."""
    if len(facts) < 2:
        return []
    ranks = sorted(facts)
    backend = facts[ranks[0]].traffic["backend"]
    name = f"all-reduce, {backend}"
    remedy = "Look at its cables, its GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO."
    errors = {rank: facts[rank].traffic["error"] for rank in ranks if facts[rank].traffic["error"]}
    if errors:
        text = "; ".join(f"{names[rank]}: {error}" for rank, error in list(errors.items())[:3])
        alone = names[next(iter(errors))] if len(errors) == 1 else ""
        return [Line("fail", name, f"{len(errors)} of {len(ranks)} nodes could not talk: {text}", remedy, alone)]
    wrong = [rank for rank in ranks if not facts[rank].traffic["is_right"]]
    if wrong:
        return [Line("fail", name, "it has a wrong sum", remedy, names[rank]) for rank in wrong]
    incoming = [facts[rank].traffic["from_previous_mbit"] for rank in ranks]
    best = [max(speed, incoming[(place + 1) % len(ranks)]) for place, speed in enumerate(incoming)]
    usual = statistics.median(best)
    lines = [
        Line("fail", "bandwidth", f"{speed:,.0f} Mbit/s to its neighbours, usual is {usual:,.0f}", remedy, names[rank])
        for rank, speed in zip(ranks, best, strict=True)
        if speed < SLOW_SHARE * usual
    ]
    reduced = min(facts[rank].traffic["all_reduce_mbit"] for rank in ranks)
    finding = f"{usual:,.0f} Mbit/s between nodes, the slowest way {min(incoming):,.0f}; all-reduce {reduced:,.0f}"
    nominal = [facts[rank].interface.get("speed_mbit") for rank in ranks]
    nominal_mbit = min((speed for speed in nominal if speed), default=None)
    if backend == "gloo" and nominal_mbit and usual < USUAL_SHARE * min(nominal_mbit, _TCP_MBIT):
        advice = "Another interface may be the fast one: set GLOO_SOCKET_IFNAME."
        lines.append(Line("warn", "bandwidth", f"{finding}; the interface is one of {nominal_mbit:,} Mbit/s", advice))
    elif not lines:
        lines.append(Line("ok", "bandwidth", finding))
    return [Line("ok", name, f"{len(ranks)} nodes have the right sum"), *lines]
