"""A corpus of real English that is already on the machine: the docstrings of the installed Python packages."""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainer.errors import UserError

FILES_WRITTEN = 8
MINIMUM_WORDS = 10
MAXIMUM_PACKAGE_SHARE = 0.15
MINIMUM_LETTER_SHARE = 0.9  # letters and blanks, of all characters
MINIMUM_PLAIN_SHARE = 0.8  # words without digits, capitals inside or symbols, of all words
_PLAIN_WORD = re.compile(r"""(?<![^ ])[('"`]*(?:[A-Za-z][a-z']*[a-z]|[aAI])[.,;:!?)'"`]*(?![^ ])""")
_NOT_LETTERS = re.compile(r"[^A-Za-z ]")
_NOT_PROSE = re.compile(
    r">>>|::|[{}=|\\<>_]{2,}|https?://|^\s*[.:@*+#-]|\w\(\w*\)|Licen[sc]e|Copyright|[Ww]arranty", re.M
)
_DEEPER_LINE = re.compile(r"\n\s{2,}\S")
_BLANK_LINES = re.compile(r"\n\s*\n")
# Strings are found by their quotes, not by parsing: `ast` takes two minutes for as many files. A string that begins
# its line is a docstring; a wrong guess still has to read like prose.
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_DOCSTRING_PREFIXES = ("", "r", "R", "u")
_SENTENCE_END = (".", "!", "?", ":", '."', ".)", ".'")


@dataclass(frozen=True)
class CorpusSummary:
    """`bytes` of UTF-8 text in `documents` documents, from `packages` packages."""

    folder: Path
    documents: int
    bytes: int
    packages: int


def write_corpus(
    folder: str | Path, target_bytes: int = 4_000_000, roots: Iterable[Path] | None = None
) -> CorpusSummary:
    """Write prose from docstrings to `folder/docstrings-N.txt`, documents apart by blank lines.

    Source files are taken in the order of the hash of their path and no package may give more than a seventh, so
    the text is mixed; the same installed packages give the same files.

    Args:
        roots: folders with .py files; default the installed packages and the standard library.

    Raises:
        UserError: when the source files hold less text than `target_bytes`.
    """
    folder = Path(folder)
    documents: list[str] = []
    seen: set[int] = set()
    written, of_package = 0, dict[str, int]()
    for path, package in _source_files(list(roots) if roots is not None else _installed_roots()):
        if of_package.get(package, 0) > MAXIMUM_PACKAGE_SHARE * target_bytes:
            continue
        for document in _prose_of(path):
            key = xxhash.xxh3_64_intdigest(re.sub(r"\W+", " ", document.lower()).encode())
            if key in seen:
                continue
            seen.add(key)
            documents.append(document)
            size = len(document.encode()) + 2
            written += size
            of_package[package] = of_package.get(package, 0) + size
        if written >= target_bytes:
            break
    if written < target_bytes:
        raise UserError(
            f"The installed Python packages hold only {written:,} bytes of English prose, not {target_bytes:,}.",
            where=str(folder),
            remedy="Use a text of your own.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES_WRITTEN):
        text = "\n\n".join(documents[number::FILES_WRITTEN]) + "\n"
        (folder / f"docstrings-{number}.txt").write_text(text, encoding="utf-8")
    return CorpusSummary(folder, len(documents), written, len(of_package))


def _installed_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in dict.fromkeys(("purelib", "platlib", "stdlib"))]


def _source_files(roots: list[Path]) -> Iterator[tuple[Path, str]]:
    """Find all .py files, as (file, top-level package), in the order of a hash of the path within its root."""
    found: dict[Path, str] = {}
    for root in roots:
        for where, folders, names in os.walk(root):
            skipped = ("__pycache__", "site-packages", "dist-packages")
            folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
            for name in names:
                if name.endswith(".py"):
                    path = Path(where) / name
                    found.setdefault(path, path.relative_to(root).as_posix())
    order = sorted(found, key=lambda path: (xxhash.xxh3_64_intdigest(found[path].encode()), found[path]))
    for path in order:
        yield path, found[path].split("/")[0].removesuffix(".py")


def _prose_of(path: Path) -> list[str]:
    """Make one document of each docstring of the file that has prose: its prose paragraphs, one a line."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    documents = []
    for match in _TRIPLE_QUOTED.finditer(source):
        line_start = source.rfind("\n", 0, match.start()) + 1
        if source[line_start : match.start()].strip() in _DOCSTRING_PREFIXES:
            paragraphs = _BLANK_LINES.split(inspect.cleandoc(match[2]))
            prose = [" ".join(paragraph.split()) for paragraph in paragraphs if _is_prose(paragraph)]
            if prose:
                documents.append("\n".join(prose))
    return documents


def _is_prose(paragraph: str) -> bool:
    text = paragraph.strip()
    if not text or not text.isascii() or not text[0].isalpha() or not text.endswith(_SENTENCE_END):
        return False
    if _NOT_PROSE.search(paragraph) or _DEEPER_LINE.search(paragraph):
        return False
    line = " ".join(text.split())
    words, symbols = line.count(" ") + 1, len(_NOT_LETTERS.findall(line))
    if words < MINIMUM_WORDS or symbols > (1 - MINIMUM_LETTER_SHARE) * len(line):
        return False
    return len(_PLAIN_WORD.findall(line)) >= MINIMUM_PLAIN_SHARE * words
