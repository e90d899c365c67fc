"""Pairs of segments on real ranks: the same losses in any layout and over a resume, evaluated, converted, learnt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForPreTraining

from launcher.console import make_console
from tests.preparing import prepare_text
from tests.ranks import ADDING, TINY_ROBERTA, WITHOUT_DROPOUT, losses, metrics, run_ranks, tiny_config, train
from tools.convert import convert
from tools.prepare import prepare
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

SIZES = {**TINY_ROBERTA, **WITHOUT_DROPOUT, "max_position_embeddings": 48}
MODELS: dict[str, dict[str, Any]] = {
    "nsp": {"preset": "bert-base", "overrides": SIZES},
    "sop": {"preset": "albert-base", "overrides": {**SIZES, "embedding_size": 16, "classifier_dropout_prob": 0.0}},
}
CLASSES = {"nsp": "BertForPreTraining", "sop": "AlbertForPreTraining"}
LOGITS = {"nsp": "seq_relationship_logits", "sop": "sop_logits"}
every_task = pytest.mark.parametrize("task", MODELS)


@pytest.fixture(scope="module")
def sentences(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's text with words and sentences marked, train and validation; four sentences a document."""
    folder = tmp_path_factory.mktemp("sentences") / "data"
    text = (workspace / "text.txt").read_text().split("\n\n")
    # The rule wants a capital letter after a full stop.
    capitals = "\n\n".join(" ".join(part.strip().capitalize() + "." for part in one.split(".")[:4]) for one in text)
    (folder.parent / "text.txt").write_text(capitals)
    marks = {"word_starts": "tokenizer", "sentence_starts": "rules"}
    return prepare_text(folder.parent / "text.txt", workspace, folder, validation_fraction=0.1, **marks)


def config_of(workspace: Path, source: Path, run_dir: Path, task: str, **sections: Any) -> Config:
    own: dict[str, Any] = {
        "data": {
            "train": str(source / "train"),
            "validation": str(source / "validation"),
            "seq_len": 48,
            **sections.pop("data", {}),
        },
        "objective": {"pair": {"task": task, "weight": 0.7}, **sections.pop("objective", {})},
        "train": {"steps": 12},
        "checkpoint": {"every_steps": 6, "keep_last": 9},
        "eval": {"every_steps": 6, "samples": 20},
    }
    config = tiny_config(workspace, run_dir, **{**own, **sections})
    model = {"preset": None, "overrides": {}, **MODELS[task], **sections.get("model", {})}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def lose_the_last(config: Config) -> None:
    """As if the run had been lost after step 6."""
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step-00000012")


def values(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run_dir) if name in line]


@every_task
def test_the_losses_depend_on_no_layout_and_a_resume_is_bit_exact(
    task: str, sentences: Path, workspace: Path, tmp_path: Path
) -> None:
    stages = [{"from_tokens": 0, "ratio": 0.3}, {"from_tokens": 2000, "ratio": 0.15}]
    own: dict[str, Any] = {"objective": {"scheme": "ngram", "mask_ratio": stages}}
    one = config_of(workspace, sentences, tmp_path / "one", task, **dict(own))
    assert train(one) == EXIT_FINISHED
    clean, of_pairs = losses(tmp_path / "one"), values(tmp_path / "one", f"train/loss/{task}")
    of_tokens = values(tmp_path / "one", "train/loss/mlm")
    assert len(of_pairs) == 12 and min(of_pairs) > 0.1
    for whole, tokens, pairs in zip(clean, of_tokens, of_pairs, strict=True):
        assert whole == pytest.approx(tokens + 0.7 * pairs, rel=1e-6)
    lose_the_last(one)
    assert train(one) == EXIT_FINISHED
    assert losses(tmp_path / "one") == clean

    options: dict[str, Any] = {"deepspeed": "zero3", "data": {"workers": 1}, **ADDING}
    two = config_of(workspace, sentences, tmp_path / "two", task, **dict(own), **options)
    assert train(two, 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)
    assert values(tmp_path / "two", f"train/loss/{task}") == pytest.approx(of_pairs, abs=1e-5, rel=0)
    for name in ("eval/loss", "eval/perplexity", f"eval/{task}/loss", f"eval/{task}/accuracy", f"eval/{task}/ignored"):
        assert values(tmp_path / "two", name) == pytest.approx(values(tmp_path / "one", name), rel=1e-4), name
    lose_the_last(two)
    assert train(config_of(workspace, sentences, tmp_path / "two", task, **dict(own))) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(clean, abs=1e-5, rel=0)


