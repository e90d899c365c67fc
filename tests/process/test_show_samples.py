"""`maskwright data show CONFIG`: what training sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.ranks import tiny_config, write_config
from tools.prepare import prepare
from trainer.config.file import load_config
from trainer.data.batch import Batch
from trainer.data.loader import SampledBlocks
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs


@pytest.fixture(scope="module")
def config(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    text, tokenizer = str(workspace / "text.txt"), str(workspace / "tokenizer")
    prepare([text], tokenizer, str(folder / "data"), workers=1, word_starts="tokenizer", console=make_console())
    return write_config(tiny_config(workspace, folder / "run", data={"train": str(folder / "data")}), folder / "c.yaml")


def shown(config: Path, *arguments: str) -> list[dict[str, Any]]:
    done = maskwright("data", "show", config, *arguments, "--json")
    assert done.returncode == EXIT_FINISHED, done.stderr
    return json.loads(done.stdout)


def test_samples_are_those_of_the_run(config: Path, workspace: Path):
    overrides = ["objective.scheme=word", "objective.mask_ratio=0.3"]
    found = shown(config, *overrides, "--samples", "6")
    inputs = open_inputs(load_config(config, overrides), 1)
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    assert [sample["t"] for sample in found] == list(range(6))
    sources, blocks = inputs.order.locate(np.arange(6))
    places = np.stack([np.arange(6), sources, blocks], axis=1)
    batch = SampledBlocks(inputs.sources, inputs.objective, inputs.config.run.seed).__getitems__(places)
    assert isinstance(batch, Batch)
    for sample, ids in zip(found, batch.inputs["input_ids"].tolist(), strict=True):
        assert sample["input_ids"] == ids
        assert sample["masked_text"] == tokenizer.decode(ids)
        for position, token in sample["labels"]:
            ids[position] = token
        assert sample["text"] == tokenizer.decode(ids) != sample["masked_text"]
        assert sample["terms"] == {"mlm": len(sample["labels"])}
    assert sum(sample["terms"]["mlm"] for sample in found) == batch.count("mlm")


def test_for_people_the_text_stands_above_what_the_model_is_shown(config: Path):
    done = maskwright("data", "show", config)
    assert done.returncode == EXIT_FINISHED, done.stderr
    blocks = done.stdout.split("═══ sample ")[1:]
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        head, original, masked = block.strip().splitlines()[:3]
        assert head.startswith(f"{number} of data: 4 predicted (") and "<mask>" not in original
        assert masked.count("<mask>") == int(head.split("(")[1].split(" masked")[0])


def test_characters_of_several_tokens_are_whole(workspace: Path, tmp_path: Path):
    text = "今天天气很好，我们去公园散步吧。 Der Äther über München ist größer – naïve café."
    (tmp_path / "text.txt").write_text("\n\n".join([text] * 40), encoding="utf-8")
    prepare(
        [str(tmp_path / "text.txt")],
        str(workspace / "tokenizer"),
        str(tmp_path / "data"),
        workers=1,
        console=make_console(),
    )
    sections: dict[str, Any] = {"data": {"train": str(tmp_path / "data")}, "objective": {"mask_ratio": 0.4}}
    config = write_config(tiny_config(workspace, tmp_path / "run", **sections), tmp_path / "config.yaml")
    printed = maskwright("data", "show", config, "--samples", "4").stdout.split("═══ sample ")[1:]
    for sample, lines in zip(shown(config, "--samples", "4"), printed, strict=True):
        # A block may begin and end inside a character.
        assert lines.splitlines()[1].strip("\ufffd ") == sample["text"].strip("\ufffd ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}", "--samples", "2"], "is no config, and '--samples' is for one"),
        (["{data}", "run.seed=3"], "is no config, and 'run.seed=3' is for one"),
        (["{config}", "objective.scheme=sentence"], "objective.scheme"),
        (["{config}", "data.train={text}"], "is raw text that has not been prepared yet"),
        (["nowhere.yaml"], "No config file or recipe 'nowhere.yaml'"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_shown_is_a_card(arguments: list[str], words: str, config: Path, workspace: Path):
    places = {"data": config.parent / "data", "config": config, "text": workspace / "text.txt"}
    done = maskwright("data", "show", *(argument.format(**places) for argument in arguments))
    assert_one_card(done, EXIT_USER_MISTAKE, words)
