"""What training needs to know of a tokenizer: its size, its special ids and its identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.tokenizer_files import (
    bert_vocabulary,
    check_files,
    sentencepiece_is_missing,
    sentencepiece_needed,
)
from trainer.errors import UserError
from trainer.runtime.paths import is_local, user_path
from trainer.runtime.plain_text import foreign_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "begin (cls or bos)", "end (sep or eos)"
MAXIMUM_ROWS = 1 << 24  # an id beyond is a mistake: at width 768 the table alone would take 48 GiB
_OLD_HUB_NAME = re.compile(r"(albert|bert|camembert|distilbert|distilroberta|roberta|xlm|xlm-roberta)-[\w.-]+")
"""Names without an owner, from before the hub asked for one; there will be no more of them."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of one tokenizer.

    Attributes:
        size: rows of the embedding: one more than the largest id, added tokens included. len(tokenizer) is less where
            ids are left out.
        begin_id, end_id: put at both ends of every block (<s> and </s>, or [CLS] and [SEP]). A tokenizer that has one
            of them alone, as GPT-2's, has it for both.
        separator_id: stored after each document; the same as end_id.
        mask_id, pad_id: None where the tokenizer has none.
        special_ids: all special ids, sorted; never predicted, never drawn as a random replacement.
        sha256: identity of the tokenizer; shards and checkpoints record it.
        unused_ids: ids below `size` that no token has, sorted; they never come up in data, and are never drawn.
        lacking: roles that no token has; see `need_tokens`.
        shared_pad: whether the padding token has another role as well, so that data may hold it.
    """

    size: int
    begin_id: int
    end_id: int
    separator_id: int
    mask_id: int | None
    pad_id: int | None
    special_ids: tuple[int, ...]
    sha256: str
    unused_ids: tuple[int, ...] = ()
    lacking: tuple[str, ...] = ()
    shared_pad: bool = False

    @property
    def filler_id(self) -> int:
        """What stands where nothing is read from: the padding token or, where there is none, the end token."""
        return self.end_id if self.pad_id is None else self.pad_id


def means_folder(name: str | Path) -> bool:
    """Tell whether the name of a Hugging Face folder means one on this machine, and not a name on the hub.

    One word is a folder, unless it is one of the hub's old names (bert-base-chinese): so a mistyped folder is found at
    once, and not after the hub's retries.
    """
    return is_local(name) or not ("/" in str(name) or _OLD_HUB_NAME.fullmatch(str(name)))


def load_tokenizer(folder: str | Path, where: str = "") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or a hub name; code that it brings along is never run.

    Args:
        where: the option or key that named it.

    Raises:
        UserError: when there is none, or only a slow one, or one that needs code of its own.
    """
    from transformers import PreTrainedTokenizerFast

    path, where = user_path(folder), where or str(folder)
    local = means_folder(folder)
    if local and not path.is_dir():
        raise UserError(
            f"No tokenizer folder at '{folder}'.",
            where=where,
            remedy="Train one with `maskwright tokenizer train --input TEXT --output DIR`, or correct the path. A name "
            "on the Hugging Face hub has its owner in front, as google-bert/bert-base-chinese.",
        )
    if local:
        check_files(path)
    tokenizer = _load(path if local else str(folder), where)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer in '{folder}' is a {type(tokenizer).__name__}, not a fast one.",
            where=where,
            remedy="Convert it to a PreTrainedTokenizerFast (a folder with tokenizer.json).",
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # A model's folder without tokenizer files: transformers makes an empty one of the model's type.
        raise UserError(
            f"'{folder}' has no tokenizer of its own: its vocabulary would be empty.",
            where=where,
            remedy="Give a folder with tokenizer.json, as `maskwright tokenizer train` writes it.",
        )
    return tokenizer


