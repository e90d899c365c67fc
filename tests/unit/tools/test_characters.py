"""`tokenizer train --type character`: every known character comes back, the most frequent ones are known."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tools.tokenizer import train_tokenizer
from tools.training_text import ReadOptions
from trainer.errors import UserError

TEXT = "Emma  Woodhouse,\thandsome , clever .\n\n\n  “It's 今天天气很好。” 😀 e\u0301 don 't\u3000\u200b!\n "
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train(text: str, folder: Path, size: int = 50_265, **options) -> tuple[PreTrainedTokenizerFast, str]:
    """Train on one text file, as one document unless told otherwise; the tokenizer as transformers loads it, and what
    was said."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_bytes(text.encode())
    said = io.StringIO()
    cased, reading = options.pop("cased", False), ReadOptions(**{"documents": "file", **options})
    console = Console(file=said, width=200, markup=False)
    inputs = [str(folder / "text.txt")]
    output = train_tokenizer(inputs, folder / "tokenizer", "character", size, console, cased=cased, reading=reading)
    return AutoTokenizer.from_pretrained(str(output)), said.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train(TEXT, tmp_path_factory.mktemp("characters"))[0]


@pytest.mark.parametrize("text", [TEXT, "\n", " ", "", "  \n\n\t  e", "e\n", "e e " * 2000])
def test_text_of_known_characters_comes_back_as_it_was(trained: PreTrainedTokenizerFast, text: str) -> None:
    ids = trained(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and trained.unk_token_id not in ids
    assert trained.decode(ids) == text
    framed = trained(text).input_ids
    assert framed == [0, *ids, 2]
    assert trained.decode(framed, skip_special_tokens=True) == text


@given(st.text(sorted(set(TEXT)), max_size=40))
def test_any_order_of_known_characters_comes_back(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(trained(text, add_special_tokens=False).input_ids) == text


def test_the_mask_leaves_the_blanks_around_it(trained: PreTrainedTokenizerFast) -> None:
    ids = trained("e <mask> m", add_special_tokens=False).input_ids
    assert trained.convert_ids_to_tokens(ids) == ["e", " ", "<mask>", " ", "m"]
    assert trained.decode(ids) == "e <mask> m"


def test_ids_go_by_frequency_then_by_code_point(tmp_path: Path) -> None:
    loaded, said = train("cb\ncb\nccé😀a", tmp_path)
    assert loaded.convert_ids_to_tokens([*range(len(loaded))]) == [*SPECIAL, "c", "\n", "b", "a", "é", "😀"]
    assert "has 6 different characters; the vocabulary has them all." in said and "supports" not in said
    assert "(character, 11 tokens)" in said


def test_a_small_vocabulary_has_the_most_frequent_and_says_what_it_lacks(tmp_path: Path) -> None:
    loaded, said = train("aaaaabbbcd", tmp_path, size=7)
    assert loaded.convert_ids_to_tokens([*range(len(loaded))]) == [*SPECIAL, "a", "b"]
    assert loaded("adcb", add_special_tokens=False).input_ids == [5, 3, 3, 6]
    assert "has 4 different characters; 2 of them, 20.00% of the text, are unknown. --vocab-size 9 has" in said
    _, said = train("aaaaabbbcd" + "a" * 100_000, tmp_path / "rare", size=7)
    assert "2 of them, less than 0.01% of the text" in said


def test_every_code_point_can_be_a_token(tmp_path: Path) -> None:
    """The odd ones and a fourteenth of all; the reader makes line ends of carriage returns."""
    points = {*range(256), *range(0x2000, 0x2100), *range(0xFE00, 0x10000), *range(0, sys.maxunicode + 1, 14)}
    every = [chr(point) for point in sorted(points) if not 0xD800 <= point < 0xE000 and point != 0x0D]
    text = "".join(every)
    loaded, said = train(text, tmp_path, size=100_000)
    assert f"has {len(every):,} different characters; the vocabulary has them all" in said
    assert loaded.decode(loaded(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_line_ends_between_documents_are_characters_of_the_text(documents: str, tmp_path: Path) -> None:
    """So that a tokenizer of paragraphs knows a text that `prepare` reads as whole files; CRLF is one character."""
    loaded, _ = train("ab\r\n\r\nba\r\n\r\na\r\n", tmp_path, documents=documents)
    assert set(loaded.get_vocab()) == {*SPECIAL, *"ab\n"}


def test_a_row_has_no_line_end_that_its_text_has_not(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "ba", "")))
    output = train_tokenizer([str(tmp_path / "rows.jsonl")], tmp_path / "t", "character", console=Console(quiet=True))
    assert set(AutoTokenizer.from_pretrained(str(output)).get_vocab()) == {*SPECIAL, "a", "b"}


def test_one_character_is_enough(tmp_path: Path) -> None:
    loaded, said = train("x", tmp_path, documents="paragraph", size=6)
    assert len(loaded) == 6 and loaded("xyx").input_ids == [0, 5, 3, 5, 2]
    assert "has 1 character; the vocabulary has it." in said


def test_long_lines_are_no_words_that_are_cut(tmp_path: Path) -> None:
    _, said = train("天" * 5000 + " " * 5000, tmp_path)
    assert "were cut" not in said


@pytest.mark.parametrize(
    ("text", "options", "problem", "where"),
    [
        ("", {}, "The input is empty", "text.txt"),
        ("\n \n\t\n", {"documents": "paragraph"}, "The input holds no character", "--input"),
        ("abc", {"size": 5}, "A character vocabulary needs at least 6 tokens, got 5", "--vocab-size 5"),
        ("abc", {"size": 5_000_000}, "at most 4,194,304 tokens", "--vocab-size 5000000"),
        ("abc", {"cased": True}, "A character tokenizer is always cased", "--cased"),
    ],
)
def test_mistakes_are_named(text: str, options: dict, problem: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        train(text, tmp_path, **options)
    assert where in refused.value.where
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
