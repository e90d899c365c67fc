"""Presets and the composed dict, checked against DeepSpeed's own reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.ranks import run_ranks, tiny_config
from trainer.config.file import parse_config
from trainer.engine.deepspeed_config import (
    _SECTIONS,
    ALLOWED_KEYS,
    ALLOWED_ZERO_KEYS,
    OWNED_KEYS,
    check_preset,
    compose,
    load_preset,
    preset_names,
    zero_stage,
)
from trainer.errors import UserError
from trainer.schedule.batch_plan import plan_batch
from trainer.schedule.phases import lay_out

PRESETS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def composed(preset: str, **train: Any) -> dict[str, Any]:
    raw = {
        "run": {"dir": "run"},
        "model": {"preset": "roberta-base", "tokenizer": "t"},
        "data": {"train": "data"},
        "batch": {"global_size": 24, "micro_size": 3},
        "optimizer": {"clip": 0.7},
        "train": {"steps": 5, "precision": "fp32", **train},
        "deepspeed": preset,
    }
    config = parse_config(raw, "test")
    plan = plan_batch(config.batch, config.train, lay_out(config.data, config.batch), 2, [100])
    return compose(config, load_preset(preset), plan)


def read_by_deepspeed(cases: list[dict[str, Any]]) -> int:
    """Runs on each of 2 ranks, because DeepSpeedConfig checks the batch against the world size."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for case in cases:
        found = DeepSpeedConfig(dict(case))
        assert (found.train_batch_size, found.train_micro_batch_size_per_gpu) == (24, 3)
        assert found.gradient_accumulation_steps == 4
        assert found.gradient_clipping == 0.7
        assert found.bfloat16_config.enabled == case["bf16"]["enabled"]
        assert found.float16_config.enabled == case["fp16"]["enabled"]
        assert found.optimizer_name is None and found.scheduler_name is None
        for key, value in case["zero_optimization"].items():
            assert _as_plain(getattr(found.zero_config, key), value) == value, key
    return 0


def _as_plain(read: Any, given: Any) -> Any:
    """A sub-section as a dict of the keys that were given."""
    return {key: getattr(read, key) for key in given} if isinstance(given, dict) else read


def test_every_preset_is_found_by_name_and_loads_through_deepspeeds_own_reader():
    assert preset_names() == sorted(PRESETS)
    cases = [composed(name) for name in PRESETS]
    cases += [composed(name, precision="bf16", gradient_accumulation_dtype="fp32") for name in PRESETS[1:]]
    cases += [composed(name, precision="fp16") for name in PRESETS[1:]]
    assert run_ranks(read_by_deepspeed, 2, cases) == [0, 0]


