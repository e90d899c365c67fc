"""What changes between two starts is refused with the difference, or taken and said; never silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.console import make_console
from tests.conftest import write_text
from tests.ranks import TINY_ROBERTA, losses, tiny_config, train
from tools.prepare import prepare
from tools.tokenizer import train_tokenizer
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

STEPS = 4
SAVED = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 2, "keep_last": 9}}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSpeed file of the user's own."""
    path = tmp_path_factory.mktemp("preset") / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    return path


@pytest.fixture(scope="module")
def saved(preset: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was lost after step 2 of 4."""
    run_dir = tmp_path_factory.mktemp("saved")
    assert train(tiny_config(workspace, run_dir, deepspeed=str(preset), **SAVED)) == EXIT_FINISHED
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def others(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers and data of another text: one with as many tokens, one with fewer."""
    folder = tmp_path_factory.mktemp("others")
    text = write_text(folder / "text.txt", documents=300, seed=5)
    console = make_console()
    train_tokenizer([str(text)], str(folder / "same size"), "bytelevel-bpe", 500, console)
    train_tokenizer([str(text)], str(folder / "smaller"), "bytelevel-bpe", 300, console)
    for tokenizer in (workspace / "tokenizer", folder / "same size", folder / "smaller"):
        prepare([str(text)], str(tokenizer), str(folder / f"data of {tokenizer.name}"), workers=1, console=console)
    return {path.name: path for path in folder.iterdir()}


def resume(workspace: Path, run_dir: Path, preset: Path, sections: dict[str, Any], ranks: int = 1) -> int:
    merged: dict[str, Any] = {"deepspeed": str(preset), **SAVED}
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section} if isinstance(section, dict) else section
    return train(tiny_config(workspace, run_dir, **merged), ranks)


