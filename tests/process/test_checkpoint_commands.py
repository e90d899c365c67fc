"""`maskwright checkpoint list` and `verify`, as a user runs them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from launcher.command import console_of_results
from tests.commands import assert_one_card, maskwright
from tests.damage import DAMAGES
from tests.unit.checkpoint.checkpoint_folders import write_checkpoint
from tools.checkpoints import list_run, verify_run
from trainer.checkpoint.find import locate, locate_best
from trainer.checkpoint.manifest import step_folder
from trainer.errors import DamagedError, UserError

FILES = ("weights.pt", "sub/config.json", "manifest.json")


def listed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    list_run(str(run_dir), True, console_of_results(True))
    return json.loads(capsys.readouterr().out)


def test_list_shows_what_can_be_resumed_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints/step-00000002/weights.pt").write_bytes(b"short")
    (tmp_path / "checkpoints/step-00000003/manifest.json").unlink()
    newest, damaged, oldest = listed(tmp_path, capsys)
    assert (newest["step"], newest["valid"], newest["state"]) == (3, False, "manifest.json: missing")
    assert newest["tokens"] is newest["saved_at"] is newest["bytes"] is newest["world_size"] is None
    assert damaged["state"] == "weights.pt: 5 bytes instead of 20" and not damaged["valid"]
    expected = {"name": "step-00000001", "step": 1, "tokens": 256, "saved_at": 1.5, "bytes": 45, "state": "valid"}
    expected |= {"world_size": 2, "stage": 1, "precision": "bf16", "valid": True}
    assert {name: oldest[name] for name in expected} == expected
    result = maskwright("checkpoint", "list", tmp_path)
    assert result.returncode == 0, result.stderr
    head, third, second, first, note = result.stdout.splitlines()
    assert head.split() == ["checkpoint", "step", "tokens", "saved", "ranks", "stage", "precision", "size", "state"]
    saved = datetime.fromtimestamp(1.5).strftime("%Y-%m-%d %H:%M").split()
    assert first.split() == ["step-00000001", "1", "256", *saved, "2", "1", "bf16", "45", "B", "valid"]
    assert "weights.pt: 5 bytes instead of 20" in second and "manifest.json: missing" in third
    assert "checkpoint verify" in note


def test_list_names_the_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        write_checkpoint(tmp_path, step, best_step=best, best_loss=2.5)
    assert [row["best"] for row in listed(tmp_path, capsys)] == [False, True, False]
    lines = maskwright("checkpoint", "list", tmp_path).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["valid", "best", "valid"]


@pytest.mark.parametrize(
    ("best", "step", "words"),
    [
        (None, 4, "no evaluation is recorded in its checkpoints"),
        (0, 4, "is that of step 0: training has made the model no better"),
        (2, 2, "is a checkpoint, and --best asks for that of a run's best evaluation"),
        (3, 4, "is that of step 3, which has no checkpoint any more"),
    ],
)
def test_a_best_checkpoint_that_is_not_there_is_a_card(best: int | None, step: int, words: str, tmp_path: Path) -> None:
    for number in (2, 4):
        write_checkpoint(tmp_path, number, best_step=min(best, number) if best is not None else None, best_loss=1.0)
    source = tmp_path if step == 4 else step_folder(tmp_path / "checkpoints", step)
    with pytest.raises(UserError) as caught:
        locate_best(source)
    assert words in caught.value.problem and caught.value.remedy.endswith(".")
    assert ("step-00000002" in caught.value.remedy) == (best == 3), "the best up to then is still there"


def test_a_damaged_best_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    for number in (2, 4):
        folder = write_checkpoint(tmp_path, number, best_step=number, best_loss=1.0)
    DAMAGES["truncated"](folder / "weights.pt")
    write_checkpoint(tmp_path, 6, best_step=4, best_loss=1.0)
    assert locate(tmp_path)[0].name == "step-00000006"
    with pytest.raises(DamagedError, match=r"Checkpoint step-00000004: weights\.pt"):
        locate_best(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_named_and_an_older_checkpoint_is_taken(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    DAMAGES[damage](new / name)
    with pytest.raises(DamagedError, match=f"1 of 2 checkpoints damaged. step-00000002: {name}: "):
        verify_run(str(tmp_path), False, console_of_results(False))
    shown = capsys.readouterr().out
    assert f"step-00000002: {name}: " in shown and "step-00000001: whole" in shown
    verify_run(str(old), True, console_of_results(True))
    assert json.loads(capsys.readouterr().out) == {"step-00000001": []}
    assert locate(tmp_path)[0] == old
    assert f"CHECKPOINT DAMAGED, an older one is tried: step-00000002: {name}: " in caplog.text
    DAMAGES[damage](old / name)
    with pytest.raises(DamagedError, match=f"None of the 2 .* step-00000002: {name}: .* step-00000001: {name}: "):
        locate(tmp_path)


def test_verify_ends_with_3_and_a_card_that_names_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    result = maskwright("checkpoint", "verify", tmp_path)
    assert (result.returncode, result.stdout) == (0, "step-00000005: whole\n")
    DAMAGES["flipped"](folder / "weights.pt")
    result = maskwright("checkpoint", "verify", tmp_path, "--json")
    assert_one_card(result, 3, "step-00000005: weights.pt: content differs from its checksum", str(tmp_path))
    assert json.loads(result.stdout) == {"step-00000005": ["weights.pt: content differs from its checksum"]}


def test_a_run_without_checkpoints_is_a_mistake(tmp_path: Path) -> None:
    for command in (list_run, verify_run):
        with pytest.raises(UserError, match="No checkpoints in"):
            command(str(tmp_path), False, console_of_results(False))


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells leave it alone in --resume=~/run, and so do scripts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_checkpoint(tmp_path / "run", 1)
    assert locate("~/run")[0] == folder
    assert locate("~/run/checkpoints/step-00000001")[0] == folder
    verify_run("~/run", False, console_of_results(False))
    assert "step-00000001: whole" in capsys.readouterr().out
