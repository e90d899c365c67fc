"""`prepare --word-starts --sentence-starts` from end to end: the marks, the manifest, reruns and other settings."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.commands import assert_one_card, maskwright
from tests.conftest import write_text
from tests.preparing import folder_hashes, quiet_console
from tests.waiting import TIMEOUT_S
from tools.inspect import verify
from tools.prepare import prepare
from tools.prepare.encode import Encoder
from tools.prepare.estimate import estimate_output
from tools.prepare.inputs import find_inputs
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import plan_units
from trainer.data.manifest import PREPARE_WORK_FOLDER, SENTENCE_STARTS, WORD_STARTS, read_data_manifest
from trainer.data.shard_checks import document_starts
from trainer.data.token_marks import read_marks
from trainer.errors import UserError

OWN = """
def words(text): return [place for place in range(len(text)) if place == 0 or text[place - 1] == "a"]
def last(text): return [len(text)]

def not_the_last(text):
    if "last" in text:
        raise ValueError("refused")
    return [0]
"""


@pytest.fixture
def own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the current folder is put there
    sys.modules.pop("own_words", None)  # of another test's folder
    (tmp_path / "own_words.py").write_text(OWN)
    write_text(tmp_path / "text.txt", documents=5, seed=1)
    return tmp_path


def document_words(folder: Path, mark: str, tokenizer: Tokenizer) -> list[list[str]]:
    """What is between two starts, for each document, without ## and blanks."""
    found = []
    for entry in read_data_manifest(folder).shards:
        tokens = np.fromfile(folder / f"{entry.name}.tok", read_data_manifest(folder).dtype)
        bits = read_marks(folder, entry, mark)
        for begin, end in itertools.pairwise(document_starts(folder, entry).astype(int).tolist()):
            places = [*(np.flatnonzero(bits[begin : end - 1]) + begin).tolist(), end - 1]
            assert places[0] == begin and not bits[end - 1]
            pieces = [
                [tokenizer.id_to_token(int(token)) for token in tokens[a:b]] for a, b in itertools.pairwise(places)
            ]
            found.append(["".join(str(piece) for piece in word).replace("##", "") for word in pieces])
    return found


def test_without_the_options_everything_is_as_it_was(tmp_path: Path) -> None:
    """Hashes and manifest as prepare wrote them before it knew of word starts."""
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<mask>", "<unk>", "<pad>", "one", "two", "."])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(str(tmp_path / "tokenizer"))
    (tmp_path / "text.txt").write_text("one two. two one.\n\none three.\n")
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "tokenizer"), str(tmp_path / "data"), console=quiet_console())

    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["shards"] == [
        {
            "name": "shard-00000",
            "tokens": 11,
            "documents": 2,
            "files": {
                "tok": [22, "e44420033172ea6aaacc8a1c701a0301"],
                "doc": [24, "383f2d6dcd9a013ffef2485c0c393cd9"],
                "sum": [8, "b2102494067f161691bd4265f83fb090"],
            },
        }
    ]
    assert manifest["settings"] == {
        "format": "text",
        "documents": "paragraph",
        "field": None,
        "validation_fraction": 0.0,
        "special_in_text": "ids",
        "inputs": "007f25258b5f41b6f3a1f6512f404f52",
    }
    counted = manifest["statistics"].pop("tokens_in_input")
    assert counted["characters"] == 28 and not counted["as_ids"] and not counted["as_text"]
    assert manifest["statistics"] == {
        "text_bytes": 27,
        "longest_document_tokens": 6,
        "empty_documents_in_input": 0,
        "refused_documents_in_input": {},
    }
    named = ["manifest.json", *(f"shard-00000.{suffix}" for suffix in ("doc", "sum", "tok"))]
    assert sorted(path.name for path in (tmp_path / "data").iterdir() if path.is_file()) == named


