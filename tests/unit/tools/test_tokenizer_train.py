"""`tokenizer train` reads what `prepare` reads, is bounded in time, ends at once on Ctrl-C and writes whole or not."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.preparing import quiet_console
from tools.prepare.inputs import find_inputs
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import plan_units
from tools.prepare.progress import ReadProgress
from tools.tokenizer import _wrap, save_tokenizer, train_tokenizer
from tools.training_text import LONGEST_WORD, ReadOptions, TrainingText
from trainer.errors import UserError

ROOT = Path(__file__).parents[3]


def train(
    source: Path, output: Path, kind: str = "bytelevel-bpe", size: int = 300, cased: bool = False, **options
) -> str:
    """Train, and return what was said; the options are of `ReadOptions`."""
    said = io.StringIO()
    train_tokenizer(
        [str(source)],
        output,
        kind,
        size,
        Console(file=said, width=200, markup=False),
        cased=cased,
        reading=ReadOptions(**options),
    )
    return said.getvalue()


def tokens_of(folder: Path, text: str) -> list[str]:
    return AutoTokenizer.from_pretrained(folder).tokenize(text)


def test_columns_delimiters_and_bad_documents_are_read_as_prepare_reads_them(tmp_path: Path) -> None:
    rows = [json.dumps({"doc": {"content": "kalo mineru kalo"}})] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"doc": 3}', "no json"]))
    options = {"field": "doc.content", "on_bad_document": "skip"}
    said = train(tmp_path / "rows.jsonl", tmp_path / "a", **options)
    assert "kalo" in tokens_of(tmp_path / "a", "kalo")
    assert "Left out: 1 broken JSON, 1 " in said

    (tmp_path / "rows.csv").write_text("name;text\n" + "x;orusti\n" * 30)
    train(tmp_path / "rows.csv", tmp_path / "b", delimiter=";")
    assert tokens_of(tmp_path / "b", "orusti") == ["orusti"]

    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("silva silva\nsilva silva\n" * 20)
    (tmp_path / "mixed" / "a.jsonl").write_text('{"text": "other"}\n')
    train(tmp_path / "mixed", tmp_path / "c", format="text", documents="line")
    assert "silva" in tokens_of(tmp_path / "c", "silva")


@pytest.mark.parametrize(
    ("options", "problem", "where"),
    [
        ({}, "No field 'text'", "--field text"),
        ({"field": "content", "format": "parket"}, "Unknown format 'parket'", "--format parket"),
        ({"documents": "paragraph"}, "cannot be 'paragraph'", "--documents paragraph"),
        ({"on_bad_document": "skipp"}, "Did you mean 'skip'", "--on-bad-document skipp"),
        ({"cased": True}, "always cased", "--cased"),
        ({"size": 10**30}, "at most 4,194,304 tokens, got 1000", "--vocab-size 1000000000000000000000000000000"),
        ({"size": 2**40}, "at most 4,194,304", "--vocab-size 1099511627776"),
        ({"size": -1}, "at least 261", "--vocab-size -1"),
    ],
)
def test_messages_name_options_of_this_command(options: dict, problem: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "kalo"}\n')
    with pytest.raises(UserError, match=problem) as refused:
        train(tmp_path / "rows.jsonl", tmp_path / "t", **options)
    assert where in refused.value.where
    assert not (tmp_path / "t").exists()


def test_a_cased_wordpiece_keeps_capitals_and_accents(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Über Kalo mi\n\n" * 40)
    train(tmp_path / "t.txt", tmp_path / "cased", "wordpiece", 60, cased=True)
    train(tmp_path / "t.txt", tmp_path / "uncased", "wordpiece", 60)
    assert tokens_of(tmp_path / "cased", "Über Kalo") == ["Über", "Kalo"]
    assert tokens_of(tmp_path / "uncased", "Über Kalo") == ["uber", "kalo"]


@pytest.mark.parametrize("kind", ["bytelevel-bpe", "wordpiece", "unigram"])
def test_a_word_without_end_is_cut_and_that_is_said(kind: str, tmp_path: Path) -> None:
    """As a whole it takes the trainer of byte-level BPE minutes: the square of its length."""
    letters = "".join(random.Random(1).choices("ACGT", k=20_000 if kind == "unigram" else 150_000))
    (tmp_path / "dna.txt").write_text(f"kalo mi\n{letters}\n{' ' * 3 * LONGEST_WORD}mi\n")
    said = train(tmp_path / "dna.txt", tmp_path / "t", kind, 500)
    assert f"words of more than {LONGEST_WORD:,} characters were cut" in said
    assert len(AutoTokenizer.from_pretrained(tmp_path / "t")) > 100


def test_cutting_loses_nothing(tmp_path: Path) -> None:
    texts = [
        "x" * (3 * LONGEST_WORD + 7),
        "a " * 5000,
        "",
        f"a{' ' * 2 * LONGEST_WORD}{'漢' * 2 * LONGEST_WORD}. b",
        "z",
    ]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    found = find_inputs([str(tmp_path / "t.txt")])
    reading = TextSettings("text", "file", "text", str(tmp_path))
    with ReadProgress(quiet_console(), "Reading", 1) as progress:
        text = TrainingText([piece for unit in plan_units(found, "file") for piece in unit.pieces], reading, progress)
        parts = list(text.texts())
    assert "".join(parts) == "\n".join(texts).rstrip("\n")
    assert max(len(word) for part in parts for word in part.split()) == LONGEST_WORD
    assert text.cut_words == 3


def test_of_two_that_write_one_folder_the_second_says_so_and_mixes_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("kalo mi\n\n" * 30)
    train(tmp_path / "t.txt", tmp_path / "t")
    before = (tmp_path / "t" / "tokenizer.json").read_bytes()
    other = AutoTokenizer.from_pretrained(tmp_path / "t").backend_tokenizer
    with pytest.raises(UserError, match="Another process has written to") as refused:
        save_tokenizer(_wrap(other, "bytelevel-bpe"), tmp_path / "t")
    assert "--output" in refused.value.where
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "t.txt"]


def test_ctrl_c_ends_native_code_at_once() -> None:
    """Hashing for hours stands for a trainer in Rust: it releases the interpreter, and sees no signal."""
    code = (
        "import hashlib, sys\n"
        "from tools.interruptible import run_interruptibly\n"
        "try:\n"
        "    run_interruptibly(lambda cancel: hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1),\n"
        "                      lambda: print('working', flush=True))\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130  # the work itself would take half an hour
