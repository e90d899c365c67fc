"""Data prepared with a tokenizer of characters: the text comes back from the shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.commands import maskwright
from tests.preparing import CHINESE, quiet_console, read_token_documents
from tools.inspect import show, verify
from tools.prepare import prepare
from tools.tokenizer import train_tokenizer

NOVEL = 'Emma  Woodhouse,\thandsome , rich .\r\n "It\'s" <mask> e\u0301 😀\r\n\r\n  ' + "\n\n".join(CHINESE) + "\n"
LINES = NOVEL.replace("\r\n", "\n").removesuffix("\n")


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with novel.txt and a tokenizer of its characters, as the command trains it."""
    folder = tmp_path_factory.mktemp("novel")
    (folder / "novel.txt").write_bytes(NOVEL.encode())
    options = ["--input", "novel.txt", "--type", "character", "--output", "tokenizer"]
    result = maskwright("tokenizer", "train", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert f"{len(set(LINES))} different characters; the vocabulary has them all." in result.stderr + result.stdout
    return folder


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_the_text_comes_back_from_the_shards(novel: Path, tmp_path: Path, documents: str) -> None:
    """A special token that was typed is text, character by character."""
    data, said = tmp_path / "data", io.StringIO()
    console = Console(file=said, width=200, markup=False)
    paths = [str(novel / "novel.txt")], str(novel / "tokenizer"), str(data)
    prepare(*paths, documents=documents, workers=1, console=console)
    verify(data, console=console)
    tokenizer = AutoTokenizer.from_pretrained(str(novel / "tokenizer"))
    found = [tokenizer.decode(ids) for ids in read_token_documents(data)]
    expected = {"file": [LINES], "paragraph": LINES.split("\n\n"), "line": LINES.split("\n")}[documents]
    assert found == [text for text in expected if text]
    assert "unknown" not in said.getvalue()
    assert "1 literal '<mask>' were read as text" in said.getvalue()


@pytest.mark.parametrize("sentence_starts", ["lines", "rules"])
def test_blanks_that_a_text_begins_with_are_no_sentence(sentence_starts: str, tmp_path: Path, capsys) -> None:
    """Chinese paragraphs are indented by two wide blanks, which are tokens here."""
    (tmp_path / "text.txt").write_text("\u3000\u3000我来到北京。\n\u3000\u3000今天天气\n\n" * 60)
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "tokenizer", "character", console=quiet_console())
    paths = [str(tmp_path / "text.txt")], str(tmp_path / "tokenizer"), str(tmp_path / "data")
    prepare(*paths, workers=1, sentence_starts=sentence_starts, console=quiet_console())
    show(tmp_path / "data", as_json=True)
    sample = json.loads(capsys.readouterr().out)["data"]["samples"][0]
    assert sample["sentences"][:3] == ["我来到北京。", "今天天气", "我来到北京。"]


def test_words_and_sentences_are_marked_at_characters(novel: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text(CHINESE[0] * 40)
    paths = [str(tmp_path / "text.txt")], str(novel / "tokenizer"), str(tmp_path / "data")
    prepare(*paths, workers=1, word_starts="jieba", sentence_starts="rules", console=quiet_console())
    show(tmp_path / "data", as_json=True)
    sample = json.loads(capsys.readouterr().out)["data"]["samples"][0]
    assert sample["words"][:5] == ["我", "来到", "北京", "清华大学", "。"]
    assert sample["sentences"][:2] == ["我来到北京清华大学。", "今天天气很好，我们去公园看花。"]
