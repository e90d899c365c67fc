"""`tokenizer extend` adds the words that are torn apart most, behind all old tokens, whole in plain transformers."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tools.extend_tokenizer import extend_tokenizer
from tools.tokenizer import train_tokenizer
from tools.training_text import ReadOptions
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError

QUIET = Console(quiet=True)
NEW_WORDS = ("myocardial", "thrombosis", "angioplasty", "ventricular", "Stenosis")
CHINESE = "今天天气很好。我们去公园散步,天气真的很好。公园里有很多人在散步。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A general text, and one with words that it lacks, how often is by their place."""
    folder, generator = tmp_path_factory.mktemp("extend"), random.Random(0)
    common = ["the", "heart", "was", "seen", "after", "many", "days", "of", "rest", "patients"]
    general = [" ".join(generator.choices(common, k=12)) + "." for _ in range(400)]
    general += [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyzS", k=9)) for _ in range(60)
    ]  # each letter is known
    (folder / "general.txt").write_text("\n\n".join(general), encoding="utf-8")
    special = [word for number, word in enumerate(NEW_WORDS) for _ in range(20 - 3 * number)]
    generator.shuffle(special)
    text = [f"the {word} was seen after {generator.choice(common)} </s> of {word}, 12." for word in special]
    (folder / "special.txt").write_text("\n\n".join(text), encoding="utf-8")
    return folder


def extend(folder: Path, kind: str, output: Path, add: int, text: str = "special.txt", **options) -> tuple[Path, str]:
    """Train a tokenizer of a kind on the general text, extend it, and return that one and what was said."""
    base = folder / kind
    if not base.exists():
        train_tokenizer([str(folder / "general.txt")], base, kind, 300, QUIET)
    said = io.StringIO()
    console = Console(file=said, width=200, markup=False)
    extend_tokenizer(str(base), [str(folder / text)], output, add, console, **options)
    return base, said.getvalue()


@pytest.mark.parametrize("kind", ["bytelevel-bpe", "wordpiece", "unigram"])
def test_words_that_cost_most_are_added_whole_and_old_tokens_keep_their_ids(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    base, said = extend(folder, kind, tmp_path / "new", 4)
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path / "new")
    text = (folder / "special.txt").read_text(encoding="utf-8")
    lowered = text.lower() if kind == "wordpiece" else text
    counts = Counter(re.findall(r"[A-Za-z]+", lowered))
    costs = {word: count * (len(old.tokenize(" " + word)) - 1) for word, count in counts.items()}
    # Metaspace leaves a comma at its word: "thrombosis" and "thrombosis," are two there.
    expected = sorted(costs, key=lambda word: (-costs[word], word))[:4]
    fresh = {name: number for name, number in new.get_vocab().items() if name not in old.get_vocab()}
    added = {name.strip("Ġ▁,"): number for name, number in fresh.items()}
    if kind != "unigram":
        assert set(added) == set(expected)
    assert set(added) <= {word if kind != "wordpiece" else word.lower() for word in NEW_WORDS}
    assert sorted(fresh.values()) == list(range(read_vocabulary(old, "").size, read_vocabulary(new, "").size))
    assert all(new.get_vocab()[name] == number for name, number in old.get_vocab().items())
    for name, number in fresh.items():
        word = new.convert_tokens_to_string([name]).strip()
        before_it, *_, last = new(f"the {word}", add_special_tokens=False).input_ids
        assert (before_it, last) == (new("the", add_special_tokens=False).input_ids[0], number), word
    plain = (folder / "general.txt").read_text(encoding="utf-8")
    assert new(plain).input_ids == old(plain).input_ids, "what has none of them is cut as before"
    assert new.mask_token_id == old.mask_token_id and new("a").input_ids[0] == old("a").input_ids[0]
    before, after = (float(found) for found in re.findall(r"(\d+\.\d+) (?:tokens a word before|now)", said))
    assert after < before and "The rarest of the 4" in said


def test_what_is_printed_is_what_the_tokenizers_do(folder: Path, tmp_path: Path) -> None:
    base, said = extend(folder, "wordpiece", tmp_path / "new", 3)
    text = (folder / "special.txt").read_text(encoding="utf-8").lower()
    words = [word for word in re.findall(r"\w+", text) if word.isalpha()]  # "/" and "<" are no words, "s" of </s> is
    for name, loaded in (("before", base), ("now", tmp_path / "new")):
        tokenizer = AutoTokenizer.from_pretrained(loaded)
        mean = sum(len(tokenizer.tokenize(word)) for word in words) / len(words)
        assert f"{mean:.3f} {'tokens a word before' if name == 'before' else 'now'}" in said
    assert f"{len(words):,} words" in said


