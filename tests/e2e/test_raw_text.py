"""Raw text in the place of data: one command from text to model, prepared once, by all ranks together."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.commands import start_maskwright
from tests.conftest import write_text
from tests.gate import record_gate
from tests.ranks import losses, metrics, tiny_config, train, write_config
from tests.waiting import TIMEOUT_S, Started, rank_processes, wait_for
from tools.prepare import prepare
from tools.validate import validate
from trainer.config import Config
from trainer.data.manifest import MANIFEST
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_USER_MISTAKE


def from_text(workspace: Path, run_dir: Path, source: Path | str, **sections: Any) -> Config:
    settings = {"validation_fraction": 0.1, **sections.pop("text", {})}
    data = {"train": str(source), "validation": str(source), "text": settings, **sections.pop("data", {})}
    defaults = {"train": {"steps": 6}, "eval": {"every_steps": 3, "samples": 16}}
    return tiny_config(workspace, run_dir, data=data, **{**defaults, **sections})


def cached(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir.parent / "text-cache").iterdir() if path.is_dir()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_text_is_the_run_on_the_prepared_data(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = from_text(workspace, tmp_path / "run", workspace / "text.txt")
    notes = validate(config, 2)
    assert "text.txt is raw text (1 file, 117.4 kB, about " in notes[0]
    assert not (tmp_path / "text-cache").exists(), "validate writes nothing"
    assert train(config, 2) == EXIT_FINISHED
    assert "text.txt (1 file, 117.4 kB) on 2 ranks into " in capfd.readouterr().out

    prepared = tiny_config(
        workspace,
        tmp_path / "other" / "run",
        data={"validation": str(workspace / "data")},
        train={"steps": 6},
        eval={"every_steps": 3, "samples": 16},
    )
    assert train(prepared, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "other" / "run")
    [folder] = cached(tmp_path / "run")
    assert files_of(folder) == files_of(workspace / "data")
    assert [line["eval/loss"] for line in metrics(tmp_path / "run") if "eval/loss" in line] == [
        line["eval/loss"] for line in metrics(tmp_path / "other" / "run") if "eval/loss" in line
    ]
    assert validate(config, 2)[0].startswith("data: 26,986 tokens"), "what has been prepared is found"


def test_the_cache_goes_by_content_tokenizer_and_settings(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write_text(texts / "a.txt", documents=200, seed=5)
    steps = {"steps": 1}
    config = from_text(workspace, tmp_path / "one", texts, train=steps)
    assert train(config) == EXIT_FINISHED
    assert "preparing" in capfd.readouterr().out
    os.utime(texts / "a.txt")
    assert train(from_text(workspace, tmp_path / "two", texts, train=steps)) == EXIT_FINISHED
    assert "preparing" not in capfd.readouterr().out, "a new time is no new content"
    assert len(cached(tmp_path / "one")) == 1
    assert train(from_text(workspace, tmp_path / "three", texts, train=steps, text={"documents": "line"})) == 0
    write_text(texts / "a.txt", documents=200, seed=6)
    assert train(from_text(workspace, tmp_path / "four", texts, train=steps)) == EXIT_FINISHED
    assert len(cached(tmp_path / "one")) == 3
    (texts / "a.txt").write_text("x" * 100)
    assert train(config, resume="auto") == EXIT_USER_MISTAKE, "a resume on other text is refused"


def launch(config: Config, folder: Path, **variables: str) -> Started:
    path = write_config(config, folder / "config.yaml")
    return start_maskwright("train", path, "--nproc-per-node", "2", **variables)


UNIT_BYTES = 1 << 16


def text_of_six_units(folder: Path) -> Path:
    """Six files that make a unit each, where units are of UNIT_BYTES."""
    folder.mkdir()
    for number in range(6):
        path = write_text(folder / f"part-{number}.txt", documents=320, seed=number)
        assert UNIT_BYTES / 2 < path.stat().st_size < UNIT_BYTES, "no two of them share one"
    return folder


def wait_for_units(run_dir: Path, count: int) -> None:
    records = "*/.prepare/unit-*.json"
    wait_for(lambda: len(list((run_dir.parent / "text-cache").glob(records))) >= count, f"{count} units")


@pytest.mark.timeout(1800)
def test_killed_and_stopped_while_preparing_it_goes_on_and_the_bytes_are_those_of_prepare(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, run_dir = text_of_six_units(tmp_path / "texts"), tmp_path / "run"
    config = from_text(workspace, run_dir, texts, train={"steps": 1})
    process = launch(config, tmp_path, **record_gate(tmp_path, 1, UNIT_BYTES))
    wait_for_units(run_dir, 1)
    os.kill(rank_processes(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 1, output
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "text-cache").glob("*/.prepare/unit-*.json")}
    assert kept

    process = launch(config, tmp_path, **record_gate(tmp_path, len(kept) + 1, UNIT_BYTES))
    wait_for_units(run_dir, len(kept) + 1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_STOPPED_AFTER_SAVING, output
    assert "stopped on SIGTERM; the same command goes on" in output
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items()), "finished units are kept"

    process = launch(config, tmp_path, **record_gate(tmp_path, 100, UNIT_BYTES))
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_FINISHED, output
    clean = tmp_path / "clean"
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", UNIT_BYTES)
    prepare([str(texts)], str(workspace / "tokenizer"), str(clean), workers=2, validation_fraction=0.1)
    [folder] = cached(run_dir)
    assert files_of(folder) == files_of(clean)


def test_what_the_model_refuses_is_said_before_its_text_is_prepared(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a large corpus that takes hours."""
    config = from_text(workspace, tmp_path / "run", workspace / "text.txt", data={"seq_len": 512})
    assert train(config, 2) == EXIT_USER_MISTAKE
    printed = capfd.readouterr().out
    assert "data.seq_len 512 needs " in printed and "preparing" not in printed
    assert not cached(tmp_path / "run")


