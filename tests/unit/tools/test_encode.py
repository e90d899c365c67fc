"""Word and sentence starts as the encoder places them, with real tokenizers of all kinds."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import RobertaProcessing

from tests.conftest import write_text
from tests.preparing import CHINESE, quiet_console
from tools.prepare import encode
from tools.prepare.encode import Encoder, split_text
from tools.prepare.segment import Segmenter, StartSettings
from tools.prepare.sentences import sentence_starts
from tools.tokenizer import KINDS, train_tokenizer
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS

ENGLISH = "Kalo mi, neru; Ünsaké İvo!  A½B ﬁn \u200bka\u0301lo don't (orus).\n\tMi lo…"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """tokenizer.json of each kind, trained on English-like text: "漢" is three tokens of byte-level BPE."""
    folder = tmp_path_factory.mktemp("kinds")
    text = write_text(folder / "text.txt", documents=120, seed=3)
    text.write_text(text.read_text() + f"\n\n{ENGLISH}" * 9)
    kinds = {kind: train_tokenizer([str(text)], folder / kind, kind, 400, quiet_console()) for kind in KINDS}
    return {kind: str(path / "tokenizer.json") for kind, path in kinds.items()}


@pytest.fixture(scope="session")
def chinese_file(chinese: Path) -> str:
    return str(chinese / "tokenizer" / "tokenizer.json")


def word_offsets(text: str) -> np.ndarray:
    """Words as a user may define them: runs of letters and digits, and each other visible character."""
    return np.array([match.start() for match in re.finditer(r"\w+|[^\w\s]", text)], np.int64)


def encoded_words(
    file: str, texts: list[str], segmenter: Segmenter | None, mark: str = WORD_STARTS
) -> list[list[list[str]]]:
    """The tokens of each text, grouped at the starts."""
    encoder, tokenizer = Encoder(file, np.dtype("<u2"), {mark: segmenter}), Tokenizer.from_file(file)
    grouped = []
    for encoded in encoder.encode(texts):
        assert encoded.starts[mark].dtype == bool and len(encoded.starts[mark]) == len(encoded.ids)
        assert encoded.starts[mark][:1].all()
        tokens = [str(tokenizer.id_to_token(token)) for token in encoded.ids.tolist()]
        places = [*np.flatnonzero(encoded.starts[mark]).tolist(), len(tokens)]
        grouped.append([tokens[a:b] for a, b in itertools.pairwise(places)])
    return grouped


def spelled(kind: str, groups: list[list[str]]) -> list[str]:
    """The words that groups of tokens spell, without the marks of their kind."""
    if kind == "bytelevel-bpe":
        return [decoders.ByteLevel().decode(group).strip() for group in groups]
    return ["".join(group).replace("##", "").replace("▁", " ").strip() for group in groups]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bytelevel-bpe", "Kalo|mi|,|neru|;|Ünsaké|İvo|!|A½B|ﬁn|\u200b|ka|\u0301|lo|don|'t|(|orus|).|Mi|lo|…"),
        ("wordpiece", "kalo|mi|,|neru|;|unsake|ivo|!|a½b|ﬁn|kalo|don|'|t|(|orus|)|.|mi|lo|…"),
    ],
)
def test_words_of_a_segmenter_start_at_the_right_tokens(files, kind: str, expected: str) -> None:
    """Whatever a normalizer does to accents, İ and zero widths. A token that holds two starts ("'t") starts one."""
    (groups,) = encoded_words(files[kind], [ENGLISH], word_offsets)
    assert "|".join(spelled(kind, groups)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_those_of_the_original_text(files, kind: str) -> None:
    """Token by token as the definition has it; NFKC makes ½ three characters and ﬁ two, BERT's cleaning drops some."""
    (encoded,) = Encoder(files[kind], np.dtype("<u2"), {WORD_STARTS: word_offsets}).encode([ENGLISH])
    plain = Tokenizer.from_file(files[kind]).encode(ENGLISH, add_special_tokens=False)
    expected = {0}
    for offset in word_offsets(ENGLISH).tolist():
        first = next(token for token, (_, end) in enumerate(plain.offsets) if offset < end)
        begins_word = plain.offsets[first][0] == offset and first > 0
        expected.add(first - 1 if begins_word and plain.tokens[first - 1] in ("Ġ", "▁") else first)
    assert np.flatnonzero(encoded.starts[WORD_STARTS]).tolist() == sorted(expected)
    assert len(expected) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_start_at_the_right_tokens(files, kind: str) -> None:
    texts = ["Kalo mi. Mi lo!  Mi\nmi ka.\nKa (ti). Ba", "mi lo. Ka"]
    grouped = encoded_words(files[kind], texts, sentence_starts, SENTENCE_STARTS)
    found = [[" ".join(words.split()) for words in spelled(kind, groups)] for groups in grouped]
    expected = [["Kalo mi.", "Mi lo!", "Mi mi ka.", "Ka (ti).", "Ba"], ["mi lo.", "Ka"]]
    if kind == "wordpiece":  # has neither blanks nor capitals
        expected = [[sentence.lower().replace(" ", "") for sentence in sentences] for sentences in expected]
    assert found == expected


