"""A vocabulary adapted as docs/adapt.md shows it: the embeddings first, the layers frozen; then all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tests.commands import maskwright
from tests.conftest import write_text
from tests.e2e.test_documentation import ROOT, blocks, shell_commands
from tests.ranks import losses
from tools.convert import convert
from tools.prepare import prepare
from trainer.errors import EXIT_FINISHED

NEW_TOKENS = [f"neologism{number}" for number in range(10)]
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert.encoder.*", _BERT),
    "roberta": ("roberta.encoder.*", _BERT),
    "modernbert": ("model.layers.*", _BERT),
    "gpt2": ("transformer.h.*", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 130}),
}
"""Model type → the pattern for its layers, and a tiny size."""


@pytest.fixture(scope="module")
def grown(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with ten more tokens, and data in which they stand."""
    folder = tmp_path_factory.mktemp("grown")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    assert tokenizer.add_tokens(NEW_TOKENS) == 10
    tokenizer.save_pretrained(folder / "more-tokenizer")
    text = write_text(folder / "plain.txt", documents=700, seed=2).read_text()
    marked = [f"{part} {NEW_TOKENS[number % 10]}." for number, part in enumerate(text.split("\n\n"))]
    (folder / "more.txt").write_text("\n\n".join(marked) + "\n")
    prepare(
        [str(folder / "more.txt")],
        str(folder / "more-tokenizer"),
        str(folder / "more-data"),
        workers=1,
        validation_fraction=0.1,
        console=Console(quiet=True),
    )
    return folder


def documented() -> tuple[str, list[list[str]]]:
    """The config more.yaml of docs/adapt.md, and the two commands that freeze and do not, without the name."""
    (config,) = [
        body
        for document, body in blocks("yaml")
        if document == ROOT / "docs" / "adapt.md" and "dir: runs/more}" in body
    ]
    lines = [
        words[1:]
        for document, words in shell_commands()
        if document == ROOT / "docs" / "adapt.md" and "more.yaml" in words
    ]
    first = next(number for number, words in enumerate(lines) if any("model.frozen" in word for word in words))
    return config, lines[first : first + 2]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_two_documented_commands_train_the_embeddings_first_and_then_all(
    model_type: str, grown: Path, workspace: Path, tmp_path: Path
) -> None:
    pattern, sizes = MODELS[model_type]
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM if model_type == "gpt2" else AutoModelForMaskedLM
    model = kind.from_config(AutoConfig.for_model(model_type, **sizes, vocab_size=500, pad_token_id=1))
    model.save_pretrained(tmp_path / "my-model")
    for name in ("more-tokenizer", "more-data"):
        (tmp_path / name).symlink_to(grown / name)
    config, commands = documented()
    if model_type == "gpt2":
        config = yaml.safe_dump({**yaml.safe_load(config), "objective": {"name": "clm"}})
    (tmp_path / "more.yaml").write_text(config)
    assert len(commands) == 2 and "roberta.encoder.*" in str(commands[0])
    assert pattern in (ROOT / "docs" / "adapt.md").read_text(), "the pattern of each of these is told there"

    first = maskwright(*(word.replace("roberta.encoder.*", pattern) for word in commands[0]), cwd=tmp_path)
    assert first.returncode == EXIT_FINISHED, first.stdout + first.stderr
    assert "vocabulary: resized from 500 to 510" in first.stdout and "frozen: " in first.stdout
    second = maskwright(*commands[1], cwd=tmp_path)
    assert second.returncode == EXIT_FINISHED, second.stdout + second.stderr
    assert "resuming from step-00000010" in second.stdout and "begin to train, with fresh moments" in second.stdout
    found = losses(tmp_path / "runs" / "first")
    assert len(found) == 20 and found[-1] < found[0]

    before, layers = model.state_dict(), pattern.removesuffix("*")
    for step in (10, 20):
        output = tmp_path / f"model-{step}"
        checkpoint = tmp_path / "runs" / "first" / "checkpoints" / f"step-{step:08d}"
        proven = convert(str(checkpoint), str(output), "float32", "5GB", Console(quiet=True))
        assert (proven.difference_from_training, proven.difference_after_reload) == (0, 0)
        after = getattr(transformers, type(model).__name__).from_pretrained(output).state_dict()
        kept = {
            name
            for name in before
            if after[name].shape == before[name].shape and torch.equal(after[name], before[name])
        }
        assert kept == ({name for name in before if name.startswith(layers)} if step == 10 else set())
        table = next(name for name, weight in before.items() if weight.shape[0] == 500 and weight.ndim == 2)
        rows = after[table][500:]
        assert len(rows) == 10 and len({tuple(row.tolist()) for row in rows}) == 10
