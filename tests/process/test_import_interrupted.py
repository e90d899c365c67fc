"""Imports that are killed, refused or find a full disk: nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import write_text
from tests.gate import record_gate
from tests.preparing import Importer, folder_hashes, read_token_documents
from tests.token_files import write_datatrove, write_megatron
from tests.waiting import TIMEOUT_S, wait_for
from trainer.data.manifest import IMPORT_WORK_FOLDER, MANIFEST, read_data_manifest
from trainer.errors import UserError

BEGIN, END = 0, 2


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_import_continues_and_gives_the_same_bytes(
    killed: int, tmp_path: Path, tokenizer: Path, documents: list[list[int]], run_import: Importer, monkeypatch
) -> None:
    linked = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    write_datatrove(tmp_path / "b.ds", [[*one, END] for one in documents])
    many = write_megatron(tmp_path / "b", [[[BEGIN, *one, END]] for one in documents * 40])
    output = tmp_path / "killed"
    code = textwrap.dedent(f"""
        import tools.import_tokens.convert as convert
        from tools.import_tokens import import_tokens
        convert.SHARD_TOKENS = 5000
        import_tokens([{str(linked)!r}, {str(many)!r}], {str(tokenizer)!r}, {str(output)!r})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **record_gate(tmp_path, 3)},
    )
    wait_for(lambda: len(list((output / IMPORT_WORK_FOLDER).glob("shard-*.json"))) >= 3, "three shards")
    process.send_signal(killed)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert killed != signal.SIGINT or "run the same command again" in printed
    with pytest.raises(UserError, match="not a prepared data set"):
        read_data_manifest(output)

    done = {path.stem for path in (output / IMPORT_WORK_FOLDER).glob("shard-*.json")}
    times = {name: (output / f"{name}.doc").stat().st_mtime_ns for name in done}
    monkeypatch.setattr("tools.import_tokens.convert.SHARD_TOKENS", 5000)
    run_import([linked, many], output)
    run_import([linked, many], tmp_path / "clean")
    assert folder_hashes(output) == folder_hashes(tmp_path / "clean")
    assert 3 <= len(done) < len(read_data_manifest(output).shards)
    assert times == {name: (output / f"{name}.doc").stat().st_mtime_ns for name in done}
    assert (output / "shard-00000.tok").samefile(tmp_path / "a.bin")


def test_an_unfinished_import_never_lets_a_later_one_write_into_the_users_file(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, run_prepare
) -> None:
    """A link left by an import that failed is replaced, not opened for writing."""
    good = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    bad = write_megatron(tmp_path / "b", [[[5, 6, 60_000]]])
    content = (tmp_path / "a.bin").read_bytes()
    with pytest.raises(UserError, match="holds id 60,000"):
        run_import([good, bad], tmp_path / "data")
    assert (tmp_path / "data" / "shard-00000.tok").samefile(tmp_path / "a.bin")
    record = tmp_path / "data" / IMPORT_WORK_FOLDER / "shard-00000.json"
    record.unlink()  # as if killed between the link and its record
    with pytest.raises(UserError, match="holds id 60,000"):
        run_import([good, bad], tmp_path / "data")
    run_import(write_megatron(tmp_path / "c", [[documents[5]]]), tmp_path / "data", link=False)
    assert read_token_documents(tmp_path / "data") == [documents[5]]
    assert (tmp_path / "a.bin").read_bytes() == content

    with pytest.raises(UserError, match="holds id 60,000"):
        run_import([good, bad], tmp_path / "again")
    text = write_text(tmp_path / "text.txt", documents=9, seed=2)
    with pytest.raises(UserError, match="already holds other files"):
        run_prepare([text], tmp_path / "again")
    assert (tmp_path / "a.bin").read_bytes() == content


