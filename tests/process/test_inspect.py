from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import write_text
from tests.preparing import quiet_console
from tools.inspect import BORDER, show, verify
from tools.prepare import prepare
from trainer.data.manifest import MANIFEST, TOKEN_MARKS, Manifest, read_data_manifest
from trainer.data.shard_checks import document_starts
from trainer.data.shard_writer import ShardWriter
from trainer.errors import DamagedError, UserError
from trainer.runtime.files import file_hash


@pytest.fixture
def data(tmp_path: Path, run_prepare, monkeypatch) -> Path:
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 32768)
    path = write_text(tmp_path / "text.txt", documents=600, seed=1)
    run_prepare([path], tmp_path / "data", validation_fraction=0.1)
    return tmp_path / "data"


def test_show_decodes_real_blocks_with_their_borders(data: Path, capsys) -> None:
    text = (data.parent / "text.txt").read_text()
    show(data, as_json=True, console=quiet_console())
    shown = json.loads(capsys.readouterr().out)

    assert list(shown) == ["train", "validation"]
    assert shown["train"]["documents"] + shown["validation"]["documents"] == 600
    assert len(shown["train"]["samples"]) == 3
    for split in shown.values():
        assert split["blocks"] == split["tokens"] // 510
        for sample in split["samples"]:
            parts = sample["text"].split(BORDER)
            assert len(parts) > 2
            assert all(part in text for part in parts)
    first = shown["train"]["samples"][0]["text"].split(BORDER)
    assert all(part in text.split("\n\n") for part in first[:-1])


def test_show_is_readable(data: Path, capsys) -> None:
    show(data / "validation", console=quiet_console())
    printed = capsys.readouterr().out
    for word in ("validation", "documents", "tokens", "uint16", "text.txt", "═══ block 0 ═══", "end of document"):
        assert word in printed
    assert "Ġ" not in printed


def test_show_refuses_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared data set"):
        show(tmp_path)


def test_verify_accepts_whole_data(data: Path, capsys) -> None:
    verify(data, as_json=True, console=quiet_console())
    assert json.loads(capsys.readouterr().out)["whole"] is True
    verify(data / "train", console=quiet_console())
    assert "Whole" in capsys.readouterr().out


def test_verify_names_every_damaged_file(data: Path, capsys) -> None:
    train = data / "train"
    flip_byte(train / "shard-00001.tok", 1000)
    truncate(train / "shard-00002.tok")
    (train / "shard-00003.doc").unlink()
    flip_byte(data / "validation" / "shard-00000.doc", 3)

    with pytest.raises(DamagedError) as caught:
        verify(data, as_json=True, console=quiet_console())
    reported = json.loads(capsys.readouterr().out)
    assert reported["whole"] is False
    assert len(reported["faults"]) == 4
    for fault in (
        "train/shard-00001.tok: content differs from its checksum in bytes 0..1,048,576",
        "train/shard-00002.tok: ",
        "train/shard-00003.doc: missing",
        "validation/shard-00000.doc: content differs",
    ):
        assert any(found.startswith(fault) for found in reported["faults"])
        assert fault in caught.value.problem
    assert caught.value.exit_code == 3


def test_verify_notices_another_tokenizer(data: Path, capsys) -> None:
    path = data / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(DamagedError, match="not the tokenizer that wrote the shards"):
        verify(data, console=quiet_console())


