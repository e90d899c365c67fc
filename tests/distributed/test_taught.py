"""Runs with a teacher: the losses of a plain loop, a teacher that stays as it is, and no other one after a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from rich.console import Console
from transformers import AutoModelForMaskedLM

from tests.commands import assert_one_card, maskwright
from tests.ranks import TINY_ROBERTA, WITHOUT_DROPOUT, losses, metrics, run_ranks, tiny_config, train, write_config
from tests.teachers import make_teacher
from tools.convert import convert
from trainer.config import Config
from trainer.data.block_reader import BlockReader
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs
from trainer.model.build import build_model

TWO_LAYERS = {**TINY_ROBERTA, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def teacher(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    return make_teacher(folder, str(workspace / "tokenizer"), "roberta-base", TWO_LAYERS)


def config_of(workspace: Path, run_dir: Path, teacher: str, **sections: Any) -> Config:
    settings = {"model": teacher, **sections.pop("settings", {})}
    own = {"objective": {"teacher": settings}, "checkpoint": {"every_steps": 4, "keep_last": 9}, "train": {"steps": 8}}
    return tiny_config(workspace, run_dir, **{**own, **sections})


def plain_losses(config: Config, steps: int) -> list[float]:
    """Distil by a loop of plain torch and transformers: whole logits, torch's own losses, AdamW."""
    inputs, taught_by = open_inputs(config, 1), config.objective.teacher
    assert taught_by is not None
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed).model
    student = type(built)(built.config)
    student.load_state_dict(built.state_dict())
    teacher = AutoModelForMaskedLM.from_pretrained(taught_by.model).eval()
    decayed = [weight for weight in student.parameters() if weight.ndim > 1]
    others = [weight for weight in student.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw, batch = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6), config.batch.global_size
    reader, found = BlockReader(inputs.sources[0], inputs.objective), []
    for step in range(1, steps + 1):
        samples = np.arange((step - 1) * batch, step * batch)
        _, blocks = inputs.order.locate(samples)
        made = inputs.objective.make_batch(reader.read(blocks), samples.astype(np.uint64), config.run.seed)
        ids, labels = made.inputs["input_ids"], made.labels["mlm"]
        ours = student(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, output_hidden_states=True)
        temperature = taught_by.temperature
        soft = torch.nn.KLDivLoss(reduction="batchmean")(
            functional.log_softmax(ours.logits.flatten(0, 1) / temperature, dim=-1),
            functional.softmax(theirs.logits.flatten(0, 1) / temperature, dim=-1),
        )
        hard = functional.cross_entropy(ours.logits.flatten(0, 1), labels, ignore_index=IGNORED_LABEL)
        states = [output.hidden_states[-1].flatten(0, 1) for output in (ours, theirs)]
        cosine = torch.nn.CosineEmbeddingLoss()(*states, torch.ones(len(states[0])))
        loss = 5.0 * temperature**2 * soft + 2.0 * hard + 1.0 * cosine
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, step / 4) * (1 - max(0, step - 4) / (steps - 4))
        adamw.step()
        found.append(loss.item())
    return found


def test_a_loop_of_plain_torch_gives_the_same_losses(workspace: Path, teacher: str, tmp_path: Path) -> None:
    sections = {"settings": {"positions": "all"}, "train": {"steps": 20}, "optimizer": {"lr": 2.0e-3}}
    config = config_of(workspace, tmp_path / "run", teacher, **sections)
    assert train(config, 2) == EXIT_FINISHED
    found = losses(tmp_path / "run")
    assert found == pytest.approx(plain_losses(config, 20), abs=1e-5, rel=1e-6) and found[-1] < 0.9 * found[0]


def train_and_look_at_the_teacher(config: Config) -> int:
    """Runs on each rank: its teacher's weights are hashed again when all is over."""
    from trainer import train as module
    from trainer.model import teacher

    kept: list[Any] = []
    load = module.load_teacher

    def load_and_keep(*arguments: Any) -> Any:
        kept.append(load(*arguments))
        return kept[-1]

    module.load_teacher = load_and_keep
    code = module.run(config)
    (found,) = kept
    assert teacher._hash(found.model) == found.identity
    assert all(weight.grad is None and not weight.requires_grad for weight in found.model.parameters())
    assert not any(module.training for module in found.model.modules())
    return code


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_the_teacher_stays_as_it_is_and_leaves_nothing_in_a_checkpoint(
    stage: str, workspace: Path, teacher: str, tmp_path: Path
) -> None:
    config = config_of(workspace, tmp_path / "run", teacher, deepspeed=stage, train={"steps": 4})
    assert run_ranks(train_and_look_at_the_teacher, 2, config) == [EXIT_FINISHED] * 2
    with_teacher = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.pt"))
    without = tiny_config(workspace, tmp_path / "alone", deepspeed=stage, train={"steps": 4})
    assert train(without, 2) == EXIT_FINISHED
    assert with_teacher == pytest.approx(
        sum(path.stat().st_size for path in (tmp_path / "alone").rglob("*.pt")), abs=999
    )


