"""Whole words, n-grams and spans on real ranks: the same losses in any layout, and over a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.preparing import prepare_text
from tests.ranks import ADDING, losses, tiny_config, train, write_config
from tools.convert import convert
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE


def prepare_words(workspace: Path, folder: Path, word_starts: str) -> Path:
    return prepare_text(workspace / "text.txt", workspace, folder, word_starts=word_starts)


@pytest.fixture(scope="module")
def words(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's text with its words marked."""
    return prepare_words(workspace, tmp_path_factory.mktemp("words") / "data", "tokenizer")


def config_of(workspace: Path, source: Path, run_dir: Path, scheme: str, **sections: Any) -> Config:
    defaults: dict[str, Any] = {"train": {"steps": 12}, "checkpoint": {"every_steps": 6, "keep_last": 9}}
    own = {
        "objective": {"scheme": scheme, "mask_ratio": 0.3, **sections.pop("objective", {})},
        "data": {"train": str(source), **sections.pop("data", {})},
    }
    return tiny_config(workspace, run_dir, **{**defaults, **own, **sections})


def lose_the_last(config: Config) -> None:
    """As if the run had been lost after step 6."""
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000012")


# The first ends within step 5, the second with step 8: the others are of stage 1, and of stage 2.
STAGES = [(0, 0.4), (1200, 0.2), (2048, 0.1)]


def stages(*changes: tuple[int, float]) -> dict[str, Any]:
    return {"mask_ratio": [{"from_tokens": token, "ratio": ratio} for token, ratio in changes]}


@pytest.mark.parametrize("scheme", ["token", "word"])
def test_with_a_ratio_in_stages_the_losses_depend_on_no_layout_and_a_resume_is_bit_exact(
    scheme: str, words: Path, workspace: Path, tmp_path: Path
) -> None:
    """Of one ratio `test_objectives` proves it, for each scheme."""
    ratio = stages(*STAGES)
    one = config_of(workspace, words, tmp_path / "one", scheme, objective=ratio)
    assert train(one) == EXIT_FINISHED
    clean = losses(tmp_path / "one")
    lose_the_last(one)
    assert train(one) == EXIT_FINISHED
    assert losses(tmp_path / "one") == clean

    options: dict[str, Any] = {"deepspeed": "zero3", "data": {"workers": 1}, **ADDING}
    two = config_of(workspace, words, tmp_path / "two", scheme, objective=ratio, **options)
    assert train(two, 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
    lose_the_last(two)
    assert train(config_of(workspace, words, tmp_path / "two", scheme, objective=ratio)) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)


def test_a_resume_may_change_the_mask_ratio_of_what_lies_ahead_alone(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resumed(*changes: tuple[int, float]) -> int:
        return train(config_of(workspace, workspace / "data", tmp_path / "run", "token", objective=stages(*changes)))

    whole = config_of(workspace, workspace / "data", tmp_path / "run", "token", objective=stages(*STAGES))
    assert train(whole) == EXIT_FINISHED
    clean = losses(tmp_path / "run")
    lose_the_last(whole)  # 48 samples of 32 tokens have been seen
    for other in ([(0, 0.3), *STAGES[1:]], [STAGES[0], (1248, 0.2)], [STAGES[0]]):
        assert resumed(*other) == EXIT_USER_MISTAKE
        said = " ".join(capsys.readouterr().out.split())
        assert "the mask ratio of the 48 samples seen so far was 0.4, from sample 38 on 0.2, now" in said
        assert "another one can begin at token 1,536 at the earliest" in said
    assert resumed(*STAGES[:2], (1536, 0.3)) == EXIT_FINISHED
    assert losses(tmp_path / "run")[:6] == clean[:6]
    assert losses(tmp_path / "run")[6:] != clean[6:]


def test_the_schemes_mask_differently(words: Path, workspace: Path, tmp_path: Path) -> None:
    found = []
    for scheme in ("token", "word", "span"):
        assert train(config_of(workspace, words, tmp_path / scheme, scheme, train={"steps": 2})) == EXIT_FINISHED
        found.append(tuple(losses(tmp_path / scheme)))
    assert len(set(found)) == 3


def test_a_resume_over_other_word_borders_is_refused(
    words: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = prepare_words(workspace, tmp_path / "halves", "tests.words:halves")
    assert train(config_of(workspace, words, tmp_path / "run", "word", train={"steps": 2})) == EXIT_FINISHED
    assert train(config_of(workspace, halves, tmp_path / "run", "word", train={"steps": 4})) == EXIT_USER_MISTAKE
    assert "the word starts of source 'data' are others, and so would be the masks" in capsys.readouterr().out
    # Who masks single tokens does not read them.
    assert train(config_of(workspace, words, tmp_path / "single", "token", train={"steps": 2})) == EXIT_FINISHED
    assert train(config_of(workspace, halves, tmp_path / "single", "token", train={"steps": 4})) == EXIT_FINISHED


def test_data_without_word_starts_is_a_card_before_anything_begins(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, workspace / "data", tmp_path / "run", "word")
    refused = maskwright("train", write_config(config, tmp_path / "config.yaml"))
    assert_one_card(refused, EXIT_USER_MISTAKE, "The data set has no word starts", "--word-starts")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_raw_text_is_prepared_with_the_words_that_the_scheme_needs(workspace: Path, tmp_path: Path) -> None:
    source = str(workspace / "text.txt")
    config = config_of(
        workspace,
        workspace / "text.txt",
        tmp_path / "run",
        "span",
        data={"validation": source, "text": {"validation_fraction": 0.1}},
        train={"steps": 4},
        eval={"every_steps": 2, "samples": 8},
    )
    assert train(config, 2) == EXIT_FINISHED
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert "mlm, 30% of tokens in spans of whole words (80% mask" in (tmp_path / "model" / "README.md").read_text()
