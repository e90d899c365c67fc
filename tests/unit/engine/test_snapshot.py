"""What is captured for a checkpoint is what was there then, whatever training does before it is written."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.engine.snapshot import HostBuffers, Snapshot, host_copy, host_memory
from trainer.runtime.files import file_hash


def state() -> dict[str, Any]:
    """Of the kind that DeepSpeed saves: views of a flat buffer, tied tensors, nested containers, plain objects."""
    flat = torch.arange(1000, dtype=torch.float32)
    module = OrderedDict(first=flat[10:110].view(10, 10), second=flat[110:150], tied=flat[10:110].view(10, 10))
    return {"module": module, "optimizer": {"state": {0: {"step": torch.tensor(3.0), "flat": [flat]}}}, "lr": [0.5]}


def test_a_host_copy_is_not_reached_by_later_changes_and_shares_what_was_shared() -> None:
    content = state()
    copied = host_copy(content, HostBuffers())
    assert copied["module"]["tied"].data_ptr() == copied["module"]["first"].data_ptr()
    whole = copied["optimizer"]["state"][0]["flat"][0]
    assert whole.untyped_storage().data_ptr() == copied["module"]["second"].untyped_storage().data_ptr()
    content["optimizer"]["state"][0]["flat"][0].zero_()
    content["optimizer"]["state"][0]["step"].add_(1)
    content["lr"][0] = 0.0
    assert torch.equal(copied["module"]["second"], torch.arange(110.0, 150.0))
    assert torch.equal(copied["module"]["first"], torch.arange(10.0, 110.0).view(10, 10))
    assert copied["optimizer"]["state"][0]["step"] == 3.0
    assert copied["lr"] == [0.5]
    assert isinstance(copied["module"], OrderedDict)


def test_a_file_written_later_is_that_of_the_moment_of_capture(tmp_path: Path) -> None:
    content, attached, detached = state(), Snapshot(), Snapshot(HostBuffers())
    attached.add(tmp_path / "now.pt", content)
    detached.add(tmp_path / "later.pt", content)
    now = attached.write()
    assert now == {"now.pt": ((tmp_path / "now.pt").stat().st_size, file_hash(tmp_path / "now.pt"))}
    content["module"]["second"].fill_(-1.0)
    assert detached.write().keys() == {"later.pt"}
    first, second = (torch.load(tmp_path / name) for name in ("now.pt", "later.pt"))
    assert torch.equal(first["module"]["second"], second["module"]["second"])
    assert (tmp_path / "now.pt").stat().st_size == pytest.approx((tmp_path / "later.pt").stat().st_size, rel=0.1)


def test_memory_is_used_again_only_when_it_is_given_back() -> None:
    buffers = HostBuffers()
    first = host_copy(torch.full((1000,), 1.0), buffers)
    second = host_copy(torch.full((1000,), 2.0), buffers)
    assert first.data_ptr() != second.data_ptr() and first[0] == 1.0
    places = {first.data_ptr(), second.data_ptr()}
    buffers.take_back()
    third = host_copy(torch.full((1000,), 3.0), buffers)
    other_size = host_copy(torch.full((999,), 4.0), buffers)
    assert third.data_ptr() in places and third.sum() == 3000.0
    assert other_size.data_ptr() not in places and other_size.sum() == 4 * 999.0


def test_a_copy_that_cannot_be_made_is_told_when_the_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("64 GiB")

    monkeypatch.setattr(HostBuffers, "copy", no_memory)
    snapshot = Snapshot(HostBuffers())
    snapshot.add(tmp_path / "file.pt", state())
    snapshot.add(tmp_path / "other.pt", state())
    with pytest.raises(OSError, match="no copy in the host's memory: 64 GiB"):
        snapshot.write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    snapshot = Snapshot()
    snapshot.add(tmp_path / "missing" / "file.pt", state())
    with pytest.raises(OSError, match="missing"):
        snapshot.write()


@pytest.mark.parametrize("problem", [0, 2])
def test_large_locked_memory_is_as_large_as_what_it_holds(problem: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gpu A11: torch's own locked memory is rounded up to a power of two. CUDA's call is faked."""
    locked: list[tuple[int, int]] = []

    class Cudart:
        def cudaHostRegister(self, pointer: int, size: int, _flags: int) -> int:  # noqa: N802, CUDA's name
            locked.append((pointer, size))
            return problem

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    size = (1 << 20) + 1
    if problem:
        with pytest.raises(RuntimeError, match="cudaError: 2"):
            host_memory(size, locked=True)
    else:
        storage = host_memory(size, locked=True)
        assert locked == [(storage.data_ptr(), storage.nbytes())] and storage.nbytes() == size
    locked.clear()
    assert host_memory(size, locked=False).nbytes() == size and not locked
