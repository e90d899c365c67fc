"""The text that models are evaluated on: blocks of each model's own tokens, and passages that all of them read."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tools.prepare.on_demand import prepare_raw_text, raw_documents
from trainer.config import Config, TextConfig
from trainer.data.batch import Samples
from trainer.data.block_reader import block_count
from trainer.data.dataset import ShardSet
from trainer.data.manifest import SPLITS, split_folder
from trainer.data.order.permutation import KeyPurpose, fold_key, permute
from trainer.data.shard_reader import ReadSettings
from trainer.data.tokenizer import Vocabulary
from trainer.errors import MaskwrightError, UserError
from trainer.inputs.pairs import refuse_single_block
from trainer.objectives.registry import make_samples
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.paths import real_path
from trainer.runtime.signals import StopRequest

_STRETCH = 512  # tokens that are decoded at once
_BROKEN = "\ufffd"  # what a decoder makes of a part of a character
_OPTIONS = (
    ("data.train", "--data"),
    ("data.text.field: ", "--field "),
    ("data.text.documents: ", "--documents "),
    ("data.text.", "--"),
)
"""How messages name a setting of the text in a run, and what this command calls it."""


@dataclass(frozen=True)
class Data:
    """Data opened for one model.

    Attributes:
        config: by which the model is evaluated.
        shards: what is evaluated.
        training: the training split beside it; None where there is none.
        samples: what makes batches of it.
        raw: the path of the raw text that all of it was made of; None where it was given as a prepared data set, or a
            part of the text is trained on.
    """

    config: Config
    vocabulary: Vocabulary
    tokenizer: Any
    shards: ShardSet
    training: ShardSet | None
    samples: Samples
    raw: str | None

    @property
    def tokens_per_byte(self) -> float | None:
        """How many of the tokens that a model is asked for stand for a byte of UTF-8 text, on average over the data.

        Only a causal model is asked for the separators between documents. None where the data set does not say how
        many bytes its text has.
        """
        manifest = self.shards.manifest
        text_bytes = manifest.statistics.get("text_bytes") or 0
        tokens = manifest.tokens - (0 if self.config.objective.name == "clm" else manifest.documents)
        return tokens / text_bytes if text_bytes else None


def text_settings(own: TextConfig, field: str | None, documents: str | None) -> TextConfig:
    """Write how raw text is read that is given to be evaluated on: words and sentences are marked as in the run."""
    marks = {name: getattr(own, name) for name in ("word_starts", "sentence_starts", "special_in_text")}
    return TextConfig.model_validate({**marks, "documents": documents, **({} if field is None else {"field": field})})


def open_data(config: Config, vocabulary: Vocabulary, tokenizer: Any, world: World, say: Callable[[str], None]) -> Data:
    """Open `data.validation` of a config as training does, and prepare it first where it is raw text; all ranks do.

    Raises:
        UserError: for data that there is not, of another tokenizer, or with less than a block.
        DamagedError: for a file that is missing or of another size.
    """
    path = config.data.validation_path
    assert path is not None
    with _options_named():
        folders = prepare_raw_text(config, world, StopRequest(), lambda line: say(_named(line)), of_run=False)
    assert folders is not None, "nothing asks it to stop"
    is_whole = not config.data.holds_out and not config.data.text.validation_fraction
    raw = path if path in folders and is_whole else None
    return distributed.run_on_all_ranks(
        world, lambda: _open(config, vocabulary, tokenizer, folders, world.is_main, raw)
    )


def _open(
    config: Config,
    vocabulary: Vocabulary,
    tokenizer: Any,
    folders: Mapping[str, Path],
    thorough: bool,
    raw: str | None,
) -> Data:
    path = config.data.validation_path
    assert path is not None
    place = folders.get(path, path)
    training, folder = (split_folder(place, split) for split in SPLITS)
    reading = ReadSettings(config.data.read, config.data.verify_reads)
    shards = ShardSet(folder, (), reading, thorough, vocabulary.size)
    if shards.manifest.tokenizer_sha256 != vocabulary.sha256:
        raise UserError(
            f"'{path}' was prepared with another tokenizer ({shards.manifest.vocabulary_size:,} tokens, sha256 "
            f"{shards.manifest.tokenizer_sha256[:12]}…) than {config.model.tokenizer} ({vocabulary.size:,} tokens, "
            f"sha256 {vocabulary.sha256[:12]}…).",
            where=f"--data {path}",
            remedy="Give the text itself, which is then tokenized for each model by its own tokenizer.",
        )
    samples = make_samples(config, vocabulary, config.data.seq_len, evaluating=True)
    blocks = block_count(shards, samples)
    if blocks == 0:
        raise UserError(
            f"The text has {shards.tokens:,} tokens: not one block of {config.data.seq_len}.",
            where=f"--data {path}",
            remedy="Give more text, or a smaller --seq-len.",
        )
    refuse_single_block(blocks, samples, "data", f"--data {path}")
    beside = None if real_path(training) == real_path(folder) else ShardSet(training, (), reading, thorough)
    return Data(config, vocabulary, tokenizer, shards, beside, samples, raw)


@contextmanager
def _options_named() -> Iterator[None]:
    """Let cards of what reads text by a config name the options of this command, as its notes do."""
    try:
        yield
    except MaskwrightError as error:
        error.where, error.remedy = _named(error.where), _named(error.remedy)
        error.remedy = error.remedy.partition(" To leave such documents out:")[0]  # for which there is no option
        raise


def _named(text: str) -> str:
    for key, option in _OPTIONS:
        text = text.replace(key, option)
    return text


def find_texts(data: Data, count: int) -> Iterator[str]:
    """Yield the text: documents as they are read or, of a prepared data set, `count` stretches of it decoded.

    Words that a stretch cuts are left out.
    """
    if data.raw is not None:
        yield from raw_documents(data.config, data.raw)
        return
    length = min(_STRETCH, data.shards.tokens)
    stretches = data.shards.block_count(length)
    chosen = permute(np.arange(min(count, stretches), dtype=np.uint64), stretches, fold_key(KeyPurpose.EVALUATION))
    for tokens in data.shards.read_blocks(np.sort(chosen.astype(np.int64)), length):
        borders = np.flatnonzero(tokens == data.vocabulary.separator_id)
        parts = np.split(tokens, borders)
        for number, part in enumerate(parts):
            ids = part[part != data.vocabulary.separator_id].tolist()
            text = data.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            words = text.split(" ")[1 if number == 0 else 0 : -1 if number == len(parts) - 1 else None]
            yield " ".join(words).strip(_BROKEN)


def choose_passages(texts: Iterable[str], count: int, most_bytes: int) -> list[str]:
    """Choose passages of a text: lines, cut before a blank where they are longer than `most_bytes` in UTF-8.

    Those with the smallest hashes of their own text: the same ones whoever reads them, and from all over the text.
    """
    chosen: dict[int, str] = {}
    heap: list[int] = []
    for text in texts:
        for passage in (part for line in text.splitlines() for part in cut(line, most_bytes)):
            key = xxhash.xxh3_64_intdigest(passage.encode())
            if key in chosen or (len(heap) == count and key > -heap[0]):
                continue
            chosen[key] = passage
            heapq.heappush(heap, -key)
            if len(heap) > count:
                del chosen[-heapq.heappop(heap)]
    return [chosen[key] for key in sorted(chosen)]


def cut(line: str, most_bytes: int) -> Iterator[str]:
    """Cut a line into parts of at most `most_bytes` (4 or more) in UTF-8, before blanks where there are any."""
    begin = 0
    while begin < len(line):
        head = line[begin : begin + most_bytes].encode()[:most_bytes].decode(errors="ignore")
        if begin + len(head) < len(line) and not line[begin + len(head)].isspace():
            blank = head.rfind(" ")
            head = head[:blank] if blank > 0 else head
        begin += len(head)
        if part := head.strip():
            yield part


@contextmanager
def scratch_folder(world: World) -> Iterator[Path]:
    """Make a temporary folder that all ranks of this machine share, and remove it at the end."""
    own = tempfile.TemporaryDirectory(prefix="maskwright-evaluate-") if world.is_main else None
    try:
        yield Path(distributed.broadcast_from_main(world, own.name if own is not None else ""))
    finally:
        if own is not None:
            own.cleanup()
