"""`model.attention_backend` on real ranks: what is found is the same on all and is kept; what is asked for is used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import assert_one_card, maskwright
from tests.faults import with_dropout
from tests.ranks import losses, run_ranks, tiny_config, train, write_config
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.model.attention_backend import RECORD, AttentionShape, fastest

SHAPE = AttentionShape(batch=2, heads=2, seq_len=64, width=16, dropout=0.0, precision="fp32")


def _find(config: Config, shape: AttentionShape, folder: Path, keep: bool) -> int:
    from trainer.runtime import distributed

    world, said = distributed.start(), []
    found = fastest(config, shape, world, said.append, keep)
    (folder / f"found-{world.rank}.json").write_text(json.dumps([found, said]))
    distributed.stop()
    return 0


def find(config: Config, folder: Path, shape: AttentionShape = SHAPE, keep: bool = True) -> list[Any]:
    """What two ranks find and say, the same on both."""
    assert run_ranks(_find, 2, config, shape, folder, keep) == [0, 0]
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


def kernels_of(run_dir: Path) -> set[str]:
    """Of attention, in the profile of a step."""
    (trace,) = (run_dir / "profile").glob("*/*rank-00000*")
    opened = gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open()
    with opened as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::_scaled_dot_product")} - {
        "_scaled_dot_product_flash_attention_for_cpu_backward"
    }


def test_what_the_first_start_finds_is_kept_for_every_later_one(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path / "run")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / RECORD
    backend, (line,) = find(config, tmp_path, keep=False)
    assert backend == "flash" and "by measurement of a layer, forward and backward: flash " in line
    assert not path.exists(), "a dry run"

    find(config, tmp_path)
    (record,) = json.loads(path.read_text())
    assert record["backend"] == "flash" and record["milliseconds"]["flash"] > 0
    # What is remembered is used, whatever a measurement would find now; the micro-batch may have changed.
    path.write_text(json.dumps([{**record, "backend": "math"}]))
    larger = AttentionShape(**{**vars(SHAPE), "batch": 8})
    assert find(config, tmp_path, larger) == ["math", [f"attention: the math backend, as in an earlier start ({path})"]]

    # Another precision is another case, and dropout one that no fast kernel of a CPU can compute.
    assert find(config, tmp_path, AttentionShape(**{**vars(SHAPE), "precision": "bf16"}))[0] == "flash"
    backend, (line,) = find(config, tmp_path, AttentionShape(**{**vars(SHAPE), "dropout": 0.1}))
    assert backend is None and "none of its fast backends" in line
    assert [each["backend"] for each in json.loads(path.read_text())] == ["math", "flash", None]
    assert find(config, tmp_path, AttentionShape(**{**vars(SHAPE), "dropout": 0.1}))[0] is None
    assert len(json.loads(path.read_text())) == 3, "that there is none is remembered, too"
    for damaged in ("{", "[1]", json.dumps([{**record, "backend": ["flash"]}]), json.dumps([{"case": record["case"]}])):
        path.write_text(damaged)  # it only saves a measurement
        assert find(config, tmp_path)[0] == "flash"


def test_the_one_that_is_asked_for(workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = tiny_config(workspace, tmp_path / "plain", train={"steps": 3, "profile": {"start": 2, "steps": 1}})
    config = write_config(plain, tmp_path / "plain.yaml")
    assert train(plain, 2) == EXIT_FINISHED
    assert "attention:" not in capfd.readouterr().out
    model = plain.model.model_copy(update={"attention_backend": "math"})
    asked = plain.model_copy(
        update={"model": model, "run": plain.run.model_copy(update={"dir": str(tmp_path / "run")})}
    )
    assert train(asked, 2) == EXIT_FINISHED
    assert capfd.readouterr().out.count("attention: the math backend, as the config says") == 1
    assert kernels_of(tmp_path / "plain") == {"_scaled_dot_product_flash_attention_for_cpu"}
    assert kernels_of(tmp_path / "run") == {"_scaled_dot_product_attention_math"}
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)

    refused = maskwright("train", config, "run.dir=" + str(tmp_path / "no"), "model.attention_backend=cudnn")
    words = ("The cudnn backend", "fp32", "on cpu", "model.attention_backend=cudnn", "model.attention_backend=auto")
    assert_one_card(refused, EXIT_USER_MISTAKE, *words)

    dropping = with_dropout(workspace, tmp_path / "dropping", train={"steps": 1})
    dropping = dropping.model_copy(update={"model": dropping.model.model_copy(update={"attention_backend": "flash"})})
    assert train(dropping) == EXIT_FINISHED
    assert "model.attention_backend=flash has no effect: on CPU attention with dropout" in capfd.readouterr().out


def test_cuda_graphs_are_refused_where_gradients_accumulate(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path / "run", batch={"global_size": 8, "micro_size": 2})
    path = write_config(config, tmp_path / "config.yaml")
    refused = maskwright("validate", path, "model.compile=reduce-overhead")
    words = ("one micro-batch", "accumulate 4", "batch.micro_size=2", "Set model.compile=true")
    assert_one_card(refused, EXIT_USER_MISTAKE, *words)
    four = ("model.compile=reduce-overhead", "--nproc-per-node", "4")
    allowed = maskwright("validate", path, *four)
    assert allowed.returncode == EXIT_FINISHED, allowed.stderr
    moving = maskwright("validate", path, *four, "deepspeed=zero2_offload")
    assert_one_card(moving, EXIT_USER_MISTAKE, "weights that stay where they are", "deepspeed=zero2_offload")
    for mode in ("true", "max-autotune", "reduce-overhead"):  # Gpu S4
        cut = maskwright("validate", path, f"model.compile={mode}", "deepspeed=zero3")
        words = (
            "cannot see through ZeRO-3",
            "deepspeed=zero3",
            "Set model.compile=false, or deepspeed to zero1 or zero2.",
        )
        assert_one_card(cut, EXIT_USER_MISTAKE, *words)
    searching = maskwright("validate", path, *four, "batch.micro_size=auto")
    assert_one_card(searching, EXIT_USER_MISTAKE, "needs a number for batch.micro_size")
    unknown = maskwright("validate", path, "model.compile=fastest")
    words = ("'model.compile'", "true, false, reduce-overhead or max-autotune", "fastest")
    assert_one_card(unknown, EXIT_USER_MISTAKE, *words)
