"""What users of other trainers complain about, from end to end; the rest of it is tested where it belongs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from launcher.console import make_console
from tests.commands import maskwright, start_maskwright_into
from tests.ranks import TINY_ROBERTA, losses, tiny_config, train, write_config
from tests.waiting import TIMEOUT_S
from tools.prepare import prepare
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.data.manifest import read_data_manifest
from trainer.errors import EXIT_FINISHED, EXIT_UNEXPECTED
from trainer.inputs.inputs import open_inputs

LINES_BEFORE_STEP_1 = [
    r"run .+: starting afresh \(--resume auto, no checkpoint found\)",
    r"data: [\d,]+ tokens in [\d,]+ blocks of 32; \d+\.\d\d epochs",
    r"batch: 8 sequences a step = 4 micro × 2 ranks × 1 accumulation; 256 tokens a step, 20 steps",
    r"schedule: 4 steps of warm-up to 0.005, then linear to 0 of it",
    r"deepspeed: zero1 \(stage 1\), fp32",
    r"validation: 16 of \d+ blocks",
    r"evaluation at step 0  loss \S+  perplexity \S+  masked accuracy \S+",
]
STEP_LINE = (
    r"step (\d+)/20  loss \d+\.\d{4}  lr \d\.\d\de[+-]\d\d  grad_norm \d+\.\d{3}  [\d,]+ tokens/s  mfu –  "
    r"wait [\d.]+%  peak \d+\.\d\d GiB  eta \d+:\d\d:\d\d"
)
LATER_LINES = [
    STEP_LINE,
    r"evaluation at step 20  .*",
    r"saved .+/checkpoints/step-00000020",
    r"finished: 20 steps, 5,120 tokens\. .+",
]


def evaluated_config(workspace: Path, run_dir: Path, **sections: Any) -> Any:
    validation = {"data": {"validation": str(workspace / "data")}, "eval": {"every_steps": 50, "samples": 16}}
    return tiny_config(workspace, run_dir, **{**validation, "logging": {"every_steps": 5}, **sections})


# A library that talks in every way there is, in every step of every rank.
NOISE = """
import os
if "RANK" in os.environ:
    import logging, sys, warnings
    from trainer.loop import Loop
    original = Loop._train_step
    def train_noisily(self, *arguments):
        print("noise by print")
        print("noise on stderr", file=sys.stderr)
        os.write(1, b"noise from C++\\n")
        warnings.warn("noise by warning")
        logging.getLogger("DeepSpeed").warning("noise by logging")
        return original(self, *arguments)
    Loop._train_step = train_noisily
"""
KINDS_OF_NOISE = ("by print", "on stderr", "from C++", "by warning", "by logging")


def python_path_with(patch: str, folder: Path) -> str:
    """A PYTHONPATH with which each new Python process runs `patch` when it starts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(patch)
    return str(folder)


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run on two ranks by the real command, its output off a terminal, in the company of a noisy library."""
    folder = tmp_path_factory.mktemp("rows")
    path = write_config(evaluated_config(workspace, folder / "run"), folder / "my.yaml")
    variables = {
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "PYTHONPATH": python_path_with(NOISE, folder / "patch"),
    }
    result = maskwright("train", path, "--nproc-per-node", "2", **variables)
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
    return folder / "run", result


def test_the_dict_that_deepspeed_gets_is_derived_whole_and_kept(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    given = json.loads((run[0] / "deepspeed.json").read_text())
    expected = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
    }
    assert {key: given[key] for key in expected} == expected
    assert "optimizer" not in given and "scheduler" not in given


def test_the_console_has_only_our_lines_and_the_noise_is_in_the_rank_logs(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, result = run
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for line, expected in zip(lines, LINES_BEFORE_STEP_1, strict=False):
        assert re.fullmatch(expected, line), line
    for line in lines[len(LINES_BEFORE_STEP_1) :]:
        assert any(re.fullmatch(expected, line) for expected in LATER_LINES), line
    assert str(run_dir) in lines[0]
    assert lines[-2] == f"saved {run_dir}/checkpoints/step-00000020"
    assert lines[-1].startswith("finished: 20 steps")
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert logs == ["rank-00000.log", "rank-00001.log"]
    for name in logs:
        log = (run_dir / "logs" / name).read_text()
        assert [kind for kind in KINDS_OF_NOISE if f"noise {kind}" in log] == list(KINDS_OF_NOISE), name


def test_a_run_on_cpu_compiles_nothing(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """DeepSpeed would build C++ at its first start: a minute, a compiler needed, and two ranks in each other's way."""
    assert not list((run[0].parent / "extensions").rglob("*"))


