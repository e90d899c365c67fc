"""Whose the parts in a work folder are: what joining and other jobs refuse, and what bad documents do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_text
from tests.preparing import UNIT_BYTES, folder_hashes, quiet_console, read_token_documents, records
from tools.prepare import finalize_job, open_job, prepare_job, prepare_task
from tools.prepare.encode import Encoder
from tools.prepare.share import Share
from tools.prepare.work_folder import JOB_FILE
from tools.prepare.worker import write_unit
from trainer.data.manifest import PREPARE_WORK_FOLDER
from trainer.errors import DamagedError, UserError


def test_the_joining_names_what_is_missing_and_how_to_write_it(tmp_path: Path, make_job, units) -> None:
    path = write_text(tmp_path / "text.txt", documents=900, seed=1)
    job = make_job([path], tmp_path / "data")
    with pytest.raises(UserError, match="no task has written"):
        finalize_job(job)
    assert not job.output.exists()
    prepare_task(job, 0, 3)
    prepare_task(job, 2, 3)
    missing = list(Share(1, 3).of(job.units))

    with pytest.raises(UserError) as caught:
        finalize_job(job)
    assert f"{len(missing)} of {len(job.units)} units are not written" in caught.value.problem
    assert f"unit 1 (bytes {missing[0].pieces[0].start:,} to " in caught.value.problem
    assert "with --task 1/3 in place of --finalize" in caught.value.remedy
    (job.output / "shard-00002.tok").unlink()
    with pytest.raises(UserError, match=r"unit 2 .*") as caught:
        finalize_job(job)
    assert "--task 1/3, --task 2/3" in caught.value.remedy

    assert not list(job.output.glob("**/manifest.json"))
    prepare_task(job, 1, 3)
    summary = prepare_task(job, 2, 3)
    assert summary and summary.kept_units == summary.units - 1 and summary.finished_units == summary.all_units
    finalize_job(job)
    prepare_job(make_job([path], tmp_path / "clean"))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_the_joining_refuses_foreign_parts_and_names_them(tmp_path: Path, make_job, units) -> None:
    path = write_text(tmp_path / "text.txt", documents=300, seed=1)
    job, other = make_job([path], tmp_path / "data"), make_job([path], tmp_path / "other", documents="line")
    for each in (job, other):
        prepare_task(each, 0, 1)
    (job.output / "shard-00099.tok").write_bytes(b"stray")
    (job.work_folder / "unit-00098.json").write_text("{}")
    shutil.copy(other.work_folder / "unit-00001.json", job.work_folder / "unit-00001.json")

    with pytest.raises(UserError, match="not of this job") as caught:
        finalize_job(job)
    for name in (f"{PREPARE_WORK_FOLDER}/unit-00001.json", "shard-00099.tok", f"{PREPARE_WORK_FOLDER}/unit-00098.json"):
        assert name in caught.value.problem
        (job.output / name).unlink()
    with pytest.raises(UserError, match=r"1 of \d+ units are not written"):
        finalize_job(job)
    prepare_task(job, 0, 1)
    finalize_job(job)
    prepare_job(make_job([path], tmp_path / "clean"))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_a_task_of_another_job_is_refused_with_what_differs(tmp_path: Path, tokenizer: Path, make_job, units) -> None:
    first = write_text(tmp_path / "a.txt", documents=300, seed=1)
    second = write_text(tmp_path / "b.txt", documents=300, seed=2)
    job = make_job([first, second], tmp_path / "data")
    prepare_task(job, 0, 2)
    before = folder_hashes(job.output)
    third = write_text(tmp_path / "c.txt", documents=5, seed=3)
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    raw = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(raw))
    others = [
        (make_job([first, second], job.output, documents="line"), "documents 'paragraph' instead of 'line'"),
        (make_job([first, second], job.output, validation_fraction=0.1), "validation_fraction 0.0 instead of 0.1"),
        (make_job([first, third], job.output), "other input files ('b.txt' besides, no 'c.txt')"),
        (open_job([str(first), str(second)], str(tmp_path / "tokenizer"), str(job.output)), "another tokenizer"),
    ]
    for other, difference in others:
        for act in (lambda job: prepare_task(job, 1, 2), finalize_job, prepare_job):
            with pytest.raises(UserError, match="unfinished parts of another job") as caught:
                act(other)
            assert difference in caught.value.problem
            assert str(job.work_folder / JOB_FILE) in caught.value.remedy
    size = second.stat().st_size
    second.write_text(second.read_text() + "more\n")
    with pytest.raises(UserError, match="another job") as caught:
        finalize_job(make_job([first, second], job.output))
    assert f"'b.txt' of {size:,} bytes instead of {size + 5:,}" in caught.value.problem
    assert folder_hashes(job.output) == before
    assert not (job.output / "train").exists() and not (job.output / "validation").exists()


def test_a_changed_input_goes_on_once_the_job_file_is_deleted(tmp_path: Path, make_job, units) -> None:
    """The remedy that the refusal names: one file of many was repaired."""
    good = [write_text(tmp_path / f"{number}.txt", documents=220, seed=number) for number in range(4)]
    bad = tmp_path / "0x.txt"  # beyond what is sampled before the work
    bad.write_bytes(b"\xff" * UNIT_BYTES)
    with pytest.raises(UserError, match="UTF-8"):
        prepare_task(make_job([*good, bad], tmp_path / "data"), 0, 1)
    bad.write_text("repaired\n")
    job = make_job([*good, bad], tmp_path / "data")
    with pytest.raises(UserError, match=r"other input files \('0x.txt' of"):
        prepare_task(job, 0, 1)
    (job.work_folder / JOB_FILE).unlink()
    finished = len(records(job))

    summary = prepare_task(job, 0, 1)
    finalize_job(job)

    assert summary and 0 < summary.kept_units == finished
    prepare_job(make_job([*good, bad], tmp_path / "clean"))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_bad_documents_are_counted_by_reason_when_asked(tmp_path: Path, make_job, units) -> None:
    texts = write_text(tmp_path / "source", documents=900, seed=1).read_text().strip().split("\n\n")
    rows = [json.dumps({"text": text}).encode() for text in texts]
    good = tmp_path / "good.jsonl"
    good.write_bytes(b"\n".join(rows) + b"\n")
    wrong = [b'{"text": "cut', b"[1]", b'{"body": "x"}', b'{"text": 5}', b'{"text": "caf\xe9"}', b'{"text": " "}']
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join(rows[:400] + wrong + rows[400:]) + b"\n")
    console = quiet_console()
    stopping = make_job([bad], tmp_path / "data")
    with pytest.raises(UserError, match=r"Line 40[1-6] of 'bad\.jsonl'") as caught:
        prepare_task(stopping, 0, 1)
    assert "--on-bad-document skip" in caught.value.remedy
    kept = len(records(stopping))

    skipping = make_job([bad], tmp_path / "data", on_bad_document="skip")
    summary = prepare_task(skipping, 0, 1)
    assert summary and summary.kept_units == kept > 0, "what a stopped run finished stays"
    with pytest.raises(UserError, match="Line 401"):
        prepare_task(stopping, 0, 1)
    joined = finalize_job(stopping, console)  # as the tasks were told

    refused = {"broken JSON": 2, "invalid UTF-8": 1, "missing field": 1, "not text": 1}
    assert joined.refused_documents == summary.losses.refused == refused
    assert joined.documents == 900 and joined.empty_documents == 1
    line = "Left out: 1 empty document, 5 refused (2 broken JSON, 1 invalid UTF-8, 1 missing field, 1 not text; 61 B)."
    assert line in console.file.getvalue()
    prepare_job(make_job([good], tmp_path / "good"))
    assert read_token_documents(tmp_path / "data") == read_token_documents(tmp_path / "good")
    with pytest.raises(UserError, match="bad documents, which were left out"):
        prepare_job(stopping)
    assert prepare_job(skipping).already_prepared


def test_bad_rows_of_a_table_and_bad_lines_of_a_text_can_be_skipped(tmp_path: Path, make_job) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"first", b"caf\xe9", None, b"last"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "number": [1, 2, 3, 4]}), tmp_path / "rows.parquet")
    (tmp_path / "text.txt").write_bytes(b"first\n\ncaf\xe9\n\nlast\n")
    expected = {"rows.parquet": ({"invalid UTF-8": 1}, 1), "text.txt": ({"invalid UTF-8": 1}, 0)}
    for name, (refused, empty) in expected.items():
        with pytest.raises(UserError, match="Not valid UTF-8"):
            prepare_job(make_job([tmp_path / name], tmp_path / f"{name}-stop"))
        summary = prepare_job(make_job([tmp_path / name], tmp_path / f"{name}-skip", on_bad_document="skip"))
        assert (summary.refused_documents, summary.empty_documents, summary.documents) == (refused, empty, 2)

    numbers = make_job([tmp_path / "rows.parquet"], tmp_path / "numbers", field="number", on_bad_document="skip")
    console = quiet_console()
    with pytest.raises(UserError, match=r"holds no documents\. Refused: 4 not text"):
        prepare_job(numbers, console=console)
    assert "No document of a sample can be read: 4 not text" in console.file.getvalue()


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_another_job_leaves_nothing_of_the_one_before(tmp_path: Path, make_job, units, fraction: float) -> None:
    """A plain prepare takes the place of an unfinished plain one; units that share a name are written anew."""
    first = write_text(tmp_path / "first.txt", documents=400, seed=1)
    second = write_text(tmp_path / "second.txt", documents=200, seed=2)
    raw = first.read_bytes()
    middle = len(raw) * 7 // 10  # beyond what is sampled before the work
    first.write_bytes(raw[:middle] + b"\n\n\xff\n\n" + raw[middle:])
    console = quiet_console()
    with pytest.raises(UserError, match="UTF-8"):
        prepare_job(make_job([first], tmp_path / "data", validation_fraction=0.5), workers=1)
    held_out = {path.name for path in (tmp_path / "data" / "validation").glob("shard-*")}
    prepare_job(make_job([second], tmp_path / "data", validation_fraction=fraction), console=console)

    assert f"validation_fraction 0.5 instead of {fraction}; other input files (" in console.file.getvalue()
    prepare_job(make_job([second], tmp_path / "clean", validation_fraction=fraction))
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")
    assert held_out - {path.name for path in (tmp_path / "clean" / "validation").glob("shard-*")}, "some had to go"


def test_a_record_never_vouches_for_the_shards_of_another_job(
    tmp_path: Path, make_job, units, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job is killed after the shards of a unit and before its record; then the earlier job goes on."""
    path = write_text(tmp_path / "text.txt", documents=300, seed=1)
    job, other = make_job([path], tmp_path / "data"), make_job([path], tmp_path / "data", documents="line")
    prepare_task(job, 0, 1)
    unit, work = other.units[1], other.work_settings()
    encoder = Encoder(work.tokenizer_file, other.dtype)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.prepare.worker.replace_synced", killed)
    with pytest.raises(KeyboardInterrupt):
        write_unit(unit, other.identity(unit), work, encoder, lambda *_: None)
    monkeypatch.undo()

    assert job.record(job.units[0]) and job.record(job.units[1]) is None


def test_a_damaged_job_file_is_named(tmp_path: Path, make_job, units) -> None:
    job = make_job([write_text(tmp_path / "text.txt", documents=20, seed=1)], tmp_path / "data")
    prepare_task(job, 0, 2)
    (job.work_folder / JOB_FILE).write_text("{")
    with pytest.raises(DamagedError, match="Cannot read what job this is") as caught:
        prepare_task(job, 1, 2)
    assert caught.value.where == str(job.work_folder / JOB_FILE)
