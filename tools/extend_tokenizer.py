"""Extending a tokenizer by the words of a text that it tears apart most often.

A word of n pieces that stands c times in the text costs c · (n − 1) tokens more than it would as one. Those that cost
most are added, with ids behind all others, so that a model of the old tokenizer grows by rows at the end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tokenizers import Tokenizer

from tools.interruptible import run_interruptibly
from tools.open_tokenizer import with_backend
from tools.prepare.segment import StartSettings
from tools.prepare.summary import say
from tools.tokenizer import save_tokenizer
from tools.training_text import ReadOptions, TrainingText, opened_text
from trainer.data.manifest import WORD_STARTS
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError
from trainer.runtime.paths import new_folder
from trainer.runtime.plain_text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OWN_WORDS = "tokenizer"
_LEAST_COUNT = 2  # a word that stands once in the text is not learnt
_SHOWN = 10
_ABOVE = 1e-3  # nats by which a whole word is likelier than its pieces, for a unigram model to take it


@dataclass(frozen=True)
class Torn:
    """A word of the text, how often it stands there, and of how many pieces it is."""

    word: str
    count: int
    pieces: int

    @property
    def cost(self) -> int:
        """Tokens that it would save as one."""
        return self.count * (self.pieces - 1)


def extend_tokenizer(
    source: str,
    inputs: Sequence[str],
    output: str | Path,
    add: int,
    console: Console | None = None,
    *,
    words: str = OWN_WORDS,
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
) -> Path:
    """Write a tokenizer that has `add` words of a text more than `source`.

    Args:
        source: folder or hub name of a fast tokenizer, or of a model with one.
        words: what a word is: OWN_WORDS, as the tokenizer cuts text, or what `prepare --word-starts` takes, for text
            without blanks: "jieba", "phrases:FILE" or "module:function".
        reading: how the input is read.

    Returns:
        the folder written.

    Raises:
        UserError: for a tokenizer that cannot be extended, a text in which no word is torn apart, and mistakes in the
            options and the input.
    """
    console = console or Console(markup=False)
    loaded = load_tokenizer(source, "--from")
    rows = read_vocabulary(loaded, source).size
    counted = OwnWords(loaded) if words == OWN_WORDS else MarkedWords(loaded, words)
    folder = new_folder(output)
    with opened_text(inputs, reading, folder, console) as text:
        counts = run_interruptibly(lambda cancel: counted.count(text.until(cancel)), text.tick)
    torn = sorted(counted.torn(counts), key=lambda each: (-each.cost, each.word))[:add]
    if not torn:
        raise UserError(
            f"This tokenizer tears no word apart that stands {_LEAST_COUNT} times in the text.",
            where="--input",
            remedy="Give more text, or --words jieba for Chinese: a character is a word to many tokenizers.",
        )
    extended = with_backend(loaded, counted.extended([each.word for each in torn], rows))
    _check(loaded, extended, rows, len(torn))
    save_tokenizer(extended, folder)
    _report(console, torn, counted, counts, type(counted)(extended, words))
    say(console, f"Wrote the tokenizer ({rows:,} + {len(torn):,} tokens) to {folder}")
    return folder


class OwnWords:
    """Words as a tokenizer's pre-tokenizer cuts them; they become pieces of its model.

    Raises:
        UserError: for a tokenizer without words, or whose model knows no whole ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, _words: str = OWN_WORDS) -> None:
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._unknown, self._special = tokenizer.unk_token_id, frozenset(tokenizer.all_special_tokens)
        StartSettings(OWN_WORDS).check(self._backend)
        self._kind = json.loads(self._backend.to_str())["model"]["type"]
        model = self._backend.model
        if self._kind not in _ADD or getattr(model, "end_of_word_suffix", None):
            raise UserError(
                f"A tokenizer of this kind ({self._kind}) cannot be given whole words.",
                where="--from",
                remedy="Give one of WordPiece, byte-level BPE or unigram pieces, or --words jieba.",
            )

    def count(self, text: TrainingText) -> Counter[str]:
        """Count the words of a text that hold a letter, as the model sees them (Ġword, ▁word)."""
        counts: Counter[str] = Counter()
        normalizer, cut = self._backend.normalizer, self._backend.pre_tokenizer.pre_tokenize_str
        for part in text.texts():
            counts.update(word for word, _ in cut(normalizer.normalize_str(part) if normalizer else part))
        return Counter({word: count for word, count in counts.items() if _has_letter(self.show(word))})

    def pieces(self, word: str) -> int:
        """Count the pieces of a word; one with an unknown piece counts by its characters."""
        found = self._backend.model.tokenize(word)
        unknown = any(piece.id == self._unknown for piece in found)
        return max(2, len(self.show(word))) if unknown else len(found)

    def torn(self, counts: Counter[str]) -> Iterable[Torn]:
        """List the words of several pieces; what spells a special token is none."""
        for word, count in counts.items():
            if count >= _LEAST_COUNT and (pieces := self.pieces(word)) > 1 and self.show(word) not in self._special:
                yield Torn(word, count, pieces)

    def show(self, word: str) -> str:
        """Say a word as it stands in the text."""
        decoder = self._backend.decoder
        return (decoder.decode([word]) if decoder else word).strip()

    def extended(self, words: Sequence[str], rows: int) -> Tokenizer:
        """Make a tokenizer that has these words as well, with the ids from `rows` on."""
        state = json.loads(self._backend.to_str())
        _ADD[self._kind](state, words, rows, self._backend.model)
        return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


