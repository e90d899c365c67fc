from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from tests.commands import start_maskwright
from tests.conftest import write_text
from tests.gate import record_gate
from tests.preparing import folder_hashes, quiet_console, read_token_documents
from tests.unit.tools.test_readers import write_rows, write_texts
from tests.waiting import TIMEOUT_S, is_running, wait_for
from tools.prepare import prepare
from tools.prepare.encode import Encoder, split_text
from tools.prepare.inputs import find_inputs
from tools.prepare.plan import plan_units
from tools.prepare.worker import _portable, choose_split
from trainer.data.dataset import ShardSet
from trainer.data.manifest import PREPARE_WORK_FOLDER, read_data_manifest
from trainer.errors import UserError

TEXTS = ["First document, two lines:\nhere.", "naïve café 漢字 😀", 'He said "no, 1.50".', "", "last <mask> </s> one"]


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.csv.gz", "rows.parquet", "rows.arrow", "text.txt.xz"])
def test_every_format_gives_the_same_tokens(tmp_path: Path, run_prepare, tokenizer, name) -> None:
    path = write_texts(tmp_path / name, TEXTS)

    summary = run_prepare([path], tmp_path / "data")

    plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    plain.encode_special_tokens = True
    expected = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS if text]
    assert read_token_documents(tmp_path / "data") == expected
    assert summary.documents == 4
    assert summary.empty_documents == (0 if name.startswith("text") else 1)


def test_hub_data_sets_read_through_the_same_path(tmp_path: Path, run_prepare) -> None:
    """A local data set folder stands in for a name on the hub; both open through `datasets`."""
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train-0.parquet", TEXTS[:2])
    write_rows(tmp_path / "set" / "train-1.parquet", TEXTS[2:])
    run_prepare([tmp_path / "set"], tmp_path / "hub", format="hub")
    run_prepare([tmp_path / "set"], tmp_path / "files")

    assert read_token_documents(tmp_path / "hub") == read_token_documents(tmp_path / "files")


def test_special_tokens_in_the_text_stay_text(tmp_path: Path, run_prepare, tokenizer) -> None:
    (tmp_path / "text.txt").write_text("a <mask> b </s> c <s> <pad> d")
    run_prepare([tmp_path / "text.txt"], tmp_path / "data")

    (ids,) = read_token_documents(tmp_path / "data")
    assert min(ids) > 4
    assert Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids) == "a <mask> b </s> c <s> <pad> d"


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, run_prepare, small_units) -> None:
    for number in range(3):
        write_text(tmp_path / f"{number}.txt", documents=60 * (number + 1), seed=number)
    inputs = sorted(tmp_path.glob("*.txt"))
    results = []
    for workers in (1, 2, 3):
        summary = run_prepare(inputs, tmp_path / str(workers), workers=workers, validation_fraction=0.2)
        results.append(folder_hashes(tmp_path / str(workers)))

    assert results[0] == results[1] == results[2]
    assert summary.splits["train"].shards > 3
    assert summary.documents == 60 + 120 + 180
    assert b"/" + tmp_path.name.encode() not in (tmp_path / "1" / "train" / "manifest.json").read_bytes()


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_continues_and_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Path, run_prepare, monkeypatch, killed
) -> None:
    """faults.md 20: the rerun redoes only unfinished units and its result equals an uninterrupted run's."""
    path = write_text(tmp_path / "text.txt", documents=1500, seed=5)
    output = tmp_path / "killed"
    code = textwrap.dedent(f"""
        import tools.prepare.plan
        from rich.console import Console
        from tools.prepare import prepare
        tools.prepare.plan.MINIMUM_UNIT_BYTES = 16384
        prepare([{str(path)!r}], {str(tokenizer)!r}, {str(output)!r}, workers=2, console=Console())
    """)
    environ = {**os.environ, **record_gate(tmp_path, 2)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)
    wait_for(lambda: len(list((output / PREPARE_WORK_FOLDER).glob("unit-*.json"))) >= 2, "two units")
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(killed)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert killed == signal.SIGKILL or "run the same command again" in printed
    assert len(workers) >= 3, "two, and what they are forked from"
    wait_for(lambda: not any(is_running(worker) for worker in workers), "the end of the workers")
    with pytest.raises(UserError, match="not a prepared data set"):
        read_data_manifest(output)

    done = [record.stem.replace("unit", "shard") for record in (output / PREPARE_WORK_FOLDER).glob("unit-*.json")]
    times = {name: (output / f"{name}.tok").stat().st_mtime_ns for name in done}
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 16384)
    run_prepare([path], output)
    run_prepare([path], tmp_path / "clean", workers=2)

    assert folder_hashes(output) == folder_hashes(tmp_path / "clean")
    assert 2 <= len(done) < len(read_data_manifest(output).shards)
    assert times == {name: (output / f"{name}.tok").stat().st_mtime_ns for name in done}


