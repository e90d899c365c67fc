"""YAML and JSON of users: whatever cannot be read, or is more than a person writes, is one card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.runtime.user_files import parse_json, parse_yaml, read_json, read_yaml, to_yaml


def _bomb(base: str, form: str) -> str:
    """Nine lines that stand for 10^8 values: each names the line before ten times."""
    levels = [f"b{n}: &a{n} {form % ', '.join([f'*a{n - 1}'] * 10)}" for n in range(1, 9)]
    return "\n".join([f"b0: &a0 {base}", *levels])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0x_", "too many digits|tag"),
        ("!!float abc", "tag"),
        ("!!int ''", "tag"),
        ("!!bool maybe", "tag"),
        ("!!map 3", "tag"),
        ("!!seq 3", "expected a sequence"),
        ("7" * 5000, "too many digits"),
        ("0x" + "f" * 5000, "too many digits"),
        ("[" * 3000, "too deeply"),
        ("[" * 100 + "]" * 100, "too deeply"),
        ("a: &a [*a]", "refers to what it stands in"),
        ("a: &a {b: *a}", "refers to what it stands in"),
        (_bomb("[1, 1]", "[%s]"), "more than 200,000 values"),
        (_bomb("{x: 1, y: 2}", "{<<: [%s]}"), "more than 200,000 values"),
        ("a: 1\nb: 2\na: 3", r"'a' appears twice \(line 3"),
        ("a: 1\n--- \nb: 2", "single document"),
        ("!!binary aGk=", "tag"),
        ("!!timestamp 2024-02-03", "tag"),
        ("!!set {a, b}", "tag"),
        ("!!python/name:os.system x", "tag"),
        ("!mine x", "tag"),
        ("? [1]\n: 2", "unhashable"),
        ("<<: 1", "merging"),
        ("*nowhere", "undefined alias"),
        ("a: [", "line 1"),
        ("a\0b", "unacceptable character"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_card(text: str, problem: str):
    started = time.process_time()
    with pytest.raises(UserError, match=problem) as caught:
        parse_yaml(text, "my.yaml", "Correct it.")
    assert time.process_time() - started < 5
    assert (caught.value.where, caught.value.remedy) == ("my.yaml", "Correct it.")
    assert len(caught.value.problem) < 600
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-02-03", "2024-02-03"),
        ("2024-02-30", "2024-02-30"),
        ("24:00:00", "24:00:00"),
        ("1:30.5", "1:30.5"),
        ("=", "="),
        ("6e-4", 6e-4),
        ("1.5e3", 1500.0),
        ("1_000", 1000),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}]),
        ("", None),
    ],
)
def test_yaml_is_read_as_it_is_meant(text: str, value: Any):
    assert parse_yaml(text, "", "") == value


@pytest.mark.parametrize(
    "value",
    [
        "6e-4",
        "1e5",
        "24:00:00",
        "2024-02-03",
        "on",
        "7",
        "",
        "=",
        "<<",
        "~",
        ".inf",
        "a\nb",
        "\x1b",
        6e-4,
        10**30,
        None,
    ],
)
def test_what_is_written_is_read_as_the_same(value: Any):
    assert parse_yaml(to_yaml({"key": value}), "", "") == {"key": value}


def test_many_keys_take_no_quadratic_time():
    lines = "\n".join(f"key{n}: 1" for n in range(20_000))
    started = time.process_time()
    assert len(parse_yaml(lines, "", "")) == 20_000
    assert time.process_time() - started < 15


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[" * 100_000, "too deeply"), ("[" * 100 + "]" * 100, "too deeply"), ("9" * 5000, "digits"), ("{}{}", "Extra")],
)
def test_json_that_cannot_be_read_is_one_card(text: str, problem: str):
    with pytest.raises(UserError, match=problem):
        parse_json(text, "my.json", "Correct it.")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for read in (read_yaml, read_json):
        with pytest.raises(UserError, match="No such file") as caught:
            read(tmp_path / "missing")
        assert caught.value.where == str(tmp_path / "missing")
        with pytest.raises(UserError, match="Is a directory"):
            read(tmp_path)
        (tmp_path / "latin1").write_bytes(b"a: \xe9")
        with pytest.raises(UserError, match="not UTF-8") as caught:
            read(tmp_path / "latin1", "--site", "Write it anew.")
        assert (caught.value.where, caught.value.remedy) == ("--site", "Write it anew.")
        with open(tmp_path / "huge", "wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(UserError, match="more than"):
            read(tmp_path / "huge")
    (tmp_path / "bom").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "bom") == read_yaml(tmp_path / "bom") == {"a": 1}
