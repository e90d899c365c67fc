"""Twelve mistakes that users make: each ends with the right exit code and one card that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.conftest import write_text
from tests.ranks import tiny_config, train, write_config
from tools.tokenizer import train_tokenizer
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE

ConfigWriter = Callable[..., Path]


@pytest.fixture
def config(workspace: Path, tmp_path: Path) -> ConfigWriter:
    """Writes a config that is right but for the sections given."""

    def write(**sections: Any) -> Path:
        return write_config(tiny_config(workspace, tmp_path / "run", **sections), tmp_path / "my.yaml")

    return write


@pytest.fixture
def damaged_data(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be damaged."""
    return Path(shutil.copytree(workspace / "data", tmp_path / "data"))


def test_a_typo_in_a_key(config: ConfigWriter, tmp_path: Path) -> None:
    path = config()
    path.write_text(path.read_text().replace("micro_size", "micro_sise"))
    words = ("Unknown key 'batch.micro_sise'. Did you mean 'micro_size'?", "where:  batch.micro_sise", str(path))
    assert_one_card(maskwright("validate", path), EXIT_USER_MISTAKE, *words)
    assert_one_card(maskwright("train", path), EXIT_USER_MISTAKE, *words)
    assert_one_card(maskwright("train", path, "--nproc-per-node", "2"), EXIT_USER_MISTAKE, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("deepspeed=zreo1", ("deepspeed=zreo1", "Did you mean 'zero1'?", "zero2_offload")),
        ("model.preset=roberta-bass", ("model.preset", "No preset 'roberta-bass'. Did you mean 'roberta-base'?")),
    ],
    ids=["DeepSpeed", "model"],
)
def test_an_unknown_preset(override: str, words: tuple[str, ...], config: ConfigWriter) -> None:
    assert_one_card(maskwright("validate", config(), override), EXIT_USER_MISTAKE, *words)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "bert.encoder.*",
            ("has a name like 'bert.encoder.*'", "where:  model.frozen=bert.encoder.*", "roberta.encoder."),
        ),
        ("*", ("All weights of RobertaForMaskedLM are frozen", "model.frozen=", "roberta.encoder.layer.*")),
    ],
    ids=["nothing", "everything"],
)
def test_a_pattern_of_frozen_weights_that_names_nothing_or_everything(
    pattern: str, words: tuple[str, ...], config: ConfigWriter, tmp_path: Path
) -> None:
    path = config(model={"frozen": [pattern]})
    for command in ("validate", "plan", "train"):
        assert_one_card(maskwright(command, path), EXIT_USER_MISTAKE, *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (
            {"rope_theta": 10_000},
            ("of type 'roberta' names no theta", "where:  data.phases[].rope_theta", "ModernBERT, EuroBERT or ESM"),
        ),
        ({"weights": {"nosuch": 1}}, ("phases[0].weights name 'nosuch', which is no source",)),
        ({"mask_ratio": 1.5}, ("Key 'data.phases.0.mask_ratio' must be less than 1",)),
    ],
    ids=["theta", "weights", "masks"],
)
def test_a_phase_that_cannot_be(phase: dict[str, Any], words: tuple[str, ...], config: ConfigWriter) -> None:
    path = config()
    override = f"data.phases=[{json.dumps({'seq_len': 16, 'until_tokens': 256, **phase})}]"
    for command in ("validate", "plan", "train"):
        assert_one_card(maskwright(command, path, override), EXIT_USER_MISTAKE, *words)


def test_a_batch_that_does_not_divide(config: ConfigWriter) -> None:
    arguments = ("batch.global_size=10", "batch.micro_size=4", "--nproc-per-node", "2")
    words = ("batch.global_size 10 does not divide", "on 2 ranks", "Set batch.global_size to 8 or 16, or", "[1, 5]")
    assert_one_card(maskwright("validate", config(), *arguments), EXIT_USER_MISTAKE, *words)
    # Started for real on two ranks: both find it, one card is shown.
    assert_one_card(maskwright("train", config(), *arguments), EXIT_USER_MISTAKE, *words)


def test_no_tokenizer(config: ConfigWriter, tmp_path: Path) -> None:
    missing = tmp_path / "tokeniser"
    path = config(model={"tokenizer": str(missing)})
    words = (f"No tokenizer folder at '{missing}'", "maskwright tokenizer train")
    assert_one_card(maskwright("validate", path), EXIT_USER_MISTAKE, *words)


