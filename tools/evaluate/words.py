"""Recovery of whole words: the same words of the same text are hidden from every model, whatever its tokens are.

A word is hidden as so many mask tokens as it has pieces, which tells the model how many there are. It is recovered if
each piece is the one that the model finds likeliest there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from tools.evaluate.pieces import PieceTokenizer, Unit, find_units
from trainer.data.tokenizer import Vocabulary
from trainer.evaluation.evaluated import Evaluated

HIDDEN_SHARE = 0.15


@dataclass(frozen=True)
class Hidden:
    """A passage as one model is shown it.

    Attributes:
        ids: int64 [S], between begin and end token.
        words: for each hidden word the positions of its tokens.
    """

    ids: np.ndarray
    words: list[list[int]]


def hide_words(
    passages: Sequence[str],
    tokenizers: Sequence[PieceTokenizer],
    vocabularies: Sequence[Vocabulary],
    seq_len: int,
    count: int,
) -> list[list[Hidden]]:
    """Hide words of passages, the same ones from every model.

    A word is chosen by the hash of its place and its passage. One that shares a token with what is beside it, in any
    of the tokenizers, is passed over for all of them; so is a passage longer than `seq_len` tokens.

    Args:
        count: of words, at most.

    Returns:
        For each tokenizer the passages in their order, of which at least one word is hidden.
    """
    found: list[list[Hidden]] = [[] for _ in tokenizers]
    left = count
    for passage in passages:
        chosen = [unit for unit in find_units(passage) if unit.is_word and _is_chosen(passage, unit)]
        pieces = [tokenizer(passage) for tokenizer in tokenizers]
        places = [[each.of(unit) for each in pieces] for unit in chosen]
        whole = [row for row in places if None not in row][:left]
        if not whole or max(len(each.ids) for each in pieces) + 2 > seq_len:
            continue
        left -= len(whole)
        for number, (each, vocabulary) in enumerate(zip(pieces, vocabularies, strict=True)):
            ids = np.array([vocabulary.begin_id, *each.ids, vocabulary.end_id], np.int64)
            words = [[place + 1 for place in row[number] or ()] for row in whole]
            found[number].append(Hidden(ids, words))
        if not left:
            break
    return found


def _is_chosen(passage: str, unit: Unit) -> bool:
    return xxhash.xxh3_64_intdigest(f"{unit.begin} {passage}".encode()) < HIDDEN_SHARE * 2**64


def recover(model: Evaluated, vocabulary: Vocabulary, hidden: Sequence[Hidden]) -> tuple[int, int]:
    """Count the words that a model recovers, and those that were hidden."""
    assert vocabulary.mask_id is not None
    right = total = 0
    with model.evaluating():
        for passage in hidden:  # one after the other: they differ in length, and a block has no padding
            places = np.concatenate(passage.words)
            shown = passage.ids.copy()
            shown[places] = vocabulary.mask_id
            inputs = {"input_ids": torch.from_numpy(shown)[None].to(model.device)}
            logits = model.network(inputs, torch.from_numpy(places).to(model.device)).logits
            told = dict(zip(places.tolist(), logits.argmax(dim=-1).tolist(), strict=True))
            right += sum(all(told[place] == passage.ids[place] for place in word) for word in passage.words)
            total += len(passage.words)
    return right, total