def _load(source: Path | str, where: str) -> Any:
    """Load whatever tokenizer there is; whatever transformers says of a bad one becomes one error."""
    from transformers import AutoTokenizer, BertTokenizer

    try:
        bert = bert_vocabulary(source) if isinstance(source, Path) else None
        if bert is not None:
            return BertTokenizer.from_pretrained(str(source), **bert.options)
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own for a bad folder
        message = foreign_message(error)
        if "trust_remote_code" in message:
            raise UserError(
                f"The tokenizer of '{source}' needs code of its own (auto_map), which is never run.",
                where=where,
                remedy="If you trust it, load it yourself with AutoTokenizer, save it as a fast tokenizer with "
                "save_pretrained, and give that folder.",
            ) from error
        if ("sentencepiece" in message or "tiktoken" in message) and sentencepiece_is_missing():
            raise sentencepiece_needed(f"The tokenizer of '{source}' is a SentencePiece model", where) from error
        raise UserError(
            f"Cannot load a tokenizer from '{source}': {message}",
            where=where,
            remedy="Give a folder with tokenizer.json, as `maskwright tokenizer train` and save_pretrained write it, "
            "or one whose config.json names the model_type that its vocabulary files belong to.",
        ) from error


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, where: str) -> Vocabulary:
    """Read the ids that training needs; what an objective needs beside them it asks for by `need_tokens`.

    Raises:
        UserError: when the tokenizer has neither a begin nor an end token, or an id that no model has a row for.
    """
    begin = _first(tokenizer.cls_token_id, tokenizer.bos_token_id)
    end = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    roles = {"mask": tokenizer.mask_token_id, "pad": tokenizer.pad_token_id, BEGIN: begin, END: end}
    lacking = tuple(name for name, value in roles.items() if value is None)
    if begin is None and end is None:
        raise _lack((BEGIN, END), where)
    begin, end = _first(begin, end), _first(end, begin)
    size, unused = _rows(tokenizer, where)
    return Vocabulary(
        size=size,
        begin_id=begin,
        end_id=end,
        separator_id=end,
        mask_id=_first(tokenizer.mask_token_id),
        pad_id=_first(tokenizer.pad_token_id),
        special_ids=tuple(sorted({*tokenizer.all_special_ids, begin, end})),
        sha256=tokenizer_sha256(tokenizer),
        unused_ids=unused,
        lacking=lacking,
        shared_pad=tokenizer.pad_token_id in (begin, end, tokenizer.mask_token_id, tokenizer.unk_token_id),
    )


def need_tokens(vocabulary: Vocabulary, roles: Sequence[str], where: str = "model.tokenizer") -> None:
    """Refuse a tokenizer that lacks a token of one of these roles: "mask", "pad", BEGIN, END.

    Raises:
        UserError: naming those it lacks.
    """
    lacking = [role for role in roles if role in vocabulary.lacking]
    if lacking:
        raise _lack(lacking, where)


def _lack(roles: Sequence[str], where: str) -> UserError:
    return UserError(
        f"The tokenizer has no {' and no '.join(roles)} token.",
        where=where,
        remedy="Add it with tokenizer.add_special_tokens and save the folder again.",
    )


def _rows(tokenizer: PreTrainedTokenizerFast, where: str) -> tuple[int, tuple[int, ...]]:
    """Count the rows that a tokenizer's ids need, and find the ids below that number that no token has."""
    ids = np.unique(np.fromiter(tokenizer.get_vocab().values(), np.int64))
    largest = int(ids[-1])
    if largest >= MAXIMUM_ROWS:
        raise UserError(
            f"The tokenizer has the id {largest:,}: a model would need a row for each id up to there.",
            where=where,
            remedy=f"Give a tokenizer whose ids are below {MAXIMUM_ROWS:,}; most likely an added token's is wrong.",
        )
    size = max(len(tokenizer), largest + 1)
    backend = tokenizer.backend_tokenizer  # where two ids spell the same token, get_vocab() has one of them
    missing = np.setdiff1d(np.arange(size), ids, assume_unique=True).tolist()
    return size, tuple(number for number in missing if backend.id_to_token(number) is None)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash what decides how text becomes ids: model, vocabulary, added tokens, normalizer, pre-tokenizer.

    Padding, truncation and the post-processor are left out: shards hold no special tokens, and saving a
    tokenizer rewrites them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: state.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    canonical = json.dumps(decisive, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(canonical).hexdigest()


def _first(*values: Any) -> Any:
    return next((int(value) for value in values if value is not None), None)
