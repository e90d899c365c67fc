"""The files of a checkpoint before they are written: what goes into each, as it is or copied to the host's memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.cuda._pin_memory_utils import pin_memory

from trainer.runtime.files import file_hash

_LARGE = 1 << 20  # bytes; malloc gives such pieces pages of their own


class HostBuffers:
    """Memory of the host that tensors are copied to, kept from one snapshot to the next.

    To be given new memory takes several times as long as to copy into memory that one has.
    """

    def __init__(self) -> None:
        self._taken: list[torch.UntypedStorage] = []
        self._spare: list[torch.UntypedStorage] = []

    def take_back(self) -> None:
        """Take back the memory of the snapshot that was made last, to be used again: it has been written."""
        self._spare += self._taken
        self._taken = []

    def copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Copy a tensor's memory; the copy is pinned where that is a GPU's."""
        fits = [number for number, spare in enumerate(self._spare) if spare.nbytes() == storage.nbytes()]
        if fits:
            target = self._spare.pop(fits[0])
        else:
            target = host_memory(storage.nbytes(), locked=storage.device.type == "cuda")
        target.copy_(storage)
        self._taken.append(target)
        return target


def host_memory(size: int, locked: bool) -> torch.UntypedStorage:
    """Allocate `size` bytes of memory, locked where a GPU copies to it.

    torch's own allocator of locked memory rounds each piece up to a power of two, which could take twice the size of
    the checkpoint from all others. So a large piece is locked as it is; small ones may share a page, which CUDA does
    not lock twice.

    Raises:
        RuntimeError: when the system does not lock so much.
    """
    large = size >= _LARGE
    storage = torch.empty(size, dtype=torch.uint8, pin_memory=locked and not large).untyped_storage()
    if locked and large:
        pin_memory(storage.data_ptr(), size)
    return storage


class Snapshot:
    """One rank's files, captured together and written later, by any thread.

    Args:
        buffers: copy each tensor to them as it is captured, so that training may go on before the files are written.
            The copies take as much memory as the files take space.
    """

    def __init__(self, buffers: HostBuffers | None = None) -> None:
        self._buffers = buffers
        self._problem: Exception | None = None
        self._contents: list[tuple[Path, Any]] = []

    def add(self, path: Path, content: Any) -> None:
        """Capture what torch.save would write to `path` now; what goes wrong with that, such as too little memory, is
        for `write` to tell: here DeepSpeed is between its barriers.
        """
        try:
            self._contents.append((path, content if self._buffers is None else host_copy(content, self._buffers)))
        except Exception as error:
            self._problem = error

    def write(self) -> dict[str, tuple[int, str]]:
        """Write the files durably, and let go of their content; no collective.

        Returns:
            name → (bytes, xxh3_128).

        Raises:
            OSError: when one cannot be written, or could not be captured.
        """
        if self._problem is not None:
            self._contents.clear()
            raise OSError(f"no copy in the host's memory: {self._problem}") from self._problem
        written = {}
        while self._contents:
            path, content = self._contents.pop(0)
            _write(path, content)
            written[path.name] = (path.stat().st_size, file_hash(path))
        return written


def _write(path: Path, content: Any) -> None:
    try:
        # Through a file of our own: for a path torch's writer hides what the system said.
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # It complains about a position in the file; the cause is behind it.
        raise OSError(str(error.__context__ or error)) from error


def host_copy(content: Any, buffers: HostBuffers) -> Any:
    """Copy `content`, its tensors to the CPU, out of reach of later changes; tensors that share memory still do."""
    copies: dict[int, Any] = {}  # as copy.deepcopy keeps them: by id of the original
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors(content):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = buffers.copy(storage)
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())
        copies[id(tensor)] = view
    return copy.deepcopy(content, copies)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)
