"""The manifest of a checkpoint: what it holds and what it belongs to.

A checkpoint is a folder `step-NNNNNNNN` with a `manifest.json` whose files all have the recorded size and
hash. Anything else is not a checkpoint. The manifest is written last and the folder is renamed into place, so a
crash leaves the old checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from heapq import heappop, heappush
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from pydantic import ConfigDict

from trainer.errors import DamagedError
from trainer.runtime.files import file_hash, json_hash, replace_synced
from trainer.runtime.typed_json import Count, Seconds, as_type
from trainer.state import TrainState

FORMAT = "maskwright-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MODEL_FOLDER = "huggingface"  # config.json and tokenizer, inside the checkpoint
PROBE = "probe.safetensors"
FROZEN = "frozen.safetensors"  # weights that are not trained, in fp32; none where all are
KEPT = "kept.safetensors"  # in MODEL_FOLDER: weights of the source that the trained class has not; none where none are
RUN_CONFIG = "config.yaml"  # of the start that saved it
DATA_ORDER = "data_order.json"  # in the run folder
HASH_THREADS = 4
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Records:
    """What a checkpoint belongs to; the same for all checkpoints of one start.

    Attributes:
        layout: world_size, stage, precision: what DeepSpeed's files are shaped by.
        identity: what must not change silently over a resume: tokenizer, model, objective, seed, length.
        data_order: what decides which tokens sample t holds; it must not change for the samples consumed.
        model: a description for people (class, type, parameters, and of these frozen, if any are).
    """

    layout: dict[str, Any]
    identity: dict[str, Any]
    data_order: dict[str, Any]
    model: dict[str, Any]


@dataclass(frozen=True)
class CheckpointManifest(Records):
    """Record of one checkpoint.

    Attributes:
        state: TrainState as a dict.
        files: path within the folder → (bytes, xxh3_128).
        versions: of the packages that wrote it.
        saved_at: seconds since 1970.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    state: dict[str, Any]
    files: dict[str, tuple[Count, str]]
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: Seconds = 0.0

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}))  # as it is read
    content["checksum"] = json_hash(content)
    replace_synced(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Read `folder/manifest.json`.

    Raises:
        DamagedError: when it is missing, no JSON, changed, or of another version.
    """
    manifest, fault = try_manifest(folder)
    if manifest is None:
        raise DamagedError(
            f"Checkpoint {folder.name}: {fault}.",
            where=str(folder / MANIFEST),
            remedy="Resume from another one: maskwright checkpoint list.",
        )
    return manifest


def try_manifest(folder: Path) -> tuple[CheckpointManifest | None, str]:
    """Read the manifest of a folder, or return None and what is wrong with it."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # One digit that flips would resume at another place without a word. Checkpoints from before it had a checksum
        # have none.
        checksum = raw.pop("checksum", None)
        if checksum is not None and checksum != json_hash(raw):
            raise ValueError("its content differs from its checksum")
        if raw.pop("format") != FORMAT or raw.pop("version") != VERSION:
            raise ValueError("written by another version of maskwright")
        manifest = as_type(CheckpointManifest, raw)
        as_type(TrainState, manifest.state)
        if not manifest.files:
            raise ValueError("it names no files")
        if outside := [name for name in manifest.files if not _is_inside(name)]:
            raise ValueError(f"it names files outside of the checkpoint, such as {outside[0][:_SHOWN_CHARACTERS]!r}")
        return manifest, ""
    except FileNotFoundError:
        return None, f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"{MANIFEST}: cannot be read ({error})"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def find_faults(
    folder: Path,
    manifest: CheckpointManifest,
    names: list[str] | None = None,
    *,
    read: bool = True,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Compare files with the manifest; one line for each fault, none when they are whole.

    Files are hashed by a few threads: reading and hashing release the interpreter's lock.

    Args:
        names: check only these (a rank's share); default all.
        read: False compares sizes alone, which reads nothing.
        on_bytes: told how many bytes have been hashed so far, by one thread at a time.
    """
    names = list(manifest.files) if names is None else names
    counter = _Counter(on_bytes)
    check = partial(_fault_of, folder, manifest, counter if read else None)
    if not read:
        return [fault for name in names if (fault := check(name))]
    largest_first = sorted(names, key=lambda name: -manifest.files[name][0])
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash") as pool:
        try:
            faults = dict(zip(largest_first, pool.map(check, largest_first), strict=True))
        except BaseException:  # Ctrl-C: leaving the pool waits for its threads, which read until they are told
            counter.stopped = True
            raise
    return [faults[name] for name in names if faults[name]]


def share_files(files: Mapping[str, tuple[int, str]], shares: int) -> list[list[str]]:
    """Divide files into shares of about the same number of bytes: each in turn, from the largest on, to the least.

    A pure function of its arguments, so that ranks need not agree on it. No share is larger than the mean by more than
    the largest file.
    """
    divided: list[list[str]] = [[] for _ in range(shares)]
    loads = [(0, 0, share) for share in range(shares)]  # bytes, files, share
    for name, (size, _) in sorted(files.items(), key=lambda item: (-item[1][0], item[0])):
        held, count, share = heappop(loads)
        divided[share].append(name)
        heappush(loads, (held + size, count + 1, share))
    return divided


class _Counter:
    """Bytes that the threads have read, and whether they are to stop."""

    def __init__(self, on_bytes: Callable[[int], None] | None) -> None:
        self.stopped = False
        self._done, self._on_bytes, self._lock = 0, on_bytes, Lock()

    def add(self, count: int) -> None:
        if self.stopped:
            raise InterruptedError("stopped")
        with self._lock:
            self._done += count
            try:
                if self._on_bytes is not None:
                    self._on_bytes(self._done)
            except BaseException:
                self.stopped = True  # the other threads, at once
                raise


def _fault_of(folder: Path, manifest: CheckpointManifest, counter: _Counter | None, name: str) -> str:
    """Say what is wrong with one file, or return an empty string; its content is read where there is a counter."""
    size, digest = manifest.files[name]
    path = folder / name
    try:
        if not path.is_file():
            return f"{name}: missing"
        found = path.stat().st_size
        if found != size:
            return f"{name}: {found:,} bytes instead of {size:,}"
        if counter is not None and file_hash(path, counter.add) != digest:
            return f"{name}: content differs from its checksum"
    except OSError as error:  # a fault like another: one rank must not leave the others waiting
        return f"{name}: {error.strerror or error}"
    return ""
