"""How much of a text is held out for evaluation, where nobody says: `data.validation: auto`.

A twentieth, as transformers' run_mlm.py does; of a small text more, so that there is something to evaluate on, and of a
large one no more than an evaluation reads: 1,024 blocks of 512 tokens are some 2 MiB of text. The documents themselves
are chosen by their hash, as with any `--validation-fraction`: a repeated document is never on both sides.

Runs that have begun depend on these numbers: with others, their data would be others as well.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from tools.prepare.bad_documents import Losses
from tools.prepare.job import Job
from tools.prepare.plan import weight_of
from tools.prepare.readers import read_documents
from tools.prepare.worker import HASHES, hash_document
from trainer.errors import UserError

USUAL_SHARE = 0.05
LARGEST_SHARE = 0.2
LEAST_BYTES, MOST_BYTES = 16 << 10, 4 << 20
COUNTED_BYTES = 16 << 20
"""Up to so much text is read for it: a share of few documents may come out far from what it says, or as none."""
_MOST_OF_TEXT = 0.5


def choose_fraction(job: Job) -> float:
    """Choose the fraction of the documents that `job` is to hold out.

    Up to COUNTED_BYTES the documents are read for it; of a larger text the size decides.

    Raises:
        UserError: as `fraction_of`; and what is wrong with the text.
    """
    size = sum(weight_of(file) for file in job.inputs.files)
    if 0 < size <= COUNTED_BYTES:
        return fraction_of(_document_bytes(job))
    return float(f"{_wanted(size) / size:.2g}") if size else USUAL_SHARE  # a data set on the hub may not say its size


def fraction_of(sizes: Mapping[int, int]) -> float:
    """Choose the smallest fraction that holds out as many bytes as wanted, with as few digits as will do.

    Args:
        sizes: hash → bytes of all documents that have it.

    Raises:
        UserError: when more than half of the text would have to go, because it has too few documents.
    """
    hashes, total = sorted(sizes), sum(sizes.values())
    if not hashes:
        return USUAL_SHARE  # of nothing: that there is no text is said by who prepares it
    held_out = list(accumulate(sizes[one] for one in hashes))
    last = bisect_left(held_out, _wanted(total))
    if held_out[last] > _MOST_OF_TEXT * total:
        raise UserError(
            f"The text has too few documents to hold out some of them: {len(hashes):,} of {total:,} bytes in all.",
            where="data.validation=auto",
            remedy="Cut it into more (data.text.documents=line), give data.validation a file of its own, or set "
            "data.validation=null.",
        )
    return _between(hashes[last], hashes[last + 1])


def _wanted(size: int) -> float:
    """Compute how many bytes of `size` are to be held out."""
    return min(max(USUAL_SHARE * size, min(LEAST_BYTES, LARGEST_SHARE * size)), MOST_BYTES)


def _document_bytes(job: Job) -> Counter[int]:
    """Read all documents; return the bytes of each by its hash, those of equal ones together."""
    found: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        reading = dataclasses.replace(job.work_settings().reading, scratch=scratch)
        losses = Losses()
        for unit in job.units:
            for piece in unit.pieces:
                for text, _ in read_documents(piece, reading, losses):
                    if text and not text.isspace():
                        raw = text.encode()
                        found[hash_document(raw)] += len(raw)
    return found


def _between(last: int, following: int) -> float:
    """Find the shortest decimal fraction of all hashes that is above `last` and not above `following`."""
    for digits in range(1, 17):
        fraction = float(f"{math.floor(last / HASHES * 10**digits + 1) / 10**digits:.{digits}f}")
        if last < fraction * HASHES <= following:
            return fraction
    return math.nextafter(last / HASHES, 1.0)
