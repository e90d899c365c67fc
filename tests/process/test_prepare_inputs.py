"""What lies in an input: links, odd names, other files, the output itself, and what is and is not damage."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.preparing import quiet_console
from tools.prepare import open_job, prepare_job
from tools.prepare.bad_documents import Losses
from tools.prepare.hints import input_notes
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.option_names import COMMAND_LINE, CONFIG
from tools.prepare.pieces import InputFiles, TextSettings
from tools.prepare.plan import plan_units
from tools.prepare.readers import read_documents
from tools.prepare.text_cache import describe_unused
from trainer.data.manifest import read_data_manifest
from trainer.errors import UserError


def texts_of(given: Path | str, field: str = "text", losses: Losses | None = None, format: str = "auto") -> list[str]:
    inputs = find_inputs([str(given)], format)
    documents = resolve_documents(None, inputs.format)
    pieces = [piece for unit in plan_units(inputs, documents) for piece in unit.pieces]
    reading = TextSettings(inputs.format, documents, field, "", on_bad_document="skip" if losses else "stop")
    return [text for piece in pieces for text, _ in read_documents(piece, reading, losses)]


def write(path: Path, content: bytes | str = "text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names_of(inputs: InputFiles) -> list[str]:
    return [file.name for file in inputs.files]


def test_linked_folders_are_read_once_whatever_circles_they_make(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "b.txt")
    texts = write(tmp_path / "texts" / "a.txt").parent
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    (texts / "again").symlink_to(tmp_path / "elsewhere" / "deep")  # by another path
    (texts / "self").symlink_to(texts)
    (texts / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(texts)
    (tmp_path / "outer").symlink_to(texts)

    for given in (texts, tmp_path / "outer", texts / "**"):
        found = find_inputs([str(given)])
        assert sorted(Path(name).name for name in names_of(found)) == ["a.txt", "b.txt"], given
    assert names_of(find_inputs([str(texts / "**" / "b.*")])) == ["again/b.txt"]
    assert find_inputs([str(texts)]).passed_over.counts == {"link to a folder that is read anyway or above": 4}
    assert len(find_inputs([str(texts), str(tmp_path / "outer")]).files) == 2


def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.txt")
    for name in ("b.txt", "folder"):
        link = tmp_path / "texts" / name
        link.symlink_to("/gone/place")
        for given in (link, tmp_path / "texts", tmp_path / "texts" / "*"):
            with pytest.raises(UserError, match="is a link to '/gone/place', which is not there") as caught:
                find_inputs([str(given)])
            assert caught.value.where == str(link)
        link.unlink()


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path, tokenizer: Path) -> None:
    texts = tmp_path / "texts"
    for name in ("a.txt", "sub/b.txt", ".hidden.txt", "c.pdf", "sub/d.pdf", "README", ".git/x.txt"):
        write(texts / name, "some text\n")
    write(texts / "empty.txt", "")
    os.mkfifo(texts / "pipe.txt")
    console = quiet_console()

    job = open_job([str(texts)], str(tokenizer), str(tmp_path / "data"))
    prepare_job(job, 1, console)

    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Read: 3 files, 1 of them empty." in printed
    assert "Passed over: 2 × hidden, 2 × .pdf, 1 × no suffix, 1 × no regular file." in printed
    with pytest.raises(UserError, match="no regular file"):
        find_inputs([str(texts / "pipe.txt")])


def test_the_output_may_lie_in_the_input(tmp_path: Path, tokenizer: Path) -> None:
    """And so may another data set, and the tokenizer: the same command goes on."""
    texts = write(tmp_path / "a.txt", "some text\n").parent
    tokenizer_copy = texts / "tokenizer"
    for file in tokenizer.iterdir():
        write(tokenizer_copy / file.name, file.read_bytes())

    for given in (str(texts), str(texts / "**"), str(texts / "*")):
        out = texts / f"out-{len(given)}"
        first = prepare_job(open_job([given], str(tokenizer_copy), str(out)), 1)
        again = prepare_job(open_job([given], str(tokenizer_copy), str(out)), 1)
        assert again.already_prepared and not first.already_prepared
        assert names_of(again.inputs) == ["a.txt"]


def test_names_that_are_not_utf8_are_read_and_recorded(tmp_path: Path, tokenizer: Path) -> None:
    texts = tmp_path / os.fsdecode("啊".encode("gbk"))
    write(texts / os.fsdecode("啊.txt".encode("gbk")), "some text\n")
    write(texts / "good.txt", "good text\n")
    console = quiet_console()
    job = open_job([str(texts)], str(tokenizer), str(tmp_path / "data"))

    prepare_job(job, 1, console)

    manifest = read_data_manifest(tmp_path / "data")
    assert manifest.documents == 2 and manifest.sources[0]["name"] == r"\xb0\xa1"
    assert names_of(job.inputs)[1] == r"\xb0\xa1.txt"
    table = pyarrow.table({"text": ["row"]})
    for suffix in ("csv", "parquet", "jsonl"):
        path = os.path.join(os.fsencode(tmp_path), "文本.".encode("gbk") + suffix.encode())
        with open(path, "wb") as file:
            if suffix == "parquet":
                pyarrow.parquet.write_table(table, file)
            else:
                file.write(b"text\nrow\n" if suffix == "csv" else b'{"text": "row"}\n')
        assert texts_of(os.fsdecode(path)) == ["row"]
        with pytest.raises(UserError) as caught:
            texts_of(os.fsdecode(path), field="body")
        str(caught.value).encode()  # valid text


def test_nested_fields_and_fields_with_dots(tmp_path: Path) -> None:
    rows = [{"doc": {"text": "in", "n": 1}, "a.b": {"c": "dotted"}, "x.y": "literal", "x": {"y": "nested"}}]
    jsonl = write(tmp_path / "rows.jsonl", json.dumps(rows[0]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    for path in (jsonl, tmp_path / "rows.parquet", tmp_path / "rows.arrow"):
        assert texts_of(path, "doc.text") == ["in"]
        assert texts_of(path, "a.b.c") == ["dotted"]
        assert texts_of(path, "x.y") == ["literal"]
        with pytest.raises(UserError, match=r"No field 'doc\.body'"):
            texts_of(path, "doc.body")
        with pytest.raises(UserError, match="holds a dict, not text") as caught:
            texts_of(path, "doc")
        assert "--field doc.text" in caught.value.remedy


def test_binary_columns_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        column = pyarrow.array(["é".encode(), None, b"\xff", b"last"], kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        losses = Losses()
        assert texts_of(path, losses=losses) == ["é", "", "last"]
        assert losses.refused == {"invalid UTF-8": 1}


def test_files_and_row_groups_without_rows_are_empty(tmp_path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", schema) as writer:
        for rows in ([], ["one"], [], ["two"]):
            writer.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), row_group_size=1)
    write(tmp_path / "c.parquet", b"")

    assert texts_of(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_a_file_of_no_bytes_is_empty_in_every_format(tmp_path: Path, name: str, suffix: str) -> None:
    for path in (tmp_path / name, tmp_path / f"{name}{suffix}"):
        write(path, b"")
    good = {"csv": "text\nx\n", "jsonl": '{"text": "x"}\n', "txt": "x\n"}
    kind = name.partition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "b.parquet")
    else:
        write(tmp_path / f"b.{kind}", good[kind])
    write(tmp_path / f"c.{kind}.gz", gzip.compress(b"")) if kind != "parquet" else None

    assert texts_of(tmp_path) == ["x"]


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_windows_of_two_gibibytes_are_read_and_said(tmp_path: Path, log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(packed, closefd=False) as writer:
        writer.write(b"long text\n")
    path = write(tmp_path / "a.txt.zst", packed.getvalue())

    assert texts_of(path) == ["long text"]
    (note,) = input_notes(find_inputs([str(path)]), "paragraph", COMMAND_LINE)
    assert f"{(1 << log) >> 20:,} MiB" in note


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.txt.gz", b"plain text\n", "not a .gz file"),
        ("a.txt.zst", b"plain text\n", "not a .zst file"),
        ("a.txt.xz", b"plain text\n", "not a .xz file"),
        ("a.txt.bz2", b"plain text\n", "not a .bz2 file"),
        ("a.parquet", b"plain text, and longer\n", "no parquet file"),
        ("a.arrow", b"plain text, and longer\n", "no arrow file"),
        ("a.parquet", b"PAR1" + b"\0" * 40, "cut short"),
        ("a.txt.gz", gzip.compress(b"text\n" * 1000, mtime=0)[:-20], "cut short"),  # mtime: one name of the test
    ],
)
def test_damage_is_said_only_of_what_is_damaged(tmp_path: Path, name: str, content: bytes, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        texts_of(write(tmp_path / name, content))
    assert remedy in caught.value.remedy
    assert ("damaged" in caught.value.remedy) == ("cut short" in remedy)


def test_what_the_system_refuses_is_no_damage(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz"):
        path = write(tmp_path / name, "x")
        inputs = find_inputs([str(path)])
        (unit,) = plan_units(inputs, "row")
        path.unlink()
        with pytest.raises(UserError, match="No such file") as caught:
            list(read_documents(unit.pieces[0], TextSettings(inputs.format, "line", "text", "")))
        assert "damaged" not in caught.value.remedy


def test_joined_files_with_byte_order_marks(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    text = write(tmp_path / "a.txt", mark + b"one\n\n" + mark + b"\n" + mark + b"two\n")
    rows = write(tmp_path / "a.jsonl", (mark + b'{"text": "one"}\n') * 2)

    assert texts_of(text) == ["one", "two"]
    assert texts_of(rows) == ["one", "one"]


def test_lines_that_end_with_a_carriage_return_alone(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\rtwo\r\rthree\r")) == ["one\ntwo", "three"]
    assert texts_of(write(tmp_path / "a.jsonl", '{"text": "one"}\r{"text": "two"}\r')) == ["one", "two"]


def test_text_without_a_blank_line_is_said_in_the_words_of_the_caller(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a sentence\n" * 50)
    inputs = find_inputs([str(path)])

    (note,) = input_notes(inputs, "paragraph", COMMAND_LINE)
    assert note.endswith("If each line is one: --documents line.")
    (note,) = input_notes(inputs, "paragraph", CONFIG)
    assert note.endswith("If each line is one: data.text.documents: line.")
    assert input_notes(inputs, "line", COMMAND_LINE) == []
    write(path, "a sentence\n" * 50 + "\nanother\n")
    assert input_notes(find_inputs([str(path)]), "paragraph", COMMAND_LINE) == []


def test_hub_splits(tmp_path: Path, tokenizer: Path) -> None:
    """A folder that `datasets` loads by its name, with two splits."""
    for split in ("train", "test"):
        write(tmp_path / "corpus" / f"{split}.jsonl", f'{{"text": "some {split}"}}\n')
    folder = str(tmp_path / "corpus")

    def read(name: str) -> list[str]:
        return texts_of(name, format="hub")

    assert read(folder) == read(f"{folder}:default") == read(f"{folder}::train") == ["some train"]
    assert read(f"{folder}::test") == read(f"{folder}:default:test") == ["some test"]
    with pytest.raises(UserError, match="validaton") as caught:
        find_inputs([f"{folder}::validaton"], "hub")
    assert "test" in caught.value.problem and "NAME:CONFIG:SPLIT" in caught.value.remedy


def test_values_in_skipped_lines_are_counted_in_bytes(tmp_path: Path) -> None:
    losses = Losses()
    path = write(tmp_path / "a.jsonl", b'{"text": "x\\ud800"}\n{"text": 5}\n\xff\n')
    rows: list[Any] = texts_of(path, losses=losses)
    assert rows == ["x\ufffd"] and losses.repaired == 1
    assert losses.refused_bytes == len('{"text": 5}\n') + 2


def test_the_text_cache_says_what_a_run_does_not_use(tmp_path: Path) -> None:
    cache = tmp_path / "text-cache"
    assert describe_unused(cache, []) is None
    write(cache / "texts-1" / "manifest.json", "x" * 600)
    write(cache / "texts-2" / "train" / "manifest.json", "x" * 400)
    write(cache / "sums.json", "{}")
    write(cache / "mine" / "notes.txt")

    note = describe_unused(cache, [cache / "texts-1"])
    assert note and "1 preparation that this run does not use, 400 B: texts-2;" in note
    assert describe_unused(cache, [cache / "texts-1", cache / "texts-2"]) is None
