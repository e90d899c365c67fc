"""A generator and a discriminator on real ranks: beside a plain loop, over a kill, in bf16, and what comes out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForTokenClassification, AutoTokenizer

from tests.commands import assert_one_card, maskwright
from tests.gate import Gate, wait_at_the_gate
from tests.objective_cases import CASES
from tests.ranks import losses, metrics, started_ranks, tiny_config, train, write_config
from tests.waiting import wait_for
from tools.convert import convert
from trainer.checkpoint.contents import read_probe
from trainer.config import Config
from trainer.data.batch import DRAWS, Batch
from trainer.data.block_reader import BlockReader
from trainer.engine.optimizer import build_optimizer
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs
from trainer.model.classes import DETECTING, GENERATOR, MAIN
from trainer.model.sampling import sample_tokens
from trainer.model.trained import build_trained
from trainer.objectives.registry import make_samples
from trainer.schedule.learning_rate import learning_rate

STEPS = 20
ELECTRA = {**CASES["rtd"].sizes, "num_hidden_layers": 2}
SHORT: dict[str, Any] = {"train": {"steps": 8}, "checkpoint": {"every_steps": 4, "keep_last": 9}}


def config_of(
    workspace: Path,
    run_dir: Path,
    generator: dict[str, Any] | None = None,
    preset: str = "electra-small",
    dropout: float = 0.0,
    layers: int = 2,
    **sections: Any,
) -> Config:
    sizes = ELECTRA if preset == "electra-small" else CASES["rtd, disentangled"].sizes
    overrides = {**sizes, "num_hidden_layers": layers, **dict.fromkeys(CASES["rtd"].dropouts, dropout)}
    own: dict[str, Any] = {
        "model": {"preset": preset, "overrides": overrides},
        "objective": {"name": "rtd", "replace_mask": 0.85, "replace_random": 0.0, "generator": generator or {}},
        "checkpoint": {"every_steps": 10, "keep_last": 9},
    }
    merged = {
        name: {**own.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    config = tiny_config(workspace, run_dir, **{**own, **merged})
    return config.model_copy(update={"model": config.model.model_copy(update={"overrides": overrides})})


def batches(config: Config) -> list[Batch]:
    """Of each step, all of its samples in their order."""
    inputs = open_inputs(config, 1)
    samples, size = make_samples(config, inputs.vocabulary, config.data.seq_len), config.batch.global_size
    reader, found = BlockReader(inputs.sources[0], samples), []
    for step in range(STEPS):
        numbers = np.arange(step * size, (step + 1) * size)
        _, blocks = inputs.order.locate(numbers)
        found.append(samples.make_batch(reader.read(blocks), numbers.astype(np.uint64), config.run.seed))
    return found


def plain_losses(config: Config) -> list[float]:
    """What a loop over stock models says, with nothing of the trainer's but weights, batches and the draw of tokens."""
    inputs = open_inputs(config, 1)
    built = build_trained(config, inputs.vocabulary, DETECTING)
    generator, discriminator = built.exports[GENERATOR], built.exports[MAIN]
    adamw, found = build_optimizer(built.module, config.optimizer), []
    for step, batch in enumerate(batches(config), start=1):
        shown, index, labels = batch.inputs["input_ids"], batch.prediction_index, batch.labels["mlm"]
        assert index is not None
        logits = generator(input_ids=shown).logits.flatten(0, 1)[index]
        tokens = shown.flatten().clone()
        tokens[index] = sample_tokens(logits.detach(), batch.inputs[DRAWS].flatten())
        replaced = torch.zeros(tokens.shape)
        replaced[index] = (tokens[index] != labels).float()
        told = discriminator(input_ids=tokens.view_as(shown)).logits.flatten()
        loss = cross_entropy(logits, labels) + 50.0 * binary_cross_entropy_with_logits(told, replaced)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(built.module.parameters(), config.optimizer.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config.optimizer.lr, STEPS, config.schedule)
        adamw.step()
        found.append(float(loss.detach()))
    return found


