"""The section `model.layers_from`: a model that begins with some layers of a trained one."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.config.base import Line, NaturalInt, Section


class LayersFromConfig(Section):
    model: Line
    """A Hugging Face checkpoint folder or hub name: of the same class, or a BERT for a DistilBERT. Embeddings, norms
    and the head are copied as well."""
    layers: Annotated[list[NaturalInt], Field(min_length=1, max_length=1024)] | None = None
    """Which of its layers, counted from 0, become the model's layers, in this order; as many as the model has. With
    tile it may be left out: then each layer takes the one that is as far up among those of its kind."""
    tile: bool = False
    """Let the model be wider: its weights are those of the narrower one over and over, from the centre outwards, as
    ModernBERT's large model began. Heads have the same width in both."""

    @model_validator(mode="after")
    def says_which(self) -> Self:
        if self.layers is None and not self.tile:
            raise ValueError("needs layers: which of that model's become this one's, such as [0, 2, 4, 7, 9, 11]")
        return self
