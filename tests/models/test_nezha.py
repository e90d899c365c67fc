"""NEZHA against the paper's formulas, written out token by token, and against the checkpoints of the former class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, continued, lively_model, preset, sizes, tiny_model, vocabulary
from trainer.model.build import build_model
from trainer.model.hf_config import build_config
from trainer.model.rehearsal import rehearse

SIZES = sizes("nezha")
REACH, HEADS = SIZES["max_relative_position"], SIZES["num_attention_heads"]


def functions_of(model: Any) -> Any:
    """The module that the model's class is in."""
    import sys

    return sys.modules[type(model).__module__]


def test_relative_positions_are_the_papers(tmp_path: Path) -> None:
    make = functions_of(tiny_model(tmp_path, "nezha")).relative_positions
    found = make(2, 4, torch.zeros(()))
    by_hand = [  # sin(d), cos(d), sin(d / 100), cos(d / 100), as 10000^(2 / 4) is 100
        [-0.909297, -0.416147, -0.019999, 0.999800],
        [-0.841471, 0.540302, -0.010000, 0.999950],
        [0.0, 1.0, 0.0, 1.0],
        [0.841471, 0.540302, 0.010000, 0.999950],
        [0.909297, -0.416147, 0.019999, 0.999800],
    ]
    assert torch.allclose(found, torch.tensor(by_hand), atol=1e-6)
    wide = make(64, 64, torch.zeros(()))
    for distance in (-64, -1, 5, 63):
        for k in (0, 7, 31):
            angle = distance / 10000 ** (2 * k / 64)
            expected = [math.sin(angle), math.cos(angle)]
            assert wide[distance + 64, 2 * k : 2 * k + 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert make(2, 4, torch.zeros((), dtype=torch.bfloat16)).dtype == torch.bfloat16


def attention_by_definition(attention: Any, hidden: torch.Tensor, reach: int) -> torch.Tensor:
    """What the paper says, with a vector for each pair of tokens: [B, S, H] → [B, S, H]."""
    length, width = hidden.shape[1], hidden.shape[2] // HEADS
    vectors = torch.zeros(length, length, width)
    for i in range(length):
        for j in range(length):
            distance = max(-reach, min(reach, j - i))
            for k in range(width // 2):
                angle = distance / 10000 ** (2 * k / width)
                vectors[i, j, 2 * k], vectors[i, j, 2 * k + 1] = math.sin(angle), math.cos(angle)
    rows = []
    for row in hidden:
        q, k, v = (getattr(attention, name)(row) for name in ("query", "key", "value"))
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            outputs = []
            for i in range(length):
                scores = torch.stack([q[i, part] @ (k[j, part] + vectors[i, j]) for j in range(length)])
                shares = (scores / math.sqrt(width)).softmax(0)
                outputs.append(sum(shares[j] * (v[j, part] + vectors[i, j]) for j in range(length)))
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, REACH, REACH + 1, 17])
def test_attention_and_its_gradients_are_the_papers(length: int, tmp_path: Path) -> None:
    model = lively_model(tmp_path, "nezha")
    attention, functions = model.nezha.encoder["layer"][0].attention["self"], functions_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, SIZES["hidden_size"], generator=generator, requires_grad=True)
    weight = torch.randn(2, length, SIZES["hidden_size"], generator=generator)
    reach = min(REACH, max(1, length - 1))
    place = torch.arange(length)
    index = (place - place[:, None]).clamp(-reach, reach) + reach
    table = functions.relative_positions(reach, SIZES["hidden_size"] // HEADS, hidden)
    found, expected = attention(hidden, None, table, index), attention_by_definition(attention, hidden, REACH)
    assert torch.allclose(found, expected, atol=2e-5)
    wanted = [hidden, *attention.parameters()]
    gradients = (torch.autograd.grad((each * weight).sum(), wanted, retain_graph=True) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * (1 + float(theirs.abs().max())))


def test_it_reads_longer_sequences_than_it_was_trained_with(tmp_path: Path) -> None:
    """With no table of positions a token sees the same in a longer text, as far as its attention reaches."""
    model = lively_model(tmp_path, "nezha").eval()
    ids = torch.randint(4, VOCABULARY_SIZE, (1, 300), generator=torch.Generator().manual_seed(1))
    assert model.config.max_position_embeddings < 300
    layer = model.nezha.encoder["layer"][0].attention["self"]
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 300, VOCABULARY_SIZE)
        hidden = model.nezha.embeddings["LayerNorm"](model.nezha.embeddings["word_embeddings"](ids[:, :80]))
        length = torch.arange(80)
        index = (length - length[:, None]).clamp(-REACH, REACH) + REACH
        table = functions_of(model).relative_positions(REACH, 8, hidden)
        assert torch.allclose(
            layer(hidden, None, table, index), attention_by_definition(layer, hidden, REACH), atol=2e-5
        )
    # A start allows it where the config says so, without other weights.
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    settings = continued(folder, max_position_embeddings=512)
    rehearse(settings, vocabulary(), [300])
    longer = build_model(settings, vocabulary(), 300, 0).model.eval()
    with torch.no_grad():
        assert torch.equal(longer(ids).logits, model(ids).logits)