def test_text_that_cannot_be_read_stops_all_ranks_with_its_place(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n\n\xff\xfebad\n")
    assert train(from_text(workspace, tmp_path / "run", tmp_path / "bad.txt"), 2) == EXIT_USER_MISTAKE
    printed = capfd.readouterr().out
    for rank in range(2):
        assert f"rank {rank}: Not valid UTF-8: line 3, byte 6 of 'bad.txt'" in printed


def test_the_cause_is_shown_and_not_the_end_of_the_ranks_that_it_stopped(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 is at work on a unit of its own when rank 1 fails."""
    (tmp_path / "texts").mkdir()
    paragraphs = write_text(tmp_path / "block.txt", documents=4000, seed=9).read_bytes() * 5  # a unit each
    (tmp_path / "texts" / "a.txt").write_bytes(paragraphs)
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff\n\n" + paragraphs)
    assert train(from_text(workspace, tmp_path / "run", tmp_path / "texts"), 2) == EXIT_USER_MISTAKE
    assert capfd.readouterr().out.count("Not valid UTF-8: line 1, byte 0 of 'b.txt'") == 2


def test_text_without_held_out_documents_is_no_validation_data(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = from_text(workspace, tmp_path / "run", workspace / "text.txt", text={"validation_fraction": 0.0})
    assert train(config) == EXIT_USER_MISTAKE
    assert "data.text.validation_fraction" in capfd.readouterr().out


def test_json_lines_and_a_mixture_of_text_and_data(workspace: Path, tmp_path: Path) -> None:
    lines = [{"body": f"the {word} is on the table."} for word in ("cup", "book", "lamp") for _ in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [{"path": str(workspace / "data")}, {"path": str(tmp_path / "rows.jsonl")}]
    config = from_text(
        workspace,
        tmp_path / "run",
        "unused",
        data={"train": sources, "validation": None},
        text={"field": "body", "validation_fraction": 0.0},
        eval={"every_steps": None},
    )
    assert train(config) == EXIT_FINISHED
    assert metrics(tmp_path / "run")[-1]["source/rows.jsonl/tokens"] > 0
    assert (cached(tmp_path / "run")[0] / MANIFEST).is_file()


@pytest.mark.parametrize("path", ["no-such", "empty", "unfinished"])
def test_what_is_neither_text_nor_data(
    path: str, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "tokenizer").mkdir(parents=True)
    (tmp_path / "unfinished" / "tokenizer" / "tokenizer.json").write_text("{}")
    config = from_text(workspace, tmp_path / "run", tmp_path / path)
    assert train(config) == EXIT_USER_MISTAKE
    assert "is not a prepared data set" in capfd.readouterr().out
