"""What the options may name: built-in segmenters, and a user's own function with all that can be wrong with it."""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.preparing import CHINESE
from tools.prepare.segment import Segmenter, StartSettings
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS
from trainer.errors import UserError

OWN = """
import numpy as np

def words(text): return [0, 3]
def arrays(text): return np.array([0, 3], np.int32)
def generated(text): yield from (0, np.int64(3))
def nothing(text): return []
def none(text): return None
def number(text): return 3
def strings(text): return text.split()
def pairs(text): return [(0, 2), (3, 5)]
def floats(text): return np.array([0.0, 3.0])
def flags(text): return [character == " " for character in text]
def outside(text): return [0, 3, len(text)]
def negative(text): return [-1]
def falling(text): return [0, 3, 2]
def twice(text): return [0, 3, 3]
def fails(text): return [text.index("x")]
value = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """own_words.py in the current folder, which Python's path does not name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    (tmp_path / "own_words.py").write_text(OWN)
    importlib.invalidate_caches()
    sys.modules.pop("own_words", None)  # another test's
    yield tmp_path / "own_words.py"
    sys.modules.pop("own_words", None)


def word_segmenter(name: str) -> Segmenter:
    segmenter = StartSettings(words=name).segmenters()[WORD_STARTS]
    assert segmenter is not None
    return segmenter


@pytest.mark.parametrize("name", ["words", "arrays", "generated"])
def test_a_function_of_the_current_folder(own_module: Path, name: str) -> None:
    found = word_segmenter(f"own_words:{name}")("ab cd")
    assert found.dtype == np.int64 and found.tolist() == [0, 3]
    assert word_segmenter("own_words:nothing")("ab cd").tolist() == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none", "gave None instead of a list of offsets"),
        ("number", "gave 3 instead of a list of offsets"),
        ("strings", "gave 'ab' (str) where an offset is expected"),
        ("pairs", "gave (0, 2) (tuple) where an offset is expected"),
        ("floats", "gave 0.0 (float) where an offset is expected"),
        ("flags", "gave False (bool) where an offset is expected"),
        ("outside", "gave the offset 5, outside the 5 characters"),
        ("negative", "gave the offset -1, outside the 5 characters"),
        ("falling", "gave the offset 2 after 3, not in ascending order"),
        ("twice", "gave the offset 3 after 3, not in ascending order"),
        ("fails", "raised ValueError: substring not found (own_words.py, line 18)"),
    ],
)
def test_what_is_wrong_with_its_result_is_said_with_the_document(own_module: Path, name: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        word_segmenter(f"own_words:{name}")("ab cd")
    assert caught.value.problem == f"own_words:{name} {problem}, for the document that begins 'ab cd'."
    assert caught.value.where == f"--word-starts own_words:{name}"
    assert "offsets, in characters, at which words start" in caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_long_document_is_named_by_its_beginning(own_module: Path) -> None:
    segmenter = StartSettings(sentences="own_words:none").segmenters()[SENTENCE_STARTS]
    assert segmenter is not None
    with pytest.raises(UserError) as caught:
        segmenter("A very long document. " * 50)
    assert len(caught.value.problem) < 200 and "'A very long document. A" in caught.value.problem
    assert "--sentence-starts own_words:none" in caught.value.where and "sentences start" in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "problem", "remedy"),
    [
        (
            StartSettings(words="jeiba"),
            "Unknown --word-starts 'jeiba'. Did you mean 'jieba'?",
            "tokenizer, jieba, phrases:FILE, or",
        ),
        (StartSettings(words="rules"), "Unknown --word-starts 'rules'.", "module:function"),
        (StartSettings(sentences="jieba"), "Unknown --sentence-starts 'jieba'.", "Choose rules, lines, or module:"),
        (StartSettings(sentences="line"), "Unknown --sentence-starts 'line'. Did you mean 'lines'?", "rules, lines"),
        (StartSettings(words="lines"), "Unknown --word-starts 'lines'.", "module:function"),
        (StartSettings(words="own words:x"), "Unknown --word-starts 'own words:x'", "module:function"),
        (StartSettings(words="own_wrods:x"), "Cannot import the module 'own_wrods': ModuleNotFoundError", "current"),
        (StartSettings(words="own_words:wrods"), "'wrods' is not there in the module 'own_words' (/", "'words'?"),
        (StartSettings(words="own_words:value"), "'value' is no function in the module 'own_words'", "Name a function"),
        (StartSettings(words="broken:x"), "Cannot import the module 'broken': ZeroDivisionError", "Give a module"),
    ],
)
def test_mistakes_in_the_name_are_found_before_the_work(own_module: Path, settings, problem: str, remedy: str) -> None:
    (own_module.parent / "broken.py").write_text("\n1 / 0\n")
    with pytest.raises(UserError) as caught:
        settings.check(Tokenizer(models.BPE()))
    assert problem in caught.value.problem and remedy in caught.value.remedy
    assert "broken.py, line 2" in caught.value.problem or "broken" not in problem


