from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.preparing import read_text_pieces
from tools.prepare.encode import split_text
from tools.prepare.inputs import find_inputs
from tools.prepare.pieces import Piece, TextSettings
from tools.prepare.plan import MINIMUM_UNIT_BYTES, plan_units
from tools.prepare.readers import read_documents
from trainer.errors import UserError

MARK = b"\xef\xbb\xbf"
LINES = st.lists(
    st.tuples(
        st.sampled_from([b"", b"", MARK]),
        st.sampled_from([b"one", b"two words", b"", b" \t", b"x", "é".encode()]),
        st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]),
    ).map(b"".join)
)


def read_all(path: Path, documents: str = "paragraph", format: str = "auto", field: str = "text") -> list[str]:
    inputs = find_inputs([str(path)], format)
    pieces = [piece for unit in plan_units(inputs, documents) for piece in unit.pieces]
    reading = TextSettings(inputs.format, documents, field, str(path.parent / "scratch"))
    return [text for piece in pieces for text, _ in read_documents(piece, reading)]


@settings(max_examples=150)
@given(lines=LINES, start=st.sampled_from([b"", b"\xef\xbb\xbf"]), end=st.sampled_from([b"", b"end"]), data=st.data())
@pytest.mark.parametrize("documents", ["line", "paragraph"])
def test_any_cut_gives_the_same_documents(tmp_path_factory, documents, lines, start, end, data) -> None:
    raw = start + b"".join(lines) + end
    path = tmp_path_factory.mktemp("cut") / "text.txt"
    path.write_bytes(raw or b"x")
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=6))

    whole = read_text_pieces(find_inputs([str(path)]), documents, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.prepare.lines._STEP_BYTES", data.draw(st.sampled_from([1, 3, 1 << 16])))
        assert read_text_pieces(find_inputs([str(path)]), documents, cuts) == whole
    text = (raw or b"x").decode().replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("^\ufeff", "", text, flags=re.MULTILINE)
    if documents == "line":
        assert whole == text.split("\n")[: len(whole)]
        assert len(whole) in (text.count("\n"), text.count("\n") + 1)
    else:
        assert " ".join(whole).split() == text.split()
        assert all(paragraph.strip() and "\n\n" not in paragraph for paragraph in whole)


@pytest.mark.parametrize("documents", ["line", "paragraph"])
def test_a_piece_inside_a_huge_line_reads_no_more_than_itself(
    tmp_path: Path, documents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a line over a thousand pieces would be read a thousand times."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * (16 << 20) + b"\n")
    (file,) = find_inputs([str(path)]).files
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            read.append(super().readinto(buffer) or 0)
            return read[-1]

    def open_counted(path: str) -> tuple[io.BufferedReader, io.BufferedReader]:
        opened = io.BufferedReader(Counted(path))
        return opened, opened

    monkeypatch.setattr("tools.prepare.lines.open_input", open_counted)
    piece = Piece(file, 5 << 20, 6 << 20)
    assert list(read_documents(piece, TextSettings("text", documents, "text", ""))) == []
    assert piece.size <= sum(read) < 2 * piece.size


def test_documents_of_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\n \nthree\n".encode())

    assert read_all(path, "paragraph") == ["one\ntwo", "three"]
    assert read_all(path, "line") == ["one", "two", "", " ", "three"]
    assert read_all(path, "file") == ["one\ntwo\n\n \nthree"]


def test_a_large_file_is_cut_and_files_as_documents_are_not(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"word\n" * (MINIMUM_UNIT_BYTES // 2))
    inputs = find_inputs([str(path)])

    assert [unit.size for unit in plan_units(inputs, "line")] == [inputs.size // 3] * 2 + [
        inputs.size - 2 * (inputs.size // 3)
    ]
    assert len(plan_units(inputs, "file")) == 1


def test_small_files_are_grouped(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text("text\n")

    (unit,) = plan_units(find_inputs([str(tmp_path)]), "line")
    assert [piece.file.name for piece in unit.pieces] == [f"{number:02d}.txt" for number in range(50)]


def test_json_lines_keep_line_ends_as_newlines_and_repair_lone_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ['{"text": "a\\r\\nb"}', "", '{"text": null}', '{"text": "x\\ud800y \\ud83d\\ude00"}']
    path.write_text("\n".join(rows))

    assert read_all(path, "row") == ["a\nb", "", "x\ufffdy 😀"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "Line 3 of 'rows.jsonl': not JSON"),
        ('["a"]', "Line 3 of 'rows.jsonl': a JSON list, not an object"),
        ('{"text": 5}', "Line 3 of 'rows.jsonl': field 'text' holds a int, not text"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")

    with pytest.raises(UserError, match="Line 3") as caught:
        read_all(path, "row")
    assert caught.value.problem.startswith(problem)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow"])
def test_a_missing_field_names_those_that_exist(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", ["a"], field="content")

    with pytest.raises(UserError) as caught:
        read_all(path, "row", field="contents")
    assert "Did you mean 'content'?" in caught.value.problem
    assert "content" in caught.value.remedy and "number" in caught.value.remedy


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_invalid_utf8_is_located(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"text.{suffix}{compression}"
    path.write_bytes(compress(b"text\nfirst\nbad \xe9t\xe9\n", compression))

    with pytest.raises(UserError) as caught:
        read_all(path, "row" if suffix == "csv" else "line")
    assert f"line 3, byte 15 of 'text.{suffix}{compression}'" in caught.value.problem
    assert "iconv -f ISO-8859-1 -t UTF-8" in caught.value.remedy


def test_invalid_utf8_in_a_later_part_is_located_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"first\n" * 10 + b"bad \xff\n")

    with pytest.raises(UserError, match="line 11, byte 64"):
        read_text_pieces(find_inputs([str(path)]), "line", [30])


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("text\n".encode("utf-16"))

    with pytest.raises(UserError) as caught:
        read_all(path)
    assert "iconv -f UTF-16" in caught.value.remedy


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_compressed_files_may_have_several_parts_but_no_missing_end(tmp_path: Path, suffix: str) -> None:
    """zstandard's own reader stops silently at the end of the first frame, and of a file cut short."""
    text = "".join(f"line {number * number}\n" for number in range(20000))
    path = tmp_path / f"text.txt{suffix}"
    both = compress(text.encode(), suffix) + compress(b"last\n", suffix)
    path.write_bytes(both)
    assert read_all(path, "line") == [*text.splitlines(), "last"]

    path.write_bytes(both[: len(both) // 2])
    with pytest.raises(UserError, match="Cannot decompress"):
        read_all(path, "line")


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "rows.csv", "text.txt", "text.md", "text"])
def test_every_format_and_compression_gives_the_same_texts(tmp_path: Path, name: str, compression: str) -> None:
    texts = ["First document, two lines:\nhere.", "naïve café 漢字 😀", 'He said "no, 1.50".', "last"]
    path = write_texts(tmp_path / f"{name}{compression}", texts)

    assert read_all(path, "paragraph" if name.startswith("text") else "row") == texts


def test_csv_values_stay_text(tmp_path: Path) -> None:
    texts = ["NA", "null", "1.50", "007", "", 'two\nlines, "quoted"']
    assert read_all(write_rows(tmp_path / "rows.csv", texts), "row") == texts


@pytest.mark.parametrize("suffix", ["csv.zst", "parquet", "arrow"])
def test_a_table_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [f"text {number * number}" for number in range(5000)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(UserError, match=f"Cannot (read|decompress) 'rows.{suffix}'.* cut short"):
        read_all(path, "row")


def test_a_large_parquet_file_is_cut_at_row_groups(tmp_path: Path, small_units: None) -> None:
    texts = [f"text {number}" for number in range(3000)]
    path = write_rows(tmp_path / "rows.parquet", texts, row_group_size=500)

    units = plan_units(find_inputs([str(path)]), "row")
    assert len(units) > 1
    assert read_all(path, "row") == texts


@settings(max_examples=100)
@given(st.text(alphabet="ab \n", max_size=200))
def test_a_long_text_is_cut_without_loss(text: str) -> None:
    parts = list(split_text(text, 16))
    assert "".join(parts) == text
    assert all(len(part) <= 16 for part in parts)


def compress(raw: bytes, suffix: str) -> bytes:
    codecs = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    return zstandard.ZstdCompressor().compress(raw) if suffix == ".zst" else codecs[suffix](raw)


def write_texts(path: Path, texts: list[str]) -> Path:
    """Paragraphs of a file called text…, else rows."""
    if not path.name.startswith("text"):
        return write_rows(path, texts)
    suffix = path.suffix if path.suffix in (".gz", ".zst", ".xz", ".bz2") else ""
    path.write_bytes(compress("\n\n".join(texts).encode(), suffix))
    return path


def write_rows(path: Path, texts: list[str], field: str = "text", row_group_size: int = 1000) -> Path:
    """A table of `texts` in the format that the suffix names, with a second column."""
    import csv

    import pyarrow
    import pyarrow.parquet

    name, compression = (path.stem, path.suffix) if path.suffix in (".gz", ".zst", ".xz", ".bz2") else (path.name, "")
    table = pyarrow.table({"number": list(range(len(texts))), field: texts})
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    elif name.endswith(".arrow"):
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".csv"):
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(["number", field])
        writer.writerows(enumerate(texts))
        path.write_bytes(compress(buffer.getvalue().encode(), compression))
    else:
        rows = [json.dumps({"number": number, field: text}) for number, text in enumerate(texts)]
        path.write_bytes(compress(("\n".join(rows) + "\n").encode(), compression))
    return path