@pytest.fixture(scope="module")
def reference(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One rank, ZeRO-1, two micro-batches, fp32, embeddings shared."""
    folder = tmp_path_factory.mktemp("reference")
    assert train(config_of(workspace, folder)) == EXIT_FINISHED
    return losses(folder)


def test_it_is_what_a_plain_loop_does(reference: list[float], workspace: Path, tmp_path: Path) -> None:
    assert plain_losses(config_of(workspace, tmp_path)) == pytest.approx(reference, rel=1e-5)
    assert reference[-1] < reference[0] - 1.0, "it learns"


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "activation checkpointing": (1, {"model": {"activation_checkpointing": True}}),
    "ZeRO-2 offload": (2, {"deepspeed": "zero2_offload"}),
    "ZeRO-3 offload": (2, {"deepspeed": "zero3_offload"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_the_layout(name: str, reference: list[float], workspace: Path, tmp_path: Path) -> None:
    ranks, sections = VARIANTS[name]
    assert train(config_of(workspace, tmp_path, **sections), ranks) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("share", ["embeddings", "disentangled"])
def test_bf16_is_fp32_but_for_rounding(share: str, workspace: Path, tmp_path: Path) -> None:
    generator = {"share": share}
    assert train(config_of(workspace, tmp_path / "fp32", generator)) == EXIT_FINISHED
    assert train(config_of(workspace, tmp_path / "bf16", generator, train={"precision": "bf16"}), 2) == EXIT_FINISHED
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    # A draw that falls on the other side of a border is another token, and another label of weight 50.
    assert rounded == pytest.approx(exact, rel=0.05) and rounded != exact
    proven = convert(str(tmp_path / "bf16"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_after_reload == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.timeout(1200)  # g++ is slow on a busy machine
def test_compiled_models_have_the_same_losses(workspace: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"generator": {"share": "disentangled"}, "layers": 1, "train": {"steps": 4}}
    assert train(config_of(workspace, tmp_path / "eager", **small)) == EXIT_FINISHED
    compiled = config_of(workspace, tmp_path / "compiled", model={"compile": True}, **small)
    assert train(compiled, timeout_s=1000) == EXIT_FINISHED
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


def held_back(gate: Path, config: Config) -> int:
    """Runs on each rank."""
    from trainer.train import run

    wait_at_the_gate(gate)
    return run(config)


@pytest.mark.parametrize(("share", "stage"), [("embeddings", "zero3"), ("disentangled", "zero3")])
def test_a_killed_run_goes_on_to_the_bit(share: str, stage: str, workspace: Path, tmp_path: Path) -> None:
    preset = {"embeddings": "electra-small", "disentangled": "deberta-v3-base"}[share]

    def of(name: str) -> Config:
        return config_of(workspace, tmp_path / name, {"share": share}, preset, dropout=0.1, deepspeed=stage, **SHORT)

    assert train(of("clean"), 2) == EXIT_FINISHED
    gate = Gate(tmp_path)
    gate.close_after(6)
    with started_ranks(held_back, 2, gate.path, of("run")) as ranks:
        wait_for(lambda: "step 6/" in ranks.output(), "step 6")
        for process in ranks.processes:
            process.kill()
    assert train(of("run"), 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")


def test_three_ranks_at_stage_3_and_then_one_at_stage_1(workspace: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"batch": {"global_size": 12, "micro_size": 2}, **SHORT}
    generator = {"share": "disentangled"}
    assert train(config_of(workspace, tmp_path / "clean", generator, **sizes)) == EXIT_FINISHED
    assert train(config_of(workspace, tmp_path / "run", generator, deepspeed="zero3", **sizes), 3) == EXIT_FINISHED
    expected = pytest.approx(losses(tmp_path / "clean"), rel=1e-5)
    assert losses(tmp_path / "run") == expected
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert train(config_of(workspace, tmp_path / "run", generator, deepspeed="zero1", **sizes)) == EXIT_FINISHED
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("share", ["embeddings", "disentangled", "nothing"])
def test_both_models_come_out_with_their_cards_and_go_in_again(share: str, workspace: Path, tmp_path: Path) -> None:
    preset = "deberta-v3-base" if share == "disentangled" else "electra-small"
    evaluated: dict[str, Any] = {
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 10, "samples": 16},
    }
    config = config_of(workspace, tmp_path / "run", {"share": share}, preset, **evaluated)
    assert train(config, 2) == EXIT_FINISHED
    lines = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(lines) == 3
    for line in lines:
        terms = line["eval/mlm/loss"] + 50.0 * line["eval/rtd/loss"]
        assert line["eval/loss"] == pytest.approx(terms) and line["eval/perplexity"] == pytest.approx(
            math.exp(line["eval/mlm/loss"])
        )
        assert {"eval/rtd/accuracy", "eval/rtd/precision", "eval/rtd/recall", "eval/masked_accuracy"} <= line.keys()
    assert lines[-1]["eval/rtd/accuracy"] > 0.8, "most tokens are the original ones"
    trained = next(line for line in metrics(tmp_path / "run") if "train/loss" in line)
    assert trained["train/loss"] == pytest.approx(trained["train/loss/mlm"] + 50.0 * trained["train/loss/rtd"])

    output = tmp_path / "model"
    proven = convert(str(tmp_path / "run"), str(output), "float32", "5GB", Console(quiet=True))
    assert (proven.difference_from_training, proven.difference_after_reload) == (0, 0)
    auto = AutoModelForTokenClassification if share == "disentangled" else AutoModelForPreTraining
    loaded = {}
    for name, kind in ((MAIN, auto), (GENERATOR, AutoModelForMaskedLM)):
        loaded[name], report = kind.from_pretrained(output / name, output_loading_info=True)
        assert not any(report.values())
        assert len(AutoTokenizer.from_pretrained(output / name)) == loaded[name].config.vocab_size
    tables = [model.get_input_embeddings().weight for model in loaded.values()]
    assert torch.equal(*tables) == (share == "embeddings")

    probes = tmp_path / "run" / "checkpoints" / "step-00000020"
    shown, told = read_probe(probes / "huggingface" / "generator").inputs, read_probe(probes).inputs
    assert not torch.equal(shown["input_ids"], told["input_ids"]), "the discriminator reads what was drawn"
    cards = [(output / name / "README.md").read_text() for name in (MAIN, GENERATOR)]
    assert "| objective | rtd: which tokens a generator has replaced, with weight 50;" in cards[0]
    assert "| replaced tokens found |" in cards[0] and f"shared: {share}" in cards[0]
    assert "pipeline_tag: fill-mask" in cards[1] and "| objective | generator of rtd" in cards[1]
    assert "`ElectraForMaskedLM`" in cards[1] or "`DebertaV2ForMaskedLM`" in cards[1]
    use = cards[0].split("```python\n")[1].split("```")[0]
    exec(use.replace("PATH_OF_THIS_FOLDER", str(output)), {"print": lambda shape: shape})

    again = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(tmp_path / "again")}),
            "model": config.model.model_copy(update={"preset": None, "from_pretrained": str(output), "overrides": {}}),
            "objective": config.objective.model_copy(
                update={
                    "generator": config.objective.generator.model_copy(  # type: ignore[union-attr]
                        update={"from_pretrained": str(output / GENERATOR)}
                    )
                }
            ),
        }
    )
    assert train(again) == EXIT_FINISHED
    first = next(line for line in metrics(tmp_path / "again") if "eval/loss" in line)
    assert first["step"] == 0 and first["eval/loss"] == pytest.approx(lines[-1]["eval/loss"], rel=1e-5)


def test_a_resume_refuses_other_sharing_and_takes_other_weights_lightly(workspace: Path, tmp_path: Path, capfd) -> None:
    assert train(config_of(workspace, tmp_path / "run", train={"steps": 10})) == EXIT_FINISHED
    longer: dict[str, Any] = {"train": {"steps": 12}, "schedule": {"warmup_steps": 4}}
    for generator, said in (
        ({"share": "disentangled"}, "share"),
        ({"weight": 10.0}, "weight"),
        ({"overrides": {"num_hidden_layers": 1}}, "model was"),
    ):
        assert train(config_of(workspace, tmp_path / "run", generator, **longer)) == EXIT_USER_MISTAKE
        assert "belongs to another run" in (found := capfd.readouterr().out) and said in found
    spelt_out = {"overrides": {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16}}
    assert train(config_of(workspace, tmp_path / "run", spelt_out, **longer)) == EXIT_FINISHED


CARDS = [
    (["objective.name=mlm", "objective.generator.weight=3"], "generator does nothing with name mlm"),
    (["objective.pair.task=sop"], "pair does nothing with name rtd"),
    (["objective.generator.share=half"], "objective.generator.share"),
    (["objective.generator.wieght=3"], "Did you mean 'weight'?"),
    (["objective.generator.overrides.embedding_size=4"], "The embeddings of the generator and of the model differ"),
    (["objective.generator.from_pretrained=nowhere/at/all"], "objective.generator.from_pretrained"),
]


def test_mistakes_are_cards_of_validate_and_plan(workspace: Path, tmp_path: Path) -> None:
    path = write_config(config_of(workspace, tmp_path / "run"), tmp_path / "c.yaml")
    done = maskwright("plan", path, "--json")
    assert done.returncode == EXIT_FINISHED, done.stderr
    assert json.loads(done.stdout)["model"]["class"] == "ElectraForPreTraining"
    shown = maskwright("data", "show", path, "--json")
    assert all(sample["terms"]["rtd"] == 32 for sample in json.loads(shown.stdout))
    for changes, said in CARDS:
        for command in ("validate", "plan"):
            assert_one_card(maskwright(command, path, *changes), EXIT_USER_MISTAKE, said)