def test_of_the_tokens_of_one_character_the_first_starts_the_word(files) -> None:
    file = files["bytelevel-bpe"]
    (groups,) = encoded_words(file, ["漢字 漢mi"], lambda text: np.array([0, 1, 3, 4]))
    assert [len(group) for group in groups] == [3, 3, 4, 1]
    assert spelled("bytelevel-bpe", groups) == ["漢", "字", "漢", "mi"]


@pytest.mark.parametrize(("kind", "blank"), [("bytelevel-bpe", "Ġ"), ("unigram", "▁")])
def test_a_blank_of_its_own_goes_with_the_word_after_it(files, kind: str, blank: str) -> None:
    for starts in ([0, 3], [0, 2, 3]):  # with the blank as a word of its own, too, as jieba has it
        (groups,) = encoded_words(files[kind], ["mi 漢 lo"], lambda text, own=tuple(starts): np.array([*own, 5]))
        assert [group[0] for group in groups][1] == blank
        assert spelled(kind, groups)[0] == "mi" and len(groups) == 3 and len(groups[1]) > 1
    # Not across texts: each starts with its own first token.
    grouped = encoded_words(files[kind], ["mi ", "漢"], lambda text: np.array([0]))
    assert [len(groups) for groups in grouped] == [1, 1]


