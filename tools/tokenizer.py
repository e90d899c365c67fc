"""Training a tokenizer: byte-level BPE as RoBERTa has it, WordPiece as BERT, unigram as XLM-RoBERTa, characters."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.normalizers import Normalizer

from tools.characters import Alphabet, character_tokenizer
from tools.interruptible import run_interruptibly
from tools.prepare.csv_rows import check_delimiter
from tools.prepare.hints import input_notes
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.job import check_on_bad_document
from tools.prepare.option_names import COMMAND_LINE
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import plan_units
from tools.prepare.progress import ReadProgress
from tools.prepare.summary import describe_refused, say
from tools.training_text import LONGEST_WORD, TrainingText
from trainer.errors import UserError, nearest
from trainer.runtime.files import sync_folder, unique_name
from trainer.runtime.paths import new_folder
from trainer.runtime.plain_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = ("bytelevel-bpe", "wordpiece", "unigram", "character")
MODEL_MAX_LENGTH = 512
LARGEST_VOCABULARY = 1 << 22  # the trainers take memory for each token that is asked for, found or not
_SPECIAL_TOKENS = {
    "bytelevel-bpe": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "unigram": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "character": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}
# wordpiece and unigram know single characters: the most frequent thirtieth of the vocabulary (a thousand, as in BERT),
# and more where a script needs it, down to this share of the text (as in SentencePiece). The rest is unknown.
CHARACTER_COVERAGE = 0.9995
_ALPHABET_SHARE = 30
_BLANK_RUN = Regex(r"\s+")


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    kind: str = "bytelevel-bpe",
    vocabulary_size: int = 50_265,
    console: Console | None = None,
    *,
    cased: bool = False,
    format: str = "auto",
    field: str = "text",
    documents: str | None = None,
    delimiter: str | None = None,
    on_bad_document: str = "stop",
) -> Path:
    """Train a tokenizer on the same inputs that `prepare` reads, and save it for AutoTokenizer.from_pretrained.

    - bytelevel-bpe (arXiv:1907.11692): any text without an unknown token; <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4;
    - wordpiece (arXiv:1810.04805, the uncased BERT): lower case, no accents, Chinese characters apart; [PAD] 0,
      [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4;
    - unigram (arXiv:1804.10959): NFKC, words marked with ▁; special tokens as in bytelevel-bpe;
    - character: each character a token, blanks and line ends too, and nothing else; special tokens as in bytelevel-bpe.

    The same inputs give the same files, but for unigram: its trainer starts from a hash map in random order, and
    the scores differ in the fourth digit from run to run. Words of more than LONGEST_WORD characters are cut.

    Args:
        vocabulary_size: number of tokens, the five special ones included; fewer when the text supports no more.
        cased: of wordpiece: keep capitals and accents, as the cased BERT.
        format, field, documents, delimiter, on_bad_document: how the input is read, as in `open_job`.

    Returns:
        the folder written.

    Raises:
        UserError: for an empty input, a vocabulary too small for its characters, an output that holds something, and
            a mistake in how the input is to be read.
    """
    console = console or Console(markup=False)
    _check(kind, vocabulary_size, cased)
    folder = new_folder(output)
    check_on_bad_document(on_bad_document, COMMAND_LINE)
    found = find_inputs(inputs, format, COMMAND_LINE, [folder])
    documents = resolve_documents(documents, found.format)
    delimiter = check_delimiter(delimiter, found.format, COMMAND_LINE)
    for line in input_notes(found, documents, COMMAND_LINE):
        say(console, line)
    with tempfile.TemporaryDirectory() as scratch, ReadProgress(console, "Reading", found.size) as progress:
        reading = TextSettings(found.format, documents, field, scratch, delimiter, on_bad_document)
        pieces = [piece for unit in plan_units(found, documents) for piece in unit.pieces]
        text = TrainingText(pieces, reading, progress)
        tokenizer, note = run_interruptibly(
            lambda cancel: _train(kind, cased, vocabulary_size, text.until(cancel)), text.tick
        )
    _say_what_was_lost(text, console)
    if note:
        say(console, note)
    _save(_wrap(tokenizer, kind), folder)
    say(console, f"Wrote the tokenizer ({kind}, {tokenizer.get_vocab_size():,} tokens) to {folder}")
    return folder


def _say_what_was_lost(text: TrainingText, console: Console) -> None:
    if text.cut_words:
        say(console, f"Note: {text.cut_words:,} words of more than {LONGEST_WORD:,} characters were cut.")
    if text.losses.refused:
        say(console, f"Left out: {describe_refused(text.losses.refused)}.")


def _check(kind: str, vocabulary_size: int, cased: bool) -> None:
    if kind not in KINDS:
        raise UserError(
            f"Unknown type of tokenizer '{kind}'.{nearest(kind, KINDS)}",
            where=f"--type {kind}",
            remedy=f"Choose one of {', '.join(KINDS)}.",
        )
    if cased and kind != "wordpiece":
        raise UserError(
            f"A {kind} tokenizer is always cased.", where="--cased", remedy="Leave it out, or add --type wordpiece."
        )
    smallest = len(_SPECIAL_TOKENS[kind]) + (256 if kind == "bytelevel-bpe" else 1)
    usual = "RoBERTa has 50265, BERT 30522."
    if not smallest <= vocabulary_size <= LARGEST_VOCABULARY:
        bound = f"at least {smallest}" if vocabulary_size < smallest else f"at most {LARGEST_VOCABULARY:,}"
        shown = shorten(str(vocabulary_size), 40)
        raise UserError(
            f"A {kind} vocabulary needs {bound} tokens, got {shown}.",
            where=f"--vocab-size {shown}",
            remedy="Leave it out to have all characters of a usual text." if kind == "character" else usual,
        )


def _train(kind: str, cased: bool, vocabulary_size: int, text: TrainingText) -> tuple[Tokenizer, str]:
    """Train a tokenizer; return it with what there is to say of its size, which may be nothing."""
    if kind == "character":
        return _train_characters(vocabulary_size, text)
    tokenizer = _train_pieces(kind, cased, vocabulary_size, text)
    reached = tokenizer.get_vocab_size()
    if reached >= vocabulary_size:
        return tokenizer, ""
    return tokenizer, f"Note: this text supports {reached:,} tokens, not {vocabulary_size:,}; more text gives more."


def _train_characters(vocabulary_size: int, text: TrainingText) -> tuple[Tokenizer, str]:
    special, counts = _special_tokens("character"), text.count_characters()
    if not counts:
        raise UserError(
            "The input holds no character: its documents are empty, or were left out.",
            where="--input",
            remedy="Give files that hold text, and the --field that has it.",
        )
    alphabet = Alphabet.of(counts, vocabulary_size - len(special))
    return character_tokenizer(alphabet, special, "<unk>"), alphabet.describe(len(special))


def _train_pieces(kind: str, cased: bool, vocabulary_size: int, text: TrainingText) -> Tokenizer:
    special = _special_tokens(kind)
    tokenizer = _untrained(kind, cased)
    common: dict[str, Any] = {"vocab_size": vocabulary_size, "show_progress": False}
    if kind == "bytelevel-bpe":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(min_frequency=2, initial_alphabet=alphabet, special_tokens=special, **common)
        tokenizer.train_from_iterator(text.texts(), trainer)
        return tokenizer
    normalizer = _untrained(kind, cased).normalizer  # one of its own: training locks that of the tokenizer
    assert normalizer is not None
    alphabet = _alphabet(normalizer, text, vocabulary_size // _ALPHABET_SHARE)
    _check_room(len(special) + len(alphabet), vocabulary_size)
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            initial_alphabet=alphabet, unk_token="<unk>", special_tokens=special, **common
        )
        # The trainer keeps every character it sees, so it does not get to see the rare ones.
        tokenizer.train_from_iterator(text.texts(normalizer, set(alphabet)), trainer)
        return tokenizer
    return _train_wordpiece(alphabet, cased, vocabulary_size, text)


def _train_wordpiece(alphabet: list[str], cased: bool, vocabulary_size: int, text: TrainingText) -> Tokenizer:
    """Train a WordPiece tokenizer in two passes.

    The trainer numbers the continuations ("##a") in the random order of a hash map, and with them everything after. So
    a first pass finds them, and a second one gets them sorted, as tokens that it must keep.
    """

    def train(keep: list[str], size: int) -> Tokenizer:
        tokenizer = _untrained("wordpiece", cased)
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            special_tokens=[*_special_tokens("wordpiece"), *keep],  # type: ignore[arg-type]
            show_progress=False,
        )
        tokenizer.train_from_iterator(text.texts(), trainer)
        return tokenizer

    special = [token.content for token in _special_tokens("wordpiece")]
    continuations = sorted(set(train([], 0).get_vocab()) - set(special) - set(alphabet))
    kept = [*alphabet, *continuations]
    _check_room(len(special) + len(kept), vocabulary_size)
    state = json.loads(train(kept, vocabulary_size).to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def _special_tokens(kind: str) -> list[AddedToken]:
    """List the special tokens of a kind.

    The mask of the kinds that mark word starts takes the blank before it along: it stands for " word".
    """
    takes_blank = kind in ("bytelevel-bpe", "unigram")
    return [
        AddedToken(token, lstrip=takes_blank and token == "<mask>", normalized=False, special=True)
        for token in _SPECIAL_TOKENS[kind]
    ]


def _check_room(needed: int, vocabulary_size: int) -> None:
    if needed > vocabulary_size:
        raise UserError(
            f"A vocabulary of {vocabulary_size:,} is too small: the characters of this text alone need {needed:,}.",
            where=f"--vocab-size {vocabulary_size}",
            remedy=f"Choose a --vocab-size well above {needed}, or --type bytelevel-bpe.",
        )


def _untrained(kind: str, cased: bool) -> Tokenizer:
    if kind == "bytelevel-bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=not cased)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(_BLANK_RUN, " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _wrap(tokenizer: Tokenizer, kind: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if kind == "wordpiece":
        pad, unknown, begin, end, mask = _SPECIAL_TOKENS[kind]
    else:
        begin, pad, end, unknown, mask = _SPECIAL_TOKENS[kind]
    ids = {token: tokenizer.token_to_id(token) for token in (begin, end)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        # BERT marks the second text with type 1; RoBERTa has one type and two separators.
        pair=f"{begin} $A {end} $B:1 {end}:1" if kind == "wordpiece" else f"{begin} $A {end} {end} $B {end}",
        special_tokens=list(ids.items()),
    )
    names = {"cls_token": begin, "sep_token": end, "pad_token": pad, "unk_token": unknown}
    if kind != "wordpiece":
        names |= {"bos_token": begin, "eos_token": end}
    # Where a blank is a token of its own, the decoded text is to have every one.
    clean_up: dict[str, Any] = {"clean_up_tokenization_spaces": False} if kind == "character" else {}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "wordpiece" else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=inputs or ["input_ids", "attention_mask"],
        mask_token=next(token for token in _special_tokens(kind) if token.content == mask),
        **names,
        **clean_up,
    )


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write to a temporary folder of its own, then rename: the output is whole or not there, and of one writer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_name(folder)
    try:
        tokenizer.save_pretrained(str(temporary))
        os.replace(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"Another process has written to '{folder}' meanwhile; it was left as it is.",
            where=f"--output {folder}",
            remedy="Use what is there, or choose another --output.",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)


def _alphabet(normalizer: Normalizer, text: TrainingText, usual: int) -> list[str]:
    """Find the `usual` most frequent characters of the normalised text, and more down to CHARACTER_COVERAGE; sorted."""
    counts: Counter[str] = Counter()
    for part in text.texts(normalizer):
        counts.update(part)
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda character: (-counts[character], character))
    covered = list(accumulate(counts[character] for character in frequent))
    needed = bisect_left(covered, CHARACTER_COVERAGE * covered[-1]) + 1 if covered else 0
    return sorted(frequent[: max(usual, needed)])