@pytest.mark.parametrize(
    "pre_tokenizer",
    [None, pre_tokenizers.ByteLevel(use_regex=False), pre_tokenizers.Metaspace(split=False)],
    ids=["none", "byte level without regex", "unsplit"],
)
def test_a_tokenizer_that_knows_no_words_is_refused(pre_tokenizer) -> None:
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    with pytest.raises(UserError, match="no pre-tokenizer that cuts text into words"):
        StartSettings(words="tokenizer").check(tokenizer)
    StartSettings(sentences="rules").check(tokenizer)
    StartSettings(sentences="lines").check(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    StartSettings(words="tokenizer").check(tokenizer)


def test_files_of_the_current_folder_hide_nothing_that_is_installed(own_module: Path) -> None:
    own_module.with_name("colorsys.py").write_text("raise SystemExit(0)\n")  # also a module of Python
    with pytest.raises(UserError, match=r"The installed module 'colorsys' .* hides the file 'colorsys.py'"):
        word_segmenter("colorsys:starts")


def test_jieba_not_installed_is_said_with_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)  # what an import finds when there is none
    with pytest.raises(UserError, match="need the package jieba, which is not installed") as caught:
        StartSettings(words="jieba").check(Tokenizer(models.BPE()))
    assert "pip install jieba" in caught.value.remedy and ".[chinese]" in caught.value.remedy


def test_jiebas_words_are_the_whole_text(monkeypatch, tmp_path: Path, capfd) -> None:
    """Without its cache in the folder for temporary files, which anyone may have written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not a cache")
    segmenter = word_segmenter("jieba")
    for text in (*CHINESE, "", "\n \u3000a  b", "😀𠀀é%+#&-_'\0龘"):
        starts = [*segmenter(text).tolist(), len(text)]
        assert "".join(text[a:b] for a, b in itertools.pairwise(starts)) == text
    words = [CHINESE[0][a:b] for a, b in itertools.pairwise(segmenter(CHINESE[0]).tolist())]
    assert words[:5] == ["我", "来到", "北京", "清华大学", "。"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"not a cache"
    assert len(list(tmp_path.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


def test_what_is_recorded_names_the_version(own_module: Path) -> None:
    from importlib.metadata import version

    built_in = StartSettings(words="jieba", sentences="rules")
    assert built_in.recorded() == {"word_starts": f"jieba {version('jieba')}", "sentence_starts": "rules 2"}
    assert StartSettings(sentences="lines").recorded() == {"sentence_starts": "lines 1"}
    assert StartSettings(words="tokenizer").recorded() == {"word_starts": "tokenizer"}
    assert StartSettings().recorded() == {}

    def recorded() -> str:
        settings = StartSettings(words="own_words:words")
        settings.check(Tokenizer(models.BPE()))
        return settings.recorded()["word_starts"]

    before = recorded()
    assert before.startswith("own_words:words ") and recorded() == before and "/" not in before
    own_module.write_text(OWN.replace("[0, 3]", "[0, 4]"))
    assert recorded() != before