def test_the_maltese_letter_is_no_blank(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "Ġ": 1, "##o": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (groups,) = encoded_words(str(tmp_path / "tokenizer.json"), ["Ġo Ġo"], lambda _: np.array([0, 1, 3, 4]))
    assert groups == [["Ġ"], ["##o"], ["Ġ"], ["##o"]]


def test_a_start_at_a_dropped_character_passes_to_the_next_token(files) -> None:
    text = "mi\u200blo ka\u0301 \u200bneru"
    (groups,) = encoded_words(files["wordpiece"], [text], lambda _: np.array([0, 2, 6, 9]))
    assert "|".join(spelled("wordpiece", groups)) == "mi|lo|ka|neru"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_own_words(files, kind: str) -> None:
    text = "Kalo mi, neru\nlo don't"
    (groups,) = encoded_words(files[kind], [text], None)
    expected = {
        "bytelevel-bpe": ["Kalo", "mi", ",", "neru", "", "lo", "don", "'t"],
        "wordpiece": ["kalo", "mi", ",", "neru", "lo", "don", "'", "t"],
        "unigram": ["Kalo", "mi,", "neru", "lo", "don't"],
        "character": [character.strip() for character in text],
    }
    assert spelled(kind, groups) == expected[kind]


def test_added_tokens_are_words(tmp_path: Path, files) -> None:
    tokenizer = Tokenizer.from_file(files["wordpiece"])
    tokenizer.add_tokens(["immunoglobulin"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (groups,) = encoded_words(str(tmp_path / "tokenizer.json"), ["mi immunoglobulin lo"], None)
    assert groups == [["mi"], ["immunoglobulin"], ["lo"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segmenter", [None, word_offsets], ids=["tokenizer", "function"])
def test_a_long_text_has_the_same_starts_in_pieces(files, monkeypatch, kind: str, segmenter) -> None:
    """The pieces are cut at blanks, so that the ids are the same: then so are the starts."""
    texts = [" ".join(f"Kalo mi, neru; {number} lo! Ünsaké orus…" for number in range(count)) for count in (90, 0, 3)]
    segmenters = {WORD_STARTS: segmenter, SENTENCE_STARTS: sentence_starts}
    encoder = Encoder(files[kind], np.dtype("<u2"), segmenters)
    whole = encoder.encode(texts)
    assert whole[0].starts[SENTENCE_STARTS].sum() == 180
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 100)
    assert len(list(split_text(texts[0], 100))) > 30
    for one, other in zip(whole, encoder.encode(texts), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.starts.keys() == other.starts.keys()
        assert all(one.starts[mark].tolist() == other.starts[mark].tolist() for mark in one.starts)


def test_a_cut_within_a_word_starts_none(files, chinese_file, monkeypatch) -> None:
    encoder = Encoder(files["bytelevel-bpe"], np.dtype("<u2"), {WORD_STARTS: None})
    chinese = Encoder(chinese_file, np.dtype("<u2"), {WORD_STARTS: None})
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 100)
    (unbroken,), (characters,) = encoder.encode(["kalo" * 200 + "..."]), chinese.encode(["今天" * 200])
    assert np.flatnonzero(unbroken.starts[WORD_STARTS])[0] == 0
    assert unbroken.starts[WORD_STARTS].sum() == 2  # the letters and the stops
    assert len(characters.ids) == 400 and characters.starts[WORD_STARTS].all()


def test_starts_do_not_depend_on_the_post_processor(tmp_path: Path, files) -> None:
    """It is no part of a tokenizer's identity, and RoBERTa's cuts the blanks off the offsets."""
    tokenizer = Tokenizer.from_file(files["bytelevel-bpe"])
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "mi 漢  lo\n ka"

    def blanks_are_words(text: str) -> np.ndarray:
        return np.array([place for place, character in enumerate(text) if character == " "], np.int64)

    plain, roberta = (
        encoded_words(file, [text], blanks_are_words)
        for file in (files["bytelevel-bpe"], str(tmp_path / "tokenizer.json"))
    )
    assert plain == roberta


def test_chinese_words_of_jieba_over_wordpiece(chinese_file) -> None:
    texts = [CHINESE[0], "Hello 世界，2016年。"]
    grouped = encoded_words(chinese_file, texts, StartSettings("jieba").segmenters()[WORD_STARTS])
    found = ["|".join(spelled("wordpiece", groups)) for groups in grouped]
    assert found[0] == "我|来到|北京|清华大学|。|今天天气|很|好|，|我们|去|公园|看花|。"
    assert found[1].startswith("hello|") and found[1].endswith("|，|2016|年|。")


def test_ids_are_the_same_with_and_without_starts(files) -> None:
    for file in files.values():
        both = {WORD_STARTS: word_offsets, SENTENCE_STARTS: sentence_starts}
        marked, plain = Encoder(file, np.dtype("<u2"), both), Encoder(file, np.dtype("<u2"))
        for one, other in zip(marked.encode([ENGLISH, "", "mi"]), plain.encode([ENGLISH, "", "mi"]), strict=True):
            assert one.ids.tolist() == other.ids.tolist() and one.ids.dtype == other.ids.dtype == "<u2"
            assert other.starts == {}