def test_an_interrupted_run_with_other_inputs_is_not_mixed_in(tmp_path: Path, run_prepare, small_units) -> None:
    first = write_text(tmp_path / "first.txt", documents=200, seed=1)
    second = write_text(tmp_path / "second.txt", documents=30, seed=2)
    bad = tmp_path / "third.txt"
    bad.write_bytes(b"\xff" * 10)
    with pytest.raises(UserError, match="UTF-8"):
        run_prepare([first, bad], tmp_path / "data")
    run_prepare([second], tmp_path / "data", validation_fraction=0.3)
    run_prepare([second], tmp_path / "clean", validation_fraction=0.3)

    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_a_finished_run_is_kept_and_never_overwritten(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=20, seed=1)
    first = run_prepare([path], tmp_path / "data")
    before = folder_hashes(tmp_path / "data")
    again = run_prepare([path], tmp_path / "data")

    assert again.already_prepared and not first.already_prepared
    assert again.splits == first.splits and again.empty_documents == first.empty_documents
    for options, problem in [
        ({"documents": "line"}, "documents 'paragraph' instead of 'line'"),
        ({"validation_fraction": 0.5}, "validation_fraction"),
    ]:
        with pytest.raises(UserError, match=problem):
            run_prepare([path], tmp_path / "data", **options)
    os.utime(path, (time.time() + 10, time.time() + 10))
    with pytest.raises(UserError, match="have changed since"):
        run_prepare([path], tmp_path / "data")
    assert folder_hashes(tmp_path / "data") == before


def test_an_output_with_other_files_is_refused(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=20, seed=1)
    with pytest.raises(UserError, match=r"already holds other files: text.txt"):
        run_prepare([path], tmp_path)


def test_the_validation_split_follows_the_text_alone(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=400, seed=1)
    paragraphs = path.read_text().strip().split("\n\n")
    reordered = tmp_path / "reordered.txt"
    reordered.write_text("\n\n".join([*reversed(paragraphs), *paragraphs[:50]]))
    run_prepare([path], tmp_path / "a", validation_fraction=0.1)
    run_prepare([reordered], tmp_path / "b", validation_fraction=0.1)
    sides = {
        (run, split): {tuple(ids) for ids in read_token_documents(tmp_path / run / split)}
        for run in "ab"
        for split in ("train", "validation")
    }

    assert sides["a", "train"] == sides["b", "train"]
    assert sides["a", "validation"] == sides["b", "validation"]
    assert not sides["a", "train"] & sides["a", "validation"]
    assert len(sides["a", "train"]) + len(sides["a", "validation"]) == 400
    assert 20 <= len(sides["a", "validation"]) <= 60
    assert {choose_split(str(number).encode(), 0.0) for number in range(100)} == {"train"}


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "</s>", "<mask>", "<unk>", "<pad>"])}
    words |= {f"w{number}": number for number in range(5, 70_000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    fast.save_pretrained(str(tmp_path / "tokenizer"))
    (tmp_path / "text.txt").write_text("w69999 w5\n\nw65536")
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "tokenizer"), str(tmp_path / "data"), console=quiet_console())

    assert ShardSet(tmp_path / "data").dtype == np.dtype("uint32")
    assert read_token_documents(tmp_path / "data") == [[69999, 5], [65536]]


