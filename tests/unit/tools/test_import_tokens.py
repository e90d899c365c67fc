"""Imported tokens become the shards that `prepare` would have written; the user's files stay as they are."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.commands import assert_one_card, maskwright
from tests.conftest import write_text
from tests.unit.tools.conftest import folder_hashes, quiet_console, read_token_documents
from tests.unit.tools.token_files import write_dataset, write_datatrove, write_megatron
from tools.import_tokens import ImportSummary, import_tokens
from tools.import_tokens.output import WORK_FOLDER
from tools.inspect import show, verify
from trainer.data.shards import MANIFEST, read_manifest
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE, UserError

BEGIN, PAD, END = 0, 1, 2
Importer = Callable[..., ImportSummary]


@pytest.fixture
def run_import(tokenizer: Path) -> Importer:
    def run(inputs: Path | list[Path], output: Path, **options) -> ImportSummary:
        paths = inputs if isinstance(inputs, list) else [inputs]
        options = {"console": quiet_console(), **options}
        return import_tokens([str(path) for path in paths], str(tokenizer), str(output), **options)

    return run


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> list[list[int]]:
    """The contents of 60 documents of text."""
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=60, seed=5)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return [loaded(text, add_special_tokens=False).input_ids for text in path.read_text().strip().split("\n\n")]


@pytest.fixture
def prepared(tmp_path: Path, run_prepare) -> Path:
    """The same documents, prepared from their text."""
    path = write_text(tmp_path / "text.txt", documents=60, seed=5)
    run_prepare([path], tmp_path / "prepared")
    return tmp_path / "prepared"


def in_halves(ids: list[int]) -> list[list[int]]:
    return [[BEGIN, *ids[:3], END], [BEGIN, *ids[3:], END]]


WAYS: dict[str, Callable[[Path, list[list[int]]], Path]] = {
    "megatron with eod": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids]),
    "megatron without eod": lambda path, ids: write_megatron(path, [[one] for one in ids]),
    "megatron of 4 bytes": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids], "<i4"),
    "megatron of 8 bytes": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids], "<i8"),
    "megatron of a Hugging Face tokenizer": lambda path, ids: write_megatron(
        path, [[[BEGIN, *one, END, END]] for one in ids]
    ),
    "megatron with sentences": lambda path, ids: write_megatron(path, [in_halves(one) for one in ids]),
    "megatron with empty documents": lambda path, ids: write_megatron(
        path, [[], [[END]], *([[*one, END]] for one in ids), [[]]]
    ),
    "datatrove with eos": lambda path, ids: write_datatrove(path.with_suffix(".ds"), [[*one, END] for one in ids]),
    "datatrove without eos": lambda path, ids: write_datatrove(path.with_suffix(".ds"), ids),
    "datatrove of 4 bytes": lambda path, ids: write_datatrove(
        path.with_suffix(".ds"), [[BEGIN, *one, END] for one in ids], token_size=4
    ),
    "datatrove without metadata": lambda path, ids: write_datatrove(
        path.with_suffix(".ds"), [[*one, END] for one in ids], token_size=4, tokenizer_name=None
    ),
    "datasets": lambda path, ids: write_dataset(path, [[BEGIN, *one, END] for one in ids]),
    "datasets with padding": lambda path, ids: write_dataset(
        path, [[], *([BEGIN, *one, END, PAD, PAD] for one in ids)], shards=3
    ),
}
LINKED = ("megatron with eod", "datatrove with eos")


@pytest.mark.parametrize("way", WAYS)
def test_an_import_gives_the_bytes_that_prepare_gives(
    way: str, tmp_path: Path, documents: list[list[int]], prepared: Path, run_import: Importer, capsys
) -> None:
    source = WAYS[way](tmp_path / "tokens", documents)
    before = folder_hashes(tmp_path)
    summary = run_import(source, tmp_path / "data")

    for suffix in ("tok", "doc", "sum"):
        name = f"shard-00000.{suffix}"
        assert (tmp_path / "data" / name).read_bytes() == (prepared / name).read_bytes()
    reference, manifest = read_manifest(prepared), read_manifest(tmp_path / "data")
    assert manifest.fingerprint == reference.fingerprint
    for name in ("dtype", "tokenizer_sha256", "vocabulary_size", "separator_id", "tokens", "documents", "shards"):
        assert getattr(manifest, name) == getattr(reference, name)
    longest = "longest_document_tokens"
    assert manifest.statistics[longest] == reference.statistics[longest]
    assert manifest.statistics["empty_documents_in_input"] == {
        "megatron with empty documents": 3,
        "datasets with padding": 1,
    }.get(way, 0)
    assert str(tmp_path) not in manifest.to_json()
    assert summary.documents == 60
    assert summary.linked == (1 if way in LINKED else 0)
    verify(tmp_path / "data", console=quiet_console())
    show(tmp_path / "data")
    assert "60, " in capsys.readouterr().out
    assert not (tmp_path / "data" / WORK_FOLDER).exists()
    assert {name: digest for name, digest in folder_hashes(tmp_path).items() if name in before} == before


def test_a_file_that_is_a_shard_already_is_not_copied(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    write_megatron(tmp_path / "b", [[one] for one in documents])
    run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "linked")
    run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "copied", link=False)

    token_file = tmp_path / "linked" / "shard-00000.tok"
    assert token_file.samefile(tmp_path / "a.bin") and not token_file.is_symlink()
    assert not (tmp_path / "copied" / "shard-00000.tok").samefile(tmp_path / "a.bin")
    assert folder_hashes(tmp_path / "linked") == folder_hashes(tmp_path / "copied")
    assert not (tmp_path / "linked" / "shard-00001.tok").samefile(tmp_path / "b.bin")
    with pytest.raises(UserError, match=r"'b' cannot be linked: its document 0 .* is not a content and one separator"):
        run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "all", link=True)
    assert run_import(tmp_path / "a.idx", tmp_path / "all", link=True).linked == 1
    with pytest.raises(UserError, match="cannot be linked"):
        run_import(tmp_path / "a.idx", tmp_path / "split", link=True, validation_fraction=0.1)


def test_where_hard_links_are_refused_it_copies_or_on_request_links_symbolically(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    written = io.StringIO()
    assert run_import(source, tmp_path / "copied", console=Console(file=written)).linked == 0
    assert "the file system of the output cannot link to it" in written.getvalue()
    assert run_import(source, tmp_path / "linked", link=True).linked == 1
    assert (tmp_path / "linked" / "shard-00000.tok").readlink() == tmp_path / "a.bin"
    verify(tmp_path / "linked", console=quiet_console())
    assert read_token_documents(tmp_path / "linked") == read_token_documents(tmp_path / "copied") == documents


def test_large_vocabularies_take_the_four_bytes_of_int32_as_they_are(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    backend = Tokenizer(models.WordLevel({**words, **{f"w{n}": n for n in range(5, 70_000)}}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    fast.save_pretrained(str(tmp_path / "tokenizer"))
    contents = [[69_999, 3, 5], [65_536]]  # with an unknown token, which is content
    write_megatron(tmp_path / "a", [[[*one, END]] for one in contents], "<i4")
    write_megatron(tmp_path / "b", [[[*one, END]] for one in contents], "<i8")
    summary = import_tokens(
        [str(tmp_path / "*.idx")], str(tmp_path / "tokenizer"), str(tmp_path / "data"), console=quiet_console()
    )
    assert read_manifest(tmp_path / "data").dtype == "<u4"
    assert read_token_documents(tmp_path / "data") == contents * 2
    assert summary.linked == 1
    assert (tmp_path / "data" / "shard-00000.tok").samefile(tmp_path / "a.bin")


def test_a_folder_a_glob_and_prefixes_find_the_same_files_in_order(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_megatron(tmp_path / "in" / "a", [[one] for one in documents[:20]])
    write_megatron(tmp_path / "in" / "deep" / "b", [[one] for one in documents[20:]])
    (tmp_path / "in" / "readme.txt").write_text("about")
    for number, given in enumerate(
        [
            [tmp_path / "in"],
            [tmp_path / "in" / "**" / "*"],
            [tmp_path / "in" / "deep" / "b.bin", tmp_path / "in" / "a", tmp_path / "in" / "deep" / "b.idx"],
        ]
    ):
        run_import(given, tmp_path / str(number))
        assert read_token_documents(tmp_path / str(number)) == documents
    (source,) = read_manifest(tmp_path / "0").sources
    assert source["name"] == "in" and source["files"] == 2


def test_the_validation_split_is_chosen_by_the_ids(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    write_megatron(tmp_path / "a", [[[*one, END]] for one in [*documents, *documents[:30]]])
    write_datatrove(tmp_path / "b.ds", [[BEGIN, *one, END] for one in reversed(documents)], token_size=4)
    run_import(tmp_path / "a", tmp_path / "from-a", validation_fraction=0.3)
    run_import(tmp_path / "b.ds", tmp_path / "from-b", validation_fraction=0.3)
    sides = {
        (run, split): {tuple(ids) for ids in read_token_documents(tmp_path / run / split)}
        for run in ("from-a", "from-b")
        for split in ("train", "validation")
    }
    assert sides["from-a", "train"] == sides["from-b", "train"]
    assert sides["from-a", "validation"] == sides["from-b", "validation"]
    assert not sides["from-a", "train"] & sides["from-a", "validation"]
    assert 8 <= len(sides["from-a", "validation"]) <= 30
    assert read_manifest(tmp_path / "from-a" / "train").documents > len(sides["from-a", "train"])
    verify(tmp_path / "from-a", console=quiet_console())
    with pytest.raises(UserError, match="Of 60 documents none falls into the validation split"):
        run_import(tmp_path / "b.ds", tmp_path / "none", validation_fraction=1e-9)


def test_documents_with_a_special_token_inside_can_be_left_out(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    bad = [*documents[3][:5], END, *documents[3][5:], END]
    source = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents[:3]] + [[bad], [[*documents[4], END]]])
    with pytest.raises(
        UserError, match=r"Document 3 of 'a' \(counted from 0\) holds the special token '</s>' \(id 2\)"
    ):
        run_import(source, tmp_path / "data")
    summary = run_import(source, tmp_path / "data", special_inside="skip")
    assert read_token_documents(tmp_path / "data") == [*documents[:3], documents[4]]
    assert summary.counts.skipped == 1 and summary.linked == 0
    assert read_manifest(tmp_path / "data").statistics["skipped_documents_in_input"] == 1


def test_a_token_that_ends_every_document_is_named_and_stripped_on_request(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, tokenizer: Path
) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    newline = loaded.get_vocab()["Ċ"]
    contents = [one[:number] for one in documents for number in (5, 9, 13)]
    source = write_datatrove(tmp_path / "a.ds", [[newline, *one, newline, END] for one in contents])
    written = io.StringIO()
    run_import(source, tmp_path / "kept", console=Console(file=written, width=400))
    assert f"Every document begins with 'Ċ' (id {newline})" in written.getvalue()
    assert f"Every document ends with 'Ċ' (id {newline})" in written.getvalue()
    assert read_token_documents(tmp_path / "kept")[0] == [newline, *contents[0], newline]
    written = io.StringIO()
    run_import(source, tmp_path / "stripped", strip=["Ċ"], console=Console(file=written, width=400))
    assert read_token_documents(tmp_path / "stripped") == contents
    assert f"{2 * len(contents)} Ċ" in written.getvalue() and "Every document ends" not in written.getvalue()


def test_what_looks_wrong_is_said(tmp_path: Path, run_import: Importer, documents: list[list[int]]) -> None:
    stream = [token for one in documents for token in one]
    blocks = [stream[start : start + 16] for start in range(0, 120 * 16, 16)]
    written = io.StringIO()
    run_import(write_dataset(tmp_path / "a", blocks), tmp_path / "data", console=Console(file=written, width=400))
    assert "120 of 120 documents have 16 tokens, and none more: they look like blocks" in written.getvalue()
    assert "The first document begins: " in written.getvalue()
    halves = [*([*one, END] for one in documents), documents[0]]
    written = io.StringIO()
    write_datatrove(tmp_path / "b.ds", halves)
    (tmp_path / "b.ds.loss").write_bytes(b"\1")
    run_import(tmp_path / "b.ds", tmp_path / "cut", console=Console(file=written, width=400))
    for words in ("1 of 61 documents end with no special token", "its .loss mask is left out", "tokenized with 'gpt2'"):
        assert words in written.getvalue()
    written = io.StringIO()
    write_megatron(tmp_path / "c", [in_halves(one) for one in documents])
    run_import(tmp_path / "c", tmp_path / "joined", console=Console(file=written, width=400))
    assert "Joined the sequences of 60 documents" in written.getvalue()


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_import_continues_and_gives_the_same_bytes(
    killed: int, tmp_path: Path, tokenizer: Path, documents: list[list[int]], run_import: Importer, monkeypatch
) -> None:
    linked = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    write_datatrove(tmp_path / "b.ds", [[*one, END] for one in documents])
    many = write_megatron(tmp_path / "b", [[[BEGIN, *one, END]] for one in documents * 40])
    output = tmp_path / "killed"
    code = textwrap.dedent(f"""
        import time
        import tools.import_tokens.convert as convert
        from tools.import_tokens import import_tokens
        convert.SHARD_TOKENS = 5000
        write = convert.write_shard
        convert.write_shard = lambda *arguments: (write(*arguments), time.sleep(0.05))[0]
        import_tokens([{str(linked)!r}, {str(many)!r}], {str(tokenizer)!r}, {str(output)!r})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while len(list((output / WORK_FOLDER).glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(killed)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert killed != signal.SIGINT or "run the same command again" in printed
    with pytest.raises(UserError, match="not a prepared data set"):
        read_manifest(output)

    done = {path.stem for path in (output / WORK_FOLDER).glob("shard-*.json")}
    times = {name: (output / f"{name}.doc").stat().st_mtime_ns for name in done}
    monkeypatch.setattr("tools.import_tokens.convert.SHARD_TOKENS", 5000)
    run_import([linked, many], output)
    run_import([linked, many], tmp_path / "clean")
    assert folder_hashes(output) == folder_hashes(tmp_path / "clean")
    assert 3 <= len(done) < len(read_manifest(output).shards)
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
    (tmp_path / "data" / WORK_FOLDER / "shard-00000.json").unlink()  # as if killed between the link and its record
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
    (tmp_path / "data" / WORK_FOLDER).mkdir(parents=True)
    with open(tmp_path / "data" / WORK_FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another import is writing"):
            run_import(source, tmp_path / "data")


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


def test_the_command_imports_several_files_and_ends_with_the_right_code(
    tmp_path: Path, documents: list[list[int]], tokenizer: Path
) -> None:
    first = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents[:30]])
    second = write_megatron(tmp_path / "b", [[one] for one in documents[30:]])
    given = ("data", "import", "--input", first, second, "--tokenizer", tokenizer)
    result = maskwright(*given, "--output", tmp_path / "data", "--from", "megatron", "--strip", "Ċ")
    assert result.returncode == EXIT_FINISHED, result.stderr
    assert "60 documents" in result.stderr and "2 shard(s), 1 of them linked" in result.stderr
    assert read_token_documents(tmp_path / "data") == documents
    refused = maskwright(*given, "--output", tmp_path / "all", "--link")
    assert_one_card(refused, EXIT_USER_MISTAKE, "'b' cannot be linked: its document 0", "Leave --link out")
    os.truncate(tmp_path / "b.bin", 100)
    words = ("Cannot import 'b.bin': it has 100 bytes", str(tmp_path / "b.bin"), "Copy the token file and its index")
    assert_one_card(maskwright(*given, "--output", tmp_path / "cut"), EXIT_DAMAGED, *words)
