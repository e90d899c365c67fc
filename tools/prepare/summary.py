"""What `prepare` found and wrote, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.prepare.bad_documents import Losses
from tools.prepare.pieces import InputFiles
from tools.prepare.special_tokens import TokenTally
from trainer.data.blocks import framed_view
from trainer.data.manifest import Manifest

USUAL_SEQ_LEN = 512
# Beyond these shares what training sees is another text than the one given: a warning.
MUCH_UNKNOWN, MUCH_UNKNOWN_TEXT = 0.03, 0.05


@dataclass(frozen=True)
class SplitSummary:
    """One written data set. `tokens` counts the separator after each document; `text_bytes` is UTF-8."""

    folder: Path
    documents: int
    tokens: int
    text_bytes: int
    longest_document_tokens: int
    shards: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text a content token (separators not counted)."""
        return self.text_bytes / max(1, self.tokens - self.documents)

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
    """The result of `prepare`. `splits` has "train", and "validation" when a fraction was held out.

    With `on_bad_document` "stop" no document is refused. Bytes and repairs are 0 in data sets of earlier versions.
    `tally` has the special and the unknown tokens of all splits.
    """

    output: Path
    splits: dict[str, SplitSummary]
    inputs: InputFiles
    empty_documents: int
    losses: Losses
    elapsed_seconds: float
    already_prepared: bool
    tally: TokenTally = field(default_factory=TokenTally)

    @classmethod
    def of(
        cls,
        output: Path,
        folders: dict[str, Path],
        manifests: dict[str, Manifest],
        inputs: InputFiles,
        seconds: float,
        already: bool,
    ) -> PrepareSummary:
        counts = manifests["train"].statistics
        return cls(
            output,
            {name: SplitSummary.of(folder, manifests[name]) for name, folder in folders.items()},
            inputs,
            counts["empty_documents_in_input"],
            Losses(
                counts.get("refused_documents_in_input", {}),
                counts.get("refused_bytes_in_input", 0),
                counts.get("repaired_documents_in_input", 0),
            ),
            seconds,
            already,
            TokenTally(**counts.get("tokens_in_input", {})),
        )

    @property
    def refused_documents(self) -> dict[str, int]:
        """Those that could not be read, by reason."""
        return self.losses.refused

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())


@dataclass(frozen=True)
class TaskSummary:
    """The result of one task. Documents and tokens are those of its units, `kept_units` of which were finished before.

    `finished_units` of the `all_units` of the job are finished, whoever wrote them.
    """

    output: Path
    task: int
    tasks: int
    units: int
    kept_units: int
    documents: int
    tokens: int
    empty_documents: int
    losses: Losses
    finished_units: int
    all_units: int
    elapsed_seconds: float


def unused_tail_tokens(tokens: int, seq_len: int = USUAL_SEQ_LEN) -> int:
    """Count the tokens at the end that fill no block of seq_len − 2."""
    return tokens % framed_view(seq_len).payload


def describe_tokens(summary: PrepareSummary) -> list[str]:
    """Say what became of special tokens in the text, and how much of it the tokenizer does not know, in lines."""
    tally = summary.tally
    lines = [f"{count:,} literal '{token}' became its id." for token, count in tally.as_ids.items() if count]
    lines += [f"{count:,} literal '{token}' were read as text." for token, count in tally.as_text.items() if count]
    if not tally.unknown:
        return lines
    share = tally.unknown / max(1, summary.tokens - summary.documents)
    text_share = min(1.0, tally.unknown_characters / max(1, tally.characters))
    line = (
        f"{tally.unknown:,} tokens are unknown, {share:.2%} of all, and stand for about {text_share:.1%} of the text."
    )
    if share > MUCH_UNKNOWN or text_share > MUCH_UNKNOWN_TEXT:
        line = (
            f"WARNING: {line} Training will not see what they stand for: the tokenizer lacks the text's characters, or "
            "it has words that are too long for it. Train one on this text (maskwright tokenizer train --type "
            "bytelevel-bpe knows every text), add what it lacks, or clean the text."
        )
    return [*lines, line]


def print_summary(summary: PrepareSummary, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in summary.splits:
        table.add_column(name if len(summary.splits) > 1 else "", justify="right", overflow="fold")
    splits = summary.splits.values()
    table.add_row("documents", *(f"{split.documents:,}" for split in splits))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("bytes a token", *(f"{split.bytes_per_token:.2f}" for split in splits))
    table.add_row("longest document", *(f"{split.longest_document_tokens:,} tokens" for split in splits))
    table.add_row(
        f"unused tail at seq_len {USUAL_SEQ_LEN}", *(f"{unused_tail_tokens(split.tokens):,} tokens" for split in splits)
    )
    table.add_row("shards", *(f"{split.shards:,}" for split in splits))
    table.add_row("folder", *(str(split.folder) for split in splits))
    console.print(table)
    for line in (*describe_tokens(summary), *account(summary)):
        say(console, line)


def account(summary: PrepareSummary) -> list[str]:
    """Say what became of every file and document of the input, in lines."""
    inputs = summary.inputs
    files = (
        f"{counted(len(inputs.files), 'data set')}" if inputs.format == "hub" else counted(len(inputs.files), "file")
    )
    empty = f", {inputs.empty:,} of them empty" if inputs.empty else ""
    passed_over = f" Passed over: {inputs.passed_over}." if inputs.passed_over.total else ""
    left_out = _describe_left_out(summary.empty_documents, summary.losses)
    return [f"Read: {files}{empty}.{passed_over}", f"Left out: {left_out}. {summary.elapsed_seconds:.1f} s"]


def print_task_summary(summary: TaskSummary, console: Console) -> None:
    kept = f" ({summary.kept_units:,} of them finished before)" if summary.kept_units else ""
    say(
        console,
        f"Task {summary.task}/{summary.tasks}: {counted(summary.units, 'unit')}{kept}, "
        f"{counted(summary.documents, 'document')}, {summary.tokens:,} tokens. Left out: "
        f"{_describe_left_out(summary.empty_documents, summary.losses)}. {summary.elapsed_seconds:.1f} s",
    )
    if summary.finished_units < summary.all_units:
        state = (
            f"{summary.finished_units:,} of {counted(summary.all_units, 'unit')} are written. When all tasks have ended"
        )
    else:
        state = f"All {counted(summary.all_units, 'unit')} are written"
    say(console, f"{state}, join them: the same command with --finalize in place of --task.")


def describe_refused(refused: dict[str, int]) -> str:
    """Write how many were refused and why, such as "2 broken JSON, 1 not text"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(refused.items()))


def _describe_left_out(empty: int, losses: Losses) -> str:
    refused = losses.refused
    size = f"; {human_bytes(losses.refused_bytes)}" if losses.refused_bytes else ""
    reasons = f" ({describe_refused(refused)}{size})" if refused else ""
    repaired = f"; half surrogate pairs became U+FFFD in {losses.repaired:,} documents" if losses.repaired else ""
    return f"{counted(empty, 'empty document')}, {sum(refused.values()):,} refused{reasons}{repaired}"


def say(console: Console, line: str) -> None:
    """Print one line as it is."""
    console.print(line, highlight=False, soft_wrap=True)


def counted(number: int, thing: str) -> str:
    """Write a number with the thing that it counts, such as "1 unit" or "2 units"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