def test_off_a_terminal_one_plain_line_an_interval(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output = run[1].stdout
    assert "\r" not in output and "\x1b" not in output and "\b" not in output
    assert [int(step) for step in re.findall(r"^step (\d+)/20 ", output, re.MULTILINE)] == [1, 5, 10, 15, 20]


def on_a_terminal(*arguments: str | Path) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 160 columns; returns its exit code and all it wrote."""
    leader, follower = pty.openpty()
    terminal = Path(os.ttyname(follower))
    process = start_maskwright_into(terminal, terminal, *arguments, TERM="xterm", COLUMNS="160")
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says EIO when the last writer has closed
            while part := os.read(leader, 1 << 16):
                written.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(TIMEOUT_S)
    os.close(follower)
    reader.join()
    os.close(leader)
    return code, written.decode(errors="replace")


def test_on_a_terminal_rank_0_alone_shows_a_bar(workspace: Path, tmp_path: Path) -> None:
    path = write_config(evaluated_config(workspace, tmp_path / "run"), tmp_path / "my.yaml")
    code, output = on_a_terminal("train", path, "--nproc-per-node", "2")
    assert code == EXIT_FINISHED, output
    assert "━" in output and "20/20" in output
    assert "\x1b[?25h" in output, "the cursor is shown again"
    assert output.count("starting afresh") == 1
    for rank in range(2):
        log = (tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "━" not in log and "\x1b[" not in log


FAIL_ON_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    from trainer.loop import Loop
    original = Loop._train_step
    def fail_at_step_3(self, *arguments):
        if self.state.step == 2:
            raise ArithmeticError("the number 42 came up")
        return original(self, *arguments)
    Loop._train_step = fail_at_step_3
"""


def test_an_error_on_one_rank_is_shown_with_its_traceback_and_log(workspace: Path, tmp_path: Path) -> None:
    path = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "my.yaml")
    patch = python_path_with(FAIL_ON_RANK_1, tmp_path / "patch")
    result = maskwright("train", path, "--nproc-per-node", "2", PYTHONPATH=patch)
    assert result.returncode == EXIT_UNEXPECTED
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr
    assert "in fail_at_step_3" in result.stderr
    log = tmp_path / "run" / "logs" / "rank-00001.log"
    card = result.stderr[result.stderr.index("Unexpected error: ") :].splitlines()
    assert card[0] == "Unexpected error: ArithmeticError: the number 42 came up"
    assert card[1] == f"  where:  rank 1; its log: {log}"
    assert card[2].startswith("  remedy:") and len(card) == 3
    assert "ArithmeticError: the number 42 came up" in log.read_text()
    assert "closed by peer" not in result.stderr, "the echo on rank 0 is not the cause"


def test_the_logged_loss_is_the_mean_over_all_masked_tokens_of_the_global_batch(
    workspace: Path, tmp_path: Path
) -> None:
    """Against plain transformers, one batch for the whole step, on blocks with unequal numbers of masked tokens."""
    lines = (workspace / "text.txt").read_text().replace("\n\n", " ").split(" ")
    text = tmp_path / "lines.txt"
    generator = np.random.default_rng(0)
    text.write_text("".join(word + ("\n" if generator.random() < 0.3 else " ") for word in lines))
    tokenizer = workspace / "tokenizer"
    prepare([str(text)], str(tokenizer), str(tmp_path / "data"), documents="line", workers=1, console=make_console())

    settings = RobertaConfig(vocab_size=500, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TINY_ROBERTA)
    torch.manual_seed(0)
    RobertaForMaskedLM(settings).save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "stock")
    config = tiny_config(
        workspace,
        tmp_path / "run",
        model={"preset": None, "from_pretrained": str(tmp_path / "stock"), "overrides": {}},
        data={"train": str(tmp_path / "data")},
        objective={"mask_ratio": 0.85},  # with a separator after every few words, blocks run out of tokens to mask
        optimizer={"lr": 1e-30},  # the weights stay as they are
        train={"steps": 3},
    )
    assert train(config, 2) == EXIT_FINISHED

    inputs = open_inputs(config, 2)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "stock").eval()
    expected, means_of_micro_batches = [], []
    for step in range(3):
        samples = np.arange(step * 8, step * 8 + 8)
        _, blocks = inputs.order.locate(samples)
        tokens = inputs.sources[0].read_blocks(blocks, inputs.objective.view.payload)
        batch = inputs.objective.make_batch(Blocks(tokens), samples.astype(np.uint64), config.run.seed)
        labels = torch.full_like(batch.inputs["input_ids"], IGNORED_LABEL)
        counted = batch.labels["mlm"] != IGNORED_LABEL
        labels.view(-1)[batch.prediction_index[counted]] = batch.labels["mlm"][counted]
        with torch.no_grad():
            expected.append(float(model(input_ids=batch.inputs["input_ids"], labels=labels).loss))
            pairs = zip(batch.inputs["input_ids"].split(2), labels.split(2), strict=True)
            means_of_micro_batches.append(
                float(torch.stack([model(input_ids=ids, labels=label).loss for ids, label in pairs]).mean())
            )
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-6)
    assert expected != pytest.approx(means_of_micro_batches, abs=2e-5), "the test would not see the difference"


