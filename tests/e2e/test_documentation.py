"""What is shipped as an example works: recipes, and every command and config in the documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launcher.cli import app
from trainer.config.file import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
_ENDS = ("|", "||", "&&", ";", ">", ">>", "2>", "&", "2>&1")


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    """The fenced blocks of all documents in one of the languages."""
    for document in DOCUMENTS:
        if document.is_file():
            for match in _FENCE.finditer(document.read_text(encoding="utf-8")):
                if match["language"] in languages:
                    yield document, match["body"]


def shell_commands() -> Iterator[tuple[Path, list[str]]]:
    """Every command of the shell blocks as words, comments left out and continued lines joined."""
    for document, body in blocks(*SHELLS):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words:
                end = next((place for place, word in enumerate(words) if word in _ENDS), len(words))
                if words[:end]:
                    yield document, words[:end]
                words = words[end + 1 :]


def maskwright_commands() -> list[tuple[Path, list[str]]]:
    """The arguments of each maskwright command, whatever starts it (srun, a path, python -m launcher)."""
    found = []
    for document, words in shell_commands():
        for place, word in enumerate(words):
            if Path(word).name == "maskwright" or words[place - 1 : place + 1] == ["-m", "launcher"]:
                found.append((document, words[place + 1 :]))
                break
    return found


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> list[str]:
    """Parse a command line as the program does, without running it; returns the names of the commands."""
    command = program()
    names: list[str] = []
    context = None
    try:
        while True:
            context = command.make_context(names[-1] if names else "maskwright", list(arguments), parent=context)
            if not hasattr(command, "resolve_command"):
                return names
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            names.append(name)
    except typer.Exit:  # --help and --version end here
        return names


def test_every_command_in_the_documents_parses() -> None:
    commands = maskwright_commands()
    readme = [arguments[0] for document, arguments in commands if document == ROOT / "README.md"]
    assert {"train", "prepare", "tokenizer", "convert"} <= set(readme), "a first run on one's own text is shown"
    for document, arguments in commands:
        try:
            parse(arguments)
        except BaseException as error:
            raise AssertionError(f"{document.name}: maskwright {shlex.join(arguments)}: {error!r}") from error


def test_the_readme_is_short_and_the_chinese_one_shows_the_same_commands() -> None:
    text = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")}
    assert len(text["README.md"].splitlines()) <= 150, "details belong behind one of its three doors"
    english, chinese = ([words for document, words in shell_commands() if document == ROOT / name] for name in text)
    assert english == chinese and len(english) >= 12
    linked = {name: set(re.findall(r"\]\(([\w./-]+)\)", words)) for name, words in text.items()}
    assert linked["README.zh.md"] - {"README.md"} == linked["README.md"] - {"README.zh.md"}


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for link, section in re.findall(r"\]\((?!https?:)([\w./-]*)(#[\w-]+)?\)", document.read_text(encoding="utf-8")):
            target = (document.parent / link).resolve() if link else document
            assert target.exists(), f"{document.name}: {link}"
            if section:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert section[1:] in anchors, f"{document.name}: {link}{section}"


def test_a_wrong_command_would_be_seen() -> None:
    assert parse(["train", "demo", "batch.micro_size=4", "--nproc-per-node", "2"]) == ["train"]
    assert parse(["checkpoint", "list", "runs/a", "--json"]) == ["checkpoint", "list"]
    assert parse(["train", "--help"]) == ["train"] and parse(["--version"]) == []
    for wrong in (["trian", "demo"], ["train", "demo", "--nproc", "2"], ["data", "shwo", "x"], ["convert", "run"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong)


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [word for _, words in shell_commands() if words[0] == "make" for word in words[1:] if word.isidentifier()]
    assert {"demo", "test"} <= set(named) <= targets


def test_every_config_in_the_documents_is_valid(tmp_path: Path) -> None:
    for document, body in blocks("yaml", "yml"):
        raw = yaml.safe_load(body)
        if isinstance(raw, dict) and "run" in raw:
            (tmp_path / "config.yaml").write_text(body, encoding="utf-8")
            try:
                load_config(tmp_path / "config.yaml")
            except Exception as error:
                raise AssertionError(f"{document.name}: {error}\n{body}") from error


RUN_MLM_FLAGS = {
    *("model_name_or_path", "model_type", "config_overrides", "config_name", "tokenizer_name", "cache_dir"),
    *("use_fast_tokenizer", "model_revision", "token", "trust_remote_code", "dtype", "low_cpu_mem_usage"),
    *("dataset_name", "dataset_config_name", "train_file", "validation_file", "overwrite_cache", "streaming"),
    *("validation_split_percentage", "max_seq_length", "preprocessing_num_workers", "mlm_probability"),
    *("line_by_line", "pad_to_max_length", "max_train_samples", "max_eval_samples"),
    *("output_dir", "do_train", "do_eval", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "num_train_epochs", "max_steps", "warmup_ratio", "eval_steps", "save_steps", "save_total_limit"),
    *("fp16", "bf16", "seed", "resume_from_checkpoint", "report_to"),
}
"""Those of the script itself (transformers, examples/pytorch/language-modeling), and those of Trainer in most use."""
_KEY = re.compile(r"[a-z]+(?:\.[a-z_]+)+|deepspeed")


def test_the_table_for_those_who_come_from_run_mlm_has_all_its_flags_and_keys_that_exist(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adapt.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `--")]
    assert set(re.findall(r"`--(\w+)`", "".join(flags for flags, _ in rows))) >= RUN_MLM_FLAGS
    reference = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    found = [text for _, meaning in rows for text in re.findall(r"`([^`]+)`", meaning)]
    keys = [text for text in found if _KEY.fullmatch(text.partition("=")[0])]
    assert len(keys) > 40
    for text in keys:
        key, is_set, _ = text.partition("=")
        if is_set:
            load_config("adapt", [text])
        else:
            assert f"| `{key}` |" in reference, text
