"""The section `model.layers_from`: a model that begins with some layers of a trained one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.base import Line, NaturalInt, Section


class LayersFromConfig(Section):
    model: Line
    """A Hugging Face checkpoint folder or hub name: of the same class, or a BERT for a DistilBERT. Embeddings, norms
    and the head are copied as well."""
    layers: Annotated[list[NaturalInt], Field(min_length=1, max_length=1024)]
    """Which of its layers, counted from 0, become the model's layers, in this order; as many as the model has."""