def test_validate_needs_no_gpu_writes_nothing_and_works_from_any_folder(workspace: Path, tmp_path: Path) -> None:
    path = write_config(evaluated_config(workspace, tmp_path / "run"), tmp_path / "my.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    before = sorted(tmp_path.rglob("*"))
    for preset, stage in (("zero3", 3), ("mine.json", 2)):
        result = maskwright(
            "validate",
            path,
            f"deepspeed={preset}",
            "--nproc-per-node",
            "2",
            cwd=tmp_path / "elsewhere",
            CUDA_VISIBLE_DEVICES="",
        )
        assert result.returncode == EXIT_FINISHED, result.stderr
        lines = result.stdout.splitlines()
        assert f"deepspeed: {preset} (stage {stage}), fp32" in lines
        assert any(re.fullmatch(LINES_BEFORE_STEP_1[2], line) for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


# All commands of a list in one new process, which alone can have caches of its own.
ONE_AFTER_ANOTHER = """
import json, sys
from launcher.cli import app
for words in json.loads(sys.argv[1]):
    try:
        app(words, prog_name="maskwright")
    except SystemExit as end:
        assert not end.code, words
    print("--- done", file=sys.stderr, flush=True)
"""


def write_input(kind: str, paragraphs: list[str], folder: Path) -> Path:
    source = folder / f"input.{'txt' if kind == 'text' else kind}"
    if kind == "text":
        source.write_text("\n\n".join(paragraphs))
    elif kind == "jsonl":
        source.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs))
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": paragraphs}).to_parquet(source)
    return source


def test_prepare_writes_two_bytes_a_token_no_cache_and_says_first_how_much(workspace: Path, tmp_path: Path) -> None:
    paragraphs = (workspace / "text.txt").read_text().split("\n\n") * 3
    caches = {name: tmp_path / name for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR")}
    for folder in caches.values():
        folder.mkdir()
    commands, kinds = [], ("text", "jsonl", "parquet")
    for kind in kinds:
        source, output = write_input(kind, paragraphs, tmp_path), tmp_path / f"data-{kind}"
        words = ("--input", source, "--tokenizer", workspace / "tokenizer", "--output", output, "--workers", "1")
        commands.append(["prepare", *map(str, words)])
    result = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands)],
        env={**os.environ, **{name: str(folder) for name, folder in caches.items()}},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == EXIT_FINISHED, result.stderr
    for folder in caches.values():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) == 0, folder
    said = result.stderr.split("--- done\n")
    assert len(said) == len(kinds) + 1
    for kind, shown in zip(kinds, said, strict=False):
        assert_written_as_foreseen(tmp_path / f"data-{kind}", shown)


def assert_written_as_foreseen(output: Path, shown: str) -> None:
    """Two bytes a token and little beside them, of which the command has told before it wrote."""
    manifest = read_data_manifest(output)
    assert manifest.dtype == "<u2"
    written = sum(path.stat().st_size for path in output.glob("shard-*"))
    assert 2 * manifest.tokens <= written <= 2 * manifest.tokens + 8 * (manifest.documents + 1) + 64
    beside = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) - written
    assert beside < 100_000, "the tokenizer and the manifest"

    estimate = re.search(r"Expect about ([\d,]+) tokens, ([\d.]+) kB of shards", shown)
    assert estimate, shown
    assert int(estimate[1].replace(",", "")) == pytest.approx(manifest.tokens, rel=0.1)
    expected_bytes = float(estimate[2]) * 1e3
    assert expected_bytes == pytest.approx(written, rel=0.1)
    assert estimate.start() < shown.index("longest document")
