"""The states that a probe is given: those of the stock class for each text alone, whatever stands beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.models.test_replaced_tokens import config_of
from tests.tiny_models import (
    ARCHITECTURES,
    BLOCKS,
    CAUSAL_ARCHITECTURES,
    PREDICTIONS,
    SEQ_LEN,
    VOCABULARY_SIZE,
    lively_model,
    masked_batch,
    sizes,
    vocabulary,
)
from trainer.config import ModelConfig
from trainer.data.batch import DRAWS
from trainer.errors import UserError
from trainer.evaluation.probe import batches_of, features_of
from trainer.model.classes import DETECTING, MAIN, MASKED
from trainer.model.cpu_dropout import use_host_dropout
from trainer.model.forward import Forward
from trainer.model.hf_config import build_config
from trainer.model.rehearsal import rehearse_states
from trainer.model.trained import build_trained, forward_of, models_in

CPU, PADDING = torch.device("cpu"), 1
OTHERS = ["flaubert", "gptj", "longformer", "rembert", "roformer", "xlm", "xlnet"]
"""Classes whose head is not known."""


def texts() -> list[np.ndarray]:
    """Texts of 1 to SEQ_LEN tokens, none of them special."""
    generator = np.random.default_rng(0)
    return [generator.integers(4, VOCABULARY_SIZE - 1, size) for size in (3, SEQ_LEN, 9, 1, 17, 8, 4, 20, 11)]


def alone(model: Any, tokens: np.ndarray) -> torch.Tensor:
    """The mean of what the encoder of a stock class gives for one text without padding."""
    with torch.no_grad():
        states = model.base_model(input_ids=torch.from_numpy(tokens)[None])[0]
    assert states.shape[:2] == (1, len(tokens))
    return states[0].mean(dim=0)


def assert_same_features(network: Any, model: Any) -> None:
    """Those through `network`, in batches of several lengths, are those of `model` for each text by itself."""
    tokens = texts()
    expected = torch.stack([alone(model, each) for each in tokens])
    assert expected.std(dim=0).max() > 0.05, "the texts differ"
    for rows in (1, 3):
        batches = batches_of([len(each) for each in tokens], SEQ_LEN, rows)
        assert len({batch.length for batch in batches}) == 3
        for batch in batches:
            found = torch.from_numpy(features_of(network.states, batch, tokens, PADDING, CPU))
            difference = (found - expected[batch.texts]).abs().max()
            assert difference < 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *CAUSAL_ARCHITECTURES, *OTHERS])
def test_they_are_those_of_each_text_alone(model_type: str, tmp_path: Path) -> None:
    stock = lively_model(tmp_path, model_type).eval()
    trained = lively_model(tmp_path, model_type).eval()
    use_host_dropout(trained)
    network = Forward(trained, CPU)
    assert_same_features(network, stock)
    head = network._head
    assert head._index is None and not trained.base_model._forward_hooks, "what was changed is as it was"


@pytest.mark.parametrize("preset", ["electra-small", "deberta-v3-base", "bert-base", "roberta-base"])
@pytest.mark.parametrize("share", ["embeddings", "disentangled"])
def test_of_two_models_they_are_the_discriminators(preset: str, share: str) -> None:
    built = build_trained(config_of(preset, {"share": share}), vocabulary(), DETECTING)
    with torch.no_grad():
        for weight in built.module.parameters():
            weight.mul_(4.0 if weight.ndim >= 2 else 1.0)
    module = built.module.eval()
    network = forward_of(module, CPU, document_attention=False)
    assert_same_features(network, models_in(module)[MAIN])


def test_a_run_with_document_attention_has_the_same(tmp_path: Path) -> None:
    network = Forward(lively_model(tmp_path, "modernbert").eval(), CPU, document_attention=True)
    assert_same_features(network, lively_model(tmp_path, "modernbert").eval())


@pytest.mark.parametrize("detects", [False, True], ids=["one model", "two models"])
def test_what_is_compiled_runs_eagerly_for_texts(detects: bool, tmp_path: Path) -> None:
    compiled = CompileCounter()
    if detects:
        built = build_trained(config_of("electra-small"), vocabulary(), DETECTING)
        module, network = built.module.eval(), forward_of(built.module, CPU, document_attention=False)
        given = {DRAWS: torch.full((BLOCKS, PREDICTIONS), 0.5)}
    else:
        module: Any = lively_model(tmp_path, "roberta").eval()
        network, given = Forward(module, CPU), {}
    module.compile(backend=compiled, dynamic=False)
    input_ids, index, _, _ = masked_batch()
    inputs = {"input_ids": input_ids, **given}
    with torch.no_grad():
        network(inputs, index)
        graphs = compiled.frame_count
        assert graphs > 0
        for length in (4, 8, 12):
            network.states({name: torch.ones(2, length, dtype=torch.int64) for name in ("input_ids", "attention_mask")})
        network(inputs, index)
    assert compiled.frame_count == graphs, "neither the texts' lengths, nor the blocks anew"


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OTHERS])
def test_a_class_that_gives_them_is_not_refused(model_type: str, tmp_path: Path) -> None:
    rehearse_states(lively_model(tmp_path, model_type).config)


def config_in(folder: Path, model_type: str, **changes: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**sizes(model_type), **changes}))
    return build_config(ModelConfig(config=str(folder), tokenizer="unused"), vocabulary(), SEQ_LEN, MASKED)


def test_a_class_of_other_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"are .* for \[2, 8\] tokens") as caught:
        rehearse_states(config_in(tmp_path, "perceiver"))
    assert caught.value.where == "eval.probe" and "Leave the probe out" in caught.value.remedy