def model(**overrides: Any) -> dict[str, Any]:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"model": {"overrides": {**TINY_ROBERTA, **still, **overrides}}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"run": {"seed": 4}}, "seed was 3, now 4"),
    "sequence length": ({"data": {"seq_len": 24}}, "seq_len was 32, now 24"),
    "objective": ({"objective": {"mask_ratio": 0.3}}, "the mask ratio of the 16 samples seen so far was 0.15, now 0.3"),
    "the share of masks of a phase that has begun": (
        {"data": {"phases": [{"seq_len": 32, "until_tokens": 2048, "mask_ratio": 0.3}]}},
        "the mask ratio of the 16 samples seen so far was 0.15, now 0.3",
    ),
    "shapes of the model": (model(intermediate_size=96), "model was RobertaForMaskedLM"),
    "heads, in the same shapes": (model(num_attention_heads=4), "model was RobertaForMaskedLM"),
    "document attention": ({"model": {"document_attention": True}}, "document attention was off, now on"),
    "chunks of the order": ({"data": {"chunk_blocks": 16}}, "the order's chunk_blocks was 8, now 16"),
    "windows of the order": ({"data": {"window_chunks": 2}}, "the order's window_chunks was 4, now 2"),
}
TAKEN: dict[str, tuple[dict[str, Any], str]] = {
    "ZeRO stage": ({"deepspeed": "zero2"}, "stage 1 × 1 rank, fp32 → stage 2 × 1 rank, fp32"),
    "precision": ({"train": {"precision": "bf16"}}, "stage 1 × 1 rank, fp32 → stage 1 × 1 rank, bf16"),
    "batch": ({"batch": {"global_size": 4}}, "batch.global_size 8 → 4"),
    "micro-batch": ({"batch": {"micro_size": 2}}, "batch.micro_size 4 → 2"),
    "learning rate": ({"optimizer": {"lr": 1.0e-3}}, "optimizer.lr 0.005 → 0.001"),
    "weight decay": ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay 0.01 → 0.1"),
    "schedule": (
        {"schedule": {"name": "cosine", "warmup_steps": 1}},
        "schedule.name linear → cosine, schedule.warmup_steps 4 → 1",
    ),
    "decay": (
        {"schedule": {"name": "wsd", "warmup_steps": 1, "decay_steps": 2}},
        "schedule.decay_fraction 0.1 → None, schedule.decay_steps None → 2, schedule.name linear → wsd",
    ),
    "the share of masks of what lies ahead": (
        {
            "data": {"phases": [{"seq_len": 32, "until_tokens": 512, "mask_ratio": 0.15, "lr_factor": 2}]},
            "objective": {"mask_ratio": 0.05},
        },
        "objective.mask_ratio 0.15 → 0.05",
    ),
    "steps": ({"train": {"steps": 5}}, "train.steps 4 → 5"),
    "dropout": (model(hidden_dropout_prob=0.1), "model.overrides.hidden_dropout_prob 0.0 → 0.1"),
    "logging": ({"logging": {"every_steps": 2}}, "logging.every_steps 1 → 2"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_be_another_run_is_refused_with_the_difference(
    change: str, workspace: Path, run_dir: Path, preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, words = REFUSED[change]
    assert_refused(workspace, run_dir, preset, sections, words, capsys)


@pytest.mark.parametrize(
    ("tokenizer", "data", "words"),
    [
        (None, "data of tokenizer", "source 'data' is another"),
        ("same size", None, "The data was prepared with another tokenizer (500 tokens"),
        ("same size", "data of same size", "tokenizer was "),
        ("smaller", "data of smaller", "model was RobertaForMaskedLM"),
    ],
    ids=["data", "tokenizer", "tokenizer and data", "vocabulary and data"],
)
def test_another_tokenizer_vocabulary_or_text_is_refused(
    tokenizer: str | None,
    data: str | None,
    words: str,
    others: dict[str, Path],
    workspace: Path,
    run_dir: Path,
    preset: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections: dict[str, Any] = {}
    if tokenizer:
        sections["model"] = {"tokenizer": str(others[tokenizer])}
    if data:
        sections["data"] = {"train": [{"path": str(others[data]), "name": "data"}]}
    assert_refused(workspace, run_dir, preset, sections, words, capsys)


def assert_refused(
    workspace: Path,
    run_dir: Path,
    preset: Path,
    sections: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(run_dir)
    capsys.readouterr()
    assert resume(workspace, run_dir, preset, sections) == EXIT_USER_MISTAKE
    assert words in capsys.readouterr().out
    assert content(run_dir) == before, "and nothing is touched"


def content(run_dir: Path) -> dict[Path, bytes]:
    """All files but those that say how the last start ended."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "status.json"]
    return {path: path.read_bytes() for path in files if not {"logs", "heartbeats"} & set(path.parts)}


@pytest.mark.parametrize("change", TAKEN)
def test_what_may_change_is_taken_and_said(
    change: str, workspace: Path, run_dir: Path, preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, words = TAKEN[change]
    capsys.readouterr()
    assert resume(workspace, run_dir, preset, sections) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert words in output
    assert "at step 2 (" in output


def test_another_number_of_ranks_is_taken_and_said_and_nothing_else_then(
    workspace: Path, run_dir: Path, preset: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert resume(workspace, run_dir, preset, {}, ranks=2) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert "resuming in another layout: stage 1 × 1 rank, fp32 → stage 1 × 2 ranks, fp32, step 2" in output
    assert losses(run_dir) == pytest.approx(losses(saved), abs=1e-5)
    moved = f"changed since step-00000002 was saved: run.dir {saved} → {run_dir}"  # as the fixture did
    assert [line for line in output.splitlines() if line.startswith("changed since")] == [moved]


def test_a_deepspeed_file_with_another_content_under_its_old_name_is_said(
    workspace: Path, run_dir: Path, preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = preset.read_text()
    preset.write_text(content.replace("1000", "5000"))
    try:
        assert resume(workspace, run_dir, preset, {}) == EXIT_FINISHED
    finally:
        preset.write_text(content)
    assert "changed since step-00000002 was saved" in (said := capsys.readouterr().out)
    assert "zero_optimization.reduce_bucket_size 1000 → 5000" in said


def test_what_changes_back_and_what_changes_in_another_folder_is_said_as_well(
    workspace: Path, run_dir: Path, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said is how a start differs from the one that saved its checkpoint, whatever the first start was like."""
    faster: dict[str, Any] = {"optimizer": {"lr": 1.0e-2}}
    assert resume(workspace, run_dir, preset, faster) == EXIT_FINISHED
    capsys.readouterr()
    assert resume(workspace, run_dir, preset, {"train": {"steps": 5}}) == EXIT_FINISHED
    assert "changed since step-00000004 was saved: optimizer.lr 0.01 → 0.005" in capsys.readouterr().out
    elsewhere = tiny_config(workspace, tmp_path / "new", **SAVED, **faster, deepspeed=str(preset))
    assert train(elsewhere, resume=str(run_dir / "checkpoints" / "step-00000002")) == EXIT_FINISHED
    assert "optimizer.lr 0.005 → 0.01" in capsys.readouterr().out
