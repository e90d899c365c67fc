"""Input files as they lie on disk: decompressed by their suffix, and what it means when that fails."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import zstandard

from tools.prepare.paths import shown
from trainer.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0", ".bz2": b"BZh"}
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes, the most there is
_USUAL_WINDOW = 1 << 27  # the most that zstd reads without being asked to
_CODEC_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, MemoryError)
DAMAGED = "It is damaged or was cut short; fetch it again."


def compression_of(path: str) -> str:
    """Find the suffix that says how a file is compressed; empty for none."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def open_input(path: str) -> tuple[IO[bytes], IO[bytes]]:
    """Open a file: return it decompressed according to its suffix, and the raw file beneath it."""
    raw = open(path, "rb", buffering=1 << 20)
    suffix = compression_of(path)
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".bz2":
        return io.BufferedReader(bz2.BZ2File(raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".zst":
        return io.BufferedReader(ZstdReader(raw), 1 << 20), raw
    return raw, raw


class ZstdReader(io.RawIOBase):
    """Decompresses all frames of a .zst file; a file cut short raises EOFError (zstandard's own reader stops after
    the first frame, and takes the end of a cut file for the end of the text).

    A frame needs as much memory as its window, up to 2 GiB.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._frame, self._text = raw, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            parts = []
            while compressed:
                self._frame = self._frame or _zstd_frame()
                parts.append(self._frame.decompress(compressed))
                compressed = b""
                if self._frame.eof:
                    compressed, self._frame = self._frame.unused_data, None
            self._text = b"".join(parts)
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


def large_window(paths: Iterable[str]) -> int:
    """Find the largest window of .zst files in bytes, which each worker needs besides; 0 when all are usual."""
    largest = 0
    for path in paths:
        if compression_of(path) == ".zst":
            try:
                with open(path, "rb") as file:
                    window = zstandard.get_frame_parameters(file.read(18)).window_size
            except (OSError, zstandard.ZstdError):
                continue  # the reader says what is wrong with it
            largest = max(largest, window)
    return largest if largest > _USUAL_WINDOW else 0


def is_codec_error(error: BaseException | None) -> bool:
    """Tell whether reading a compressed file may have raised this."""
    return isinstance(error, _CODEC_ERRORS)


def explain_codec_error(path: str, error: BaseException) -> UserError:
    """Explain to a user why a compressed file cannot be read: damage is said only of what looks like it."""
    name, suffix = shown(Path(path).name), compression_of(path)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
        return explain_os_error(path, error)
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in reason.lower():
        needs = f" (a window of {window >> 20:,} MiB)" if (window := large_window([path])) else ""
        remedy = "Use fewer workers, or compress it again with a smaller window."
        return UserError(f"Not enough memory to decompress '{name}'{needs}.", where=shown(path), remedy=remedy)
    problem = f"Cannot decompress '{name}': {reason}."
    if not _has_magic(path, suffix):
        remedy = f"It is not a {suffix} file, whatever its name says: rename it after what it is."
    elif "ictionary" in reason:
        remedy = "It was compressed with a dictionary: decompress it with that first."
    elif "nsupported" in reason:
        remedy = f"Decompress it with the program that wrote it, and compress it as a plain {suffix} file."
    else:
        remedy = DAMAGED
    return UserError(problem, where=shown(path), remedy=remedy)


def explain_os_error(path: str, error: OSError) -> UserError:
    """Explain to a user why the system cannot read a file."""
    remedies = {
        errno.EACCES: "Check its permissions.",
        errno.EPERM: "Check its permissions.",
        errno.ENOENT: "It was there when the command began: leave the input alone, and run the same command again.",
        errno.ENOMEM: "Use fewer workers.",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = remedies.get(error.errno or 0, "Check the disk or the file system that it lies on, and run it again.")
    return UserError(f"Cannot read '{shown(Path(path).name)}': {reason}.", where=shown(path), remedy=remedy)


def _has_magic(path: str, suffix: str) -> bool:
    with open(path, "rb") as file:
        start = file.read(8)
    skippable = suffix == ".zst" and start[1:4] == b"\x2a\x4d\x18"  # a frame that holds no data
    return start.startswith(_MAGIC[suffix]) or skippable
