"""Tokenizers with another backend: of a causal model, where a text is left open so that the model goes on."""

from __future__ import annotations

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
