"""Training a tokenizer: byte-level BPE as RoBERTa has it, WordPiece as BERT, unigram as XLM-RoBERTa, characters."""

from __future__ import annotations

import errno
import json
import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.normalizers import Normalizer

from tools.characters import Alphabet, character_tokenizer
from tools.full_disk import full_disk_explained
from tools.interruptible import run_interruptibly
from tools.prepare.summary import say
from tools.training_text import ReadOptions, TrainingText, opened_text
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError, nearest
from trainer.runtime.files import sync_folder, unique_name
from trainer.runtime.paths import new_folder
from trainer.runtime.plain_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = ("bytelevel-bpe", "wordpiece", "unigram", "character")
MODEL_MAX_LENGTH = 512
USUAL_SIZE = 50_265  # RoBERTa's
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
    vocabulary_size: int | None = None,
    console: Console | None = None,
    *,
    cased: bool = False,
    source: str | None = None,
    special_tokens: Sequence[str] = (),
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
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
        vocabulary_size: number of tokens, special ones included; fewer when the text supports no more. Default
            USUAL_SIZE, or that of `source`.
        cased: of wordpiece: keep capitals and accents, as the cased BERT.
        source: a tokenizer, folder or hub name, whose kind, way to cut text and special tokens are taken over, in the
            place of `kind` and `cased`; its pieces of words are learnt anew.
        special_tokens: more special tokens, which stand for themselves wherever a text has them.
        reading: how the input is read.

    Returns:
        the folder written.

    Raises:
        UserError: for an empty input, a vocabulary too small for its characters, an output that holds something, and
            a mistake in how the input is to be read.
    """
    console = console or Console(markup=False)
    like = load_tokenizer(source, "--from") if source is not None else None
    size = vocabulary_size or (len(like) if like else USUAL_SIZE)
    if like is None:
        _check(kind, size, cased)
    special = _more_special_tokens(special_tokens, like.all_special_tokens if like else _SPECIAL_TOKENS[kind])
    folder, size = new_folder(output), size - len(special)

    def learn(cancel: Event) -> tuple[PreTrainedTokenizerFast, str]:
        given = text.until(cancel)
        return _train_like(like, size, given) if like else _train(kind, cased, size, given)

    with opened_text(inputs, reading, folder, console) as text:
        tokenizer, note = run_interruptibly(learn, text.tick)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": special})  # type: ignore[arg-type]
    if note:
        say(console, note)
    save_tokenizer(tokenizer, folder)
    say(console, f"Wrote the tokenizer ({source or kind}, {len(tokenizer):,} tokens) to {folder}")
    return folder


def _more_special_tokens(names: Sequence[str], taken: Sequence[str]) -> list[AddedToken]:
    """Check special tokens that the user asks for, beside those that are `taken`."""
    for number, name in enumerate(names):
        if not name.strip() or name in taken or name in names[:number]:
            raise UserError(
                f"'{name}' is a special token already." if name.strip() else "A special token is empty.",
                where=f"--special-token '{name}'",
                remedy="Leave it out.",
            )
    return [AddedToken(name, normalized=False, special=True) for name in names]


def _train_like(
    like: PreTrainedTokenizerFast, vocabulary_size: int, text: TrainingText
) -> tuple[PreTrainedTokenizerFast, str]:
    """Train a tokenizer that cuts text as another does; return it with what there is to say of its size."""
    tokenizer = like.train_new_from_iterator(text.texts(), vocabulary_size, show_progress=False)
    reached = len(tokenizer)
    if reached > vocabulary_size:
        return tokenizer, f"Note: characters and special tokens alone are {reached:,} tokens, not {vocabulary_size:,}."
    return tokenizer, "" if reached == vocabulary_size else _smaller(reached, vocabulary_size)


def _smaller(reached: int, wanted: int) -> str:
    return f"Note: this text supports {reached:,} tokens, not {wanted:,}; more text gives more."


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


def _train(kind: str, cased: bool, vocabulary_size: int, text: TrainingText) -> tuple[PreTrainedTokenizerFast, str]:
    """Train a tokenizer; return it with what there is to say of its size, which may be nothing."""
    if kind == "character":
        tokenizer, note = _train_characters(vocabulary_size, text)
        return _wrap(tokenizer, kind), note
    tokenizer = _train_pieces(kind, cased, vocabulary_size, text)
    reached = tokenizer.get_vocab_size()
    return _wrap(tokenizer, kind), "" if reached >= vocabulary_size else _smaller(reached, vocabulary_size)


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


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write to a temporary folder of its own, then rename: the output is whole or not there, and of one writer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_name(folder)
    try:
        with full_disk_explained(folder, "tokenizer"):
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
