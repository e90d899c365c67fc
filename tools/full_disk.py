"""A disk that is full while an output is written: a card, whichever library says so, and in which way."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def full_disk_explained(target: Path, what: str) -> Iterator[None]:
    """Turn a full disk into a card.

    Args:
        target: what `--output` names.
        what: is written there.

    Raises:
        UserError: for a full disk, a quota, and a limit on files; any other error goes through.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # tokenizers raises plain ones
        is_full = getattr(error, "errno", None) in _FULL or any(f"(os error {each})" in str(error) for each in _FULL)
        if not (is_full or isinstance(error, SafetensorError)):
            raise
        raise UserError(
            f"The {what} could not be written: {error}.",
            where=f"--output {target}",
            remedy="Free some space and run the same command again; nothing was left behind.",
        ) from error
