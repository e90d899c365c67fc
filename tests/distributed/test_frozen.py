"""`model.frozen`: weights that keep every bit, at any stage and precision, over saves, resumes and conversion."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from tests.commands import start_maskwright
from tests.damage import DAMAGES
from tests.elastic_matrix import run_in_turn
from tests.faults import DROPOUT
from tests.gate import Gate
from tests.ranks import TWO_LAYERS, losses, tiny_config, train, write_config
from tests.waiting import TIMEOUT_S, rank_processes, wait_for_step
from tools.convert import convert
from trainer.checkpoint.find import candidates, find_candidate_faults
from trainer.checkpoint.manifest import FROZEN, read_checkpoint_manifest
from trainer.checkpoint.safe_load import load_without_code
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.data.loader import SampledBlocks
from trainer.engine.partitions import MOMENTS, WEIGHT
from trainer.errors import EXIT_FINISHED
from trainer.inputs.inputs import open_inputs

ENCODER = ["roberta.encoder.*"]
ALL_BUT_HEAD = ["roberta.*"]
LAYOUTS = [
    ("zero0", "fp32"),
    ("zero1", "fp32"),
    ("zero2", "fp32"),
    ("zero3", "fp32"),
    ("zero1", "bf16"),
    ("zero2", "bf16"),
    ("zero3", "bf16"),
    ("zero1", "fp16"),
    ("zero3", "fp16"),
    ("zero2_offload", "bf16"),
    ("zero3_offload", "bf16"),
    ("zero1", "bf16", "fp32"),
]
NAMES = [" ".join(layout) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def start(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to continue from, whose weights half precision cannot hold."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**{**TWO_LAYERS, "vocab_size": 500, "pad_token_id": 1}))
    for weight in model.parameters():  # a norm of ones would survive any rounding
        weight.data += 0.02 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workspace / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def config_of(start: Path, workspace: Path, tmp_path: Path) -> Any:
    def make(run: str, frozen: Sequence[str] = ENCODER, dropout: bool = False, **sections: Any) -> Config:
        model = {"preset": None, "from_pretrained": str(start), "tokenizer": None, "frozen": list(frozen)}
        given = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2, "keep_last": 9}, **sections}
        given["model"] = {**model, "overrides": DROPOUT if dropout else {}, **given.get("model", {})}
        return tiny_config(workspace, tmp_path / run, **given)

    return make


def of_layout(layout: tuple[str, ...]) -> dict[str, Any]:
    """Sections of a preset, a precision and, if it is another, that in which gradients are added up."""
    preset, precision, *accumulation = layout
    train = {"steps": 4, "precision": precision, "gradient_accumulation_dtype": None}
    if accumulation:
        train["gradient_accumulation_dtype"] = accumulation[0]
    return {"deepspeed": preset, "train": train, "batch": {"micro_size": 2}}


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def converted(source: Path | str, output: Path) -> dict[str, torch.Tensor]:
    """The weights of a run or checkpoint, by name, as plain transformers loads them after conversion."""
    found = convert(str(source), str(output), "float32", "5GB", Console(quiet=True))
    assert found.difference_after_reload == 0
    return AutoModelForMaskedLM.from_pretrained(output).state_dict()


def the_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def trained(start: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Runs of 4 steps with a frozen encoder on 2 ranks, one of each layout."""
    folder = tmp_path_factory.mktemp("trained")
    model = {"preset": None, "from_pretrained": str(start), "tokenizer": None, "frozen": ENCODER, "overrides": {}}
    configs = {
        name: tiny_config(workspace, folder / name, model=model, **of_layout(layout))
        for name, layout in zip(NAMES, LAYOUTS, strict=True)
    }
    run_in_turn(2, list(configs.values()))
    return configs


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_keeps_every_bit_and_all_else_is_trained(
    name: str, trained: dict[str, Config], start: Path, tmp_path: Path
) -> None:
    before = AutoModelForMaskedLM.from_pretrained(start).state_dict()
    after = converted(trained[name].run.dir, tmp_path / "model")
    assert the_same(before, after) == {weight for weight in before if weight.startswith("roberta.encoder.")}
    found, expected = losses(Path(trained[name].run.dir)), losses(Path(trained["zero1 fp32"].run.dir))
    assert found == pytest.approx(expected, abs=5e-3 if "16" in name else 1e-5, rel=0)
    assert found[-1] < found[0] - 0.1
    count, total = (sum(before[each].numel() for each in names) for names in (the_same(before, after), before))
    total -= (
        before["lm_head.decoder.weight"].numel() + before["lm_head.decoder.bias"].numel()
    )  # which are others' names
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| frozen | `roberta.encoder.*`: {count:,} of {total:,} parameters |" in card


