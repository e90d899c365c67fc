"""Whether a run may go on with a data order other than the one it has followed so far, and what has changed.

Only the past counts: sources, shards and weights that the first `samples` samples did not depend on may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHARDS_NAMED = 5


def order_differences(saved: dict[str, Any], current: dict[str, Any], samples: int) -> list[str]:
    """What about the first `samples` samples has changed, one line each; none when they are the same.

    Args:
        saved, current: as `Inputs.data_order` gives them. Where both have the `shards` of their sources, a changed
            source is explained shard by shard.
    """
    scalars = ("version", "payload", "chunk_blocks", "window_chunks")
    lines = [
        f"the order's {name} was {saved[name]}, now {current[name]}" for name in scalars if saved[name] != current[name]
    ]
    visited = sorted({number for _, _, places in _begun(saved, samples) for number, n in enumerate(places) if n})
    for number in visited:
        lines += _source_differences(number, saved["sources"], current["sources"])
    if not lines and _begun(saved, samples) != _begun(current, samples):
        lines.append(_describe_mixture(saved, current, samples))
    return lines


def shard_differences(before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]) -> list[str]:
    """How the shards of a source differ: changed, gone, added, renamed or in another order.

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
    lines = [f"{word}: {_named(names)}" for word, names in groups.items() if names]
    common = [name for name in new if name in old]
    return lines if lines or common == list(old) else ["its shards are in another order"]


def _begun(order: dict[str, Any], samples: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """The spans that the first `samples` samples lie in; places without the zeros of sources added later."""
    begun = []
    for start, size, places in order["spans"]:
        while places and places[-1] == 0:
            places = places[:-1]
        if start < samples:
            begun.append((start, size, tuple(places)))
    return begun


def _source_differences(number: int, saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[str]:
    before = saved[number]
    after = current[number] if number < len(current) else None
    if after is not None and after["fingerprint"] == before["fingerprint"]:
        return []
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


def _describe_mixture(saved: dict[str, Any], current: dict[str, Any], samples: int) -> str:
    start, size, _ = _begun(saved, samples)[-1]
    earliest = start + -(-(samples - start) // size) * size
    before, now = (_begun(order, samples)[-1][2] for order in (saved, current))
    return (
        f"the mixture of the {samples:,} samples seen so far was {before}, now {now} places: other weights can begin "
        f"at token {earliest * saved['seq_len']:,} at the earliest (data.stages)"
    )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHARDS_NAMED} more" if len(names) > _SHARDS_NAMED else ""
    return ", ".join(names[:_SHARDS_NAMED]) + more
