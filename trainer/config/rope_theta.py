"""The base of a model's rotary position embeddings (RoPE, arXiv:2104.09864), which phases may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeTheta:
    """Theta: pair i of the d numbers of a head turns by position · theta^(−2i / d).

    Attributes:
        base: of all layers or, where some of them attend to a window alone (ModernBERT), of the others.
        local: of those with a window; None where the model knows one theta.
    """

    base: float
    local: float | None = None

    def __str__(self) -> str:
        return f"{self.base:,g}" + ("" if self.local is None else f" and {self.local:,g} of the local layers")

    @property
    def keys(self) -> dict[str, float]:
        """What it is by the keys of a phase."""
        return {"rope_theta": self.base, **({} if self.local is None else {"local_rope_theta": self.local})}

    @classmethod
    def of(cls, keys: Mapping[str, Any], prefix: str = "") -> RopeTheta:
        """Read what `keys` wrote, where each stands behind a prefix."""
        return cls(keys[f"{prefix}rope_theta"], keys.get(f"{prefix}local_rope_theta"))
