"""`maskwright data select`: three passes over a corpus, a unit of it at a time, on all cores.

The first counts words, the second weighs each document, the third writes those that were chosen. In memory are 16 bytes
a document. The same input gives the same files, whatever the number of workers.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from rich.console import Console

from tools.full_disk import full_disk_explained
from tools.prepare.bad_documents import Losses
from tools.prepare.csv_rows import check_delimiter
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.job import check_on_bad_document
from tools.prepare.option_names import COMMAND_LINE, OptionNames
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import Unit, plan_units
from tools.prepare.pool import worker_context
from tools.prepare.progress import ReadProgress
from tools.prepare.readers import read_documents
from tools.prepare.summary import counted, describe_refused, human_bytes, say
from tools.select.importance import BUCKETS, buckets_of, log_ratios
from tools.training_text import ReadOptions
from trainer.errors import MaskwrightError, UserError
from trainer.runtime.files import sync_files, sync_folder, unique_name
from trainer.runtime.paths import new_folder
from trainer.runtime.plain_text import printable

_SHOWN = 3  # documents of each end
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Selection:
    """How much is chosen, one of the two: a share of the documents in (0, 1), or a number of them; and the draw's seed.

    Raises:
        UserError: unless one of the two is given.
    """

    share: float | None = None
    documents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.documents is None):
            raise UserError(
                "How much is to be chosen is said twice." if self.share else "How much is to be chosen is not said.",
                where="--share, --documents",
                remedy="Give one of them: --share 0.05, or --documents 100000.",
            )

    def count(self, documents: int) -> int:
        """Say how many of so many documents are to be chosen."""
        return min(documents, self.documents or max(1, round((self.share or 0.0) * documents)))


@dataclass(frozen=True)
class SelectionReport:
    """What was chosen.

    Attributes:
        refused: documents that were left out, by their fault.
        mean_log_weight: of the documents of the corpus, of those that were chosen, and of the target's.
        most_like, least_like: beginnings of the chosen documents with the largest and the smallest weights.
    """

    output: str
    documents: int
    chosen: int
    text_bytes: int
    chosen_bytes: int
    refused: dict[str, int]
    mean_log_weight: dict[str, float]
    most_like: list[str]
    least_like: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def print(self, console: Console) -> None:
        size, total = human_bytes(self.chosen_bytes), human_bytes(self.text_bytes)
        say(console, f"Chosen: {self.chosen:,} of {counted(self.documents, 'document')}, {size} of {total} of text.")
        if self.refused:
            say(console, f"Left out: {describe_refused(self.refused)}.")
        of = {name: f"{weight:,.1f}" for name, weight in self.mean_log_weight.items()}
        say(console, f"Mean log weight: corpus {of['corpus']}, chosen {of['chosen']}, --like {of['target']}.")
        for title, texts in (("Most alike", self.most_like), ("Least alike of the chosen", self.least_like)):
            for text in texts:
                say(console, f"{title}: {printable(text)}")
        say(console, f"Wrote {self.output}: give it to `maskwright prepare --input`, or as data.train.")


@dataclass(frozen=True)
class Counted:
    """Of some text: how often each bucket is in it, int64 [BUCKETS], and how many documents there are."""

    counts: NDArray[np.int64]
    documents: int


@dataclass(frozen=True)
class Weighed:
    """Of the documents of a unit: log weights, float64 [n], and bytes of text, int64 [n]; and those left out."""

    weights: NDArray[np.float64]
    sizes: NDArray[np.int64]
    refused: dict[str, int]


@dataclass(frozen=True)
class _Corpus:
    units: Sequence[Unit]
    reading: TextSettings
    size: int


def select_documents(
    inputs: Sequence[str],
    like: Sequence[str],
    output: str | Path,
    selection: Selection,
    console: Console | None = None,
    *,
    workers: int | None = None,
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
) -> SelectionReport:
    """Write the documents of a corpus that resemble a target, as JSON lines with a field `text`.

    Args:
        inputs: the corpus: files, globs, folders, as `prepare` takes them.
        like: the target; its format and its documents go by the file names.
        output: the folder to write: `part-00000.jsonl.zst` and so on, documents in the order of the corpus.
        workers: processes; default one for each usable core.
        reading: how the corpus is read.

    Raises:
        UserError: for a mistake in the options or the input, and a target without words.
    """
    console = console or Console(markup=False)
    check_on_bad_document(reading.on_bad_document, COMMAND_LINE)
    folder = new_folder(output)
    count = workers or len(os.sched_getaffinity(0))
    context: Any = worker_context(__name__)
    # Ctrl-C reaches the workers as well, and ends them without a word.
    pool = ProcessPoolExecutor(count, context, signal.signal, (signal.SIGINT, signal.SIG_DFL))
    with tempfile.TemporaryDirectory() as scratch, pool:
        target = _find(like, replace(reading, format="auto", documents=None), scratch, folder, "like")
        corpus = _find(inputs, reading, scratch, folder, "from")
        of_target = _total(_each_unit(pool, count_words, target, console, "Counting --like"))
        if not of_target.counts.any():
            raise UserError("The text to be like holds no word.", where="--like", remedy="Give files that hold text.")
        of_corpus = _total(_each_unit(pool, count_words, corpus, console, "Counting --from"))
        ratios = log_ratios(of_target.counts, of_corpus.counts)
        weighed = _each_unit(pool, weigh, corpus, console, "Weighing", [ratios] * len(corpus.units))
        chosen = choose([each.weights for each in weighed], selection)
        beginnings = _write(pool, corpus, chosen, folder, console)
    mean_of_target = float(ratios @ of_target.counts / of_target.documents)
    return _report(folder, weighed, chosen, beginnings, mean_of_target)


def count_words(unit: Unit, reading: TextSettings) -> Counted:
    """Count the buckets of a unit; runs in a worker."""
    counts, documents = np.zeros(BUCKETS, np.int64), 0
    for text in _texts(unit, reading, Losses()):
        counts += np.bincount(buckets_of(text), minlength=BUCKETS)
        documents += 1
    return Counted(counts, documents)


def weigh(unit: Unit, reading: TextSettings, ratios: NDArray[np.float64]) -> Weighed:
    """Weigh each document of a unit by the ratios of `log_ratios`, −inf where it has no word; runs in a worker."""
    losses = Losses()
    weights: list[float] = []
    sizes: list[int] = []
    for text in _texts(unit, reading, losses):
        buckets = buckets_of(text)
        weights.append(float(ratios[buckets].sum()) if len(buckets) else -np.inf)
        sizes.append(len(text.encode()))
    return Weighed(np.array(weights), np.array(sizes, np.int64), dict(losses.refused))


def choose(weights: Sequence[NDArray[np.float64]], selection: Selection) -> list[NDArray[np.bool_]]:
    """Draw documents without replacement, with chances in proportion to their weights: by unit bool [n].

    Args:
        weights: by unit, the logarithms.
    """
    if not weights:
        return []
    draws = [
        of_unit + np.random.default_rng([selection.seed, number]).gumbel(size=len(of_unit))
        for number, of_unit in enumerate(weights)
    ]
    every = np.concatenate(draws)
    count = min(selection.count(len(every)), int(np.isfinite(every).sum()))
    is_chosen = np.zeros(len(every), np.bool_)
    is_chosen[np.argsort(-every, kind="stable")[:count]] = True
    return np.split(is_chosen, np.cumsum([len(of_unit) for of_unit in weights])[:-1])


def write_chosen(unit: Unit, reading: TextSettings, task: tuple[NDArray[np.bool_], str]) -> list[str]:
    """Write the chosen documents of a unit to a file; runs in a worker.

    Args:
        task: which documents, bool [n], and the path.

    Returns:
        The beginning of each.

    Raises:
        UserError: when the unit has not as many documents any more.
    """
    is_chosen, path = task
    beginnings, number = [], -1
    if not is_chosen.any():
        return []
    with open(path, "wb") as file, zstandard.ZstdCompressor(3, write_checksum=True).stream_writer(file) as compressed:
        lines = io.TextIOWrapper(compressed, encoding="utf-8", newline="\n")
        for number, text in enumerate(_texts(unit, reading, Losses())):
            if number < len(is_chosen) and is_chosen[number]:
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                beginnings.append(" ".join(text[: 2 * _SHOWN_CHARACTERS].split())[:_SHOWN_CHARACTERS])
        lines.flush()
        lines.detach()
    if number + 1 != len(is_chosen):
        raise UserError(
            f"The input has changed meanwhile: {unit.describe()} has {number + 1:,} documents, not {len(is_chosen):,}.",
            where="--from",
            remedy="Run the command again when nothing writes to it.",
        )
    return beginnings


def _find(inputs: Sequence[str], options: ReadOptions, scratch: str, output: Path, option: str) -> _Corpus:
    names = OptionNames(input=option)
    found = find_inputs(inputs, options.format, names, [output])
    documents = resolve_documents(options.documents, found.format, names)
    delimiter = check_delimiter(options.delimiter, found.format, names)
    reading = TextSettings(found.format, documents, options.field, scratch, delimiter, options.on_bad_document, names)
    return _Corpus(plan_units(found, documents), reading, found.size)


def _texts(unit: Unit, reading: TextSettings, losses: Losses) -> Iterator[str]:
    for piece in unit.pieces:
        for text, _ in read_documents(piece, reading, losses):
            yield text


def _each_unit(
    pool: Executor,
    function: Callable[..., Any],
    corpus: _Corpus,
    console: Console,
    doing: str,
    given: Sequence[Any] | None = None,
) -> list[Any]:
    """Call a function in the workers for each unit of a corpus, with what is given for each; the results in order."""
    more = [(each,) for each in given] if given is not None else [()] * len(corpus.units)
    tasks = {
        pool.submit(function, unit, corpus.reading, *arguments): unit
        for unit, arguments in zip(corpus.units, more, strict=True)
    }
    done = 0
    with ReadProgress(console, doing, corpus.size) as progress:
        try:
            for task in as_completed(tasks):
                task.result()
                done += sum(piece.size for piece in tasks[task].pieces)
                progress.update(done)
        except BrokenProcessPool:
            raise MaskwrightError(
                "A worker process was killed.",
                where=doing,
                remedy="If the machine ran out of memory, use fewer --workers.",
            ) from None
        except BaseException:
            for task in tasks:
                task.cancel()  # those under way end by themselves
            raise
    return [task.result() for task in tasks]


def _total(parts: Sequence[Counted]) -> Counted:
    counts = np.sum([part.counts for part in parts], axis=0, dtype=np.int64, initial=0)
    return Counted(np.broadcast_to(counts, BUCKETS), sum(part.documents for part in parts))


def _write(
    pool: Executor, corpus: _Corpus, chosen: Sequence[NDArray[np.bool_]], folder: Path, console: Console
) -> list[str]:
    """Write all that was chosen, whole or not at all; return the beginnings of the documents."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_name(folder)
    temporary.mkdir()
    try:
        paths = [str(temporary / f"part-{unit.number:05}.jsonl.zst") for unit in corpus.units]
        given = list(zip(chosen, paths, strict=True))
        with full_disk_explained(folder, "selection"):
            beginnings = _each_unit(pool, write_chosen, corpus, console, "Writing", given)
            sync_files(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return [text for of_unit in beginnings for text in of_unit]


def _report(
    folder: Path,
    weighed: Sequence[Weighed],
    chosen: Sequence[NDArray[np.bool_]],
    beginnings: list[str],
    mean_of_target: float,
) -> SelectionReport:
    weights = np.concatenate([each.weights for each in weighed])
    sizes = np.concatenate([each.sizes for each in weighed])
    is_chosen = np.concatenate(chosen)
    order: list[int] = np.argsort(-weights[is_chosen], kind="stable").tolist()
    texts = [beginnings[place] for place in order]
    known = weights[np.isfinite(weights)]
    return SelectionReport(
        output=str(folder),
        documents=len(weights),
        chosen=int(is_chosen.sum()),
        text_bytes=int(sizes.sum()),
        chosen_bytes=int(sizes[is_chosen].sum()),
        refused=dict(sum((Counter(each.refused) for each in weighed), Counter())),
        mean_log_weight={
            "corpus": float(known.mean()) if len(known) else 0.0,
            "chosen": float(weights[is_chosen].mean()) if is_chosen.any() else 0.0,
            "target": mean_of_target,
        },
        most_like=texts[:_SHOWN],
        least_like=texts[-_SHOWN:],
    )