class MarkedWords:
    """Words by a function, for text without blanks; they become added tokens, which are found before all else."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: str) -> None:
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None
        settings = StartSettings(words)
        settings.check(self._backend)
        starts = settings.segmenters()[WORD_STARTS]
        assert starts is not None
        self._starts: Callable[[str], Any] = starts

    def count(self, text: TrainingText) -> Counter[str]:
        """Count the words of a text that are of two characters or more, all of them letters."""
        counts: Counter[str] = Counter()
        for part in text.texts():
            borders = [*self._starts(part).tolist(), len(part)]
            counts.update(part[begin:end].strip() for begin, end in pairwise(borders))
        return Counter({word: count for word, count in counts.items() if len(word) > 1 and word.isalpha()})

    def pieces(self, word: str) -> int:
        """Count the tokens of a word by itself."""
        return len(self._backend.encode(word, add_special_tokens=False))

    def torn(self, counts: Counter[str]) -> Iterable[Torn]:
        """List the words of several tokens; those that have letters with blanks between words are left out."""
        for word, count in counts.items():
            if count >= _LEAST_COUNT and not word.isascii() and (pieces := self.pieces(word)) > 1:
                yield Torn(word, count, pieces)

    def show(self, word: str) -> str:
        """Say a word as it stands in the text."""
        return word

    def extended(self, words: Sequence[str], rows: int) -> Tokenizer:
        """Make a tokenizer that has these words as well, with the ids from `rows` on."""
        state = json.loads(self._backend.to_str())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        state["added_tokens"] += [{"id": rows + number, "content": word, **flags} for number, word in enumerate(words)]
        return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def _add_wordpieces(state: dict[str, Any], words: Sequence[str], rows: int, _model: Any) -> None:
    """WordPiece takes the longest piece that a word begins with, which is then the word."""
    state["model"]["vocab"].update({word: rows + number for number, word in enumerate(words)})


def _add_to_bpe(state: dict[str, Any], words: Sequence[str], rows: int, _model: Any) -> None:
    """Add words that no merges lead to; `ignore_merges` has a word that is in the vocabulary taken whole."""
    _add_wordpieces(state, words, rows, _model)
    state["model"]["ignore_merges"] = True


def _add_to_unigram(state: dict[str, Any], words: Sequence[str], rows: int, model: Any) -> None:
    """Add words a little likelier than their pieces together. Ids are places in the list of pieces.

    Added tokens that have ids beyond the list get their places: they are found before the model is asked.
    """
    vocabulary: list[Any] = state["model"]["vocab"]  # [piece, score]
    scores: dict[str, float] = dict(vocabulary)
    lowest = min(scores.values())
    names = {token["id"]: token["content"] for token in state["added_tokens"]}
    vocabulary += [[names.get(number, f"<unused {number}>"), lowest] for number in range(len(vocabulary), rows)]
    for word in words:
        vocabulary.append([word, sum(scores.get(piece.value, lowest) for piece in model.tokenize(word)) + _ABOVE])


_ADD: dict[str, Callable[[dict[str, Any], Sequence[str], int, Any], None]] = {
    "WordPiece": _add_wordpieces,
    "BPE": _add_to_bpe,
    "Unigram": _add_to_unigram,
}


def _has_letter(word: str) -> bool:
    return any(character.isalpha() for character in word)


def _check(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, rows: int, added: int) -> None:
    """Prove that old tokens keep their ids, and that the new ones have those behind them."""
    before, after = old.get_vocab(), new.get_vocab()
    fresh = {name: number for name, number in after.items() if name not in before}
    kept = all(after.get(name) == number for name, number in before.items())
    fresh = {name: number for name, number in fresh.items() if not name.startswith("<unused ")}
    if not kept or sorted(fresh.values()) != list(range(rows, rows + added)):
        raise UserError(
            "The ids of this tokenizer have gaps, so that new ones cannot stand behind them.",
            where="--from",
            remedy="Give a tokenizer as its maker saved it, or close the gaps.",
        )


def _report(
    console: Console,
    torn: Sequence[Torn],
    before: OwnWords | MarkedWords,
    counts: Counter[str],
    after: OwnWords | MarkedWords,
) -> None:
    """Say what was gained, and which words were torn apart most."""
    words = counts.total()
    old, new = (sum(count * each.pieces(word) for word, count in counts.items()) / words for each in (before, after))
    say(console, f"{words:,} words, {len(counts):,} different ones: {old:.3f} tokens a word before, {new:.3f} now.")
    say(console, f"The rarest of the {len(torn):,} that were added stands {min(each.count for each in torn):,} times.")
    for each in torn[:_SHOWN]:
        shown = printable(before.show(each.word))
        say(console, f"  {shown}: {each.count:,} times, was {each.pieces} pieces")
