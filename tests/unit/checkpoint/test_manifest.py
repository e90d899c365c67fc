"""What counts as a checkpoint, in which order they are looked at, and what a resume refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.command import console_of_results
from tools.checkpoints import verify_run
from trainer.checkpoint.find import candidates, locate
from trainer.checkpoint.manifest import (
    CheckpointManifest,
    Records,
    find_faults,
    read_manifest,
    step_folder,
    write_manifest,
)
from trainer.checkpoint.resume import check_resumable, set_aside
from trainer.errors import DamagedError, UserError
from trainer.files import file_hash
from trainer.state import TrainState

DATA_ORDER: dict[str, Any] = {
    "version": 1,
    "payload": 30,
    "chunk_blocks": 4,
    "window_chunks": 4,
    "seq_len": 32,
    "spans": [[0, 64, [64]]],
    "sources": [{"name": "wiki", "blocks": 100, "fingerprint": "abc", "quarantine": []}],
}
RECORDS = Records(
    layout={"world_size": 2, "stage": 1, "precision": "bf16"},
    identity={"tokenizer": "def", "seed": 0, "objective": {"mask_ratio": 0.15}},
    data_order=DATA_ORDER,
    model={"class": "RobertaForMaskedLM"},
)


def write_checkpoint(run_dir: Path, step: int) -> Path:
    folder = step_folder(run_dir / "checkpoints", step)
    (folder / "sub").mkdir(parents=True)
    files = {}
    for name in ("weights.pt", "sub/config.json"):
        (folder / name).write_bytes(f"{name} of step {step}".encode())
        files[name] = ((folder / name).stat().st_size, file_hash(folder / name))
    state = TrainState(step=step, samples=8 * step, tokens=256 * step).to_dict()
    manifest = CheckpointManifest(**vars(RECORDS), state=state, files=files, versions={"torch": "2"}, saved_at=1.5)
    write_manifest(folder, manifest)
    return folder


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7)
    manifest = read_manifest(folder)
    assert folder.name == "step-00000007"
    assert (manifest.step, manifest.state["samples"], manifest.saved_at) == (7, 56, 1.5)
    assert (manifest.layout, manifest.identity, manifest.model) == (RECORDS.layout, RECORDS.identity, RECORDS.model)
    assert manifest.bytes == sum((folder / name).stat().st_size for name in manifest.files)
    assert find_faults(folder, manifest) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: "",
        lambda raw: "[]",
        lambda raw: json.dumps({**raw, "version": 99}),
        lambda raw: json.dumps({**raw, "format": "another"}),
        lambda raw: json.dumps({**raw, "surprise": 1}),
        lambda raw: json.dumps({name: value for name, value in raw.items() if name != "files"}),
        lambda raw: json.dumps({**raw, "state": {"step": 1, "epoch": 2}}),
        lambda raw: json.dumps(raw)[:-20],
    ],
)
def test_a_manifest_that_cannot_be_read_is_damage(change: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / "manifest.json").write_text(change(json.loads((folder / "manifest.json").read_text())))
    with pytest.raises(DamagedError, match="step-00000001 has a manifest that cannot be read"):
        read_manifest(folder)
    (candidate,) = candidates(tmp_path)
    assert candidate.manifest is None and "cannot be read" in candidate.fault


def test_each_fault_of_a_file_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    manifest = read_manifest(folder)
    whole = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(whole[:-3])
    (folder / "sub" / "config.json").unlink()
    faults = [f"weights.pt: {len(whole) - 3} bytes instead of {len(whole)}", "sub/config.json: missing"]
    assert find_faults(folder, manifest) == faults
    assert find_faults(folder, manifest, ["sub/config.json"]) == faults[1:], "a rank checks its share alone"
    (folder / "weights.pt").write_bytes(whole[:-1] + b"!")
    assert find_faults(folder, manifest, ["weights.pt"]) == ["weights.pt: content differs from its checksum"]


def test_candidates_come_newest_first_by_number_and_nothing_else_counts(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-00000200").mkdir()
    (folder / "step-00000300").write_text("a file")
    (folder / "step-5").mkdir()
    (folder / "latest").write_text("step-00000009")
    step_folder(folder, 123_456_789).mkdir()  # a ninth digit, and no manifest
    assert [(found.step, found.manifest is not None) for found in candidates(tmp_path)] == [
        (123_456_789, False),
        (100, True),
        (20, True),
        (9, True),
    ]
    assert candidates(tmp_path / "nosuch") == []


def test_a_run_means_its_newest_whole_checkpoint_and_a_folder_means_itself(tmp_path: Path) -> None:
    old, new = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert locate(tmp_path)[0] == new
    assert locate(old)[1].step == 1
    (new / "weights.pt").unlink()
    assert locate(tmp_path)[0] == old
    with pytest.raises(DamagedError, match=r"weights\.pt: missing"):
        locate(new)
    with pytest.raises(UserError) as caught:
        locate(tmp_path / "checkpoints" / "step-00000003")
    assert caught.value.remedy == "There are: step-00000001, step-00000002."
    (old / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="None of the 2 checkpoints is whole"):
        locate(tmp_path)


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


def test_a_resume_of_something_else_is_refused_with_each_difference(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    manifest = read_manifest(folder)
    check_resumable(folder, manifest, RECORDS, DATA_ORDER)
    other = replace(RECORDS, identity={**RECORDS.identity, "seed": 1, "tokenizer": "xyz"})
    with pytest.raises(UserError, match="seed was 0, now 1; tokenizer was def, now xyz"):
        check_resumable(folder, manifest, other, DATA_ORDER)
    with pytest.raises(UserError, match="the order's payload was 30, now 31"):
        check_resumable(folder, manifest, RECORDS, {**DATA_ORDER, "payload": 31})
    other = replace(RECORDS, layout={**RECORDS.layout, "world_size": 4})
    with pytest.raises(UserError, match="another layout: world_size was 2, now 4"):
        check_resumable(folder, manifest, other, DATA_ORDER)
    other = replace(RECORDS, model={"class": "renamed"})  # a description, not an identity
    check_resumable(folder, manifest, other, DATA_ORDER)


def test_changed_data_are_explained_shard_by_shard_from_the_run_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    source = DATA_ORDER["sources"][0]
    with_shards = {**source, "shards": [["shard-0", "a", "b"], ["shard-1", "c", "d"]]}
    (tmp_path / "data_order.json").write_text(json.dumps({**DATA_ORDER, "sources": [with_shards]}))
    changed = {**source, "fingerprint": "xyz", "shards": [["shard-0", "a", "b"], ["shard-1", "c", "e"]]}
    with pytest.raises(UserError, match=r"source 'wiki' is another \(changed: shard-1\)"):
        check_resumable(folder, read_manifest(folder), RECORDS, {**DATA_ORDER, "sources": [changed]})
    (tmp_path / "data_order.json").write_text("{")
    with pytest.raises(UserError, match=r"source 'wiki' is another \(its content differs\)"):
        check_resumable(folder, read_manifest(folder), RECORDS, {**DATA_ORDER, "sources": [changed]})


def test_an_earlier_run_is_set_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        write_checkpoint(tmp_path, number)
        (tmp_path / "metrics.jsonl").write_text(f"run {number}")
        (tmp_path / "logs").mkdir(exist_ok=True)
        assert set_aside(tmp_path) == tmp_path / f"previous-{number}"
    for number in (1, 2):
        kept = tmp_path / f"previous-{number}"
        assert (kept / "metrics.jsonl").read_text() == f"run {number}"
        assert read_manifest(step_folder(kept / "checkpoints", number)).step == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "previous-1", "previous-2"]
