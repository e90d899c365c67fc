"""What is to be read: input files, the pieces they are cut into, and how their text is found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.prepare.compression import compression_of
from tools.prepare.option_names import COMMAND_LINE, OptionNames
from tools.prepare.walk import PassedOver


@dataclass(frozen=True)
class InputFile:
    """One input. `name` is relative to what the user gave, and valid text even where `path` is not (its bytes are then
    os.fsencode(path)); `parts` > 1 only for hub data sets (their shards)."""

    path: str
    name: str
    size: int
    mtime_ns: int
    source: int
    parts: int = 1
    revision: str = ""

    @property
    def compressed(self) -> bool:
        return bool(compression_of(self.path))


@dataclass(frozen=True)
class InputFiles:
    """Files of one format, sorted by path; `sources` has one entry for each input the user gave."""

    format: str
    files: tuple[InputFile, ...]
    sources: tuple[dict[str, Any], ...]
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def empty(self) -> int:
        """How many files hold nothing."""
        return sum(not file.size for file in self.files) if self.format != "hub" else 0

    @property
    def size(self) -> int:
        """Bytes on disk, as stored; 0 for a hub data set that does not say."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Piece:
    """A part of one input: the documents whose first byte lies in [start, end) of the file, or, for a format that
    has no byte ranges, part `part` of `parts` equal ones."""

    file: InputFile
    start: int
    end: int
    part: int = 0
    parts: int = 1

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TextSettings:
    """How inputs become documents.

    Attributes:
        format, documents: as `find_inputs` and `resolve_documents` say.
        field: the column that holds the text; `a.b` is the field `b` within `a`, unless there is a column of that name.
        scratch: a folder for the few small files that `datasets` writes.
        delimiter: what separates the fields of csv files; None is a tab in .tsv files and a comma in others.
        on_bad_document: "stop" makes a document that cannot be read an error, "skip" counts it and leaves it out.
        names: how messages name these options.
    """

    format: str
    documents: str
    field: str
    scratch: str
    delimiter: str | None = None
    on_bad_document: str = "stop"
    names: OptionNames = COMMAND_LINE
