from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from trainer.runtime.host_memory import available_bytes


def group(folder: Path, limit: str, used: int, file_pages: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {file_pages}\n")


def test_the_tightest_group_above_a_process_counts(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    group(tmp_path / "fs" / "job", "3000", 1000, file_pages=500)
    group(tmp_path / "fs" / "job" / "step", "max", 800)
    assert available_bytes(own, tmp_path / "fs") == 2500
    group(tmp_path / "fs" / "job" / "step", "900", 1000)
    assert available_bytes(own, tmp_path / "fs") == 0


@pytest.mark.parametrize("content", [None, "12:memory:/old\n", "0::/without/limits\n"])
def test_without_limits_it_is_what_the_machine_has(content, tmp_path):
    own = tmp_path / "cgroup"
    if content is not None:
        own.write_text(content)
    assert available_bytes(own, tmp_path / "fs") == pytest.approx(psutil.virtual_memory().available, rel=0.2)
