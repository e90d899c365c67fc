"""Whether a run may go on with a data order other than the one it has followed so far, and what has changed.

Only the past counts: phases, sources, shards and weights that the first `samples` samples did not depend on may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.config import RopeTheta
from trainer.data.manifest import STARTS_OF
from trainer.runtime.plain_text import listed
from trainer.schedule.mask_ratio import ratio_differences
from trainer.schedule.phases import tokens_before


def order_differences(saved: dict[str, Any], current: dict[str, Any], samples: int) -> list[str]:
    """Say what about the first `samples` samples has changed, one line each; none when they are the same.

    Args:
        saved, current: as `Inputs.data_order` gives them. Where both have the `shards` of their sources, a changed
            source is explained shard by shard.
    """
    scalars = ("version", "chunk_blocks", "window_chunks")
    lines = [
        f"the order's {name} was {saved[name]}, now {current[name]}" for name in scalars if saved[name] != current[name]
    ]
    kinds = [order.get("samples", "stream") for order in (saved, current)]
    if kinds[0] != kinds[1]:
        return [*lines, f"samples were blocks of the {kinds[0]}, now of the {kinds[1]} (data.samples)"]
    before, now = (_begun_phases(order, samples) for order in (saved, current))
    begun = [_begun(phase, samples) for phase in before]
    visited = sorted({number for spans in begun for _, _, places in spans for number, n in enumerate(places) if n})
    for number in visited:
        lines += _source_differences(number, saved["sources"], current["sources"])
    if _lengths(before) != _lengths(now):
        return [*lines, _describe_phases(before, now, samples)]
    if "mask_ratio" in saved and "mask_ratio" in current:  # not before there were stages of it
        lines += ratio_differences(saved["mask_ratio"], current["mask_ratio"], _lengths(before), samples)
    lines += [
        f"the rope theta of phase {number} was {was}, now {becomes} (data.phases[].rope_theta, local_rope_theta)"
        for number, (was, becomes) in enumerate(zip(*map(_thetas, (before, now)), strict=True), 1)
        if was != becomes
    ]
    for old, new in zip(before, now, strict=True):
        if not lines and _begun(old, samples) != _begun(new, samples):
            token = tokens_before(_lengths(before), old["first_sample"])
            lines.append(_describe_mixture(old, new, samples, token))
    return lines


def recorded_phases(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the phases of a recorded order: first_sample, seq_len, blocks and spans of each.

    What was recorded before there were phases is a run of one.
    """
    blocks = [source.get("blocks") for source in order["sources"]]
    return order.get("phases") or [{**order, "first_sample": 0, "blocks": blocks}]


def shard_differences(before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]) -> list[str]:
    """Say how the shards of a source differ: changed, gone, added, renamed or in another order.

    Args:
        before, after: for each shard its name, then whatever identifies its content.
    """
    old, new = {name: content for name, *content in before}, {name: content for name, *content in after}
    renamed = {
        name: other
        for name, content in old.items()
        if name not in new
        for other in new
        if other not in old and new[other] == content
    }
    groups = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "renamed": [f"{name} to {other}" for name, other in renamed.items()],
        "gone": [name for name in old if name not in new and name not in renamed],
        "added": [name for name in new if name not in old and name not in renamed.values()],
    }
    lines = [f"{word}: {listed(names)}" for word, names in groups.items() if names]
    common = [name for name in new if name in old]
    return lines if lines or common == list(old) else ["its shards are in another order"]


def _begun_phases(order: dict[str, Any], samples: int) -> list[dict[str, Any]]:
    """Find the phases that the first `samples` samples lie in."""
    return [phase for phase in recorded_phases(order) if phase["first_sample"] < max(1, samples)]


def _lengths(phases: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(phase["first_sample"], phase["seq_len"]) for phase in phases]


def _thetas(phases: list[dict[str, Any]]) -> list[str]:
    """Describe the rope theta of each phase; that of the first is compared with the model's config."""
    thetas = [phase.get("rope_theta") for phase in phases]  # none where no phase changes it
    return ["that of the first" if theta in (None, thetas[0]) else str(RopeTheta.of(theta)) for theta in thetas]


def _begun(phase: dict[str, Any], samples: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Find the spans that the first `samples` samples lie in; places without the zeros of sources added later."""
    begun = []
    for start, size, places in phase["spans"]:
        while places and places[-1] == 0:
            places = places[:-1]
        if phase["first_sample"] + start < samples:
            begun.append((start, size, tuple(places)))
    return begun


def _source_differences(number: int, saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[str]:
    before = saved[number]
    after = current[number] if number < len(current) else None
    if after is not None and after["fingerprint"] == before["fingerprint"]:
        return [
            f"the {STARTS_OF[mark]} starts of source '{before['name']}' are "
            + ("others, and so would be the masks" if mark in after.get("marks", {}) else "no longer read")
            for mark, identity in before.get("marks", {}).items()
            if after.get("marks", {}).get(mark) != identity
        ]
    moved = [place for place, source in enumerate(current) if source["fingerprint"] == before["fingerprint"]]
    if moved:
        return [f"source '{before['name']}' was number {number + 1} of data.train, now number {moved[0] + 1}"]
    if after is None:
        return [f"source '{before['name']}' is gone"]
    reasons = []
    if "shards" in before and "shards" in after:
        reasons += shard_differences(before["shards"], after["shards"])
    if before["quarantine"] != after["quarantine"]:
        reasons.append(f"quarantine was {before['quarantine'] or 'empty'}, now {after['quarantine'] or 'empty'}")
    return [f"source '{before['name']}' is another ({'; '.join(reasons) or 'its content differs'})"]


def _describe_phases(before: list[dict[str, Any]], now: list[dict[str, Any]], samples: int) -> str:
    was, becomes = (
        ", then ".join(
            f"blocks of {length}" + (f" from sample {first:,} on" if first else "")
            for first, length in _lengths(phases)
        )
        for phases in (before, now)
    )
    return (
        f"the {samples:,} samples seen so far were {was}, now {becomes}: other phases can begin at token "
        f"{tokens_before(_lengths(before), samples):,} at the earliest (data.phases, data.seq_len, global_size)"
    )


def _describe_mixture(saved: dict[str, Any], current: dict[str, Any], samples: int, first_token: int) -> str:
    """Say how the places of a phase that begins at position `first_token` have changed."""
    start, size, _ = _begun(saved, samples)[-1]
    inside = samples - saved["first_sample"]
    earliest = start + -(-(inside - start) // size) * size
    before, now = (_begun(phase, samples)[-1][2] for phase in (saved, current))
    return (
        f"the mixture of the {samples:,} samples seen so far was {before}, now {now} places: other weights can begin "
        f"at token {first_token + earliest * saved['seq_len']:,} at the earliest (data.stages, data.phases)"
    )
