"""`maskwright bench prepare`: tokens a second of one core, from text files to blocks that training can read.

The real `prepare` with one and two workers, beside what Hugging Face's run_mlm.py does with the same text and
tokenizer, and beside the bare tokenizer. Each repetition has a process of its own, its imports done before the clock
starts; a token is one of the text's own, without separators and special tokens, on every side.
"""

from __future__ import annotations

import io
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.common import BenchReport, Measurement, Ratio, Variant, in_own_process, measure, run_benchmark
from tools.prepare.inputs import find_inputs, resolve_documents
from trainer.errors import UserError

CORPUS_BYTES = 4_000_000  # less than any installation of maskwright holds
VOCABULARY_SIZE = 16_384
SEQ_LEN = 512
_DATASETS_BUILDERS = {"text": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
# One thread: a fast tokenizer otherwise spreads a batch over all cores.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class PrepareBenchmark:
    """What `bench prepare` is asked to measure.

    Attributes:
        inputs: text files, as `prepare` takes them; empty harvests the installed documentation.
        tokenizer: its folder; None trains one on the text.
        megabytes: of text, when it is harvested.
        against: "hf" (Hugging Face) or "none".
    """

    inputs: tuple[str, ...] = ()
    tokenizer: str | None = None
    megabytes: int = 32
    against: str = "hf"
    rounds: int = 3


def bench_prepare(settings: PrepareBenchmark, console: Console) -> BenchReport:
    """Measure `prepare` and what it stands beside.

    Raises:
        UserError: for inputs that `prepare` would refuse, or that Hugging Face's side cannot read.
    """
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as scratch:
        folder = Path(scratch)
        inputs = list(settings.inputs) or [str(_harvest(folder / "text", settings.megabytes, console))]
        found = find_inputs(inputs)
        if found.format not in _DATASETS_BUILDERS or any(file.path.endswith(".zst") for file in found.files):
            raise UserError(
                "Text of this kind cannot be read by both sides.",
                where=", ".join(inputs),
                remedy="Give plain text, JSON lines, csv, parquet or arrow, not packed with zstd.",
            )
        tokenizer = settings.tokenizer or _train_tokenizer(inputs, folder / "tokenizer", console)
        job = {"inputs": inputs, "tokenizer": str(tokenizer), "scratch": scratch}
        variants, ratios = _variants(job, settings.against)
        facts = {**asdict(settings), "format": found.format, "bytes": found.size}
        notes = [f"{found.size / 1e6:.1f} MB of {found.format}; the same text and tokenizer for all"]
        if not settings.inputs:
            notes.append(f"the text is {CORPUS_BYTES / 1e6:.0f} MB of documentation, over and over")
        return run_benchmark("prepare", facts, variants, ratios, notes, settings.rounds, console)


def _variants(job: dict[str, Any], against: str) -> tuple[list[Variant], list[Ratio]]:
    def variant(name: str, what: str, function: str, **arguments: int) -> Variant:
        call = {**job, **arguments}
        return Variant(name, what, lambda: in_own_process(f"{__name__}:{function}", call, _ONE_THREAD))

    variants = [
        variant("bare tokenizer", "tokenizers' encode_batch_fast on documents in memory", "run_bare_tokenizer"),
        variant("prepare, 1 worker", "text files to verified shards", "run_prepare", workers=1),
        variant("prepare, 2 workers", "the same", "run_prepare", workers=2),
    ]
    ratios = [
        Ratio("prepare, 1 worker", "bare tokenizer"),
        Ratio("prepare, 2 workers", "prepare, 1 worker", "wall"),
    ]
    if against == "hf":
        what = "load_dataset, map of the tokenizer, map to blocks (group_texts), one process, to Arrow files"
        variants.append(variant("hf map", what, "run_datasets_map"))
        ratios.append(Ratio("prepare, 1 worker", "hf map"))
    return variants, ratios


def _harvest(folder: Path, megabytes: int, console: Console) -> Path:
    """Write the documentation corpus, and copy it until there is enough of it."""
    from tools.sample_corpus import write_corpus

    console.print("Harvesting text from the documentation of the installed packages")
    corpus = write_corpus(folder, CORPUS_BYTES)
    copies = max(1, round(megabytes * 1_000_000 / corpus.bytes))
    for number, path in itertools.product(range(1, copies), sorted(folder.glob("docstrings-?.txt"))):
        shutil.copyfile(path, path.with_stem(f"{path.stem}-again-{number}"))
    return folder


def _train_tokenizer(inputs: Sequence[str], folder: Path, console: Console) -> Path:
    from tools.tokenizer import train_tokenizer

    return train_tokenizer(inputs, folder, "bytelevel-bpe", VOCABULARY_SIZE, console)


def run_prepare(inputs: list[str], tokenizer: str, scratch: str, workers: int) -> Measurement:
    """Measure one call of the real `prepare`, its worker processes included."""
    from transformers import AutoTokenizer  # noqa: F401  # imported here, with torch, so that it is not timed

    from tools.prepare import prepare

    quiet = Console(file=io.StringIO())
    with tempfile.TemporaryDirectory(dir=scratch) as output:

        def work() -> int:
            summary = prepare(inputs, tokenizer, f"{output}/data", workers=workers, console=quiet)
            return summary.tokens - summary.documents

        return measure(work)


def run_bare_tokenizer(inputs: list[str], tokenizer: str, scratch: str) -> Measurement:
    """Measure the tokenizer alone, in the batches that `prepare` gives it; text is in memory, and ids stay there."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    bare.no_padding()
    bare.no_truncation()
    bare.encode_special_tokens = True
    batches = list(_batches(inputs, scratch))
    return measure(
        lambda: sum(len(one) for texts in batches for one in bare.encode_batch_fast(texts, add_special_tokens=False))
    )


def _batches(inputs: list[str], scratch: str) -> Iterator[list[str]]:
    from tools.prepare.encode import BATCH_CHARACTERS, BATCH_DOCUMENTS
    from tools.prepare.pieces import TextSettings
    from tools.prepare.plan import plan_units
    from tools.prepare.readers import read_documents

    found = find_inputs(inputs)
    documents = resolve_documents(None, found.format)
    reading = TextSettings(found.format, documents, "text", scratch)
    pieces = [piece for unit in plan_units(found, documents) for piece in unit.pieces]
    texts, characters = list[str](), 0
    for text, _ in itertools.chain.from_iterable(read_documents(piece, reading) for piece in pieces):
        texts.append(text)
        characters += len(text)
        if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def run_datasets_map(inputs: list[str], tokenizer: str, scratch: str) -> Measurement:
    """Measure `datasets` from text files to blocks of SEQ_LEN in Arrow files, as run_mlm.py without --line_by_line.

    Documents are tokenized with their special tokens, put end to end a batch at a time, and cut into blocks; what is
    left of a batch is dropped. Caching is off, all else as the library has it.
    """
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    found = find_inputs(inputs)
    files = [file.path for file in found.files]
    options: dict[str, Any] = {"sample_by": "paragraph"} if found.format == "text" else {}
    fast = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    fast.model_max_length = 1 << 40  # no warning for documents longer than the model: they are cut into blocks
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory(dir=scratch) as cache:

        def tokenize(rows: dict[str, list[Any]]) -> Any:
            return fast(rows["text"], return_special_tokens_mask=True)

        def to_blocks() -> list[Any]:
            text: Any = datasets.load_dataset(
                _DATASETS_BUILDERS[found.format], data_files=files, split="train", cache_dir=cache, **options
            )
            others = text.column_names
            tokenized = text.map(tokenize, batched=True, remove_columns=others, load_from_cache_file=False)
            return [tokenized, tokenized.map(group_blocks, batched=True, load_from_cache_file=False)]

        results: list[Any] = []
        measured = measure(lambda: results.extend(to_blocks()) or 0)
        tokenized = results[0]
        special = sum(np.sum(rows, dtype=np.int64) for rows in _values(tokenized, "special_tokens_mask"))
        tokens = sum(len(rows) for rows in _values(tokenized, "input_ids")) - int(special)
    return Measurement(tokens, measured.wall_seconds, measured.cpu_seconds)


def group_blocks(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Put each column's lists end to end, cut that into lists of SEQ_LEN, and drop the rest."""
    blocks = {}
    for name, lists in rows.items():
        joined = list(itertools.chain.from_iterable(lists))
        whole = len(joined) // SEQ_LEN * SEQ_LEN
        blocks[name] = [joined[start : start + SEQ_LEN] for start in range(0, whole, SEQ_LEN)]
    return blocks


def _values(rows: Any, column: str) -> Iterator[Any]:
    """Give the values of a column of lists, flat, a piece at a time."""
    for piece in rows.data.column(column).chunks:
        yield piece.flatten().to_numpy()
