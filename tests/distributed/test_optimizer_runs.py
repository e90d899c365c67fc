"""Runs with StableAdamW and Muon: resumed bit for bit, refused by name where the state is another, converted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.console import make_console
from tests.faults import with_dropout
from tests.ranks import losses, train
from tools.convert import convert
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

QUERY = "roberta.encoder.layer.0.attention.self.query.weight"


def config_of(workspace: Path, folder: Path, name: str, steps: int = 8, **sections: Any) -> Config:
    return with_dropout(
        workspace,
        folder,
        optimizer={"name": name},
        train={"steps": steps},
        schedule={"warmup_steps": 2, "name": "constant"},
        checkpoint={"every_steps": 4},
        **sections,
    )


@pytest.mark.parametrize(("name", "preset"), [("stable_adamw", "zero3"), ("muon", "zero1"), ("muon", "zero0")])
def test_a_run_is_resumed_bit_for_bit_and_converted(name: str, preset: str, workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run", name, deepspeed=preset)
    assert train(config, 2) == EXIT_FINISHED
    clean = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training == conversion.difference_after_reload == 0.0


def test_the_state_of_another_optimizer_is_refused_by_name_and_stable_adamw_goes_on_from_adamw(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config_of(workspace, tmp_path / "run", "adamw", steps=4)) == EXIT_FINISHED
    assert train(config_of(workspace, tmp_path / "run", "muon")) == EXIT_USER_MISTAKE
    shown = capsys.readouterr().out
    assert "optimizer was adamw or stable_adamw, now muon" in shown and "Restore these settings" in shown
    assert train(config_of(workspace, tmp_path / "run", "stable_adamw")) == EXIT_FINISHED
    assert ZeroFiles(tmp_path / "run" / "checkpoints" / "step-00000008").adam_step == 8
    assert len(losses(tmp_path / "run")) == 8


def test_muon_takes_up_what_was_frozen(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, two_layers = tmp_path / "run", {"num_hidden_layers": 2}
    for steps, patterns in ((4, ["roberta.encoder.layer.0.*"]), (8, [])):
        model = {"frozen": patterns, "overrides": two_layers}
        assert train(config_of(workspace, run, "muon", steps, model=model, deepspeed="zero2"), 2) == EXIT_FINISHED
    shown = capsys.readouterr().out
    assert "optimizer: Muon updates 6 matrices of" in shown and "optimizer: Muon updates 12 matrices of" in shown
    updates = ZeroFiles(run / "checkpoints" / "step-00000008").updates
    assert (updates[QUERY], updates[QUERY.replace("layer.0", "layer.1")]) == (4, 8)
