"""A list of phrases: what stands in it is one word, all other text is character by character."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tools.prepare.phrases import phrase_segmenter, read_phrases
from tools.prepare.segment import StartSettings
from trainer.errors import UserError


def words(text: str, *phrases: str) -> list[str]:
    starts = [*phrase_segmenter(phrases)(text).tolist(), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    ("text", "phrases", "expected"),
    [
        ("in New York now", ["New York"], ["New York"]),
        ("in New York City", ["New York", "New York City", "York"], ["New York City"]),
        ("start the art", ["art"], ["art"]),
        ("art, arts; art", ["art"], ["art", "art"]),
        ("die Größe, größer", ["Größe"], ["Größe"]),
        ("我来到北京清华大学。", ["北京", "清华大学", "大学"], ["北京", "清华大学"]),
        ("用GPU训练", ["GPU"], ["GPU"]),
        ("C++ and C", ["C++"], ["C++"]),
        ("nothing of it", ["else"], []),
        ("", ["x"], []),
    ],
)
def test_the_longest_phrase_that_stands_alone_is_one_word(text: str, phrases: list[str], expected: list[str]) -> None:
    found = words(text, *phrases)
    assert "".join(found) == text
    assert [word for word in found if len(word) > 1] == expected


def test_a_file_has_one_phrase_a_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffNew York\r\n\n  deep learning \n", encoding="utf-8")
    assert read_phrases(tmp_path / "list.txt", "--word-starts") == ["New York", "deep learning"]


def test_a_list_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    for name, text in (("a", "New York\n"), ("b", "New York\n"), ("c", "New York\nart\n")):
        (tmp_path / name).write_text(text)
    recorded = [StartSettings(f"phrases:{tmp_path / name}").recorded()["word_starts"] for name in "abc"]
    assert recorded[0] == recorded[1] != recorded[2]
    assert recorded[0].startswith("phrases ") and str(tmp_path) not in recorded[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "Cannot read the phrases in .*: No such file"), (b"\xff", "is not UTF-8"), (b" \n\n", "holds no phrase")],
)
def test_a_list_that_cannot_be_used_is_a_card(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        StartSettings(f"phrases:{path}").segmenters()
    assert error.value.where == f"--word-starts phrases:{path}"