@pytest.mark.parametrize("name", NAMES)
def test_files_of_weights_and_optimizer_hold_nothing_of_it(name: str, trained: dict[str, Config]) -> None:
    folder = checkpoint(trained[name], 4)
    files = ZeroFiles(folder)
    assert files.shapes.keys() == files.trained.keys() | files.frozen.keys()
    assert set(files.frozen) == {weight for weight in files.shapes if weight.startswith("roberta.encoder.")}
    assert not files.trained.keys() & files.frozen.keys()
    assert all(weight.dtype == torch.float32 for weight in files.frozen.values())
    count, size = (sum(shape.numel() for shape in shapes) for shapes in (files.trained.values(), files.shapes.values()))
    for path in folder.glob("*model_states.pt"):
        assert not load_without_code(path)["module"].keys() & files.frozen.keys()
    elements = sum(tensor.numel() for path in folder.glob("*optim_states.pt") for tensor in tensors_in(path))
    assert elements <= 3 * count + 200, "weight and moments of what is trained, and some padding"
    manifest = read_checkpoint_manifest(folder)
    assert (manifest.model["parameters"], manifest.model["frozen"]) == (size, size - count)
    assert FROZEN in manifest.files


def tensors_in(path: Path) -> list[torch.Tensor]:
    """Those of an optimizer file, one for each memory."""
    found: dict[int, torch.Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            found[value.data_ptr()] = value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                look(item)

    look(load_without_code(path))
    return list(found.values())


def plain_losses(config: Config, patterns: str, until: float = math.inf) -> list[float]:
    """Train the stock class by a loop of plain torch, what begins with `patterns` after step `until` only."""
    assert config.train.steps is not None and config.model.from_pretrained is not None
    inputs = open_inputs(config, 1)
    stock = RobertaForMaskedLM.from_pretrained(config.model.from_pretrained)
    blocks, size = SampledBlocks(inputs.sources, inputs.objective, config.run.seed), config.batch.global_size
    decayed = [weight for weight in stock.parameters() if weight.ndim > 1]
    others = [weight for weight in stock.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=1e-6)
    found = []
    for step in range(1, config.train.steps + 1):
        for name, weight in stock.named_parameters():
            weight.requires_grad_(step > until or not name.startswith(patterns))
        samples = np.arange((step - 1) * size, step * size)
        batch: Any = blocks.__getitems__(np.stack([samples, *inputs.order.locate(samples)], axis=1))
        logits = stock(input_ids=batch.inputs["input_ids"]).logits.flatten(0, 1)[batch.prediction_index]
        loss = cross_entropy(logits, batch.labels["mlm"])
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        for group in adamw.param_groups:
            rest = 1 - max(0, step - 4) / (config.train.steps - 4)
            group["lr"] = config.optimizer.lr * min(1.0, step / 4) * rest
        adamw.step()
        found.append(loss.item())
    return found


def test_a_head_alone_is_trained_as_a_loop_of_plain_torch_does(config_of: Any) -> None:
    """The decoder is the embedding, so that it is frozen as well."""
    config = config_of("run", ALL_BUT_HEAD, train={"steps": 20})
    assert train(config, 2) == EXIT_FINISHED
    found = losses(Path(config.run.dir))
    assert found == pytest.approx(plain_losses(config, "roberta."), abs=1e-5, rel=0)
    assert found[-1] < found[0] - 0.2


def test_layers_that_are_frozen_are_recomputed_as_any(config_of: Any) -> None:
    """Activation checkpointing of layers whose weights, and at the bottom inputs, have no gradient."""
    plain, *others = [
        config_of(f"{preset} {frozen[0]} {checkpointing}", frozen, deepspeed=preset, train={"steps": 4}, model=model)
        for frozen in (ENCODER, ["roberta.embeddings.*"])
        for preset in ("zero1", "zero3")
        for checkpointing in (False, True)
        for model in [{"activation_checkpointing": checkpointing}]
    ]
    run_in_turn(2, [plain, *others])
    curves = [losses(Path(config.run.dir)) for config in (plain, *others)]
    for curve in curves[1:4]:
        assert curve == pytest.approx(curves[0], abs=1e-5, rel=0)
    for curve in curves[5:]:
        assert curve == pytest.approx(curves[4], abs=1e-5, rel=0)
    assert curves[4] != curves[0]


OF_EACH_STAGE = [("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "fp16"), ("zero3", "bf16")]
RESUMED = {1: OF_EACH_STAGE, 2: [*OF_EACH_STAGE, *LAYOUTS[1:4], LAYOUTS[-1]]}


@pytest.mark.parametrize("ranks", RESUMED)
def test_a_resume_is_bit_equal_with_dropout(ranks: int, config_of: Any) -> None:
    layouts = RESUMED[ranks]
    configs = [config_of(" ".join(layout), dropout=True, **of_layout(layout)) for layout in layouts]
    run_in_turn(ranks, configs)
    clean = [losses(Path(config.run.dir)) for config in configs]
    for config in configs:
        shutil.rmtree(checkpoint(config, 4))
    run_in_turn(ranks, configs)
    assert [losses(Path(config.run.dir)) for config in configs] == clean


def test_another_layout_goes_on_with_the_same_bits(config_of: Any, tmp_path: Path) -> None:
    """Out of each stage and into each, fp32, bf16, fp16 and offload, on 1 and 2 ranks."""
    walks = [
        ((2, ("zero2", "bf16")), (1, ("zero3", "bf16"))),
        ((2, ("zero3", "bf16")), (1, ("zero1", "fp32"))),
        ((1, ("zero0", "fp32")), (2, ("zero3", "fp32"))),
        ((1, ("zero3", "fp16")), (2, ("zero0", "fp32"))),
        ((1, ("zero1", "fp32")), (2, ("zero2_offload", "bf16"))),
        ((2, ("zero3_offload", "bf16")), (1, ("zero2", "fp32"))),
    ]
    first = [
        (before, config_of(f"walk {number}", **of_layout(layout))) for number, ((before, layout), _) in enumerate(walks)
    ]
    then = [
        (after, config_of(f"walk {number}", **of_layout(layout))) for number, (_, (after, layout)) in enumerate(walks)
    ]
    for ranks in (1, 2):
        group = [config for count, config in first if count == ranks]
        run_in_turn(ranks, group)
    for _, config in first:
        shutil.rmtree(checkpoint(config, 4))
    for ranks in (1, 2):
        run_in_turn(ranks, [config for count, config in then if count == ranks])
    reference = losses(Path(first[2][1].run.dir))  # fp32 throughout
    for number, (_, config) in enumerate(then):
        found = losses(Path(config.run.dir))
        assert found == pytest.approx(reference, abs=1e-5 if number == 2 else 1e-2, rel=0)
        ours, theirs = ZeroFiles(checkpoint(config, 4)).frozen, ZeroFiles(checkpoint(config, 2)).frozen
        assert the_same(ours, theirs) == set(ours)
        converted(config.run.dir, tmp_path / f"model {number}")


def test_a_killed_run_goes_on_bit_for_bit(config_of: Any, tmp_path: Path) -> None:
    sections = {"deepspeed": "zero2", "train": {"steps": 6, "precision": "bf16"}}
    clean, config = (config_of(run, dropout=True, **sections) for run in ("clean", "killed"))
    assert train(clean, 2) == EXIT_FINISHED
    command = ("train", write_config(config, tmp_path / "config.yaml"), "--nproc-per-node", "2")
    gate = Gate(tmp_path)
    gate.close_after(3)
    process = start_maskwright(*command, **gate.environment)
    wait_for_step(process, Path(config.run.dir), 3)
    os.kill(rank_processes(process)[0], signal.SIGKILL)
    gate.open()
    process.communicate(timeout=TIMEOUT_S)
    process = start_maskwright(*command, **gate.environment)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_FINISHED, output
    assert "resuming from step-00000002" in output
    assert losses(Path(config.run.dir)) == losses(Path(clean.run.dir))


def test_damage_to_the_frozen_weights_is_found(trained: dict[str, Config], tmp_path: Path) -> None:
    for name, damage in DAMAGES.items():
        run = tmp_path / name
        shutil.copytree(trained["zero2 bf16"].run.dir, run)
        damage(run / "checkpoints" / "step-00000004" / FROZEN)
        (found,) = candidates(run)
        assert any(FROZEN in fault for fault in find_candidate_faults(found)), name


def state_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    files, found = ZeroFiles(folder), {}
    for kind in (WEIGHT, *MOMENTS):
        found[kind] = torch.empty(files.shapes[name].numel())
        files.read_into(name, 0, found[kind], kind)
    return found


QUERY, TABLE = "roberta.encoder.layer.1.attention.self.query.weight", "roberta.embeddings.word_embeddings.weight"


def test_what_begins_to_train_on_a_resume_is_updated_as_plain_torch_does(
    config_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With moments, and a count of updates, of its own; and then bit-equal again, and in another layout to 1e-5."""
    sections = {"train": {"steps": 6}, "batch": {"micro_size": 2}}
    presets = ["zero0", "zero1", "zero2", "zero3"]
    frozen = [config_of(preset, deepspeed=preset, **sections) for preset in presets]
    free = [config_of(preset, [], deepspeed=preset, **sections) for preset in presets]
    run_in_turn(2, frozen, stopped=[True] * len(frozen))
    capsys.readouterr()
    run_in_turn(2, free)
    shown = capsys.readouterr().out
    size = sum(weight.numel() for weight in ZeroFiles(checkpoint(frozen[0], 2)).frozen.values())
    assert f"frozen: 32 weights of {size:,} parameters begin to train, with fresh moments" in shown
    assert "model.frozen ['roberta.encoder.*'] → []" in shown
    expected = plain_losses(free[0], "roberta.encoder.", until=2)
    for config in free:
        assert losses(Path(config.run.dir)) == pytest.approx(expected, abs=1e-5, rel=0), config.deepspeed
        updates = ZeroFiles(checkpoint(config, 4)).updates
        assert (updates[QUERY], updates[TABLE]) == (2, 4)
        assert not (checkpoint(config, 4) / FROZEN).exists()

    clean = [losses(Path(config.run.dir)) for config in free]
    for config in free:
        shutil.rmtree(checkpoint(config, 6))
    run_in_turn(2, free)
    assert [losses(Path(config.run.dir)) for config in free] == clean
    shutil.rmtree(checkpoint(free[3], 6))
    assert train(config_of("zero3", [], deepspeed="zero1", **sections)) == EXIT_FINISHED
    assert losses(Path(free[3].run.dir)) == pytest.approx(expected, abs=1e-5, rel=0)


def test_what_is_frozen_on_a_resume_stays_as_it_was_unrounded_and_may_begin_again(
    config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"deepspeed": "zero3", "schedule": {"warmup_steps": 2}}
    first = config_of("run", [], train={"steps": 2, "precision": "bf16"}, **sections)
    then = config_of("run", train={"steps": 4, "precision": "bf16"}, **sections)
    last = config_of("run", [], train={"steps": 6, "precision": "bf16"}, **sections)
    assert train(first, 2) == EXIT_FINISHED
    assert train(then, 2) == EXIT_FINISHED
    size = sum(weight.numel() for weight in ZeroFiles(checkpoint(then, 4)).frozen.values())
    assert f"frozen: 32 weights of {size:,} parameters are kept as they are from here on" in capsys.readouterr().out
    before, after = state_of(checkpoint(then, 2), QUERY), state_of(checkpoint(then, 4), QUERY)
    assert torch.equal(before[WEIGHT], after[WEIGHT])
    assert not torch.equal(before[WEIGHT], before[WEIGHT].bfloat16().float())
    assert all(before[kind].any() and not after[kind].any() for kind in MOMENTS)
    one, other = (converted(checkpoint(then, step), tmp_path / f"model {step}") for step in (2, 4))
    assert the_same(one, other) == {name for name in one if name.startswith("roberta.encoder.")}
    assert train(last, 2) == EXIT_FINISHED
    updates = ZeroFiles(checkpoint(last, 6)).updates
    assert (updates[QUERY], updates[TABLE]) == (2, 6)
    assert not torch.equal(state_of(checkpoint(last, 6), QUERY)[WEIGHT], after[WEIGHT])
