"""What counts as a checkpoint, in which order they are looked at, and what a resume refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.damage import flip
from tests.unit.checkpoint.checkpoint_folders import DATA_ORDER, RECORDS, write_checkpoint
from trainer.checkpoint import find
from trainer.checkpoint.find import candidates, locate
from trainer.checkpoint.manifest import HASH_THREADS, find_faults, read_checkpoint_manifest, share_files, step_folder
from trainer.checkpoint.resume import check_resumable, describe_layout, set_aside
from trainer.config import OptimizerConfig
from trainer.errors import DamagedError, UserError
from trainer.runtime.distributed import World


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7)
    manifest = read_checkpoint_manifest(folder)
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
        lambda raw: json.dumps({**raw, "files": {}}),
        lambda raw: json.dumps(raw)[:-20],
    ],
)
def test_a_manifest_that_cannot_be_read_is_damage(change: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["checksum"]  # as in a manifest from before there was one
    assert find_faults(folder, read_checkpoint_manifest(folder)) == []
    (folder / "manifest.json").write_text(change(raw))
    with pytest.raises(DamagedError, match=r"step-00000001: manifest\.json: cannot be read"):
        read_checkpoint_manifest(folder)
    (candidate,) = candidates(tmp_path)
    assert candidate.manifest is None and "cannot be read" in candidate.fault


def test_each_fault_of_a_file_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    manifest = read_checkpoint_manifest(folder)
    whole = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(whole[:-3])
    (folder / "sub" / "config.json").unlink()
    faults = [f"weights.pt: {len(whole) - 3} bytes instead of {len(whole)}", "sub/config.json: missing"]
    assert find_faults(folder, manifest) == faults
    assert find_faults(folder, manifest, ["sub/config.json"]) == faults[1:], "a rank checks its share alone"
    (folder / "weights.pt").write_bytes(whole[:-1] + b"!")
    assert find_faults(folder, manifest, ["weights.pt"]) == ["weights.pt: content differs from its checksum"]


def test_a_digit_that_has_flipped_in_the_manifest_is_damage(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7) / "manifest.json"
    text = path.read_text()
    assert text.count('"samples": 56') == 1
    path.write_text(text.replace('"samples": 56', '"samples": 57'))
    with pytest.raises(DamagedError, match=r"manifest\.json: cannot be read \(its content differs from its checksum\)"):
        read_checkpoint_manifest(path.parent)


@given(st.dictionaries(st.text("abc/", min_size=1), st.integers(0, 1000), min_size=1), st.integers(1, 9))
def test_shares_have_each_file_once_and_none_is_larger_than_the_mean_by_more_than_one_file(
    sizes: dict[str, int], ranks: int
) -> None:
    files = {name: (size, "") for name, size in sizes.items()}
    shares = share_files(files, ranks)
    assert len(shares) == ranks
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(loads) / ranks + max(sizes.values())


def test_one_large_file_is_a_share_and_small_ones_another() -> None:
    files = {f"small-{number}": (10, "") for number in range(9)} | {"large": (1000, "")}
    assert sorted(map(len, share_files(files, 2))) == [1, 9], "by bytes, not by count"


def test_bytes_are_counted_over_threads_and_faults_come_in_the_manifests_order(tmp_path: Path) -> None:
    names = [f"file-{number}" for number in range(3 * HASH_THREADS)]
    sizes = {name: 1000 * (number + 1) for number, name in enumerate(names)}
    folder = write_checkpoint(tmp_path, 1, {name: os.urandom(size) for name, size in sizes.items()})
    manifest = read_checkpoint_manifest(folder)
    seen: list[int] = []
    assert find_faults(folder, manifest, on_bytes=seen.append) == []
    assert seen == sorted(seen) and seen[-1] == sum(sizes.values()) == manifest.bytes
    for name in names[::3]:
        flip(folder / name)
    assert find_faults(folder, manifest) == [f"{name}: content differs from its checksum" for name in names[::3]]
    assert find_faults(folder, manifest, read=False) == [], "sizes alone"


def test_an_interrupted_check_does_not_read_to_the_end(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, {f"file-{number}": bytes(1 << 25) for number in range(6)})
    seen: list[int] = []

    def interrupt(done: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_faults(folder, read_checkpoint_manifest(folder), on_bytes=interrupt)
    assert seen[-1] < 6 << 24, "of 6 << 25 bytes"


def test_a_long_check_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_TELL_SECONDS", 0.0)
    folder = write_checkpoint(tmp_path, 3, {"weights.pt": bytes(1 << 23)})
    lines: list[str] = []
    assert find.choose_checkpoint(World(0, 1, 0, torch.device("cpu"), None), tmp_path, "auto", lines.append) == folder
    assert lines == ["checking step-00000003: 4 of 8 MiB", "checking step-00000003: 8 of 8 MiB"]


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
    with pytest.raises(
        DamagedError,
        match=r"None of the 2 checkpoints is whole\. step-00000002: weights\.pt: missing \| step-00000001: manifest",
    ):
        locate(tmp_path)


def test_a_resume_of_something_else_is_refused_with_each_difference(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    manifest = read_checkpoint_manifest(folder)
    check_resumable(folder, manifest, RECORDS, DATA_ORDER)
    other = replace(RECORDS, identity={**RECORDS.identity, "seed": 1, "tokenizer": "xyz"})
    with pytest.raises(UserError, match="seed was 0, now 1; tokenizer was def, now xyz"):
        check_resumable(folder, manifest, other, DATA_ORDER)
    with pytest.raises(UserError, match="were blocks of 32, now blocks of 24"):
        check_resumable(folder, manifest, RECORDS, {**DATA_ORDER, "seq_len": 24})
    other = replace(RECORDS, layout={**RECORDS.layout, "world_size": 4})  # it is spread anew over the ranks
    check_resumable(folder, manifest, other, DATA_ORDER)
    other = replace(RECORDS, model={"class": "renamed"})  # a description, not an identity
    check_resumable(folder, manifest, other, DATA_ORDER)


def test_a_checkpoint_that_says_no_optimizer_is_of_adamw(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    manifest = read_checkpoint_manifest(folder)
    assert "optimizer" not in manifest.identity
    for name, is_refused in (("adamw", False), ("stable_adamw", False), ("muon", True)):
        family = OptimizerConfig(name=name).family  # type: ignore[arg-type]
        current = replace(RECORDS, identity={**RECORDS.identity, "optimizer": family})
        if is_refused:
            with pytest.raises(UserError, match="optimizer was adamw or stable_adamw, now muon"):
                check_resumable(folder, manifest, current, DATA_ORDER)
        else:
            check_resumable(folder, manifest, current, DATA_ORDER)


def test_a_change_of_layout_is_described() -> None:
    layout = {"world_size": 8, "stage": 1, "precision": "bf16", "gradient_accumulation_dtype": "fp32"}
    assert describe_layout(layout, layout) == ""
    other = {"world_size": 1, "stage": 3, "precision": "fp32", "gradient_accumulation_dtype": None}
    expected = "stage 1 × 8 ranks, bf16, gradients accumulated in fp32 → stage 3 × 1 rank, fp32"
    assert describe_layout(layout, other) == expected


def test_changed_data_are_explained_shard_by_shard_from_the_run_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    source = DATA_ORDER["sources"][0]
    with_shards = {**source, "shards": [["shard-0", "a", "b"], ["shard-1", "c", "d"]]}
    (tmp_path / "data_order.json").write_text(json.dumps({**DATA_ORDER, "sources": [with_shards]}))
    changed = {**source, "fingerprint": "xyz", "shards": [["shard-0", "a", "b"], ["shard-1", "c", "e"]]}
    with pytest.raises(UserError, match=r"source 'wiki' is another \(changed: shard-1\)"):
        check_resumable(folder, read_checkpoint_manifest(folder), RECORDS, {**DATA_ORDER, "sources": [changed]})
    (tmp_path / "data_order.json").write_text("{")
    with pytest.raises(UserError, match=r"source 'wiki' is another \(its content differs\)"):
        check_resumable(folder, read_checkpoint_manifest(folder), RECORDS, {**DATA_ORDER, "sources": [changed]})


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
        assert read_checkpoint_manifest(step_folder(kept / "checkpoints", number)).step == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "previous-1", "previous-2"]