@every_task
def test_what_is_converted_gives_the_logits_of_training_and_loads_as_it_is(
    task: str, sentences: Path, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, sentences, tmp_path / "run", task)
    assert train(config, 2) == EXIT_FINISHED
    printed = capfd.readouterr().out
    assert f"{task} accuracy " in printed and f"pairs: {task}; " in printed
    evaluated = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert len(evaluated) == 3
    for line in evaluated:
        of_terms = line["eval/mlm/loss"] + 0.7 * line[f"eval/{task}/loss"]
        assert line["eval/loss"] == pytest.approx(of_terms, rel=1e-6)
        assert line["eval/masked_accuracy"] == line["eval/mlm/accuracy"]
        assert 0 <= line[f"eval/{task}/ignored"] < 0.5 and 0 < line[f"eval/{task}/accuracy"] <= 1

    proven = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_from_training == 0 and proven.difference_after_reload == 0
    for one in (AutoModelForPreTraining, getattr(transformers, CLASSES[task])):
        model, report = one.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert type(model).__name__ == CLASSES[task] and not any(report.values())
    card = (tmp_path / "model" / "README.md").read_text()
    assert "; and of pairs of segments whether" in card and "with weight 0.7 |" in card
    assert "| pairs told right |" in card and "pipeline_tag: fill-mask" in card
    shown = card.split("```python\n")[2].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(tmp_path / "model"))
    exec(shown, {})  # as a reader of the card does
    said = capfd.readouterr().out.strip().splitlines()[-1]
    assert said in {"nsp": ("B follows A", "B is from elsewhere"), "sop": ("in order", "not in order")}[task]


@every_task
def test_the_probe_holds_the_logits_of_pairs_and_convert_looks_at_them(
    task: str, sentences: Path, workspace: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from trainer.checkpoint.contents import read_probe
    from trainer.checkpoint.manifest import PROBE
    from trainer.errors import DamagedError

    config = config_of(workspace, sentences, tmp_path / "run", task, train={"steps": 2})
    assert train(config) == EXIT_FINISHED
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    probe = read_probe(folder)
    assert probe.pair_logits is not None and probe.pair_logits.shape == (4, 2) and len(probe.outputs) == 2
    model = AutoModelForPreTraining.from_pretrained(_converted(tmp_path / "run")).eval()
    with torch.no_grad():
        found = getattr(model(**probe.inputs), LOGITS[task])
    assert torch.allclose(found, probe.pair_logits, atol=1e-6)

    # The pair's logits alone are others: an older probe without them is content.
    tensors = load_file(folder / PROBE)
    save_file({**tensors, "pair_logits": tensors["pair_logits"] + 0.01}, tmp_path / PROBE)
    with pytest.raises(DamagedError, match="do not give the logits that training recorded"):
        _compared(folder, tmp_path)
    del tensors["pair_logits"]
    save_file(tensors, tmp_path / PROBE)
    assert read_probe(tmp_path).pair_logits is None
    assert _compared(folder, tmp_path) == 0


def _converted(run_dir: Path) -> Path:
    output = run_dir.with_name("converted")
    convert(str(run_dir), str(output), "float32", "5GB", Console(quiet=True))
    return output


def _compared(folder: Path, with_probe: Path) -> float:
    """Compare a checkpoint's weights with the probe of another folder."""
    from tools.convert import _compare_with_training
    from tools.load_model import load_model
    from trainer.checkpoint.manifest import read_checkpoint_manifest
    from trainer.model.classes import MAIN

    model = load_model(folder, read_checkpoint_manifest(folder), None)
    return _compare_with_training(model, with_probe, MAIN)


def test_partners_are_of_the_same_source_and_phase_in_any_layout(
    sentences: Path, workspace: Path, tmp_path: Path
) -> None:
    """A mixture of two sources, in two lengths of blocks, and a step that is not filled."""
    mixture = [
        {"path": str(sentences / "train"), "name": "much"},
        {"path": str(sentences / "validation"), "name": "few"},
    ]
    data = {"train": mixture, "phases": [{"seq_len": 32, "until_tokens": 1280, "micro_size": 4}]}
    one = config_of(workspace, sentences, tmp_path / "one", "nsp", data={**data, "validation": None})
    two = config_of(
        workspace,
        sentences,
        tmp_path / "two",
        "nsp",
        data={**data, "validation": None, "workers": 2},
        deepspeed="zero3",
    )
    assert train(one) == EXIT_FINISHED and train(two, 2) == EXIT_FINISHED
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5, rel=0)
    for name in ("train/loss/nsp", "source/much/loss", "source/few/loss"):
        expected = values(tmp_path / "one", name)
        assert len(expected) == 12 and values(tmp_path / "two", name) == pytest.approx(expected, abs=1e-5, rel=0)


