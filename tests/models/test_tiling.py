"""A model that begins with the weights of a narrower one, tiled: which place each takes, and what it then computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_layers import loaded, logits
from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, family_of_type, saved, vocabulary, write_config
from trainer.config import LayersFromConfig, ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.classes import DETECTING
from trainer.model.rehearsal import rehearse
from trainer.model.tiling import TILED, layers_for, spread

TWICE = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 61}
NAMES = {
    "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"},
}


def tiled(folder: Path, model_type: str, source: Path, layers: list[int] | None = None, **sizes: Any) -> ModelConfig:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    names = NAMES.get(model_type, {})
    settings = write_config(own, model_type, **{names.get(name, name): value for name, value in sizes.items()})
    return settings.model_copy(update={"layers_from": LayersFromConfig(model=str(source), layers=layers, tile=True)})


def built(settings: ModelConfig, family: str, size: int = VOCABULARY_SIZE) -> Any:
    rehearse(settings, vocabulary(size), [SEQ_LEN], family)
    return build_model(settings, vocabulary(size), SEQ_LEN, seed=7, family=family)


def test_places_wrap_around_a_whole_copy_in_the_middle() -> None:
    assert spread(3, 3).tolist() == [0, 1, 2]
    assert spread(3, 8).tolist() == [1, 2, 0, 1, 2, 0, 1, 2]  # as ModernBERT's from_middle: two before the middle one
    assert spread(4, 6, 2).tolist() == [0, 1, 2, 3, 0, 1]  # heads of two: none fits before it
    assert spread(4, 8, 2).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_layers_are_taken_by_how_far_up_they_are() -> None:
    assert layers_for(3, 3) == [0, 1, 2]
    assert layers_for(3, 6) == [0, 0, 1, 1, 2, 2]
    assert layers_for(6, 3) == [1, 3, 5]
    assert layers_for(22, 28)[:6] == [0, 1, 1, 2, 3, 4] and sorted(set(layers_for(22, 28))) == list(range(22))


@pytest.mark.parametrize("model_type", sorted(TILED))
def test_a_multiple_of_the_width_gives_the_logits_of_the_narrower_one(model_type: str, tmp_path: Path) -> None:
    """The property behind the division: LayerNorm, attention and the head see each unit as often as any other."""
    source, family = saved(tmp_path, model_type), family_of_type(model_type)
    model = built(tiled(tmp_path, model_type, source, **TWICE), family).model
    assert model.config.hidden_size == 64
    torch.testing.assert_close(logits(model), logits(loaded(source, model_type)), rtol=1e-4, atol=1e-5)
