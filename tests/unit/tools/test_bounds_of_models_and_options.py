"""Sizes of models, and options of plan and simulate, that nobody means are cards, at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tools.plan.run import PlanOptions, _check_options
from tools.simulate.plan import SimulateOptions, plan_simulation
from trainer.config import ModelConfig
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError
from trainer.model.hf_config import build_config

VOCABULARY = Vocabulary(99, 0, 2, 2, 98, 1, (0, 1, 2, 3, 98), sha256="")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**6), ("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("vocab_size", 2**62)],
)
def test_a_model_of_a_size_that_nobody_means_is_refused_before_it_is_built(name: str, value: int) -> None:
    model = ModelConfig.model_validate({"preset": "roberta-base", "tokenizer": "t", "overrides": {name: value}})
    with pytest.raises(UserError) as caught:
        build_config(model, VOCABULARY, 32)
    assert name in caught.value.problem or name in caught.value.where


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nodes", 10**9),
        ("gpus_per_node", 10**6),
        ("vocabulary_size", 10**12),
        ("network_gbit", math.inf),
        ("storage_gb_s", math.nan),
    ],
)
def test_options_of_plan_have_bounds(name: str, value: float) -> None:
    usual: dict[str, Any] = dict.fromkeys(("device", "bench", "vocabulary_size", "network_gbit", "storage_gb_s"))
    options = PlanOptions(**{**usual, "nodes": 1, "gpus_per_node": 1, name: value})
    with pytest.raises(UserError, match="at most") as caught:
        _check_options(options)
    assert name.split("_")[0][:5] in caught.value.where


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 2**62),
        ("shards", 10**12),
        ("vocabulary_size", 2**40),
        ("ranks", 10**9),
        ("global_size", 10**12),
        ("steps", 10**15),
        ("first_sample", 2**63 - 1),
        ("seed", 2**64),
    ],
)
def test_options_of_simulate_have_bounds(name: str, value: int) -> None:
    with pytest.raises(UserError, match="at most"):
        plan_simulation(None, (), SimulateOptions(**{name: value}))
