"""A checkpoint, a model, a tokenizer or a data set of somebody else runs nothing, whatever is in it.

Each file here would make a marker file if something in it ran; none does.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.console import make_console
from tests.ranks import tiny_config, train
from tools.convert import convert
from trainer.checkpoint.manifest import read_checkpoint_manifest, write_manifest
from trainer.checkpoint.safe_load import load_without_code
from trainer.checkpoint.zero_files import MODEL_FILE, ZeroFiles
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, DamagedError, UserError
from trainer.runtime.files import file_hash

ROOT = Path(__file__).parents[2]
OPTIMIZER_FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def calls(marker: Path) -> dict[str, Call]:
    """Calls that make the marker."""
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "io.open": Call(open, str(marker), "w"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "posix.mkdir": Call(os.mkdir, str(marker)),
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    assert train(tiny_config(workspace, run_dir, train={"steps": 2})) == EXIT_FINISHED
    return run_dir


def poisoned(trained: Path, run_dir: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the run in which one file of its checkpoint is changed, and the manifest has its new hash."""
    shutil.copytree(trained, run_dir)
    (folder,) = (run_dir / "checkpoints").glob("step-*")
    path = folder / name
    content = load_without_code(path)
    torch.save(change(dict(content)), folder / "new")
    (folder / "new").rename(path)
    manifest = read_checkpoint_manifest(folder)
    manifest.files[name] = (path.stat().st_size, file_hash(path))
    write_manifest(folder, manifest)
    return folder


PLACES: dict[str, tuple[str, Callable[[Call], Callable[[dict[str, Any]], Any]]]] = {
    "model file": (MODEL_FILE, lambda call: lambda content: content | {"module": call}),
    "client state": (MODEL_FILE, lambda call: lambda content: content | {"rng": {"states": [1, (call,)]}}),
    "whole file": (MODEL_FILE, lambda call: lambda _content: call),
    "optimizer": (OPTIMIZER_FILE, lambda call: lambda _content: {"optimizer_state_dict": {"loss_scaler": call}}),
}


@pytest.mark.parametrize("name", sorted(calls(Path("x"))))
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_a_checkpoint_is_not_run_and_named(
    place: str, name: str, trained: Path, marker: Path, tmp_path: Path
) -> None:
    file, change = PLACES[place]
    call = calls(marker)[name]
    folder = poisoned(trained, tmp_path / "run", file, change(call))
    with pytest.raises(DamagedError, match="nothing in it was run") as caught:
        ZeroFiles(folder).read_weight("roberta.embeddings.word_embeddings.weight")
    assert name.rpartition(".")[2] in caught.value.problem  # pickle has Python 2's names for some modules
    assert file in caught.value.problem
    assert not marker.exists()
    made = pickle.loads(pickle.dumps(call))
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert marker.exists(), "Python's own reader runs it"


@pytest.mark.parametrize("kind", ["legacy", "pickle", "torchscript", "noise", "empty", "list"])
def test_other_kinds_of_files_are_refused(kind: str, marker: Path, tmp_path: Path) -> None:
    path, call = tmp_path / "file.pt", calls(marker)["posix.mkdir"]
    if kind == "legacy":
        torch.save({"module": call}, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"module": call}, protocol=0))
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    elif kind == "list":
        torch.save([1], path)
    else:
        path.write_bytes(b"\x80\x02]q\x00." * 9 if kind == "noise" else b"")
    with pytest.raises(ValueError, match=r"\w"):
        load_without_code(path)
    assert not marker.exists()


def test_convert_and_resume_refuse_it_too(trained: Path, workspace: Path, marker: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    file, change = PLACES["optimizer"]
    poisoned(trained, run_dir, file, change(calls(marker)["posix.system"]))
    with pytest.raises(DamagedError, match=r"posix\.system"):
        convert(str(run_dir), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert train(tiny_config(workspace, run_dir, train={"steps": 4})) == EXIT_DAMAGED
    assert not marker.exists()
    assert not (tmp_path / "model").exists()


def test_what_is_not_deepspeeds_is_damage_and_no_traceback(trained: Path, tmp_path: Path) -> None:
    for number, content in enumerate(
        ({}, {"optimizer_state_dict": 3}, {"optimizer_state_dict": {"param_slice_mappings": [{"x": 1}]}})
    ):
        folder = poisoned(trained, tmp_path / str(number), OPTIMIZER_FILE, lambda _old, new=content: new)
        with pytest.raises(DamagedError, match="what DeepSpeed writes"):
            ZeroFiles(folder)


def test_the_weights_of_a_model_run_nothing(workspace: Path, marker: Path, tmp_path: Path) -> None:
    from transformers import RobertaConfig

    from tools.evaluate.subject import find_subject
    from trainer.config import ModelConfig
    from trainer.data.tokenizer import read_vocabulary
    from trainer.model.build import build_model

    vocabulary = read_vocabulary(load_tokenizer(workspace / "tokenizer"), "")
    config = RobertaConfig(vocab_size=vocabulary.size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    torch.save({"lm_head.bias": calls(marker)["posix.system"]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="Cannot load weights"):
        build_model(ModelConfig(from_pretrained=str(tmp_path)), vocabulary, 32, 0)
    load_tokenizer(workspace / "tokenizer").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        find_subject(str(tmp_path))
    assert not marker.exists()


def test_a_tokenizer_runs_nothing_and_asks_nothing(
    workspace: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises(UserError, match="needs code of its own"):
        load_tokenizer(folder)
    assert not asked
    assert not marker.exists()


def test_an_array_of_objects_is_no_input(workspace: Path, marker: Path, tmp_path: Path) -> None:
    from tools.import_tokens import import_tokens

    np.save(tmp_path / "tokens.npy", np.array([calls(marker)["posix.mkdir"]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a file that can be imported"):
        import_tokens(
            [str(tmp_path / "tokens.npy")], str(workspace / "tokenizer"), str(tmp_path / "out"), console=make_console()
        )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("way", "places"),
    [
        ("weights_only=False", set()),
        ("allow_pickle=True", set()),
        ("pickle_module", set()),
        # Of the folder that this conversion has written, with the code that it was told to run. Elsewhere it is words.
        ("trust_remote_code=(?!False|True)", {"tools/convert.py"}),
        (r"trust_remote_code=True,?\n", set()),
        ("spec_from_|exec_module", {"trainer/model/model_code.py"}),
    ],
)
def test_no_reader_in_the_code_is_told_to_run_code(way: str, places: set[str]) -> None:
    sources = [path for folder in ("launcher", "trainer", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)) for path in sources if re.search(way, path.read_text(encoding="utf-8"))}
    assert found == places
