from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from tools.config_reference import config_reference, metrics_reference
from trainer.config import Config
from trainer.tracking.metrics import COUNTERS, EVALUATION_METRICS, TRAINING_METRICS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("name", "make", "command"),
    [
        ("config.md", config_reference, "python -m tools.config_reference > docs/config.md"),
        ("metrics.md", metrics_reference, "python -m tools.config_reference metrics > docs/metrics.md"),
    ],
)
def test_committed_reference_is_up_to_date(name: str, make: Callable[[], str], command: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == make(), f"run: {command}"


def test_every_config_key_has_a_row() -> None:
    reference = config_reference()
    keys = [key for name, field in Config.model_fields.items() for key in keys_of(name, field.annotation)]
    assert {"data.text.format", "deepspeed", "run.dir", "checkpoint.async"} < set(keys)
    for key in keys:
        assert f"| `{key}` |" in reference


def keys_of(name: str, kind: object) -> list[str]:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return [name]
    fields = {field.alias or inner: field for inner, field in kind.model_fields.items()}
    return [key for inner, field in fields.items() for key in keys_of(f"{name}.{inner}", field.annotation)]


def test_bounds_and_defaults_are_shown() -> None:
    reference = config_reference()
    assert "| `objective.mask_ratio` | number, above 0, below 1 or a list | `0.15` |" in reference
    assert "| `schedule.name` | `linear`, `cosine`, `wsd`, `constant` | `linear` |" in reference
    assert "| `run.dir` | text | *required* |" in reference


def test_every_metric_has_a_row() -> None:
    reference = metrics_reference()
    for name in (*COUNTERS, *TRAINING_METRICS, *EVALUATION_METRICS):
        assert f"| `{name}` |" in reference
