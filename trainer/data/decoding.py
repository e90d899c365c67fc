"""Tokens as text, a part at a time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenizers import decoders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PART_OF_CHARACTER = "\ufffd"
# Chinese, Japanese, Korean and full-width characters, around which WordPiece's decoder puts blanks that no text has.
_WIDE = "[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U0001f000-\U0003ffff]"
_BLANK_AT_WIDE = re.compile(rf"(?<={_WIDE}) | (?={_WIDE})")


def decode_runs(tokenizer: PreTrainedTokenizerFast, ids: list[int], ends: list[int]) -> list[str]:
    """Decode each run as it reads after those before it: decoded alone, a word would lose the blank before it."""
    without_blanks = isinstance(tokenizer.backend_tokenizer.decoder, decoders.WordPiece)
    texts, before, begin = [], "", 0
    for end in ends:
        decoded = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            decoded = decoded.rstrip(_PART_OF_CHARACTER)  # the next token, which holds the rest of it, brings it
        if decoded.startswith(before):
            text = decoded[len(before) :]
        else:  # a decoder that looks ahead
            text = str(tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False))
        texts.append(_BLANK_AT_WIDE.sub("", text) if without_blanks else text)
        before, begin = decoded, end
    return texts
