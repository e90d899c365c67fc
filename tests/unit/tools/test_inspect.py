from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_text
from tests.unit.tools.conftest import quiet_console
from tools.inspect import BORDER, show, verify
from trainer.data.shards import MANIFEST, Manifest, document_starts, read_manifest
from trainer.errors import DamagedError, UserError
from trainer.files import file_hash


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


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda manifest: replace(manifest, tokens=manifest.tokens + 1), "but its shards have"),
        (lambda manifest: replace(manifest, vocabulary_size=300), "in a vocabulary of 300"),
        (lambda manifest: replace(manifest, separator_id=3), "does not end with the separator 3"),
        (lambda manifest: replace(manifest, dtype="<u4"), "cannot be"),
    ],
)
def test_verify_checks_that_the_parts_agree(data: Path, change, fault) -> None:
    write_manifest(data / "train", change(read_manifest(data / "train")))
    with pytest.raises(DamagedError, match=fault):
        verify(data / "train", console=quiet_console())


def test_verify_checks_the_document_borders(data: Path) -> None:
    folder, manifest = data / "train", read_manifest(data / "train")
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def flip_byte(path: Path, offset: int) -> None:
    raw = np.fromfile(path, np.uint8)
    raw[offset] ^= 1
    raw.tofile(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])
