"""Losses to compare with: of a model that has learnt nothing, and of one that knows how frequent tokens are.

A uniform guess over V tokens costs ln V nats. Guessing by frequency costs the cross-entropy of the validation tokens
under the distribution of the training tokens (Shannon, 1948); a model below that has learnt something of context.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import Manifest, read_data_manifest
from trainer.data.shard_checks import check_sizes

MOST_TOKENS = 1 << 27
"""Tokens of a data set that are counted; of a larger one evenly spread stretches, which tell the same."""
_STRETCH = 1 << 20


def unigram_cross_entropy(train_folder: str | Path, validation_folder: str | Path, vocabulary_size: int) -> float:
    """Compute the cross-entropy of validation tokens under the frequencies of training tokens, in nats a token.

    Of content tokens: separators are none, and no objective masks them. Each id counts once more than it comes, so that
    none is impossible (add-one smoothing).

    Args:
        vocabulary_size: V, ids below which there is a probability.

    Raises:
        UserError: for a folder that is no data set.
        DamagedError: for a manifest that is damaged, or shards that are not as it says.
    """
    seen, _ = token_counts(train_folder, vocabulary_size)
    asked, _ = token_counts(validation_folder, vocabulary_size)
    for counts, folder in ((seen, train_folder), (asked, validation_folder)):
        separator = read_data_manifest(folder).separator_id
        counts[separator : separator + 1] = 0  # of which there may be none below V
    logarithms = np.log(seen + 1.0) - np.log(float(seen.sum()) + len(seen))
    return -float(asked @ logarithms) / max(1.0, float(asked.sum()))


def token_counts(folder: str | Path, vocabulary_size: int) -> tuple[NDArray[np.int64], bool]:
    """Count how often each id comes in a data set, int64 [V], and tell whether all of it was counted.

    Raises:
        UserError: for a folder that is no data set.
        DamagedError: for a manifest that is damaged, or shards that are not as it says.
    """
    manifest = read_data_manifest(folder)
    counts = np.zeros(max(vocabulary_size, manifest.vocabulary_size, manifest.separator_id + 1), np.int64)
    for stretch in _stretches(Path(folder), manifest):
        known = stretch[stretch < len(counts)]  # `data verify` finds ids beyond; they would take any memory here
        counts += np.bincount(known, minlength=len(counts))
    return counts[:vocabulary_size], manifest.tokens <= MOST_TOKENS


def _stretches(folder: Path, manifest: Manifest) -> Iterator[NDArray[np.uint]]:
    """Yield the tokens in stretches; of more than MOST_TOKENS every second, third, … of them."""
    every, number = -(-manifest.tokens // MOST_TOKENS), 0
    for entry in manifest.shards:
        check_sizes(folder, entry)
        if not entry.tokens:  # nothing to map
            continue
        tokens = np.memmap(folder / f"{entry.name}.tok", manifest.dtype, "r")
        for start in range(0, len(tokens), _STRETCH):
            if number % every == 0:
                yield tokens[start : start + _STRETCH]
            number += 1