def test_the_largest_micro_batch_is_found_with_both_terms(sentences: Path, workspace: Path, tmp_path: Path) -> None:
    """By the memory model, as on a CPU, and by a trial step, as on a GPU."""
    auto = {"batch": {"micro_size": "auto", "memory_gib": 1.0}, "train": {"steps": 2}, "eval": {"every_steps": None}}
    config = config_of(workspace, sentences, tmp_path / "run", "nsp", **auto)
    assert train(config) == EXIT_FINISHED
    assert run_ranks(try_sizes, 2, config) == [4, 4]


def try_sizes(config: Config) -> int:
    """Runs on each rank; returns the micro-batch that a trial finds."""
    from trainer.model.source import load_vocabulary
    from trainer.runtime import distributed
    from trainer.sizing.micro_batch_trial import largest_by_trial

    world = distributed.start()
    try:
        return largest_by_trial(config, load_vocabulary(config), world, config.data.seq_len, [2, 4]) or 0
    finally:
        distributed.stop()


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_without_a_pair_its_head_has_gradients_of_nought(
    deepspeed: str, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Documents of one sentence have no border: all is trained as masked tokens alone."""
    lines = (workspace / "text.txt").read_text().replace(". ", "\n").replace("\n\n", "\n")
    (tmp_path / "lines.txt").write_text(lines)
    prepare_text(tmp_path / "lines.txt", workspace, tmp_path / "data", documents="line", sentence_starts="rules")
    none: dict[str, Any] = {
        "data": {"train": str(tmp_path / "data"), "validation": None},
        "eval": {"every_steps": None},
    }
    config = config_of(workspace, tmp_path, tmp_path / "run", "nsp", deepspeed=deepspeed, **none)
    assert train(config, 2) == EXIT_FINISHED
    assert "pairs: nsp; 100.0% of the blocks of 48 have none, and no label: TOO FEW" in capfd.readouterr().out
    assert values(tmp_path / "run", "train/ignored/nsp") == [1.0] * 12
    assert values(tmp_path / "run", "train/loss/nsp") == [None] * 12, "the loss of no pair is no loss of 0"
    found = losses(tmp_path / "run")
    assert found == values(tmp_path / "run", "train/loss/mlm") and found[-1] < found[0] - 0.2
    assert values(tmp_path / "run", "train/skipped_steps")[-1] == 0


def topics(path: Path, shuffled: bool) -> Path:
    """Documents of 24 sentences, each with its document's topic or, shuffled, with any; one of eight."""
    import random

    generator = random.Random(1)
    names, fillers = [f"K{vowel}" for vowel in "aeiouyäö"], [f"l{vowel}" for vowel in "aeiou"]
    documents = []
    for _ in range(600):
        topic = generator.choice(names)
        sentences = [
            f"{generator.choice(names) if shuffled else topic} {generator.choice(fillers)} {generator.choice(fillers)}."
            for _ in range(24)
        ]
        documents.append(" ".join(sentences))
    path.write_text("\n\n".join(documents))
    return path


@pytest.mark.parametrize(
    ("task", "shuffled", "steps"),
    [("nsp", False, 900), ("nsp", True, 400), ("sop", True, 400)],
    ids=["the topic tells", "nothing tells", "no order tells"],
)
def test_what_can_be_told_is_learnt_and_nothing_else(
    task: str, shuffled: bool, steps: int, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tools.tokenizer import train_tokenizer

    text, console = topics(tmp_path / "text.txt", shuffled), make_console()
    train_tokenizer([str(text)], str(tmp_path / "tokenizer"), "wordpiece", 60, console)
    prepare(
        [str(text)],
        str(tmp_path / "tokenizer"),
        str(tmp_path / "data"),
        workers=1,
        validation_fraction=0.2,
        sentence_starts="rules",
        console=console,
    )
    sections: dict[str, Any] = {
        "data": {"seq_len": 24},
        "train": {"steps": steps},
        "optimizer": {"lr": 3.0e-3},
        "schedule": {"warmup_steps": 100},
        "batch": {"global_size": 32, "micro_size": 32},
        "eval": {"every_steps": steps, "samples": 400},
        "checkpoint": {"every_steps": None},
        "logging": {"every_steps": 100},
        "objective": {"pair": {"task": task}, "mask_ratio": 0.1},
    }
    config = config_of(workspace, tmp_path / "data", tmp_path / "run", "nsp", **sections)  # BERT tells both
    # Drawn from a wider normal distribution, attention between sentences is found in a quarter of the steps.
    overrides = {**config.model.overrides, "num_hidden_layers": 2, "initializer_range": 0.15}
    model = config.model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer"), "overrides": overrides})
    assert train(config.model_copy(update={"model": model})) == EXIT_FINISHED
    accuracy = values(tmp_path / "run", f"eval/{task}/accuracy")[-1]
    assert accuracy > 0.75 if not shuffled else 0.4 < accuracy < 0.6