def test_a_very_long_document_is_encoded_in_pieces(tmp_path: Path, run_prepare, monkeypatch, tokenizer) -> None:
    text = " ".join(write_text(tmp_path / "source", documents=300, seed=1).read_text().split())
    (tmp_path / "text.txt").write_text(text)
    run_prepare([tmp_path / "text.txt"], tmp_path / "whole")
    monkeypatch.setattr("tools.prepare.encode.BATCH_CHARACTERS", 5000)
    assert len(list(split_text(text, 5000))) >= 10
    (encoded,) = Encoder(str(tokenizer / "tokenizer.json"), np.dtype("<u2")).encode([text])
    assert [encoded.ids.tolist()] == read_token_documents(tmp_path / "whole")


def test_the_manifest_and_the_summary_count_alike(tmp_path: Path, run_prepare) -> None:
    path = write_text(tmp_path / "text.txt", documents=50, seed=1)
    summary = run_prepare([path], tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    documents = read_token_documents(tmp_path / "data")

    assert summary.tokens == manifest["tokens"] == sum(len(ids) + 1 for ids in documents)
    assert summary.splits["train"].longest_document_tokens == max(map(len, documents))
    assert summary.splits["train"].text_bytes == path.stat().st_size - 2 * 49 - 1
    assert manifest["sources"] == [{"name": "text.txt", "files": 1, "bytes": path.stat().st_size}]
    assert not (tmp_path / "data" / PREPARE_WORK_FOLDER).exists()


@pytest.mark.parametrize(
    ("make", "options", "problem"),
    [
        (lambda folder: folder / "txet.txt", {}, "Did you mean 'text.txt'"),
        (lambda folder: folder / "no" / "such", {}, "Its folder does not exist"),
        (lambda folder: folder / "*.csv", {}, "No file matches"),
        (lambda folder: folder / "empty", {}, "holds no input files; it holds nothing"),
        (lambda folder: folder / "odd", {}, "1 × .dat"),
        (lambda folder: folder / "odd" / "x.dat", {}, "Cannot tell the format of 'x.dat'"),
        (lambda folder: folder / "mixed", {}, "mixes formats: 1 jsonl, 1 text"),
        (lambda folder: folder / "empty.txt", {}, "The input is empty"),
        (lambda folder: folder / "blank.txt", {}, "holds no documents"),
        (lambda folder: folder / "blank.txt", {"documents": "line"}, "holds no documents. 3 were empty"),
        (lambda folder: folder / "text.txt", {"documents": "row"}, "cannot be 'row'"),
        (lambda folder: folder / "text.txt", {"format": "texts"}, "Did you mean 'text'"),
        (lambda folder: folder / "text.txt", {"validation_fraction": 1.5}, "below 1, got 1.5"),
        (lambda folder: folder / "text.txt", {"validation_fraction": 0.001}, "none falls into the validation split"),
        (lambda folder: folder / "text.txt", {"workers": 0}, "At least one worker"),
        (lambda folder: folder / "text.txt", {"format": "hub"}, "Cannot open the data set"),
    ],
)
def test_mistakes_in_the_input_are_named(tmp_path: Path, run_prepare, make, options, problem) -> None:
    for name in ("empty", "odd", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "blank.txt").write_text("\n \n\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "odd" / "x.dat").write_text("text")
    (tmp_path / "mixed" / "a.txt").write_text("text")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "text"}')

    with pytest.raises(UserError) as caught:
        run_prepare([make(tmp_path)], tmp_path / "data", **options)
    assert problem in caught.value.problem
    assert caught.value.where and caught.value.remedy


def test_one_format_can_be_picked_from_a_mixed_folder(tmp_path: Path, run_prepare) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("about")
    write_rows(tmp_path / "in" / "a.parquet", ["one", "two"])

    assert run_prepare([tmp_path / "in"], tmp_path / "data", format="parquet").documents == 2


def test_inputs_given_twice_are_read_once(tmp_path: Path, run_prepare) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "b.txt").write_text("two")

    assert run_prepare([tmp_path / "in", tmp_path / "in" / "*.txt"], tmp_path / "data").documents == 2


