from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.prepare.sentences import line_starts, sentence_starts


@pytest.mark.parametrize(
    "sentences",
    [
        ["It is late. ", "We go! ", "Where? ", "Home… ", "Now."],
        ["He said “no.” ", "She left (at 3.5 km/h). ", '"Really?" he asked. ', '"Yes." ', "Good."],
        ["See www.x.org/a.b?c=d and e.g. this, i.e. that."],
        ["J. R. R. Tolkien met the U.S. Army. ", "Then he wrote."],
        ["Wait... what? ", "No?! ", "Yes... ", "No."],
        ["今天天气很好。", "我们走吧！！！", "你说：“真的吗？”", "（是的。）", "好……", "价格是3.5元。"],
        ["“好吗？”，他问。", "全角句点．", "半角｡", "日本語です。", "はい"],
        ["真的吗?", "我不信!", "2016.10.1晚上"],
        ["a?b!c and 1!2 and ?3"],
        ["لماذا؟ ", "نعم. ", "यह है। ", "वह है। ", "Что? ", "Да."],
        ["A heading\n", "Its text goes on\nin a wrapped line. ", "Next.\n\n", "lower case after a blank line"],
        ["第一行\n", "第二行\n", "第三行"],
        ["one, two\n", "...and three\n", "Four"],
        ["Mr. ", "Smith stays a known fault: abbreviations are a matter of the language."],
    ],
    ids=lambda sentences: sentences[0],
)
def test_sentences_start_where_the_rules_say(sentences: list[str]) -> None:
    expected = np.cumsum([0, *map(len, sentences)])[:-1].tolist()
    found = sentence_starts("".join(sentences))
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_blanks_start_no_sentence() -> None:
    """But those that a text begins with belong to its first one."""
    assert sentence_starts("One.  \n  Two. \n").tolist() == [0, 9]
    assert sentence_starts("  \n One.  \n  Two. \n").tolist() == [0, 13]
    assert sentence_starts("").tolist() == sentence_starts(" \n\t").tolist() == []


@given(st.text("aB今 .!?。！…\n\"'”)（“,:1", max_size=60))
def test_offsets_ascend_and_lie_on_visible_characters(text: str) -> None:
    starts = sentence_starts(text).tolist()
    assert starts == sorted(set(starts))
    assert all(not text[start].isspace() for start in starts[1:])
    assert starts[:1] == ([0] if text.strip() else [])


@pytest.mark.parametrize(
    "lines",
    [
        ["One. Two! three\n", "四。五。\n", "lower case, as it stands"],
        ["A document of one line."],
        ["Ends with a line end\n"],
        ["windows\r\n", "lines\r\n", "end"],
        ["old\r", "lines\r\n", "and\n", "new"],
        ["a\n\n \t\u3000\n", "blank lines are passed over\r\n \r\n", "b\n \n"],
        [".\n", ", so is a line of marks\n", ")"],
        ["no line end:\u2028\x85\x0b\x0c to the readers neither"],
    ],
    ids=repr,
)
def test_with_lines_each_line_is_a_sentence(lines: list[str]) -> None:
    found = line_starts("".join(lines))
    assert found.dtype == np.int64
    assert found.tolist() == np.cumsum([0, *map(len, lines)])[:-1].tolist()


def test_leading_blanks_and_lines_of_blanks_start_none() -> None:
    """But those that a text begins with belong to its first sentence."""
    assert line_starts("One.  \n\u3000Two. \n\t\n").tolist() == [0, 8]
    assert line_starts("  One.\n  Two.").tolist() == [0, 9]
    assert line_starts("\n \r\n\tOne").tolist() == [0]
    for blank in ("", " ", "\n", " \r\n\t\n\u3000"):
        assert line_starts(blank).tolist() == [] and line_starts(blank).dtype == np.int64


@given(st.text("aB今 .\n\r\t\u3000\u2028", max_size=60))
def test_lines_are_found_as_one_finds_them_by_hand(text: str) -> None:
    expected, place = [], 0
    for line in re.split(r"(\r\n|\r|\n)", text):
        if line.strip():
            expected.append(place + len(line) - len(line.lstrip()))
        place += len(line)
    expected[:1] = [0] * len(expected[:1])
    assert line_starts(text).tolist() == expected


@pytest.mark.parametrize("find", [sentence_starts, line_starts])
@pytest.mark.parametrize("unit", [" ", "\n", '."', " .", "\n ", "。", "."])
def test_odd_texts_take_no_more_than_linear_time(unit: str, find: Callable[[str], np.ndarray]) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        find("a" + unit * count + "b")
        return time.process_time() - start

    assert min(seconds(160_000) for _ in range(3)) < 40 * min(seconds(10_000) for _ in range(3)) + 0.05
