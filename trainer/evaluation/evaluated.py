"""What can be evaluated: a model in training, or one at rest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from trainer.objectives.objective import Network


class Evaluated(Protocol):
    """A model that can be evaluated: the engine that trains one, or one that lies at rest."""

    @property
    def network(self) -> Network:
        """What runs it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Turn dropout off, and compute no gradients."""
        ...