def test_an_unfinished_import_of_other_or_changed_files_is_not_mixed_in(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    for number in range(3):
        write_megatron(tmp_path / f"a{number}", [[ids] for ids in documents])
    bad = write_megatron(tmp_path / "b", [[[5, 6, 60_000]]])
    with pytest.raises(UserError, match="holds id 60,000"):
        run_import([tmp_path / "a0", tmp_path / "a1", tmp_path / "a2", bad], tmp_path / "data")
    longest_first = sorted(documents, key=len, reverse=True)
    write_megatron(tmp_path / "a0", [[ids] for ids in longest_first])  # of the same size
    os.utime(tmp_path / "a0.bin", (time.time() + 10, time.time() + 10))
    run_import([tmp_path / "a0", tmp_path / "a1"], tmp_path / "data")
    assert read_token_documents(tmp_path / "data") == longest_first + documents
    run_import([tmp_path / "a0", tmp_path / "a1"], tmp_path / "clean")
    with pytest.raises(UserError, match="holds id 60,000"):
        run_import([tmp_path / "a0", bad], tmp_path / "split", validation_fraction=0.3)
    run_import([tmp_path / "a0", tmp_path / "a1"], tmp_path / "split")
    assert folder_hashes(tmp_path / "split") == folder_hashes(tmp_path / "clean")
    assert sorted(path.name for path in (tmp_path / "split").iterdir() if path.is_dir()) == ["tokenizer"]
    assert folder_hashes(tmp_path / "data") == folder_hashes(tmp_path / "clean")


def test_a_finished_import_is_kept_and_never_overwritten(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, run_prepare
) -> None:
    source = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    assert not run_import(source, tmp_path / "data").already_imported
    before = folder_hashes(tmp_path / "data")
    assert run_import(source, tmp_path / "data").already_imported
    for options, problem in [
        ({"validation_fraction": 0.5}, "validation_fraction 0.0, not 0.5"),
        ({"special_inside": "skip"}, "special_inside 'refuse', not 'skip'"),
        ({"strip": ["Ċ"]}, "strip"),
    ]:
        with pytest.raises(UserError, match=problem):
            run_import(source, tmp_path / "data", **options)
    text = write_text(tmp_path / "text.txt", documents=9, seed=2)
    with pytest.raises(UserError, match="already holds a data set"):
        run_prepare([text], tmp_path / "data")
    os.utime(tmp_path / "a.bin", (time.time() + 10, time.time() + 10))
    with pytest.raises(UserError, match="have changed since"):
        run_import(source, tmp_path / "data")
    assert folder_hashes(tmp_path / "data") == before
    assert (tmp_path / "data" / MANIFEST).is_file()


def test_an_output_that_is_in_use_or_holds_something_is_refused(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    source = write_megatron(tmp_path / "a", [[one] for one in documents])
    with pytest.raises(UserError, match=r"already holds other files: a\.bin, a\.idx"):
        run_import(source, tmp_path)
    with pytest.raises(UserError, match=r"Cannot create the output folder: (Not a directory|File exists)"):
        run_import(source, tmp_path / "a.bin" / "data")
    with pytest.raises(UserError, match=r"Cannot create the output folder: (Not a directory|File exists)"):
        run_import(source, tmp_path / "a.bin")
    (tmp_path / "data" / IMPORT_WORK_FOLDER).mkdir(parents=True)
    hold = """if True:
        import fcntl, sys
        with open(sys.argv[1], "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            print(flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", hold, str(tmp_path / "data" / IMPORT_WORK_FOLDER / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()  # it has the lock
        with pytest.raises(UserError, match="Another import is writing"):
            run_import(source, tmp_path / "data")
        other.stdin.close()


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]], run_import: Importer
) -> None:
    """A file larger than 40 kB cannot be written, as on a disk that is nearly full."""
    write_megatron(tmp_path / "a", [[one] for one in documents])
    large = write_megatron(tmp_path / "b", [[one] for one in documents * 40])
    code = textwrap.dedent(f"""
        import errno, os, resource, signal
        from tools.import_tokens import import_tokens
        from trainer.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            import_tokens([{str(tmp_path / "a")!r}, {str(large)!r}], {str(tokenizer)!r}, {str(tmp_path / "data")!r})
        except UserError as error:
            print(error)
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Cannot write: File too large." in result.stdout, result.stdout + result.stderr
    assert not (tmp_path / "data" / MANIFEST).exists()
    run_import([tmp_path / "a", large], tmp_path / "data")
    assert read_token_documents(tmp_path / "data") == documents * 41