def test_padding_is_not_looked_at(tmp_path: Path) -> None:
    model = lively_model(tmp_path, "nezha").eval()
    ids = torch.randint(4, VOCABULARY_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[:, :9]
        assert torch.allclose(padded, model(ids[:, :9]).logits, atol=1e-5)


def former_names(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of Hugging Face's former NezhaForPreTraining, without its pair's head."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "nezha.embeddings.word_embeddings.weight": (VOCABULARY_SIZE, width),
        "nezha.embeddings.token_type_embeddings.weight": (2, width),
        "nezha.pooler.dense.weight": (width, width),
        "nezha.pooler.dense.bias": (width,),
        "cls.predictions.bias": (VOCABULARY_SIZE,),
        "cls.predictions.transform.dense.weight": (width, width),
        "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.decoder.weight": (VOCABULARY_SIZE, width),
        "cls.predictions.decoder.bias": (VOCABULARY_SIZE,),
    }
    norms = ["nezha.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for number in range(layers):
        layer = f"nezha.encoder.layer.{number}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        square = [f"{layer}.attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
        for name, rows, columns in (
            *((name, width, width) for name in square),
            (f"{layer}.intermediate.dense", inner, width),
            (f"{layer}.output.dense", width, inner),
        ):
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        shapes[f"{layer}.attention.self.relative_positions_encoding.positions_encoding"] = (64, 64, 8)
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def test_a_checkpoint_of_the_former_class_is_continued_and_grown(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in former_names(SIZES["num_hidden_layers"]).items()
    }
    for name, first in (
        ("decoder.weight", "nezha.embeddings.word_embeddings.weight"),
        ("decoder.bias", "cls.predictions.bias"),
    ):
        weights[f"cls.predictions.{name}"] = weights[first].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    former = {
        **SIZES,
        "vocab_size": VOCABULARY_SIZE,
        "architectures": ["NezhaForPreTraining"],
        "classifier_dropout": 0.1,
    }
    (tmp_path / "config.json").write_text(json.dumps({**former, "pad_token_id": 1, "use_cache": True}))
    settings = continued(tmp_path)
    rehearse(settings, vocabulary(), [SEQ_LEN])
    built = build_model(settings, vocabulary(), SEQ_LEN, 0)
    [said] = [note for note in built.notes if note.startswith("checkpoint:")]
    assert said == "checkpoint: not used: nezha.pooler.dense.bias, nezha.pooler.dense.weight"
    loaded = built.model.state_dict()
    unused = {name for name in weights if "pooler" in name or "positions_encoding" in name}
    assert loaded.keys() == weights.keys() - unused
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)

    rehearse(settings, vocabulary(VOCABULARY_SIZE + 10), [SEQ_LEN])
    grown = build_model(settings, vocabulary(VOCABULARY_SIZE + 10), SEQ_LEN, 0).model
    assert len(grown.cls["predictions"].bias) == VOCABULARY_SIZE + 10


def test_the_preset_is_the_published_one() -> None:
    config = build_config(preset("nezha-base"), vocabulary(21128), 512)
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_relative_position")
    assert [getattr(config, name) for name in kept] == [768, 12, 12, 3072, 64]
    default = type(config)(pad_token_id=1).to_dict()
    differing = {name for name, value in config.to_dict().items() if default.get(name) != value}
    assert differing == {"architectures", "auto_map"}, "a folder that says no sizes is of the same"
