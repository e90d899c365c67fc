"""Ranks that would start from different things end alike, with one card; those that read the same go on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.commands import start_maskwright
from tests.ranks import free_port, run_ranks, tiny_config, write_config
from tests.waiting import TIMEOUT_S
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.errors import EXIT_USER_MISTAKE, UserError
from trainer.inputs.consistency import compare, facts_of_start, tell_others
from trainer.runtime import distributed


@dataclass(frozen=True)
class Start:
    """What one rank is given: a folder to be in, which stands for a node's own disk, and the command's arguments."""

    folder: Path
    raw: dict[str, Any]
    resume: str = "auto"
    dry_run: bool = False

    def but(self, key: str, value: Any) -> Start:
        raw = json.loads(json.dumps(self.raw))
        section, name = key.split(".")
        raw[section][name] = value
        return replace(self, raw=raw)


def compare_each(usual: Start, others: list[Start]) -> int:
    """On each rank: compare, and print the card; in each case the last rank has another start than the rest."""
    world = distributed.start()
    for number, other in enumerate(others):
        start = other if world.rank == world.size - 1 else usual
        os.chdir(start.folder)
        facts = facts_of_start(parse_config(start.raw, "test"), start.resume, start.dry_run)
        try:
            compare(world, lambda facts=facts: facts)
            print(f"case {number}: alike", flush=True)
        except UserError as error:
            print(f"case {number}: {error.where}", flush=True)
    return 0


def test_whatever_a_rank_reads_for_itself_is_compared(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here, changed, empty = (tmp_path / name for name in ("here", "changed", "empty"))
    for folder in (here, changed):
        shutil.copytree(workspace / "tokenizer", folder / "tokenizer")
        shutil.copytree(workspace / "data", folder / "data")
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(bytes(40 << 20))
        (folder / "model" / "modeling.py").write_text("import torch\n")
        (folder / "teacher").mkdir()
        (folder / "teacher" / "model.safetensors").write_bytes(bytes(1 << 10))
        shutil.copy("ds_configs/zero1.json", folder / "stage.json")
    empty.mkdir()
    config = tiny_config(workspace, tmp_path / "run", deepspeed="stage.json").model_dump(mode="json")
    config["model"] |= {"tokenizer": "tokenizer", "preset": None, "from_pretrained": "./model", "code": True}
    config["data"]["train"] = [{"path": "data"}]
    config["objective"]["teacher"] = {"model": "./teacher"}
    usual = Start(here, config)

    def with_file(name: str, change: bytes) -> Start:
        """Another content of one file, at the same path."""
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(here, folder, copy_function=os.link)
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        (folder / name).unlink()
        (folder / name).write_bytes(content[:middle] + change + content[middle + len(change) :])
        return replace(usual, folder=folder)

    cases = {
        "alike": usual,
        "objective.mask_ratio is 0.15 on ranks 0-1 (": usual.but("objective.mask_ratio", 0.2),
        "train.steps is 20 on ranks 0-1 (": usual.but("train.steps", 21),
        'train.precision is "fp32" on ranks 0-1 (': usual.but("train.precision", "bf16"),
        "run.seed is 3 on ranks 0-1 (": usual.but("run.seed", 99),
        "data.train.0.quarantine is [] on ranks 0-1 (": usual.but(
            "data.train", [{"path": "data", "quarantine": ["shard-1"]}]
        ),
        '--resume is "auto" on ranks 0-1 (': replace(usual, resume="must"),
        "--dry-run is false on ranks 0-1 (": replace(usual, dry_run=True),
        "deepspeed=stage.json.zero_optimization.stage is 1 on": with_file("stage.json", b""),
        "model.tokenizer=tokenizer: tokenizer.json is": with_file("tokenizer/tokenizer.json", b"#"),
        "model.from_pretrained=./model: model.safetensors is": with_file(
            "model/model.safetensors", bytes([1] * (1 << 20))
        ),
        "model.from_pretrained=./model: modeling.py is": with_file("model/modeling.py", b"#"),
        "objective.teacher.model=./teacher: model.safetensors is": with_file("teacher/model.safetensors", b"#"),
        "data data (train) is": with_file("data/train/manifest.json", b"#"),
    }
    stage = cases["deepspeed=stage.json.zero_optimization.stage is 1 on"].folder / "stage.json"
    stage.write_text(stage.read_text().replace('"stage": 1', '"stage": 2'))
    assert run_ranks(compare_each, 3, usual, list(cases.values())) == [0, 0, 0]
    output = capfd.readouterr().out
    for number, expected in enumerate(cases):
        lines = [line for line in output.splitlines() if line.startswith(f"case {number}: ")]
        assert len(lines) == 3 and len(set(lines)) == 1, f"all ranks say the same: {lines}"
        assert expected in lines[0] and (number == 0 or "on rank 2 (" in lines[0])
        assert lines[0].count(" is ") == (number > 0), "one fact differs, and one is named"


def train_or_tell(config: Config, unreadable: bool) -> int:
    """The last rank has another seed, or no config that it can read."""
    from trainer.train import run

    if os.environ["RANK"] == "0":
        return run(config)
    if unreadable:
        tell_others(UserError("No config here.", where="my.yaml"))
    return run(config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})}))


@pytest.mark.parametrize(
    ("unreadable", "said"), [(False, "run.seed is 3 on rank 0 ("), (True, "No config here. [my.yaml]")]
)
def test_a_run_of_ranks_that_differ_ends_before_it_writes_anything(
    unreadable: bool, said: str, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path / "run")
    assert run_ranks(train_or_tell, 2, config, unreadable) == [EXIT_USER_MISTAKE] * 2
    assert capfd.readouterr().out.count(said) == 2
    assert not (tmp_path / "run").exists()


def test_a_config_that_one_node_lacks_ends_both_launchers_with_one_card(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank")
    sources = (config, tmp_path / "missing.yaml")
    launchers = [start_maskwright("train", source, *nodes, str(node)) for node, source in enumerate(sources)]
    for launcher in launchers:
        output = launcher.communicate(timeout=TIMEOUT_S)[0]
        assert launcher.returncode == EXIT_USER_MISTAKE, output
        assert output.count("Please check: No config file or recipe") == 1
        assert "missing.yaml, on rank 1 (" in output and "Traceback" not in output