def test_chinese_words_whatever_the_number_of_workers(tmp_path: Path, chinese: Path, monkeypatch) -> None:
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 16384)
    hashes = []
    for workers in (1, 3):
        summary = prepare(
            [str(chinese / "texts")],
            str(chinese / "tokenizer"),
            str(tmp_path / str(workers)),
            documents="line",
            workers=workers,
            validation_fraction=0.2,
            word_starts="jieba",
            sentence_starts="rules",
            console=quiet_console(),
        )
        hashes.append(folder_hashes(tmp_path / str(workers)))
    assert hashes[0] == hashes[1]
    assert summary.splits["train"].shards > 2
    assert sum(name.endswith((".wrd", ".snt")) for name in hashes[0]) == 2 * sum(
        name.endswith(".tok") for name in hashes[0]
    )
    verify(tmp_path / "1", console=quiet_console())

    tokenizer = Tokenizer.from_file(str(chinese / "tokenizer" / "tokenizer.json"))
    train = tmp_path / "1" / "train"
    first = "我|来到|北京|清华大学|。|今天天气|很|好|，|我们|去|公园|看花|。|0|我|来到|北京|清华大学|。"
    words, sentences = (document_words(train, mark, tokenizer) for mark in (WORD_STARTS, SENTENCE_STARTS))
    assert "|".join(words[0]).startswith(first)
    assert sentences[0][:2] == ["我来到北京清华大学。", "今天天气很好，我们去公园看花。"]
    assert ["他说：“你真的吃过饭了吗？”", "大家都笑了！"] in [document[:2] for document in sentences]
    assert len(words) == summary.splits["train"].documents


def test_the_tokens_are_the_same_with_and_without(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=60, seed=1)
    run_prepare([path], tmp_path / "plain")
    run_prepare([path], tmp_path / "words", word_starts="tokenizer")
    run_prepare([path], tmp_path / "both", word_starts="tokenizer", sentence_starts="rules")

    plain, words, both = (read_data_manifest(tmp_path / name) for name in ("plain", "words", "both"))
    for other, marks in ((words, ["wrd"]), (both, ["wrd", "snt"])):
        files = dict(other.shards[0].files)
        assert list(files) == ["tok", "doc", "sum", *marks]
        assert {suffix: files[suffix] for suffix in ("tok", "doc", "sum")} == plain.shards[0].files
        assert other.fingerprint == plain.fingerprint
    assert words.settings == {**plain.settings, "word_starts": "tokenizer"}
    assert both.settings == {**words.settings, "sentence_starts": "rules 2"}
    bits = read_marks(tmp_path / "both", both.shards[0], SENTENCE_STARTS)
    assert bits.sum() == 60  # the text is in lower case: a sentence a document