def known_to_deepspeed() -> int:
    """Runs on a rank of its own, so that pytest's process needs no deepspeed.

    Each key is one of DeepSpeed's, and no value that we take is refused by it.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(model: Any) -> set[str]:
        aliases = {field.alias for field in model.model_fields.values() if field.alias}
        return aliases | set(model.model_fields)

    assert set(ALLOWED_ZERO_KEYS) <= names(DeepSpeedZeroConfig)
    assert set(_SECTIONS["zero_optimization.offload_param"]) <= names(DeepSpeedZeroOffloadParamConfig)
    assert set(_SECTIONS["zero_optimization.offload_optimizer"]) <= names(DeepSpeedZeroOffloadOptimizerConfig)
    takes = {
        DeepSpeedZeroConfig: ALLOWED_ZERO_KEYS,
        DeepSpeedZeroOffloadParamConfig: _SECTIONS["zero_optimization.offload_param"],
        DeepSpeedZeroOffloadOptimizerConfig: _SECTIONS["zero_optimization.offload_optimizer"],
        DeepSpeedZeroLeafModuleConfig: _SECTIONS["zero_optimization.leaf_module"],
        CommsLoggerConfig: _SECTIONS["comms_logger"],
    }
    for model, keys in takes.items():
        for key, annotation in keys.items():
            for value in ODD_VALUES:
                assert not accepted(TypeAdapter(annotation).validate_python, value) or accepted(
                    lambda given, model=model, key=key: model(**{key: given}), value
                ), f"{model.__name__}: {key}={value!r}"
    return 0


ODD_VALUES = [None, True, -1, 0, 1, 2.5, 5e8, 10**30, math.inf, math.nan, "big", "auto", "cpu", "5", [], ["a"], [1], {}]


def accepted(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except (ValueError, TypeError):
        return False
    return True


def test_every_key_that_we_allow_is_one_that_deepspeed_reads():
    assert run_ranks(known_to_deepspeed, 1) == [0]
    assert not set(ALLOWED_KEYS) & set(OWNED_KEYS)


@pytest.mark.parametrize("key", sorted(OWNED_KEYS))
def test_a_number_that_the_run_config_owns_is_refused_with_its_owner(key: str):
    with pytest.raises(UserError) as caught:
        check_preset({key: 1, "zero_optimization": {"stage": 1}}, "my.json")
    assert f"'{key}' is owned by the run config" in caught.value.problem
    assert caught.value.where == f"my.json: {key}"
    assert OWNED_KEYS[key] in caught.value.remedy


def test_a_scheduler_in_a_preset_is_refused(tmp_path: Path):
    preset = {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(preset))
    with pytest.raises(UserError, match="'scheduler' is owned") as caught:
        load_preset(str(path))
    assert "set schedule in the run config" in caught.value.remedy


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ({"zero_optimisation": {}}, "Unknown DeepSpeed key 'zero_optimisation'. Did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "'zero_optimization.overlap_com'. Did you mean 'ov"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "'zero_optimization.offload_param.devise'. Did you mean 'device'?",
        ),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {}}, "got None"),
        ({}, "got None"),
        ([], "is a JSON object"),
        ({"zero_optimization": 1}, "zero_optimization must be an object, got 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param must be an object, got 'cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "could not resume"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "neither be converted nor resumed"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, "DeepSpeed's own AdamW on the host"),
        ({"zero_optimization": {"stage": 1}, "zero_force_ds_cpu_optimizer": True}, "DeepSpeed's own AdamW on the host"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": math.inf}}, "reduce_bucket_size must be a finite"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}},
            "reduce_bucket_size must be greater than 0, got",
        ),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "must be a valid integer"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 10**30}}, "sub_group_size"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "x"}}}, "device must be 'none', 'cpu' or"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 2}}},
            "ratio must be less than or equal to 1",
        ),
        ({"zero_optimization": {"stage": 3, "leaf_module": 3}}, "leaf_module must be an object, got 3"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"class": "x"}}}, "Did you mean 'classes'?"),
        ({"zero_optimization": {"stage": True, "overlap_comm": "auto"}}, "overlap_comm must be a valid boolean"),
        ({"zero_optimization": {"stage": 1}, "comms_logger": None}, "comms_logger must be an object, got None"),
        (
            {"zero_optimization": {"stage": 1}, "communication_data_type": "fp8"},
            "communication_data_type must be 'fp32'",
        ),
        (
            {"zero_optimization": {"stage": 1}, "gradient_predivide_factor": 0},
            "gradient_predivide_factor must be greater",
        ),
    ],
)
def test_a_mistake_in_a_preset_is_an_error_that_names_the_key(preset: Any, words: str):
    with pytest.raises(UserError) as caught:
        check_preset(preset, "my.json")
    assert words in caught.value.problem
    assert "my.json" in caught.value.where


def test_an_offload_that_is_null_is_none():
    check_preset({"zero_optimization": {"stage": 1, "offload_optimizer": None, "leaf_module": None}}, "my.json")


def train_with_quantized_weights(config: Any) -> int:
    from trainer.engine.engine import TrainingEngine
    from trainer.inputs.inputs import open_inputs
    from trainer.liveness.watchdog import Limits
    from trainer.model.build import build_model
    from trainer.runtime import distributed

    world = distributed.start(Limits.of(config.watchdog).of_start)
    inputs = open_inputs(config, world.size)
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    with pytest.raises(UserError, match="DeepSpeed quantizes on GPUs only"):
        TrainingEngine(built, inputs.ds_config, config.optimizer, world)
    return 0


def test_quantized_weights_on_a_cpu_are_refused(workspace: Path, tmp_path: Path):
    path = tmp_path / "quantized.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}))
    assert run_ranks(train_with_quantized_weights, 1, tiny_config(workspace, tmp_path, deepspeed=str(path))) == [0]


def test_an_unknown_preset_lists_the_names():
    with pytest.raises(UserError, match="Did you mean 'zero3'") as caught:
        load_preset("zero33")
    assert all(name in caught.value.remedy for name in PRESETS)


def test_a_preset_is_found_by_name_or_path_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert zero_stage(load_preset("zero3")) == 3
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert zero_stage(load_preset("mine.json")) == 2
    monkeypatch.chdir("/")
    assert zero_stage(load_preset(str(tmp_path / "mine.json"))) == 2


def test_a_preset_that_is_no_json_is_named(tmp_path: Path):
    (tmp_path / "mine.json").write_text("{zero_optimization}")
    with pytest.raises(UserError, match="Not valid JSON") as caught:
        load_preset(str(tmp_path / "mine.json"))
    assert caught.value.where == str(tmp_path / "mine.json")
