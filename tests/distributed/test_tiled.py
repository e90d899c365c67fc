"""A model that begins with the weights of a narrower run: it starts where that one ended, goes on and is converted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.ranks import TINY_ROBERTA, WITHOUT_DROPOUT, losses, tiny_config, train
from tools.convert import convert
from trainer.errors import EXIT_FINISHED

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def test_training_goes_on_from_a_narrower_run(workspace: Path, tmp_path: Path) -> None:
    """The base learns for 20 steps; twice as wide and deep, its weights give a loss far below that of random ones."""
    narrow, model = tmp_path / "narrow", tmp_path / "model"
    assert train(tiny_config(workspace, narrow), 2) == EXIT_FINISHED
    convert(str(narrow), str(model), "float32", "5GB", Console(quiet=True))
    sections: dict[str, Any] = {"optimizer": {"lr": 1.0e-4}, "train": {"steps": 4}, "deepspeed": "zero3"}
    tiled = {
        "layers_from": {"model": str(model), "tile": True},
        "overrides": {**TINY_ROBERTA, **WITHOUT_DROPOUT, **WIDE},
    }
    assert train(tiny_config(workspace, tmp_path / "wide", model=tiled, **sections), 2) == EXIT_FINISHED
    ended, wide = losses(narrow), losses(tmp_path / "wide")
    assert abs(ended[0] - math.log(500)) < 0.2 and ended[-1] < ended[0] - 1
    assert max(wide) < ended[0] - 0.8
    proven = convert(str(tmp_path / "wide"), str(tmp_path / "converted"), "float32", "5GB", Console(quiet=True))
    assert proven.difference_from_training == proven.difference_after_reload == 0.0
