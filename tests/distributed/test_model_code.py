"""A run of a model with code of its own, from its folder to a model that plain transformers loads, by the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import assert_one_card, maskwright
from tests.own_code import CONFIGURATION, MODELING, leaves_a_marker, write_code
from tests.ranks import losses, metrics, run_ranks, tiny_config, write_config
from trainer.checkpoint.find import checkpoints_folder
from trainer.checkpoint.manifest import MODEL_FOLDER, PROBE, read_checkpoint_manifest, write_manifest
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.model.model_code import SHIPPED

LOAD = """\
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
torch.set_num_threads(1)
model, report = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert not any(name.partition(".")[0] in ("trainer", "tools", "launcher") for name in sys.modules)
from safetensors import safe_open
with safe_open(sys.argv[2], "pt") as file:
    index, recorded = file.get_tensor("prediction_index"), file.get_tensor("logits")
    with torch.no_grad():
        logits = model.eval()(file.get_tensor("input_ids")).logits.flatten(0, 1)[index][: len(recorded)]
print(type(model).__name__, float((logits - recorded).abs().max()))
print(len(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)))
"""


def config_of(workspace: Path, run_dir: Path, code: Path, **sections: Any) -> Config:
    model = {"preset": None, "config": str(code), "code": True, "overrides": {}}
    defaults = {
        "train": {"steps": 6},
        "checkpoint": {"every_steps": 3, "keep_last": 9},
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 3, "samples": 16},
    }
    return tiny_config(workspace, run_dir, **{**defaults, "model": model, **sections})


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, the code, a run of 6 steps on 2 ranks, and where transformers would copy code to."""
    folder = tmp_path_factory.mktemp("own")
    marker = leaves_a_marker(folder / "marker")
    code = write_code(folder / "bag", marker + MODELING, CONFIGURATION)
    config = write_config(config_of(workspace, folder / "run", code), folder / "my.yaml")
    modules = {"HF_MODULES_CACHE": str(folder / "modules")}
    done = maskwright("train", config, "--nproc-per-node", "2", **modules)
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    assert (folder / "marker").exists()
    return folder


def test_two_ranks_train_it_at_once_and_leave_nothing_in_a_cache(trained: Path) -> None:
    found = losses(trained / "run")
    assert found[-1] < found[0]
    assert [line["step"] for line in metrics(trained / "run") if "eval/loss" in line] == [0, 3, 6]
    assert not (trained / "modules").exists(), "no rank has copied the code to where another one would write too"
    assert not (trained / "bag" / "__pycache__").exists()


def test_each_checkpoint_holds_the_code_and_its_hashes(trained: Path) -> None:
    for step in ("step-00000003", "step-00000006"):
        folder = checkpoints_folder(trained / "run") / step
        manifest = read_checkpoint_manifest(folder)
        for name in ("modeling_bag.py", "configuration_bag.py"):
            assert (folder / MODEL_FOLDER / name).read_bytes() == (trained / "bag" / name).read_bytes()
            assert f"{MODEL_FOLDER}/{name}" in manifest.files and f"model.code {name}" in manifest.identity
        assert "auto_map" in json.loads((folder / MODEL_FOLDER / "config.json").read_text())


def test_it_converts_when_asked_to_run_the_code_and_plain_transformers_loads_it(
    trained: Path, workspace: Path, tmp_path: Path
) -> None:
    (trained / "marker").unlink(missing_ok=True)
    refused = maskwright("convert", trained / "run", "--output", tmp_path / "model")
    assert_one_card(refused, EXIT_USER_MISTAKE, "has code of its own, and none of it is run unasked", "add --code")
    assert not (trained / "marker").exists() and not (tmp_path / "model").exists()
    done = maskwright("convert", trained / "run", "--output", tmp_path / "model", "--code")
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    assert "logits: 0 from the training engine's, 0 after reload as float32" in done.stderr + done.stdout
    assert "trust_remote_code=True" in done.stderr + done.stdout
    assert "trust_remote_code=True" in (tmp_path / "model" / "README.md").read_text()

    probe = checkpoints_folder(trained / "run") / "step-00000006" / PROBE
    environ = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", LOAD, str(tmp_path / "model"), str(probe)]
    loaded = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False)
    assert loaded.returncode == 0, loaded.stderr
    name, difference, size = loaded.stdout.split()[-3:]
    assert (name, int(size)) == (
        "BagForMaskedLM",
        len(json.loads((workspace / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]),
    )
    assert float(difference) < 1e-6

    # And it is a folder to continue from.
    settings = ("model.config=null", f"model.from_pretrained={tmp_path / 'model'}", f"run.dir={tmp_path / 'next'}")
    again = maskwright("train", trained / "my.yaml", *settings, "schedule.warmup_steps=2", "train.steps=4")
    assert again.returncode == EXIT_FINISHED, again.stdout + again.stderr


def test_a_checkpoint_that_does_not_say_that_it_has_code_runs_none(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints_folder(trained / "run") / "step-00000006", tmp_path / "step-00000006"))
    manifest = read_checkpoint_manifest(folder)
    for name in [name for name in manifest.identity if name.startswith("model.code ")]:
        del manifest.identity[name]
    write_manifest(folder, manifest)
    (trained / "marker").unlink(missing_ok=True)
    refused = maskwright("convert", folder, "--output", tmp_path / "model")
    assert_one_card(refused, EXIT_USER_MISTAKE, "has code of its own, and none of it is run unasked")
    assert not (trained / "marker").exists()


