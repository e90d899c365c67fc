"""Labelled texts: what is read of a file, and a card for each mistake in one."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_vocabulary import write_tokenizer
from trainer.data.labels import LabelledTexts, read_labelled, tokenize
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError

ROWS = [(f"text {number}, of two", "even" if number % 2 == 0 else "odd") for number in range(10)]
KEY = "eval.probe.path"


def write(path: Path, rows: Sequence[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")) -> Path:
    """Write rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([columns, *rows])
    return path


def read(path: Path, folds: int = 5, samples: int = 100, **columns: str) -> LabelledTexts:
    return read_labelled(str(path), columns.get("text", "text"), columns.get("label", "label"), folds, samples, KEY)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_same_texts_are_read_from_each_format(suffix: str, tmp_path: Path) -> None:
    rows = [('a "quoted" text,\twith\nmore', "even"), *ROWS]
    found = read(write(tmp_path / f"my{suffix}", rows))
    assert found.texts == tuple(text for text, _ in rows)
    assert found.classes == ("even", "odd")
    assert found.labels.tolist() == [0, *(number % 2 for number in range(10))]
    assert found.majority == 6 / 11
    assert found.describe() == "probe: 11 texts, 2 classes, majority 54.5%"


def test_columns_may_have_other_names_and_labels_of_json_may_be_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [(text, number % 3) for number, (text, _) in enumerate(ROWS)], ("body", "id"))
    found = read(path, folds=3, text="body", label="id")
    assert found.classes == ("0", "1", "2") and found.labels.tolist() == [number % 3 for number in range(10)]
    path = write(tmp_path / "other.jsonl", [(text, number < 5) for number, (text, _) in enumerate(ROWS)])
    assert read(path).classes == ("false", "true")


def test_a_mark_at_the_start_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "my.csv", ROWS)
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    assert read(path).texts == tuple(text for text, _ in ROWS)


def test_of_a_longer_file_the_same_texts_are_drawn(tmp_path: Path) -> None:
    rows = [(f"text {number}", str(number % 2)) for number in range(1000)]
    path = write(tmp_path / "my.csv", rows)
    drawn = read(path, samples=100)
    assert len(set(drawn.texts)) == 100 and set(zip(drawn.texts, map(str, drawn.labels), strict=True)) <= set(rows)
    assert [int(text.split()[1]) for text in drawn.texts] == sorted(int(text.split()[1]) for text in drawn.texts)
    assert drawn.texts == read(path, samples=100).texts
    assert sum(int(text.split()[1]) < 500 for text in drawn.texts) == pytest.approx(50, abs=20), "from all of it"
    assert read(path, samples=1000).texts == tuple(text for text, _ in rows)


def test_texts_that_stand_there_twice_are_counted(tmp_path: Path) -> None:
    assert "; 2 stand there a second time" in read(write(tmp_path / "my.csv", [*ROWS, *ROWS[:2]])).describe()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("The first line of 'my.csv' has no 'text'", "It has: nothing")),
        (b"text,label\n", ("has 0 labelled texts, none",)),
        (b"texts,label\na,b\n", ("has no 'text'. Did you mean 'texts'? It has: texts, label.", "eval.probe.text")),
        (b"text,label,label\na,b,c\n", ("names 'label' twice",)),
        (b"text,label\na,b,c\n", ("Line 2 of 'my.csv' has 3 fields, and the first line 2", "into quotes")),
        (b"text,label\na\n", ("Line 2 of 'my.csv' has 1 fields",)),
        (b'text,label\n"a,b\nc,d\n', ("Cannot tell where a field of 'my.csv' ends, in the row at line 2",)),
        (b"text,label\na,b\n ,b\n", ("Line 3 of 'my.csv': 'text' is empty",)),
        (b"text,label\na,b\na,\n", ("Line 3 of 'my.csv': 'label' is empty",)),
        (b"text,label\ncaf\xe9,b\n", ("is not UTF-8: ", "at byte 14", "iconv")),
        (b"text,label\na,x\nb,x\n", ("has 2 labelled texts, all of the class 'x'",)),
        (b"text,label\n" + b"a,x\n" * 5 + b"b,y\n" * 4, ("fewer texts than the 5 folds", "'y' (4)", "of the 9 texts")),
    ],
)
def test_a_csv_that_is_no_labelled_text_is_a_card(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.where == f"{KEY}={path}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a", "label": 1}\n{"text": "a"\n', ("Not valid JSON in line 2",)),
        ('["a", 1]\n', ("Line 1 is no JSON object", "one JSON object a line")),
        ('{"text": "a", "lable": 1}\n', ("Line 1 of 'my.jsonl' has no 'label'. Did you mean 'lable'?",)),
        ('{"text": null, "label": 1}\n', ("Line 1 of 'my.jsonl': 'text' is empty",)),
        ('{"text": ["a"], "label": 1}\n', ("'text' holds a list",)),
        ('{"text": "a", "label": 0.5}\n', ("'label' holds a float",)),
        ('{"text": "\\ud800", "label": 1}\n', ("'text' is not Unicode",)),
    ],
)
def test_json_lines_that_are_no_labelled_texts_are_a_card(content: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("my.xlsx", "no .csv, .tsv or .jsonl"), ("missing.csv", "No such file"), ("folder.csv", "Is a directory")],
)
def test_a_file_that_is_none_is_a_card(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "my.xlsx").touch()
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_a_file_that_is_too_long_is_a_card(tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)  # a hole, which takes no room
    with pytest.raises(UserError, match=r"has 268,435,457 bytes, more than the 268,435,456 that are read") as caught:
        read(path)
    assert "a sample of its rows" in caught.value.remedy


def test_an_option_names_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_labelled(str(tmp_path / "no.csv"), "text", "label", 5, 100, "--probe")
    assert caught.value.where == f"--probe {tmp_path / 'no.csv'}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = {f"w{number}": number for number in range(5, 10)}
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("labels") / "tokenizer", words))


def labelled(*texts: str) -> LabelledTexts:
    return LabelledTexts(texts, np.zeros(len(texts), np.int64), ("a", "b"), 2, f"{KEY}=my.csv")


def test_texts_are_tokenized_in_the_tokenizers_template_and_cut(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    found = tokenize(labelled("w5 w6", "w9 w8 w7 w6 w5"), tokenizer, 4)
    assert [each.tolist() for each in found] == [tokenizer("w5 w6")["input_ids"], [9, 8, 7, 6]]
    assert all(each.dtype == np.int64 for each in found)
    assert tokenizer.backend_tokenizer.to_str() == before, "a checkpoint would save how it was cut"


def test_a_text_of_which_nothing_is_left_is_a_card(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="leaves nothing of the text") as caught:
        tokenize(labelled("w5", " \t "), tokenizer, 4)
    assert caught.value.where == f"{KEY}=my.csv"
