from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from trainer.runtime.files import create_synced, replace_synced, unique_name


@pytest.mark.parametrize("hard_links", [True, False])
def test_one_of_several_creates_a_file_and_none_leaves_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    path, start = tmp_path / "job.json", Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return create_synced(path, b"%d" % number * 1000)

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    content = path.read_bytes()
    assert len(content) == 1000 and len(set(content)) == 1, "one writer's content, whole"
    assert any(created)
    assert not hard_links or [number for number in range(8) if created[number]] == [int(content[:1])]
    assert not create_synced(path, b"later") and path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"first", b"second"):
        replace_synced(path, content, unique_name(path))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
