"""Parts of a data set that a run leaves out on purpose, because they are damaged.

An entry names a shard and, after a colon, one or several of its MiB as `maskwright data verify` and the error of a
damaged read count them: `shard-00003`, `shard-00003:17`, `shard-00003:17-19`. The stream of tokens closes over the
gap, so every later block moves: a quarantine is part of the data's fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trainer.data.manifest import SUM_BYTES, Manifest
from trainer.errors import UserError, nearest

_ENTRY = re.compile(r"(?P<shard>[^:]+)(:(?P<first>\d+)(-(?P<last>\d+))?)?")


def kept_stretches(manifest: Manifest, quarantine: Sequence[str], where: str) -> list[tuple[int, int, int]]:
    """List what is left of a data set: (shard, first token, tokens) in order.

    Args:
        where: the data set, for the error.

    Raises:
        UserError: for an entry that cannot be read, or names a shard or a MiB that is not there.
    """
    numbers = {entry.name: number for number, entry in enumerate(manifest.shards)}
    left_out: dict[int, list[tuple[int, int]]] = {}
    for text in quarantine:
        match = _ENTRY.fullmatch(text)
        if match is None:
            raise UserError(
                f"Cannot read the quarantine '{text}'.",
                where=where,
                remedy="Write a shard, or a shard and MiB: shard-00003, shard-00003:17 or shard-00003:17-19.",
            )
        name = match["shard"]
        if name not in numbers:
            raise UserError(
                f"The quarantine names '{name}', which is no shard.{nearest(name, list(numbers))}",
                where=where,
                remedy="Correct the name; `maskwright data verify` lists damaged shards.",
            )
        left_out.setdefault(numbers[name], []).append(_range(match, manifest, numbers[name], where))

    per_mebibyte = SUM_BYTES // np.dtype(manifest.dtype).itemsize
    stretches = []
    for number, entry in enumerate(manifest.shards):
        start = 0
        for first, last in sorted(left_out.get(number, [])):
            if first * per_mebibyte > start:
                stretches.append((number, start, first * per_mebibyte - start))
            start = max(start, (last + 1) * per_mebibyte)
        if entry.tokens > start:
            stretches.append((number, start, entry.tokens - start))
    return stretches


def _range(match: re.Match[str], manifest: Manifest, number: int, where: str) -> tuple[int, int]:
    """Find the first and last MiB of an entry."""
    last_of_shard = max(0, (manifest.shards[number].files["tok"][0] - 1) // SUM_BYTES)
    if match["first"] is None:
        return 0, last_of_shard
    first = int(match["first"])
    last = int(match["last"] or first)
    if not first <= last <= last_of_shard:
        raise UserError(
            f"The quarantine '{match[0]}' lies outside the shard, whose last MiB is {last_of_shard}.",
            where=where,
            remedy="Correct the numbers; they start at 0.",
        )
    return first, last
