"""A data set is as proven as a checkpoint: its manifest, its borders, its names and its ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import flip
from tests.unit.data.test_shards import write_data_set
from tools.inspect import verify
from trainer.checkpoint.manifest import try_manifest
from trainer.data.dataset import ShardSet
from trainer.data.documents import DocumentBorders
from trainer.data.manifest import MANIFEST, PREPARE_WORK_FOLDER, read_data_manifest, read_entry, split_folder
from trainer.data.shard_reader import ReadSettings
from trainer.errors import DamagedError, UserError
from trainer.runtime.files import json_hash

VERIFIED = ReadSettings(verify=True)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], checksum: bool = False) -> None:
    """Change a manifest as a person or an older version would: without a checksum, or with one that fits."""
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("checksum")
    change(content)
    if checksum:
        content["checksum"] = json_hash(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def put(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(content: Any) -> None:
        *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
        for part in parents:
            content = content[part]
        content[last] = value

    return change


CONTRADICTIONS: list[tuple[str, Any]] = [
    *[("shards.0.tokens", value) for value in (7, 9, "x", None, 1e30, -1, True, 8.0, 10**30)],
    *[("shards.0.documents", value) for value in (1, "x", None, [2])],
    *[("tokens", value) for value in (1, "x", None)],
    *[("documents", value) for value in (3, {}, None)],
    *[("dtype", value) for value in ("x", 3, "<i2", ">u2", "<u4", None)],
    *[("vocabulary_size", value) for value in (70_000, "x", None, -1)],
    *[("separator_id", value) for value in (1 << 16, "x", None)],
    *[(name, value) for name in ("settings", "statistics") for value in (3, None, [])],
    ("tokenizer_sha256", None),
    *[("sources", value) for value in (3, [3], [{}], [{"name": 1, "bytes": 2}])],
    *[("shards", value) for value in (3, [3], {}, [None])],
    *[("shards.0.files", value) for value in ({}, [1], {"tok": [16, "x"]}, None)],
    *[("shards.0.files.doc", value) for value in ([16, "x"], [24], "x", [24, 3], None)],
    *[("shards.0.files.tok", value) for value in ([14, "x"], [16])],
    *[("shards.0.name", value) for value in ("../x", "/abs/x", "a/b", "", ".", "..", "x" * 5000, "a\0b", 3, "a\nb")],
    ("unknown", 1),
    ("version", 2),
    ("format", "x"),
]


@pytest.mark.parametrize(("path", "value"), CONTRADICTIONS)
def test_what_contradicts_itself_or_is_of_another_type_is_damage(path: str, value: Any, tmp_path: Path) -> None:
    write_data_set(tmp_path, [[[5, 6, 7], [8, 9, 5]]])
    rewrite(tmp_path, put(path, value), checksum=True)
    with pytest.raises(DamagedError, match="Cannot read the manifest"):
        read_data_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[" * 100_000, b"\xff", b"3", b"null", b"9" * 5000, b"[]"])
def test_any_other_content_is_damage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match="Cannot read the manifest"):
        read_data_manifest(tmp_path)


def test_every_digit_counts_and_a_manifest_of_an_older_version_opens(tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path, [[[5, 6, 7], [8, 9, 5]]])
    text = (tmp_path / MANIFEST).read_text()
    for place in (number for number, character in enumerate(text) if character.isdigit()):
        changed = str((int(text[place]) + 1) % 10)
        (tmp_path / MANIFEST).write_text(text[:place] + changed + text[place + 1 :])
        with pytest.raises(DamagedError):
            read_data_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    rewrite(tmp_path, lambda content: None)
    assert read_data_manifest(tmp_path) == manifest


def test_moved_borders_are_found_when_reads_are_verified(tmp_path: Path) -> None:
    write_data_set(tmp_path, [[[5] * 9] * 8])
    moved = np.arange(0, 81, 10, dtype="<u8")
    moved[1:-1] += 3
    (tmp_path / "shard-00000.doc").write_bytes(moved.tobytes())
    with pytest.raises(DamagedError, match=r"shard-00000\.doc differs from its checksum"):
        DocumentBorders(ShardSet(tmp_path, settings=VERIFIED)).starts(np.arange(4) * 20, 20)


@pytest.mark.parametrize("settings", [VERIFIED, ReadSettings(), ReadSettings(method="pread")])
def test_an_id_beyond_the_vocabulary_is_damage(settings: ReadSettings, tmp_path: Path) -> None:
    write_data_set(tmp_path, [[[5, 999, 7]]])
    assert ShardSet(tmp_path, settings=settings).read_blocks(np.array([0]), 4).tolist() == [[5, 999, 7, 2]]
    data = ShardSet(tmp_path, settings=settings, vocabulary_size=999)
    with pytest.raises(DamagedError, match="holds the id 999"):
        data.read_blocks(np.array([0]), 4)


def test_a_lost_manifest_is_damage_and_an_unfinished_job_is_not(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_data_set(tmp_path / split, [[[5, 6, 7]]])
    (tmp_path / "train" / MANIFEST).unlink()
    for folder in (tmp_path / "train", split_folder(tmp_path, "train")):
        with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
            read_data_manifest(folder)
    with pytest.raises(DamagedError, match="train/manifest"):
        verify(tmp_path)
    (tmp_path / PREPARE_WORK_FOLDER).mkdir()
    with pytest.raises(UserError, match="not a prepared data set"):
        read_data_manifest(tmp_path / "train")


def test_the_record_of_a_unit_names_no_other_folder() -> None:
    files = {"tok": [8, "x"], "doc": [16, "x"], "sum": [8, "x"]}
    assert read_entry({"name": "shard-00000", "tokens": 4, "documents": 1, "files": files}).documents == 1
    with pytest.raises(ValueError, match="cannot be the name of a shard"):
        read_entry({"name": "../x", "tokens": 4, "documents": 1, "files": files})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_the_manifest_of_a_checkpoint_names_no_other_folder(name: str, tmp_path: Path) -> None:
    from tests.unit.checkpoint.checkpoint_folders import write_checkpoint

    folder = write_checkpoint(tmp_path, 5)
    rewrite(folder, lambda content: content["files"].update({name: [1, "x"]}), checksum=True)
    manifest, fault = try_manifest(folder)
    assert manifest is None
    assert "outside of the checkpoint" in fault


def test_every_digit_of_a_checkpoints_manifest_counts(tmp_path: Path) -> None:
    from tests.unit.checkpoint.checkpoint_folders import write_checkpoint

    folder = write_checkpoint(tmp_path, 5)
    text = (folder / MANIFEST).read_text()
    for place in (number for number, character in enumerate(text) if character.isdigit()):
        (folder / MANIFEST).write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert try_manifest(folder)[0] is None
    (folder / MANIFEST).write_text(text)
    flip(folder / MANIFEST)
    assert try_manifest(folder)[0] is None