def test_a_resume_uses_the_code_that_it_began_with_or_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained / "run", copy)
    shutil.rmtree(checkpoints_folder(copy) / "step-00000006")
    code = shutil.copytree(trained / "bag", tmp_path / "bag")
    settings = (f"run.dir={copy}", f"model.config={code}")
    with open(code / "modeling_bag.py", "a") as file:
        file.write("# another line\n")
    done = maskwright("train", trained / "my.yaml", *settings, "--nproc-per-node", "2")
    words = ("model.code modeling_bag.py was ", "The model's code as it was is in ")
    assert_one_card(done, EXIT_USER_MISTAKE, *words)
    shutil.copy(checkpoints_folder(copy) / "step-00000003" / MODEL_FOLDER / "modeling_bag.py", code)
    done = maskwright("train", trained / "my.yaml", *settings, "--nproc-per-node", "2")
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    assert losses(copy) == losses(trained / "run")


def test_what_is_asked_of_a_start_is_asked_of_all_commands(trained: Path, tmp_path: Path) -> None:
    for command in (("validate",), ("plan", "--device", "h200"), ("train", "--dry-run")):
        arguments = (command[0], trained / "my.yaml", f"run.dir={tmp_path / 'run'}", *command[1:])
        done = maskwright(*arguments)
        assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
        (trained / "marker").unlink()
        refused = maskwright(*arguments, "model.code=false")
        words = ("the folder wants code of its own to be run", "where:  model.config", "set model.code=true")
        assert_one_card(refused, EXIT_USER_MISTAKE, *words)
        assert not (trained / "marker").exists()


FILL = """\
import sys
from transformers import pipeline
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
assert type(fill.model).__module__.startswith("transformers_modules."), type(fill.model).__module__
print(len(fill(f"ka {fill.tokenizer.mask_token} lo.")))
"""


def test_nezha_on_one_sample_a_line_is_one_command(workspace: Path, tmp_path: Path) -> None:
    """As guides for NEZHA on dialogues have it: a line a sample, blocks of 128, 30 epochs, a rate of 6e-5."""
    lines = [line for line in (workspace / "text.txt").read_text().split("\n\n")[:60] if line]
    (tmp_path / "dialogues.txt").write_text("\n".join(lines))
    settings = {
        "run": {"dir": "run"},
        "model": {
            "preset": "nezha-base",
            "tokenizer": str(workspace / "tokenizer"),
            "overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        },
        "data": {"train": "dialogues.txt", "samples": "documents", "text": {"documents": "line"}, "seq_len": 128},
        "objective": {"name": "mlm", "scheme": "word"},
        "batch": {"global_size": 4, "micro_size": 4},
        "optimizer": {"lr": 6.0e-5},
        "train": {"epochs": 30, "precision": "fp32"},
        "checkpoint": {"every_steps": 20, "keep_last": 10},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    done = maskwright("train", "my.yaml", cwd=tmp_path)
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    kept = sorted(checkpoints_folder(tmp_path / "run").glob("step-*"))
    assert len(kept) == 10
    found = [line["train/loss"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert found[-1] < found[0] - 0.1

    done = maskwright("convert", "run", "--output", "model", cwd=tmp_path)
    assert done.returncode == EXIT_FINISHED, "maskwright's own code needs no --code: " + done.stdout + done.stderr
    own = SHIPPED["nezha"] / "modeling_nezha.py"
    assert (tmp_path / "model" / own.name).read_bytes() == own.read_bytes()
    environ = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", FILL, str(tmp_path / "model")]
    filled = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False)
    assert filled.returncode == 0 and filled.stdout.strip().endswith("5"), filled.stdout + filled.stderr


def train_with_a_head_of_all_positions(config: Config) -> int:
    from trainer.train import run

    return run(config)


def test_a_head_that_looks_at_other_positions_is_not_restricted(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would learn with logits that nobody computes who loads the model."""
    modeling = MODELING.replace(
        "class BagForMaskedLM",
        "class Head(nn.Linear):\n    def forward(self, hidden):\n"
        "        return super().forward(hidden + hidden.mean(-2, keepdim=True))\n\n\nclass BagForMaskedLM",
    ).replace("self.lm_head = nn.Linear(", "self.lm_head = Head(")
    config = config_of(workspace, tmp_path / "run", write_code(tmp_path / "bag", modeling))
    assert run_ranks(train_with_a_head_of_all_positions, 2, config) == [EXIT_USER_MISTAKE] * 2
    said = capfd.readouterr().out
    assert "The head of BagForMaskedLM gives a position other logits when others are predicted" in said
    assert not list(checkpoints_folder(tmp_path / "run").glob("step-*"))
