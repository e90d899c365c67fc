"""The section `optimizer`: what makes an update of gradients."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import NonNegativeFloat, PositiveFloat, Section

_Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    name: Literal["adamw", "stable_adamw", "muon"] = "adamw"
    """adamw (arXiv:1711.05101); stable_adamw (arXiv:2304.13013), which takes shorter steps with a weight whose gradient
    is larger than its moments foresaw; muon (arXiv:2502.16982), which makes the updates of the layers' matrices
    orthogonal, and leaves all other weights to adamw. Biases and norms are not decayed. docs/optimizers.md says which
    one to take. A resume may change between adamw and stable_adamw."""
    lr: PositiveFloat = 6.0e-4
    """Peak learning rate."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    """Decay rates of the two moments; with muon of what adamw updates."""
    eps: PositiveFloat = 1.0e-6
    """Added to the root of the second moment."""
    momentum: _Decay = 0.95
    """muon only: decay rate of the one moment of a matrix."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay a step, times the learning rate."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    @property
    def family(self) -> str:
        """The names of the optimizers whose state is of the same kinds, for a resume to compare."""
        return "muon" if self.name == "muon" else "adamw or stable_adamw"

    @model_validator(mode="after")
    def momentum_is_used(self) -> Self:
        if self.name != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"momentum does nothing with name {self.name}: leave it out, or set name to muon")
        return self