def test_verify_names_the_damaged_file_of_the_tokenizer(data: Path) -> None:
    """What it says of special tokens is in no shard; a set from before there were sums of it is read as before."""
    path = data / "tokenizer" / "tokenizer_config.json"
    for damage, fault in ((lambda: path.write_text('{"a": 1}'), "8 bytes instead of"), (path.unlink, "missing")):
        damage()
        with pytest.raises(DamagedError, match=f"1 fault: tokenizer/tokenizer_config.json: {fault}"):
            verify(data, console=quiet_console())
    for name in ("train", "validation"):
        write_manifest(data / name, replace(read_data_manifest(data / name), tokenizer_files={}))
    verify(data, console=quiet_console())
    manifest = replace(read_data_manifest(data / "train"), tokenizer_files={"../x": (1, "")})
    write_manifest(data / "train", manifest)
    with pytest.raises(DamagedError, match="cannot be the name of a file"):
        verify(data, console=quiet_console())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda manifest: replace(manifest, tokens=manifest.tokens + 1), "but the shards have"),
        (lambda manifest: replace(manifest, vocabulary_size=300), "in a vocabulary of 300"),
        (lambda manifest: replace(manifest, separator_id=3), "does not end with the separator 3"),
        (lambda manifest: replace(manifest, dtype="<u4"), "dtype is .<u4., but"),
    ],
)
def test_verify_checks_that_the_parts_agree(data: Path, change, fault) -> None:
    write_manifest(data / "train", change(read_data_manifest(data / "train")))
    with pytest.raises(DamagedError, match=fault):
        verify(data / "train", console=quiet_console())


def test_verify_checks_the_document_borders(data: Path) -> None:
    folder, manifest = data / "train", read_data_manifest(data / "train")
    entry = manifest.shards[0]
    starts = document_starts(folder, entry)
    starts[[3, 4]] = starts[[4, 3]]
    path = folder / f"{entry.name}.doc"
    path.write_bytes(starts.astype("<u8").tobytes())
    files = {**entry.files, "doc": (path.stat().st_size, file_hash(path))}
    write_manifest(folder, replace(manifest, shards=(replace(entry, files=files), *manifest.shards[1:])))

    with pytest.raises(DamagedError, match=r"shard-00000\.doc: not the borders"):
        verify(folder, console=quiet_console())


def test_a_moved_data_set_still_shows(data: Path, tmp_path: Path, capsys) -> None:
    shutil.move(data, tmp_path / "moved")
    show(tmp_path / "moved", as_json=True)
    assert json.loads(capsys.readouterr().out)["train"]["samples"]


@pytest.fixture
def marked_data(tmp_path: Path, chinese: Path) -> Path:
    prepare(
        [str(chinese / "texts" / "0.txt")],
        str(chinese / "tokenizer"),
        str(tmp_path / "marked"),
        documents="line",
        workers=1,
        word_starts="jieba",
        sentence_starts="rules",
        console=quiet_console(),
    )
    return tmp_path / "marked"


def test_show_marks_words_and_sentences(marked_data: Path, capsys) -> None:
    show(marked_data, console=quiet_console())
    printed = capsys.readouterr().out
    assert f"  words      marked by jieba {version('jieba')}; │ before each" in printed
    assert "  sentences  marked by rules 2; ▸ before each" in printed
    assert "▸我│来到│北京│清华大学│。▸今天天气│很│好│，│我们│去│公园│看花│。" in printed
    assert "再│训练│模型│。▸hello│world│2016│年│。" in printed.replace(" ", "")


def test_show_colours_words_on_a_terminal(marked_data: Path, capsys) -> None:
    terminal = Console(file=sys.stdout, force_terminal=True, color_system="standard", width=40)
    show(marked_data, console=terminal)
    printed = capsys.readouterr().out
    odd, even, sentence, end = "\x1b[35m", "\x1b[36m", "\x1b[1;31m", "\x1b[0m"
    words = f"{odd}我{end}{even}来到{end}{odd}北京{end}{even}清华大学{end}{odd}。{end}"
    assert f"{sentence}▸{end}{words}{sentence}▸{end}{even}今天天气{end}" in printed
    assert "alternating colours" in printed and "│" not in printed
    show(marked_data, console=Console(file=sys.stdout, force_terminal=True, no_color=True))
    assert "▸我│来到│北京" in capsys.readouterr().out


def test_show_lists_words_and_sentences_in_json(marked_data: Path, data: Path, capsys) -> None:
    show(marked_data, as_json=True, console=quiet_console())
    sample = json.loads(capsys.readouterr().out)["marked"]["samples"][0]
    assert sample["words"][:5] == ["我", "来到", "北京", "清华大学", "。"]
    assert sample["sentences"][:2] == ["我来到北京清华大学。", "今天天气很好，我们去公园看花。"]
    assert "我 来 到" in sample["text"] and "│" not in sample["text"]
    show(data, as_json=True, console=quiet_console())
    assert sorted(json.loads(capsys.readouterr().out)["train"]["samples"][0]) == ["block", "text"]


