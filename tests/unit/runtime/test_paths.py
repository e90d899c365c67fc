"""Paths that users give: each that cannot be meant is refused, with the key or option that gave it."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.runtime.paths import is_local, new_folder, real_path, user_path

CODE = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", "is empty"),
        ("a\nb", "one line"),
        ("a\x1b[2Jb", "one line"),
        ("a\0b", "one line"),
        ("a\u2028b", "one line"),
        ("~nobody-is-called-so/x", "No home folder is known for '~nobody-is-called-so'"),
        ("x" * 256, "too long"),
        ("missing/" + "é" * 128, "too long"),
        ("x/" * 2000, "too long"),
    ],
)
def test_a_path_that_nobody_means_is_refused(given: str, problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        user_path(given, "run.dir")
    assert caught.value.where == f"run.dir={given}"
    assert caught.value.remedy
    with pytest.raises(UserError, match=problem):
        is_local(given)


def test_a_home_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    with pytest.raises(UserError, match="No home folder is known for '~'"):
        user_path("~/data", "--output")


def test_paths_that_are_meant_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    for given in (".", "a b", "a/../b", "ä/ö", "a%j", "a'b", "a#b", "\u200d"):
        assert user_path(given) == Path(given)


def test_links_that_go_round_in_a_circle_are_refused(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "inside"):
        with pytest.raises(UserError, match="round in a circle") as caught:
            user_path(path, "--resume")
        assert caught.value.where == f"--resume {path}"
    assert real_path(tmp_path / "a").parent == real_path(tmp_path)


def test_a_folder_to_be_made_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for given, problem in {
        ".": "in use",
        "..": "in use",
        "/": "in use",
        str(tmp_path): "in use",
        "file": "exists already: a file",
        "file/x": "Cannot create",
        "full": "not empty",
        "link": "symbolic link",
        "dangling": "symbolic link",
        "/proc/x": "Cannot write",
        "/proc/x/y": "Cannot create",
        "n" * 200: "too long",
    }.items():
        with pytest.raises(UserError, match=problem) as caught:
            new_folder(given)
        assert caught.value.where == f"--output {given}"
    assert new_folder("empty") == Path("empty")
    assert new_folder("a/b") == Path("a/b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "dangling", "empty", "file", "full", "link"]


def test_paths_of_users_are_expanded_in_one_place():
    """`expanduser` fails on an unknown user, and `resolve` of Python 3.11 on links that go round in a circle."""
    here = (CODE / "trainer" / "runtime" / "paths.py", CODE / "launcher" / "__main__.py")  # the latter: its own
    for folder in ("launcher", "trainer", "tools"):
        for path in (CODE / folder).rglob("*.py"):
            if path not in here:
                calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
                names = {function.attr for function in calls if isinstance(function, ast.Attribute)}
                assert not names & {"expanduser", "resolve"}, f"{path}: use trainer.runtime.paths"
