"""What can happen to a file: of a disk, of an editor, of a copy that went wrong. All of it follows from a generator."""

from __future__ import annotations

import os
import re
from pathlib import Path
from random import Random

OTHER_CONTENT = (
    *(b"3", b"null", b"{}", b"[]", b'"x"', b"[1]", b'{"a": 1}', b"{}\n{}\n", b'{"step": "x"}\n', b'{"step": 1e300}\n'),
    *(b'{"step": -1, "time": null}\n', b'{"pid": -1}', b'{"pid": "x", "host": 3}', b"NaN", b"Infinity", b"[" * 100_000),
    *(
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"\n",
        b"\xef\xbb\xbf{}",
        b"1" * 5000,
        b'{"a":' * 2000,
        b"x" * 100_000,
        b"a: [\n",
    ),
)

KINDS = (
    *("flip", "flip", "truncate", "empty", "remove", "swap", "folder", "loop", "dangling"),
    *("other", "other", "digit", "digit", "grow"),
)


def damage(generator: Random, path: Path, others: list[Path]) -> str:
    """Damage a file in place; returns what was done. It may come to nothing: compare before and after."""
    kind = generator.choice(KINDS)
    content = path.read_bytes()
    if kind == "flip" and content:
        at = generator.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
        return f"flip a bit of byte {at}"
    if kind == "truncate" and content:
        size = generator.randrange(len(content))
        os.truncate(path, size)
        return f"truncate to {size}"
    if kind == "digit" and (numbers := list(re.finditer(rb"\d+|true|false|null|[a-z]{3,}", content[:50_000]))):
        found = generator.choice(numbers)
        new = generator.choice((b"0", b"1", b"7", b"-1", b"null", b'"x"', b"1e30", b"9" * 30, b"[]", b"{}"))
        path.write_bytes(content[: found.start()] + new + content[found.end() :])
        return f"{found[0].decode()} at byte {found.start()} becomes {new.decode()}"
    if kind == "grow":
        path.write_bytes(content + generator.choice((b"\x00", b"x", b"{}\n", content[:100])))
        return "grow"
    if kind == "swap":
        other = generator.choice(others)
        theirs = other.read_bytes()
        other.write_bytes(content)
        path.write_bytes(theirs)
        return f"swap with {other.name}"
    if kind == "other":
        new = generator.choice(OTHER_CONTENT)
        path.write_bytes(new)
        return f"write {new[:40]!r}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
        if generator.random() < 0.5:
            (path / "x").write_text("x")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere-at-all")
    elif kind in ("empty", "flip", "truncate", "digit"):
        path.touch()
        return "empty"
    return kind