def test_the_words_of_byte_level_bpe_are_those_of_the_text(tmp_path: Path, run_prepare, tokenizer: Path) -> None:
    path = write_text(tmp_path / "text.txt", documents=5, seed=1)
    run_prepare([path], tmp_path / "data", word_starts="tokenizer")
    found = document_words(tmp_path / "data", WORD_STARTS, Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
    expected = [
        [word for blank in paragraph.split(" ") for word in blank.replace(".", " .").split(" ")]
        for paragraph in path.read_text().strip().split("\n\n")
    ]
    assert [[word.lstrip("Ġ") for word in words] for words in found] == expected


def test_another_setting_is_refused(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=20, seed=1)
    run_prepare([path], tmp_path / "words", word_starts="tokenizer")
    run_prepare([path], tmp_path / "plain")
    before = folder_hashes(tmp_path)

    assert run_prepare([path], tmp_path / "words", word_starts="tokenizer").already_prepared
    for folder, options, problem in [
        ("words", {"word_starts": "jieba"}, r"word_starts 'tokenizer' instead of 'jieba \d"),
        ("words", {}, "word_starts 'tokenizer' instead of None"),
        (
            "words",
            {"word_starts": "tokenizer", "sentence_starts": "rules"},
            "sentence_starts None instead of 'rules 2'",
        ),
        ("plain", {"sentence_starts": "rules"}, "sentence_starts None instead of 'rules 2'"),
    ]:
        with pytest.raises(UserError, match=problem):
            run_prepare([path], tmp_path / folder, **options)
    assert folder_hashes(tmp_path) == before


@pytest.mark.parametrize("later", [{}, {"word_starts": "jieba"}], ids=["no marks", "other marks"])
def test_units_of_an_interrupted_run_with_other_settings_are_done_again(
    own_words: Path, run_prepare, small_units, monkeypatch, later: dict[str, str]
) -> None:
    monkeypatch.chdir(own_words)
    path, data = write_text(own_words / "text.txt", documents=90, seed=1), own_words / "data"
    path.write_text(path.read_text() + "\n\nThe last one.")
    with pytest.raises(UserError, match="raised ValueError: refused"):
        run_prepare([path], data, word_starts="tokenizer", sentence_starts="own_words:not_the_last")
    assert list(data.glob("shard-*.wrd")) and list(data.glob("shard-*.snt"))
    assert list((data / PREPARE_WORK_FOLDER).glob("unit-*.json"))
    run_prepare([path], data, **later)
    run_prepare([path], own_words / "clean", **later)

    assert folder_hashes(data) == folder_hashes(own_words / "clean")
    assert not list(data.glob("shard-*.snt"))


DOCUMENTS = (
    "\u3000\u3000One sentence. Of two\r\n  goes on, in lower case\r\n\u3000\r\nThird",
    "A document of one line.",
    "Last\r\none",
)
SENTENCES = [
    ["One sentence. Of two", "goes on, in lower case", "Third"],
    ["A document of one line."],
    ["Last", "one"],
]
"""Documents as the original BERT's, a sentence a line; and the sentences to be found in them."""


def as_text(folder: Path) -> Path:
    """With blank lines between the documents."""
    (folder / "in.txt").write_bytes("\r\n \r\n\r\n".join(DOCUMENTS).encode())
    return folder / "in.txt"


def as_rows(folder: Path) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return folder / "in.jsonl"


def as_csv(folder: Path) -> Path:
    (folder / "in.csv").write_bytes("".join(["text\r\n", *(f'"{text}"\r\n' for text in DOCUMENTS)]).encode())
    return folder / "in.csv"


@pytest.mark.parametrize("write", [as_text, as_rows, as_csv])
def test_sentences_are_lines_within_documents(write: Callable[[Path], Path], tmp_path: Path, run_prepare) -> None:
    run_prepare([write(tmp_path)], tmp_path / "data", sentence_starts="lines")
    manifest = read_data_manifest(tmp_path / "data")
    assert manifest.settings["sentence_starts"] == "lines 1"
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer" / "tokenizer.json"))
    (entry,) = manifest.shards
    tokens = np.fromfile(tmp_path / "data" / f"{entry.name}.tok", manifest.dtype).astype(int).tolist()
    bits, found = read_marks(tmp_path / "data", entry, SENTENCE_STARTS), []
    for begin, end in itertools.pairwise(document_starts(tmp_path / "data", entry).astype(int).tolist()):
        places = [*(np.flatnonzero(bits[begin : end - 1]) + begin).tolist(), end - 1]
        found.append([tokenizer.decode(tokens[a:b]).strip() for a, b in itertools.pairwise(places)])
    assert found == SENTENCES
    verify(tmp_path / "data", console=quiet_console())


def test_lines_are_the_same_sentences_however_long_the_text_and_whatever_the_workers(
    tmp_path: Path, run_prepare, small_units
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"ka lo {number}\n mi\n\n" for number in range(2000)))
    for workers in (1, 2):
        run_prepare([path], tmp_path / str(workers), sentence_starts="lines", workers=workers)
    assert folder_hashes(tmp_path / "1") == folder_hashes(tmp_path / "2")
    run_prepare([path], tmp_path / "file", sentence_starts="lines", documents="file")
    for name in ("1", "file"):
        shards = read_data_manifest(tmp_path / name).shards
        assert sum(int(read_marks(tmp_path / name, entry, SENTENCE_STARTS).sum()) for entry in shards) == 4000