def test_chinese_words_of_a_tokenizer_of_characters_become_tokens(tmp_path: Path) -> None:
    pytest.importorskip("jieba")
    (tmp_path / "text.txt").write_text("\n\n".join([CHINESE] * 5), encoding="utf-8")
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "base", "wordpiece", 60, QUIET)
    extend_tokenizer(
        str(tmp_path / "base"), [str(tmp_path / "text.txt")], tmp_path / "new", 9, QUIET, words="jieba"
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "new")
    assert {"天气", "公园", "散步"} <= set(tokenizer.get_vocab())
    assert tokenizer.tokenize("我们去公园散步")[-2:] == ["公园", "散步"]
    assert tokenizer.decode(tokenizer("去公园", add_special_tokens=False).input_ids).replace(" ", "") == "去公园"


def test_mistakes_are_named_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    (folder / "letters.txt").write_text("1 the the the 22", encoding="utf-8")
    with pytest.raises(UserError, match="tears no word apart"):
        extend(folder, "bytelevel-bpe", tmp_path / "new", 4, "letters.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full"):
        extend(folder, "bytelevel-bpe", tmp_path / "full", 4)
    with pytest.raises(UserError, match="Unknown --word-starts"):
        extend(folder, "bytelevel-bpe", tmp_path / "new", 4, words="jeiba")
    train_tokenizer([str(folder / "general.txt")], tmp_path / "characters", "character", 100, QUIET)
    with pytest.raises(UserError, match="cannot be given whole words"):
        extend_tokenizer(str(tmp_path / "characters"), [str(folder / "special.txt")], tmp_path / "new", 4, QUIET)
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_like_another_learns_other_pieces_and_keeps_the_rest(folder: Path, tmp_path: Path) -> None:
    for kind in ("bytelevel-bpe", "wordpiece", "unigram"):
        base, _ = extend(folder, kind, tmp_path / f"{kind}-unused", 1)
        special = [str(folder / "special.txt")]
        train_tokenizer(special, tmp_path / kind, vocabulary_size=290, console=QUIET, source=str(base))
        old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path / kind)
        assert new.all_special_tokens and set(new.all_special_tokens) == set(old.all_special_tokens)
        assert new("a").input_ids[0] == new.cls_token_id and len(new) <= 290
        assert len(new.tokenize("the myocardial")) < len(old.tokenize("the myocardial")), kind


def test_more_special_tokens_stand_for_themselves(folder: Path, tmp_path: Path) -> None:
    text = [str(folder / "general.txt")]
    for kind in ("bytelevel-bpe", "wordpiece"):
        train_tokenizer(text, tmp_path / kind, kind, 290, QUIET, special_tokens=["[name]", "<turn>"])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert len(tokenizer) <= 290
        assert {"[name]", "<turn>"} <= set(tokenizer.all_special_tokens)
        assert tokenizer.tokenize("the<turn>[name]")[-2:] == ["<turn>", "[name]"]
        assert not {"[name]", "<turn>"} & {tokenizer.mask_token, tokenizer.cls_token, tokenizer.pad_token}
    for name in ("[PAD]", " ", "twice"):
        with pytest.raises(UserError, match="special token"):
            train_tokenizer(text, tmp_path / "none", "wordpiece", 290, QUIET, special_tokens=["twice", name])


@pytest.mark.parametrize("files", [1, 40])
def test_a_sample_is_from_all_over_the_input(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 2000)
    texts = [f"word{number} of paragraph {number}, and more of it." for number in range(1000)]
    (tmp_path / "texts").mkdir()
    for number in range(files):
        part = texts[number * 1000 // files : (number + 1) * 1000 // files]
        (tmp_path / "texts" / f"{number:02}.txt").write_text("\n\n".join(part), encoding="utf-8")
    size = sum(path.stat().st_size for path in (tmp_path / "texts").iterdir())
    from tools.training_text import opened_text

    def read(sample: int | None) -> list[str]:
        with opened_text([str(tmp_path / "texts")], ReadOptions(sample=sample), tmp_path / "out", QUIET) as text:
            first, second = list(text.texts()), list(text.texts())
            assert first == second, "each pass reads the same"
            return first

    assert sorted(read(None)) == sorted(texts) == sorted(read(10 * size))
    found = read(size // 5)
    assert 0.17 < sum(map(len, found)) / sum(map(len, texts)) < 0.26
    places = [texts.index(text) for text in found]
    assert all(any(low <= place < low + 100 for place in places) for low in range(0, 1000, 100))