def test_a_folder_that_is_no_model(config: ConfigWriter, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, problem in ((tmp_path / "missing", "there is no such folder"), (tmp_path / "empty", "no config.json")):
        path = config(model={"preset": None, "from_pretrained": str(given), "tokenizer": None, "overrides": {}})
        assert_one_card(maskwright("validate", path), EXIT_USER_MISTAKE, problem, f"'{given}'", "model.from_pretrained")


def test_a_tokenizer_that_does_not_match_the_shards(config: ConfigWriter, workspace: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "other.txt", documents=100, seed=9)
    train_tokenizer([str(text)], str(tmp_path / "other"), "bytelevel-bpe", 300, make_console())
    result = maskwright("validate", config(model={"tokenizer": str(tmp_path / "other")}))
    words = ("another tokenizer (500 tokens", "(300 tokens", str(workspace / "data"), "model.tokenizer")
    assert_one_card(result, EXIT_USER_MISTAKE, *words)


@pytest.mark.parametrize(("content", "problem"), [(b"", "is empty"), (b" \n\n \n", "holds no documents")])
def test_empty_input(content: bytes, problem: str, workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "empty.txt"
    source.write_bytes(content)
    result = maskwright(
        "prepare", "--input", source, "--tokenizer", workspace / "tokenizer", "--output", tmp_path / "out"
    )
    assert_one_card(result, EXIT_USER_MISTAKE, problem, "Give files that hold text")


def test_input_that_is_not_utf8(workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "latin1.txt"
    source.write_bytes("first line\nthe caf\xe9\n".encode("latin-1"))
    result = maskwright(
        "prepare", "--input", source, "--tokenizer", workspace / "tokenizer", "--output", tmp_path / "out"
    )
    words = ("Not valid UTF-8: line 2, byte 18 of 'latin1.txt'", str(source), "iconv -f")
    assert_one_card(result, EXIT_USER_MISTAKE, *words)
    assert not list((tmp_path / "out").glob("**/manifest.json"))


def test_a_truncated_shard(config: ConfigWriter, damaged_data: Path) -> None:
    victim = next((damaged_data / "train").glob("*.tok"))
    size = victim.stat().st_size
    os.truncate(victim, size - 10)
    path = config(data={"train": str(damaged_data)})
    words = (
        f"Shard file {victim.name} has {size - 10:,} bytes; its manifest says {size:,}",
        str(victim),
        "data verify",
    )
    assert_one_card(maskwright("validate", path), EXIT_DAMAGED, *words)
    verified = maskwright("data", "verify", damaged_data)
    assert_one_card(verified, EXIT_DAMAGED, f"train/{victim.name}: {size - 10:,} bytes instead of {size:,}")


def test_a_bit_flipped_in_a_shard(damaged_data: Path) -> None:
    assert maskwright("data", "verify", damaged_data).returncode == EXIT_FINISHED
    victim = next((damaged_data / "validation").glob("*.tok"))
    content = bytearray(victim.read_bytes())
    content[1000] ^= 1
    victim.write_bytes(content)
    words = (f"1 fault: validation/{victim.name}: content differs from its checksum in bytes 0..1,048,576", "again")
    assert_one_card(maskwright("data", "verify", damaged_data), EXIT_DAMAGED, *words)


def test_a_checkpoint_of_another_model(workspace: Path, config: ConfigWriter, tmp_path: Path) -> None:
    assert train(tiny_config(workspace, tmp_path / "run", train={"steps": 2})) == EXIT_FINISHED
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = maskwright("train", config(), "model.overrides.num_hidden_layers=3")
    words = ("step-00000002 belongs to another run: model was RobertaForMaskedLM", "run.dir", "model.from_pretrained")
    assert_one_card(result, EXIT_USER_MISTAKE, *words)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_both_steps_and_epochs(config: ConfigWriter) -> None:
    path = config()
    path.write_text(path.read_text().replace("epochs: null", "epochs: 3"))
    words = ("Section 'train' needs exactly one of steps, tokens, epochs; got steps and epochs", str(path))
    assert_one_card(maskwright("train", path), EXIT_USER_MISTAKE, *words)


def test_a_deepspeed_key_that_the_config_owns(config: ConfigWriter, tmp_path: Path) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    result = maskwright("validate", config(), f"deepspeed={preset}")
    words = ("'gradient_clipping' is owned by the run config", f"{preset}: gradient_clipping", "set optimizer.clip")
    assert_one_card(result, EXIT_USER_MISTAKE, *words)