def test_a_moved_teacher_goes_on_and_another_one_is_refused(
    workspace: Path, teacher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, tmp_path / "run", teacher)
    assert train(config, 2) == EXIT_FINISHED
    clean = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    moved = shutil.copytree(teacher, tmp_path / "moved")
    assert train(config_of(workspace, tmp_path / "run", str(moved)), 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == clean

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    other = make_teacher(tmp_path / "other", str(workspace / "tokenizer"), "roberta-base", TWO_LAYERS, seed=12)
    capfd.readouterr()
    assert train(config_of(workspace, tmp_path / "run", other), 2) == EXIT_USER_MISTAKE
    said = capfd.readouterr().out
    identity = json.loads((tmp_path / "run/checkpoints/step-00000004/manifest.json").read_text())["identity"]
    assert f"the teacher was {teacher} (weights {identity['teacher']}), now {other} (weights " in said
    assert train(tiny_config(workspace, tmp_path / "run"), 2) == EXIT_USER_MISTAKE
    assert "objective.teacher was {" in capfd.readouterr().out
    hotter = config_of(workspace, tmp_path / "run", teacher, settings={"temperature": 3.0})
    assert train(hotter, 2) == EXIT_USER_MISTAKE


def train_until_killed(config: Config) -> int:
    """Runs on each rank: rank 1 is killed in step 6, after its forward pass."""
    from trainer.engine.engine import TrainingEngine
    from trainer.train import run

    backward, calls = TrainingEngine.backward, []

    def backward_or_die(self: TrainingEngine, loss: torch.Tensor) -> None:
        calls.append(loss)
        if len(calls) == 6 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(self, loss)

    TrainingEngine.backward = backward_or_die  # type: ignore[method-assign]
    return run(config)


def test_a_killed_run_ends_as_the_clean_one_with_dropout(workspace: Path, teacher: str, tmp_path: Path) -> None:
    model = {"overrides": {**TINY_ROBERTA, **dict.fromkeys(WITHOUT_DROPOUT, 0.1)}}
    clean = config_of(workspace, tmp_path / "clean", teacher, model=model)
    assert train(clean, 2) == EXIT_FINISHED
    config = config_of(workspace, tmp_path / "run", teacher, model=model)
    codes = run_ranks(train_until_killed, 2, config)
    assert codes[1] == -signal.SIGKILL and codes[0] != EXIT_FINISHED
    assert train(config, 2, resume="must") == EXIT_FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")


@pytest.mark.parametrize("samples", ["stream", "documents"])
def test_it_evaluates_converts_and_says_who_taught(
    samples: str, workspace: Path, teacher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {
        "data": {"validation": str(workspace / "data"), "samples": samples},
        "eval": {"every_steps": 4, "samples": 16},
        "train": {"steps": 8, "precision": "bf16"},
        "model": {"document_attention": samples == "documents"},
    }
    config = config_of(workspace, tmp_path / "run", teacher, **sections)
    assert train(config, 2) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert f"teacher: {teacher}, RobertaForMaskedLM, " in said and "agrees with its teacher" in said
    trained = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    for line in trained:
        parts = [line[f"train/loss/{term}"] for term in ("mlm", "soft", "cosine")]
        assert line["train/loss"] == pytest.approx(2 * parts[0] + 5 * parts[1] + parts[2], rel=1e-5)
    evaluated = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) == 3 and evaluated[-1]["eval/soft/loss"] < evaluated[0]["eval/soft/loss"]
    assert 0 <= evaluated[-1]["eval/soft/accuracy"] <= 1 and "eval/cosine/accuracy" not in evaluated[-1]
    assert np.log(evaluated[-1]["eval/perplexity"]) == pytest.approx(evaluated[-1]["eval/mlm/loss"])

    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"taught by `{teacher}`: 5 × soft targets at temperature 2 at the predicted positions + 2 × the" in card
    assert "| its teacher's likeliest token found |" in card


def test_validate_and_plan_say_and_refuse_what_a_start_does(workspace: Path, teacher: str, tmp_path: Path) -> None:
    path = write_config(config_of(workspace, tmp_path / "run", teacher), tmp_path / "c.yaml")
    done = maskwright("validate", path)
    assert done.returncode == 0 and f"teacher: {teacher}, RobertaForMaskedLM" in done.stdout
    done = maskwright("plan", path)
    assert done.returncode == 0 and "GiB of the weights are the teacher's" in " ".join(done.stdout.split())
    small = make_teacher(
        tmp_path / "small", str(workspace / "tokenizer"), "roberta-base", {**TWO_LAYERS, "hidden_size": 16}
    )
    for command in ("validate", "plan", "train"):
        done = maskwright(command, path, f"objective.teacher.model={small}")
        words = ("width of 16 and the model's one of 32", "objective.teacher.cosine=0")
        assert_one_card(done, EXIT_USER_MISTAKE, *words)
    assert (
        maskwright("validate", path, f"objective.teacher.model={small}", "objective.teacher.cosine=0").returncode == 0
    )
    done = maskwright("validate", path, "objective.pair={task: nsp}")
    assert_one_card(done, EXIT_USER_MISTAKE, "with teacher cannot have pair")
    done = maskwright("validate", path, "objective.name=plm")
    assert_one_card(done, EXIT_USER_MISTAKE, "teacher does nothing with name plm")
