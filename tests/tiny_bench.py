"""A model for tests of the training step that is built in a moment; the benchmarks take it as a config.json."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import TINY_ROBERTA


def write_tiny_model(folder: Path) -> str:
    """Write its config.json; returns the path."""
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "roberta", "type_vocab_size": 1, **TINY_ROBERTA}))
    return str(path)
