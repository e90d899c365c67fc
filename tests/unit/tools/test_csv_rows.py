"""Rows of csv: the text is that of its column, or the row is refused by its number."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.prepare.bad_documents import Losses
from tools.prepare.csv_rows import check_delimiter
from tools.prepare.inputs import find_inputs
from tools.prepare.option_names import COMMAND_LINE, CONFIG, OptionNames
from tools.prepare.pieces import Piece, TextSettings
from tools.prepare.readers import read_documents
from trainer.errors import UserError


def read(
    path: Path,
    content: str | bytes,
    field: str = "text",
    delimiter: str | None = None,
    losses: Losses | None = None,
    names: OptionNames = COMMAND_LINE,
) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (file,) = find_inputs([str(path)]).files
    reading = TextSettings("csv", "row", field, "", delimiter, "skip" if losses else "stop", names)
    return [text for text, _ in read_documents(Piece(file, 0, file.size), reading, losses)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text,lang\nhello,en,\nwelt,de,\n", ["hello", "welt"]),
        ("text,lang,\nhello,en,\n", ["hello"]),
        (",text\n0,a\n1,b\n", ["a", "b"]),
        ('text,lang\n"two\r\nlines, ""quoted""",en\n5" disc,de\n', ['two\nlines, "quoted"', '5" disc']),
        ("text\rone\rtwo\r", ["one", "two"]),
        ("\n\ntext\n\none\n  \ntwo", ["one", "two"]),
        ("id,text,lang\n1,a\n2\n3,c,en\n", ["a", "", "c"]),
        ("\ufefftext\none\n\ufefftext\ntwo\n", ["one", "two"]),
        ('\ufeff"text",n\na,1\n\ufeff"text",n\n"b, c",2\n', ["a", "b, c"]),
        ('text,path\n"in C:\\dir\\",x\n', ["in C:\\dir\\"]),
        ("text\na\u2028b\x85c\x0bd\n", ["a\u2028b\x85c\x0bd"]),
        ("lang,n\n", None),
        ("text\n", []),
        ("\n \n", []),
    ],
)
def test_rows_are_read_as_they_stand(tmp_path: Path, content: str, texts: list[str] | None) -> None:
    if texts is None:
        with pytest.raises(UserError, match="No field 'text'"):
            read(tmp_path / "rows.csv", content)
    else:
        assert read(tmp_path / "rows.csv", content) == texts


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("text,lang\na,en\nhello, world,en\n", "Row 2 of 'rows.csv' (line 3) has 3 fields, the header 2: 'en'"),
        ("text,lang\n0,hello,en\n", "Row 1 of 'rows.csv' (line 2) has 3 fields"),
        ('text,lang\n"x",en\n"he said \\"hi\\", ok",en\n', "a quote inside a field in quotes, in the row at line 3"),
        ('text,lang\n"a \\", b"\n', "a quote after a backslash, in the row at line 2"),
        ('text\n"a \\", b"\n', "Row 1 of 'rows.csv' (line 2) has 2 fields"),
        ('text\n"ends \\""\n"next"\n', "a quote inside a field in quotes"),
        ('text\nfine\n"never closed\nmore\n', "a quote is opened and never closed, in the row at lines 3 to 4"),
        ('text\n"closed" too early\n', "a quote inside a field in quotes"),
        ("text,text\na,b\n", "has 2 columns called 'text'"),
    ],
)
def test_a_row_that_does_not_add_up_is_refused_by_its_place(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.csv", content)
    assert problem in caught.value.problem
    assert caught.value.remedy and "damaged" not in caught.value.remedy


def test_rows_with_surplus_fields_or_bad_bytes_can_be_skipped(tmp_path: Path) -> None:
    losses = Losses()
    content = b"lang,text\nen,a\nen,b,c\n\xff,d\nen,caf\xe9\nen,e\n"

    assert read(tmp_path / "rows.csv", content, losses=losses) == ["a", "d", "e"]
    assert losses.refused == {"wrong number of csv fields": 1, "invalid UTF-8": 1}
    assert losses.refused_bytes == len("en,b,c\n") + len("en,caf.\n")
    with pytest.raises(UserError, match="line 4, byte 23") as caught:
        read(tmp_path / "all.csv", b"lang,text\nen,a\nen,b\nen,\xffd\n")
    assert "--on-bad-document skip" in caught.value.remedy


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(st.text('ab",;\t\n\\é ', max_size=12), st.text('x",;\\\n', max_size=4)), max_size=6))
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_csv_writers_write_is_read_back(tmp_path_factory, delimiter: str, rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "other"), *rows])

    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    if any(text.endswith("\\") and other.count('"') % 2 for text, other in rows):
        with pytest.raises(UserError, match="a quote after a backslash"):
            read(path, buffer.getvalue(), delimiter=delimiter)
    else:
        assert read(path, buffer.getvalue(), delimiter=delimiter) == [text for text, _ in rows]


def test_delimiters(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.tsv", "n\ttext\n1\ta, b\n") == ["a, b"]
    assert read(tmp_path / "rows.csv", "n;text\n1;a, b\n", delimiter=";") == ["a, b"]
    assert check_delimiter("tab", "csv", COMMAND_LINE) == check_delimiter("\\t", "csv", COMMAND_LINE) == "\t"
    with pytest.raises(UserError, match="No field 'text'") as caught:
        read(tmp_path / "rows.csv", "n;text\n1;a\n", names=CONFIG)
    assert "data.text.delimiter: ';'" in caught.value.remedy
    for wrong in ("", ",,", '"', "\n"):
        with pytest.raises(UserError, match="cannot separate fields"):
            check_delimiter(wrong, "csv", COMMAND_LINE)
    with pytest.raises(UserError, match="no delimiter"):
        check_delimiter(";", "jsonl", COMMAND_LINE)


def test_a_field_of_megabytes_takes_no_more_than_linear_time(tmp_path: Path) -> None:
    text = "word, " * 700_000
    started = time.process_time()
    assert read(tmp_path / "rows.csv", f'text\n"{text}"\n') == [text]
    assert time.process_time() - started < 10
