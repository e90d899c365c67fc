"""Tokenizers as whoever uses the model needs them: left open for a causal one to go on, and with older code's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def left_open(tokenizer: Any, begins: bool) -> Any:
    """Return a tokenizer of the same tokens that puts no end token after a text; itself, if it never did.

    Training has an end token where a document ends. After one, a model begins another document.

    Args:
        tokenizer: a fast one.
        begins: whether training put a begin token before each document; else none is put before a text.
    """
    from tokenizers import processors

    if tokenizer("a").input_ids[-1] not in {tokenizer.eos_token_id, tokenizer.sep_token_id}:
        return tokenizer
    begin = tokenizer.cls_token or tokenizer.bos_token
    first = [begin] if begins and begin is not None else []
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A"],
        pair=[*first, "$A", "$B:1"],
        special_tokens=[(token, backend.token_to_id(token)) for token in first],
    )
    return with_backend(tokenizer, backend)


def with_backend(tokenizer: Any, backend: Any) -> Any:
    """Make a tokenizer with another backend, a `tokenizers.Tokenizer`, and the roles and settings of `tokenizer`.

    It is of the general class, because classes such as RobertaTokenizer make parts of the backend anew whenever they
    are loaded.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def write_with_vocab_txt(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer and, of one with WordPiece, the vocab.txt that older code reads.

    Such code takes how to read it from tokenizer_config.json, and lower case for granted: BertTokenizer(vocab.txt)
    would read a cased vocabulary as an uncased one. A line's number is its token's id, so that a vocabulary with gaps
    has no such file; added tokens are lines as well.
    """
    backend = tokenizer.backend_tokenizer
    names = sorted((number, token) for token, number in backend.get_vocab(with_added_tokens=True).items())
    tokens = [token for _, token in names]
    is_dense = [number for number, _ in names] == list(range(len(names))) and not any(
        end in token for token in tokens for end in "\n\r"
    )
    is_wordpiece = type(backend.model).__name__ == "WordPiece"
    if is_wordpiece and type(normalizer := backend.normalizer).__name__ == "BertNormalizer":
        tokenizer.init_kwargs |= {
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }
    tokenizer.save_pretrained(folder)
    if is_wordpiece and is_dense:
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
