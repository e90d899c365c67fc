"""No side file of a run folder stops anything, whatever is in it; no file of the user's is replaced."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.ranks import tiny_config
from tools.status import look_at, status_lines
from trainer.checkpoint.manifest import DATA_ORDER
from trainer.checkpoint.run_folder import check_replaceable
from trainer.config.file import dump_config
from trainer.config.run_names import RUN_NAMES, check_named_files
from trainer.errors import UserError
from trainer.liveness.heartbeat import heartbeat_path, read_heartbeat
from trainer.model import attention_backend
from trainer.runtime import run_lock
from trainer.runtime.files import give_usual_mode
from trainer.runtime.side_files import replace_side_file
from trainer.runtime.tuning_cache import recall, remember
from trainer.sizing import micro_batch as micro_size
from trainer.tracking.jsonl import JsonlWriter, read_last, read_metrics
from trainer.tracking.starts import STARTS, read_start_records, record_start
from trainer.tracking.status import STATUS, Status

ODD = [b"", b"\0" * 40, b"\xff\xfe", b"3", b"null", b"{}", b'"x"', b"[]", b"[3]", b'{"a":', b"[" * 100_000, b"9" * 5000]
ODD_VALUES = ["x", None, {}, [1], True, -1, 1e300, float("nan"), float("inf"), 10**30]


@pytest.mark.parametrize("content", ODD)
def test_any_content_counts_as_none(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = json.dumps({"step": 3, "train/loss": 1.5}).encode()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(line + b"\n" + content + b"\n" + line + b"\n")
    assert [found["step"] for found in read_metrics(metrics)] == [3, 3]
    assert not content or f"{metrics}: line 2" in caplog.text
    assert (read_last(metrics, "train/loss") or {})["train/loss"] == 1.5
    JsonlWriter(metrics, 5).close()
    for name in (STARTS, STATUS, "lock.json", "records.json"):
        (tmp_path / name).write_bytes(content)
    heartbeat_path(tmp_path, 0).parent.mkdir()
    heartbeat_path(tmp_path, 0).write_bytes(content)
    assert read_start_records(tmp_path) == []
    assert record_start(tmp_path, 3, 1, None).startswith("start 1")
    assert read_heartbeat(tmp_path, 0) is None
    assert run_lock._read(tmp_path / "lock.json") is None
    remember(tmp_path / "records.json", {"a": 1})
    assert recall(tmp_path / "records.json")[-1] == {"a": 1}
    assert status_lines(look_at(str(tmp_path)))


@pytest.mark.parametrize("value", ODD_VALUES)
def test_values_of_another_type_count_as_none(value: object, tmp_path: Path) -> None:
    for name in asdict(Status()):
        (tmp_path / STATUS).write_text(json.dumps({**asdict(Status()), name: value}))
        assert status_lines(look_at(str(tmp_path)))
    (tmp_path / STATUS).unlink()
    for name in ("step", "samples", "tokens", "time", "train/loss", "throughput/tokens_per_second"):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0, name: value}))
        assert status_lines(look_at(str(tmp_path)))


def test_a_folder_in_the_place_of_a_file_is_moved_beside_it(tmp_path: Path) -> None:
    (tmp_path / STARTS / "mine").mkdir(parents=True)
    record_start(tmp_path, 0, 1, None)
    assert len(read_start_records(tmp_path)) == 1
    assert (tmp_path / f"{STARTS}.folder-1" / "mine").is_dir()
    replace_side_file(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_names_of_the_run_are_all_known() -> None:
    written = {DATA_ORDER, STARTS, STATUS, run_lock.GUARD, run_lock.RECORD, micro_size.RECORD, attention_backend.RECORD}
    assert written <= set(RUN_NAMES)


@pytest.mark.parametrize("key", ["deepspeed", "tokenizer", "data"])
def test_what_a_config_reads_may_not_lie_where_the_run_writes(key: str, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "deepspeed.json").write_text("{}")
    place = {"deepspeed": "deepspeed.json"}.get(key, "checkpoints")
    named = str(tmp_path / place)
    sections = {"deepspeed": named, "tokenizer": {"tokenizer": named}, "data": {"train": named}}
    section = {"deepspeed": "deepspeed", "tokenizer": "model", "data": "data"}[key]
    config = tiny_config(workspace, tmp_path, **{section: sections[key]})
    with pytest.raises(UserError, match="lies where the run writes its own"):
        check_named_files(config, tmp_path)
    check_named_files(tiny_config(workspace, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "examples.jsonl"])
def test_lines_of_the_users_are_never_replaced_and_those_of_a_run_are(name: str, tmp_path: Path) -> None:
    path, step = tmp_path / name, '{"step": 3, "loss": 1}\n'
    for content in ('{"text": "mine"}\n', "mine\n", '{"text": "a"}\n{"text": "b"}'):
        path.write_text(content)
        with pytest.raises(UserError, match="not of maskwright's making"):
            check_replaceable(tmp_path, "auto", None)
        check_replaceable(tmp_path, "never", None)  # it is moved aside
    for content in (step, "", "\0\0\0", '{"ste', "\0\0\n" + step, step + '{"step": 4, "lo'):
        path.write_text(content)
        check_replaceable(tmp_path, "auto", None)


def test_a_config_of_the_users_is_never_replaced_and_one_of_a_run_is(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# mine\nrun: {name: my}\n")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match="not of maskwright's making"):
            check_replaceable(tmp_path, resume, None)
    check_replaceable(tmp_path, "auto", tmp_path)  # a resume replaces nothing
    frozen = dump_config(tiny_config(workspace, tmp_path))
    for content in (frozen, "", "\0\0", "[" * 9):
        path.write_text(content)
        check_replaceable(tmp_path, "never", None)
    path.write_text(f"# mine\n{frozen}")
    with pytest.raises(UserError, match="not of maskwright's making"):
        check_replaceable(tmp_path, "auto", None)
    path.unlink()
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError, match=r"deepspeed\.json"):
        check_replaceable(tmp_path, "auto", None)


def test_the_mode_of_a_file_is_that_of_others(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    os.chmod(tmp_path / "b", 0o600)
    give_usual_mode(tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == stat.S_IMODE((tmp_path / "a").stat().st_mode)