def test_documents_without_tokens_start_nothing(tmp_path: Path, chinese: Path) -> None:
    """BERT's cleaning drops control characters: such a document is a separator alone."""
    (tmp_path / "text.txt").write_text("今天\n\u200b\u200b\n天气\n")
    prepare(
        [str(tmp_path / "text.txt")],
        str(chinese / "tokenizer"),
        str(tmp_path / "data"),
        documents="line",
        word_starts="tokenizer",
        sentence_starts="rules",
        console=quiet_console(),
    )
    (entry,) = read_data_manifest(tmp_path / "data").shards
    assert document_starts(tmp_path / "data", entry).tolist() == [0, 3, 4, 7]
    assert read_marks(tmp_path / "data", entry, WORD_STARTS).tolist() == [1, 1, 0, 0, 1, 1, 0]
    assert read_marks(tmp_path / "data", entry, SENTENCE_STARTS).tolist() == [1, 0, 0, 0, 1, 0, 0]
    verify(tmp_path / "data", console=quiet_console())


def test_a_users_function_comes_from_the_current_folder(own_words: Path, tokenizer: Path) -> None:
    """With -P Python itself does not look there, as for the installed command."""
    import subprocess

    arguments = ["--input", "text.txt", "--tokenizer", str(tokenizer), "--output", "data", "--workers", "2"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "prepare", *arguments, "--word-starts", "own_words:words"],
        cwd=own_words,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr
    found = document_words(own_words / "data", WORD_STARTS, Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
    assert found[0][0].endswith("a") and len(found) == 5
    assert read_data_manifest(own_words / "data").settings["word_starts"].startswith("own_words:words ")


def test_a_wrong_function_ends_with_one_card(own_words: Path, tokenizer: Path) -> None:
    arguments = ["--input", "text.txt", "--tokenizer", tokenizer, "--output", "data", "--workers", "1"]
    result = maskwright("prepare", *arguments, "--sentence-starts", "own_words:last", cwd=own_words)
    beginning = (own_words / "text.txt").read_text()[:40]
    words = (
        "own_words:last gave the offset",
        f"for the document that begins '{beginning}",
        "--sentence-starts own_words",
    )
    assert_one_card(result, 2, *words)
    result = maskwright("prepare", *arguments, "--word-starts", "jeiba", cwd=own_words)
    assert_one_card(result, 2, "Unknown --word-starts 'jeiba'. Did you mean 'jieba'?")


def test_the_estimate_counts_the_marks(tmp_path: Path, tokenizer: Path) -> None:
    found = find_inputs([str(write_text(tmp_path / "text.txt", documents=100, seed=1))])
    encoder = Encoder(str(tokenizer / "tokenizer.json"), np.dtype("<u2"))
    given = plan_units(found, "paragraph"), TextSettings("text", "paragraph", "text", ""), encoder, np.dtype("<u2")
    plain, both = estimate_output(*given), estimate_output(*given, marks=2)
    assert both.tokens == plain.tokens > 1000
    assert both.output_bytes - plain.output_bytes == pytest.approx(plain.tokens / 4)


def test_all_phrases_of_a_list_and_only_they_are_whole(tmp_path: Path, run_prepare, tokenizer: Path) -> None:
    path = write_text(tmp_path / "text.txt", documents=40, seed=1)
    words = path.read_text().replace(".", "").split()
    phrases = {" ".join(words[place : place + 2]) for place in range(0, 60, 7)}
    (tmp_path / "list.txt").write_text("\n".join(sorted(phrases)))
    run_prepare([path], tmp_path / "data", word_starts=f"phrases:{tmp_path / 'list.txt'}")
    found = document_words(tmp_path / "data", WORD_STARTS, Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
    several = {word.replace("Ġ", " ").strip() for document in found for word in document if word.strip("Ġ").count("Ġ")}
    assert several == phrases, "what is longer than a token is a phrase, and each phrase is there"