def test_a_mistake_found_by_a_worker_reaches_the_caller(tmp_path: Path, run_prepare, small_units) -> None:
    good = write_text(tmp_path / "a.txt", documents=100, seed=1)
    bad = tmp_path / "b.txt"
    bad.write_bytes(b"good line\n" * 500 + b"bad \xff\n" + b"good line\n" * 500 + b"x")
    write_text(tmp_path / "c.txt", documents=100, seed=1)

    with pytest.raises(UserError) as caught:
        run_prepare([good, bad, tmp_path / "c.txt"], tmp_path / "data", workers=2, documents="line")
    assert "line 501, byte 5,004 of 'b.txt'" in caught.value.problem
    assert not multiprocessing.active_children()


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, run_prepare, monkeypatch) -> None:
    path = write_text(tmp_path / "text.txt", documents=100, seed=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(UserError, match=r"only 1\.0 kB are free"):
        run_prepare([path], tmp_path / "data")


def test_the_estimate_and_the_summary_are_printed(tmp_path: Path, run_prepare) -> None:
    """users.md 16: the size is said before anything is written."""
    path = write_text(tmp_path / "text.txt", documents=2000, seed=1)
    written = io.StringIO()
    summary = run_prepare([path], tmp_path / "data", console=Console(file=written, width=120))

    lines = written.getvalue()
    expected = int(lines.split("Expect about ")[1].split(" tokens")[0].replace(",", ""))
    assert expected == pytest.approx(summary.tokens, rel=0.1)
    for word in ("documents", "tokens", "longest document", "unused tail at seq_len 512", "bytes a token", "empty"):
        assert word in lines


def test_a_killed_worker_is_reported(tmp_path: Path, tokenizer: Path) -> None:
    """Held before its record gets its name: one that had finished would not be missed."""
    path, output = write_text(tmp_path / "text.txt", documents=100, seed=1), tmp_path / "data"
    words = ("--input", path, "--tokenizer", tokenizer, "--output", output, "--workers", "1")
    process = start_maskwright("prepare", *words, **record_gate(tmp_path, 0))
    wait_for(lambda: any((output / PREPARE_WORK_FOLDER).glob("*unit-00000.json*")), "the record")
    (worker,) = psutil.Process(process.pid).children()  # forked, as all of tests is, by no server
    worker.kill()
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, printed
    assert "A worker process was killed by signal 9." in printed
    assert f"bytes 0 to {path.stat().st_size:,} of 'text.txt'" in printed.replace("\n", " ")


def test_what_a_user_can_mend_in_a_worker_is_no_traceback(tmp_path: Path, small_units) -> None:
    path = write_text(tmp_path / "text.txt", documents=100, seed=1)
    unit = plan_units(find_inputs([str(path)]), "line")[1]
    output = tmp_path / "data"
    cases = [
        (MemoryError(), "Not enough memory", unit.describe(), "fewer --workers"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full", str(output), "run the same command"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", str(output / ".shard-00001.tok.0123.tmp")),
            "has been removed",
            str(output / ".shard-00001.tok.0123.tmp"),
            "one prepare work in a folder at a time",
        ),
    ]
    for error, problem, where, remedy in cases:
        shown = pickle.loads(pickle.dumps(_portable(error, str(output / PREPARE_WORK_FOLDER), unit)))
        assert isinstance(shown, UserError)
        assert problem in shown.problem and shown.where == where and remedy in shown.remedy
    elsewhere = _portable(FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere"), str(output), unit)
    assert isinstance(elsewhere, FileNotFoundError)
