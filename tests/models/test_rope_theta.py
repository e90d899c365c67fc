"""A model given another rope theta is the model that is built with it, to the last bit, and is not compiled anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import masked_batch, tiny_model
from trainer.config import DataConfig, RopeTheta
from trainer.errors import UserError
from trainer.model.rope_theta import check_theta, prove_theta, set_theta, theta_of

OWN, OTHER = 10_000, 160_000


def of_layers(base: float, local: float) -> dict[str, Any]:
    both = {"full_attention": base, "sliding_attention": local}
    return {"rope_parameters": {name: {"rope_type": "default", "rope_theta": theta} for name, theta in both.items()}}


def of_all(theta: float, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **fields}}


ROTARY = {"position_embedding_type": "rotary"}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], RopeTheta]] = {
    "modernbert": (of_layers(OWN, OWN), of_layers(OTHER, 5000), RopeTheta(OTHER, 5000)),
    "eurobert": (of_all(OWN), of_all(OTHER), RopeTheta(OTHER)),
    "esm": ({**ROTARY, "rope_theta": float(OWN)}, {**ROTARY, "rope_theta": float(OTHER)}, RopeTheta(OTHER)),
    "llama": (of_all(OWN), of_all(OTHER), RopeTheta(OTHER)),
    "nomic_bert": (of_all(OWN), of_all(OTHER), RopeTheta(OTHER)),
    "modernbert-decoder": (of_layers(OWN, OWN), of_layers(OTHER, 5000), RopeTheta(OTHER, 5000)),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=masked_batch()[0]).logits


@pytest.mark.parametrize("model_type", MODELS)
def test_it_has_the_bits_and_the_config_of_a_model_built_with_that_theta(model_type: str, tmp_path: Path) -> None:
    own, other, theta = MODELS[model_type]
    model, fresh = tiny_model(tmp_path, model_type, **own).eval(), tiny_model(tmp_path, model_type, **other).eval()
    before, first = theta_of(model.config), logits(model)
    assert before is not None
    assert not torch.equal(first, logits(fresh)), "theta makes a difference at all"
    set_theta(model, theta)
    assert torch.equal(logits(model), logits(fresh))
    assert model.config.to_dict() == fresh.config.to_dict(), "integers stay what they are"
    assert theta_of(model.config) == theta
    set_theta(model, before)
    assert torch.equal(logits(model), first)


def test_frequencies_are_written_in_place_so_nothing_is_compiled_anew(tmp_path: Path) -> None:
    own, _, theta = MODELS["modernbert"]
    model, graphs = tiny_model(tmp_path, "modernbert", **own).eval(), list[torch.fx.GraphModule]()

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, dynamic=False)
    first, made = logits(compiled), len(graphs)
    set_theta(model, theta)
    second = logits(compiled)
    assert len(graphs) == made, "no guard failed"
    assert not torch.equal(first, second)
    assert torch.equal(second, logits(model))


def phases(**keys: float) -> DataConfig:
    return DataConfig.model_validate({"train": "x", "phases": [{"seq_len": 16, "until_tokens": 99, **keys}]})


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, float], str]] = {
    "no rotary positions": ("roberta", {}, {"rope_theta": OTHER}, "names no theta"),
    "a theta that is not used": (
        "esm",
        {"position_embedding_type": "absolute"},
        {"rope_theta": OTHER},
        "EsmForMaskedLM does not compute with the theta of its config",
    ),
    "no local layers": ("eurobert", {}, {"local_rope_theta": OTHER}, "has one theta, and none of local layers"),
    "frequencies by length": (
        "eurobert",
        of_all(OWN, rope_type="dynamic", factor=2.0),
        {"rope_theta": OTHER},
        "rope_type is 'dynamic'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_theta_cannot_change_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, changes, keys, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        prove_theta(tiny_model(tmp_path, model_type, **changes), phases(**keys))
    assert caught.value.where == f"data.phases[].{next(iter(keys))}"


def test_a_model_whose_theta_can_change_tells_its_own(tmp_path: Path) -> None:
    own, _, _ = MODELS["modernbert"]
    model = tiny_model(tmp_path, "modernbert", **own)
    prove_theta(model, phases(rope_theta=OTHER))
    assert check_theta(model.config, phases(local_rope_theta=OTHER)) == RopeTheta(OWN, OWN)
