"""Conversion: from a checkpoint of any stage to a folder that plain transformers loads, with training's logits."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.ranks import run_ranks, tiny_config, train
from tools.convert import _outputs, convert
from trainer.checkpoint.contents import Probe, read_probe
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, DamagedError, UserError


@pytest.fixture(scope="module")
def run_of(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a run of 8 steps on 2 ranks by a preset, once."""

    @cache
    def make(preset: str) -> Path:
        run_dir = tmp_path_factory.mktemp(preset)
        config = tiny_config(
            workspace,
            run_dir,
            deepspeed=preset,
            train={"steps": 8},
            data={"validation": str(workspace / "data")},
            eval={"every_steps": 4, "samples": 32, "mask_ratio": 0.2},
        )
        assert train(config, 2) == EXIT_FINISHED
        return run_dir

    return make


@pytest.fixture(params=["zero0", "zero1", "zero2", "zero3"])
def of_each_stage(request: pytest.FixtureRequest, run_of: Callable[[str], Path]) -> Path:
    return run_of(request.param)


@pytest.fixture
def trained(run_of: Callable[[str], Path]) -> Path:
    return run_of("zero2")


def test_every_stage_converts_and_the_logits_are_those_of_training_bit_for_bit(
    of_each_stage: Path, workspace: Path, tmp_path: Path
) -> None:
    conversion = convert(str(of_each_stage), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.step == 8
    assert conversion.difference_from_training == 0.0
    assert conversion.difference_after_reload == 0.0
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "RobertaForMaskedLM"
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight

    # And by hand, without any of our model code: the stock forward pass gives the logits that training recorded.
    probe = read_probe(of_each_stage / "checkpoints" / "step-00000008")
    with torch.no_grad():
        logits = model.eval()(**probe.inputs).logits.flatten(0, 1)[probe.prediction_index]
    torch.testing.assert_close(logits[: len(probe.logits)], probe.logits, rtol=0, atol=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(workspace / "tokenizer").get_vocab()
    answers = pipeline("fill-mask", model=str(tmp_path / "model"), device="cpu")("ka <mask> lo.")
    assert len(answers) == 5


def test_of_a_gpus_micro_batch_one_block_is_computed_on_the_cpu(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list[int]()

    def outputs(model: Any, probe: Probe) -> list[torch.Tensor]:
        blocks.append(len(probe.inputs["input_ids"]))
        return _outputs(model, probe)

    monkeypatch.setattr("tools.convert.read_probe", lambda folder: replace(read_probe(folder), device="cuda"))
    monkeypatch.setattr("tools.convert._outputs", outputs)
    conversion = convert(str(trained), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training < 1e-4 and conversion.difference_after_reload == 0.0
    assert blocks and set(blocks) == {1}


def test_the_model_card_tells_data_steps_settings_curve_and_perplexity(trained: Path, tmp_path: Path) -> None:
    convert(str(trained), str(tmp_path / "model"), "float32", "5GB", make_console())
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for expected in (
        "`RobertaForMaskedLM`",
        "| tokens seen | 2,048 |",
        "validation perplexity of masked tokens",
        "| evaluations | 20% of the tokens are predicted |",
        "| batch | 8 sequences |",
        "linear, 4 warm-up steps",
        "on 2 ranks",
        "## Curve",
        "deepspeed 0.19",
    ):
        assert expected in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_output_is_within_its_rounding(dtype: str, trained: Path, tmp_path: Path) -> None:
    conversion = convert(str(trained), str(tmp_path / "model"), dtype, "5GB", make_console())
    assert 0 < conversion.difference_after_reload < 0.1
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype is getattr(torch, dtype)


def test_sharded_output_loads(trained: Path, tmp_path: Path) -> None:
    convert(str(trained), str(tmp_path / "model"), "float32", "100KB", make_console())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")


def test_a_damaged_or_missing_checkpoint_leaves_no_output(of_each_stage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(of_each_stage, copy)
    victim = next((copy / "checkpoints" / "step-00000008").glob("*states.pt"))
    os.truncate(victim, 100)
    with pytest.raises(DamagedError, match=rf"step-00000008: {victim.name}: 100 bytes instead of"):
        convert(str(copy), str(tmp_path / "model"), "float32", "5GB", make_console())
    with pytest.raises(DamagedError, match=victim.name):
        convert(str(victim.parent), str(tmp_path / "model"), "float32", "5GB", make_console())
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        convert(str(tmp_path), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("size", ["5", "5TiB", "-5GB", ""])
def test_a_size_of_weight_files_that_is_none_is_refused_before_any_work(size: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Not a size: '{size}'"):
        convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", size, make_console())
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_cards_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = maskwright("convert", tmp_path / "run", "--output", tmp_path / "model", "--max-shard-size", "foo")
    assert_one_card(result, EXIT_USER_MISTAKE, "Not a size: 'foo'", "--max-shard-size foo", "Write 5GB or 500MB")
    output = tmp_path / "file" / "model"
    result = maskwright("convert", tmp_path / "run", "--output", output)
    assert_one_card(result, EXIT_USER_MISTAKE, f"Cannot create '{tmp_path}/file'", f"--output {output}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_an_output_that_exists_is_never_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        convert(str(trained), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert (tmp_path / "model" / "mine").read_text() == "keep"


def test_weights_that_do_not_give_trainings_logits_are_refused(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from trainer.checkpoint.manifest import read_checkpoint_manifest, write_manifest
    from trainer.runtime.files import file_hash

    copy = tmp_path / "run" / "checkpoints" / "step-00000008"
    shutil.copytree(trained / "checkpoints" / "step-00000008", copy)
    probe = load_file(copy / "probe.safetensors")
    probe["logits"][0, 0] += 1.0
    save_file(probe, copy / "probe.safetensors")
    manifest = read_checkpoint_manifest(copy)
    path = copy / "probe.safetensors"
    manifest.files["probe.safetensors"] = (path.stat().st_size, file_hash(path))
    write_manifest(copy, manifest)
    with pytest.raises(DamagedError, match="do not give the logits that training recorded"):
        convert(str(copy), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert not (tmp_path / "model").exists()


def convert_with_full_disk(run: Path, output: Path) -> int:
    """Runs in a process of its own: no file may grow above 100 kB, a full disk's nearest relative."""
    import resource
    import signal

    from trainer.errors import MaskwrightError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        convert(str(run), str(output), "float32", "5GB", make_console())
    except MaskwrightError as error:
        print(error.problem, flush=True)
        return error.exit_code
    return 0


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(convert_with_full_disk, 1, trained, tmp_path / "model") == [EXIT_USER_MISTAKE]
    assert "The model could not be written: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(trained: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f".model.tmp-{socket.gethostname()}-{ended.pid}"
    at_work = tmp_path / f".model.tmp-{socket.gethostname()}-{os.getppid()}"
    for folder in (left, at_work):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    convert(str(trained), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert sorted(path.name for path in tmp_path.iterdir()) == [at_work.name, "model"]
