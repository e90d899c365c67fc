"""What can be evaluated: a model in training, or one at rest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from trainer.objectives.objective import Network


class EvaluatedNetwork(Network, Protocol):
    """What runs a model, and shows what its encoder puts out."""

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states [B, S, H] of padded texts: see `trainer.model.forward.Forward.states`."""
        ...


class Evaluated(Protocol):
    """A model that can be evaluated: the engine that trains one, or one that lies at rest."""

    @property
    def network(self) -> EvaluatedNetwork:
        """What runs it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Turn dropout off, and compute no gradients."""
        ...
