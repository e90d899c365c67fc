"""What a run that has begun keeps, whatever the newest defaults are."""

from __future__ import annotations

import re

from trainer.checkpoint.find import candidates
from trainer.checkpoint.manifest import RUN_CONFIG
from trainer.config import DEFAULTS, Config
from trainer.errors import MaskwrightError
from trainer.runtime.paths import user_path

_FIRST = 1  # of checkpoints from before there were sets
_LINE = re.compile(r"^defaults: (\d+)$", re.MULTILINE)


def as_begun(config: Config, resume: str = "auto") -> Config:
    """Return the config with the set of defaults of the run that `resume` continues; as it is where that is none.

    What does not fit (no such checkpoint, a damaged one) is left to the resume itself to say.
    """
    begun = None if resume == "never" else _set_of(config.run.dir if resume in ("auto", "must") else resume)
    return config if begun is None else config.model_copy(update={"defaults": begun})


def _set_of(place: str) -> int | None:
    """Read the set recorded by a checkpoint or by a run's newest one that can be read; all of a run have the same."""
    try:
        source = user_path(place)
        folders = [candidate.folder for candidate in candidates(source) if candidate.manifest is not None]
    except (OSError, MaskwrightError):
        return None
    for folder in folders or [source]:
        try:
            found = _LINE.search((folder / RUN_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return min(int(found[1]), DEFAULTS) if found else _FIRST
    return None
