"""What `maskwright evaluate` reads of a text: passages, words and the tokens of both, whatever the tokenizer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from launcher.cli import app
from tools.evaluate.data import choose_passages, cut
from tools.evaluate.options import EvaluateOptions
from tools.evaluate.pieces import PieceTokenizer, find_units
from tools.evaluate.words import HIDDEN_SHARE, hide_words
from trainer.data.tokenizer import read_vocabulary

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXT = "Ünïcode wörds, don't split: 3 of 12 cats.  我来到北京 and けさ"


def tokenizer_of(kind: str, texts: list[str]) -> Any:
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "pieces":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    backend.train_from_iterator(texts, trainer)
    roles = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(roles, SPECIAL, strict=True)))


KINDS = ("bytes", "pieces", "unigram")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: tokenizer_of(kind, [TEXT] * 20 + ["the cat sat on a mat"]) for kind in KINDS}


def test_words_and_signs_are_found_in_any_script() -> None:
    found = [TEXT[unit.begin : unit.end] for unit in find_units(TEXT)]
    assert " ".join(found) == "Ünïcode wörds , don ' t split : 3 of 12 cats . 我 来 到 北 京 and け さ"
    assert [TEXT[unit.begin : unit.end] for unit in find_units(TEXT) if not unit.is_word] == [",", "'", ":", "."]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_stands_for_a_stretch_of_the_text_without_blanks(kind: str, tokenizers: dict[str, Any]) -> None:
    pieces = PieceTokenizer(tokenizers[kind])(TEXT)
    for begin, end in pieces.spans:
        assert TEXT[begin:end].strip() == TEXT[begin:end]
    covered = np.zeros(len(TEXT), bool)
    for begin, end in pieces.spans:
        covered[begin:end] = True
    assert covered.tolist() == [not character.isspace() for character in TEXT]
    units = find_units(TEXT)
    groups = pieces.groups(units)
    for number, unit in enumerate(units, 1):
        if (places := pieces.of(unit)) is not None:
            assert [groups[place] for place in places] == [number] * len(places)
    whole = [unit for unit in units if pieces.of(unit) is not None]
    assert len(whole) > 0.5 * len(units)


def test_a_special_token_in_a_text_is_text(tokenizers: dict[str, Any]) -> None:
    for kind in ("bytes", "pieces"):  # a unigram model has its special tokens among its pieces, as for `prepare`
        tokenizer = tokenizers[kind]
        ids = PieceTokenizer(tokenizer)("a <mask> b </s>").ids
        assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(ids), kind


def test_the_same_words_are_hidden_from_all(tokenizers: dict[str, Any]) -> None:
    generator = random.Random(3)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "Ünïcode", "wörds", "don't", "12", "cats,", "split:", "北京"]
    passages = [" ".join(generator.choices(vocabulary, k=generator.randint(3, 40))) for _ in range(300)]
    readers = [PieceTokenizer(tokenizer) for tokenizer in tokenizers.values()]
    vocabularies = [read_vocabulary(tokenizer, "") for tokenizer in tokenizers.values()]
    found = hide_words(passages, readers, vocabularies, 400, 10_000)
    assert len({len(each) for each in found}) == 1
    told: list[list[str]] = []
    for tokenizer, own, each in zip(tokenizers.values(), vocabularies, found, strict=True):
        words = []
        for hidden in each:
            assert hidden.ids[0] == own.begin_id and hidden.ids[-1] == own.end_id
            words += [tokenizer.convert_ids_to_tokens(hidden.ids[word]) for word in hidden.words]
        told.append(["".join(word).replace("##", "").replace("▁", "").replace("Ġ", "") for word in words])
    readable = [number for number, word in enumerate(told[1]) if word.isascii() and word != "<unk>"]
    assert len(readable) > 100
    for number in readable:
        assert told[0][number] == told[1][number] == told[2][number]
    total = sum(unit.is_word for passage in passages for unit in find_units(passage))
    assert 0.5 * HIDDEN_SHARE * total < len(told[0]) < 1.2 * HIDDEN_SHARE * total
    few = hide_words(passages, readers, vocabularies, 400, 7)
    assert [sum(len(hidden.words) for hidden in each) for each in few] == [7] * 3
    short = hide_words(passages, readers, vocabularies, 20, 10_000)
    assert all(len(hidden.ids) <= 20 for each in short for hidden in each) and short[0]


def test_passages_are_lines_cut_before_blanks_and_chosen_by_their_hash() -> None:
    assert list(cut("one two  three", 8)) == ["one two", "three"]
    assert list(cut("一二三四五", 7)) == ["一二", "三四", "五"]
    assert list(cut("abcdefgh ij", 4)) == ["abcd", "efgh", "ij"]
    assert list(cut("   ", 4)) == []
    lines = [f"line {number} of a text" for number in range(500)]
    chosen = choose_passages(["\n".join(lines[:250]), "\n".join(lines[250:])], 20, 100)
    assert len(chosen) == 20 and set(chosen) < set(lines)
    assert choose_passages(list(reversed(lines)) * 2, 20, 100) == chosen, "whatever the order, and each once"
    assert choose_passages(lines, 10, 100) == chosen[:10]
    assert max(lines.index(each) for each in chosen) > 250 > min(lines.index(each) for each in chosen)


def test_ranks_are_given_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def start(options: EvaluateOptions, as_json: bool, process_count: int | None) -> int:
        given.append((options, as_json, process_count))
        return 0

    monkeypatch.setattr("launcher.evaluate.start_evaluation", start)
    every = EvaluateOptions(
        models=("one", "-two", "three"),
        against="three",
        data="text.txt",
        samples=7,
        seq_len=64,
        micro_size=3,
        mask_ratio=0.3,
        words=0,
        pll_documents=5,
        field="body",
        documents="line",
        precision="bf16",
        run_code=True,
    )
    for options in (every, EvaluateOptions(models=("one",))):
        result = CliRunner().invoke(app, ["evaluate", "--nproc-per-node", "2", "--json", *options.arguments()])
        assert result.exit_code == 0, result.output
        assert given.pop() == (options, True, 2)
