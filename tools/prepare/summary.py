"""What `prepare` found and wrote, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.data.shards import Manifest

USUAL_SEQ_LEN = 512


@dataclass(frozen=True)
class SplitSummary:
    """One written data set. `tokens` counts the separator after each document; `text_bytes` is UTF-8."""

    folder: Path
    documents: int
    tokens: int
    text_bytes: int
    longest_document_tokens: int
    shards: int

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> SplitSummary:
        counts = manifest.statistics
        return cls(
            folder,
            manifest.documents,
            manifest.tokens,
            counts["text_bytes"],
            counts["longest_document_tokens"],
            len(manifest.shards),
        )


@dataclass(frozen=True)
class PrepareSummary:
    """The result of `prepare`. `splits` has "train", and "validation" when a fraction was held out."""

    output: Path
    splits: dict[str, SplitSummary]
    empty_documents: int
    elapsed_seconds: float
    already_prepared: bool

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text a content token (separators not counted)."""
        return sum(split.text_bytes for split in self.splits.values()) / max(1, self.tokens - self.documents)


def unused_tail_tokens(tokens: int, seq_len: int = USUAL_SEQ_LEN) -> int:
    """Tokens at the end that fill no block of seq_len − 2."""
    return tokens % (seq_len - 2)


def print_summary(summary: PrepareSummary, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in summary.splits:
        table.add_column(name if len(summary.splits) > 1 else "", justify="right")
    splits = summary.splits.values()
    table.add_row("documents", *(f"{split.documents:,}" for split in splits))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("longest document", *(f"{split.longest_document_tokens:,} tokens" for split in splits))
    table.add_row(
        f"unused tail at seq_len {USUAL_SEQ_LEN}", *(f"{unused_tail_tokens(split.tokens):,} tokens" for split in splits)
    )
    table.add_row("shards", *(f"{split.shards:,}" for split in splits))
    table.add_row("folder", *(str(split.folder) for split in splits))
    console.print(table)
    console.print(
        f"{summary.bytes_per_token:.2f} bytes a token; {summary.empty_documents:,} empty documents left out; "
        f"{summary.elapsed_seconds:.1f} s",
        highlight=False,
    )


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