def test_show_marks_sentences_that_are_lines(tmp_path: Path, run_prepare, capsys) -> None:
    """With blanks at ends of lines where they stood."""
    (tmp_path / "text.txt").write_text("ka lo. mi\n  neru ka \nmi\n\nlo\n\n" * 60)
    run_prepare([tmp_path / "text.txt"], tmp_path / "data", sentence_starts="lines")
    show(tmp_path / "data")
    printed = capsys.readouterr().out
    assert "  sentences  marked by lines 1; ▸ before each" in printed
    assert "▸ka lo. mi\n  ▸neru ka \n▸mi" in printed
    show(tmp_path / "data", as_json=True)
    sample = json.loads(capsys.readouterr().out)["data"]["samples"][0]
    assert sample["sentences"][:5] == ["ka lo. mi", "neru ka", "mi", "lo", "ka lo. mi"]


def test_words_of_byte_level_bpe_read_as_the_text(tmp_path: Path, run_prepare, capsys) -> None:
    (tmp_path / "text.txt").write_text("ka lo 漢字\nmi " * 200)
    run_prepare([tmp_path / "text.txt"], tmp_path / "data", documents="file", word_starts="tokenizer")
    show(tmp_path / "data", as_json=True)
    sample = json.loads(capsys.readouterr().out)["data"]["samples"][0]
    assert sample["words"][:6] == ["ka", "lo", "漢字", "\n", "mi", "ka"]
    show(tmp_path / "data")
    assert "│ka │lo │漢字\n│mi │ka │lo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("padding", True, "bits are set after the last of"),
        ("separator", True, "a separator is marked as a start"),
        ("first", False, "the first token of a document is not marked as a start"),
        ("size", None, "bytes, but .* hold"),
    ],
)
@pytest.mark.parametrize("mark", TOKEN_MARKS)
def test_verify_checks_that_the_starts_agree_with_the_documents(
    tmp_path: Path, mark: str, place: str, value: bool | None, fault: str
) -> None:
    bits = np.array([1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1], bool)
    writer = ShardWriter(tmp_path, "shard-00000", np.dtype("<u2"), 2, TOKEN_MARKS)
    for document in (bits[:4], bits[5:7], bits[8:8], bits[8:12]):
        writer.add_document(np.full(len(document), 7), dict.fromkeys(TOKEN_MARKS, document))
    entry = writer.close()
    manifest = Manifest("<u2", "", 1000, 2, entry.tokens, entry.documents, (entry,))
    write_manifest(tmp_path, manifest)
    verify(tmp_path, console=quiet_console())

    path, borders = tmp_path / f"{entry.name}.{mark}", document_starts(tmp_path, entry).astype(int)
    packed = np.unpackbits(np.fromfile(path, np.uint8), bitorder="little")
    where = {"padding": entry.tokens, "separator": borders[2] - 1, "first": borders[1], "size": 0}[place]
    packed[where] = packed[where] if value is None else value
    path.write_bytes(np.packbits(packed, bitorder="little").tobytes() + (b"\0" if place == "size" else b""))
    files = {**entry.files, mark: (path.stat().st_size, file_hash(path))}
    write_manifest(tmp_path, replace(manifest, shards=(replace(entry, files=files),)))
    with pytest.raises(DamagedError, match=rf"shard-00000\.{mark}: .*{fault}"):
        verify(tmp_path, console=quiet_console())


def test_verify_misses_marks_that_the_settings_promise(data: Path) -> None:
    manifest = read_data_manifest(data / "validation")
    write_manifest(data / "validation", replace(manifest, settings={**manifest.settings, "word_starts": "tokenizer"}))
    with pytest.raises(DamagedError, match=r"word_starts are set, but shard-00000 has no \.wrd"):
        verify(data, console=quiet_console())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def flip_byte(path: Path, offset: int) -> None:
    raw = np.fromfile(path, np.uint8)
    raw[offset] ^= 1
    raw.tofile(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])
