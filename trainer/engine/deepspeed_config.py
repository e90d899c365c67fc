"""The DeepSpeed configuration: a preset from ds_configs/, plus the numbers that our config owns.

DeepSpeed accepts an unknown top-level key in silence and takes some numbers from two places. Here every
key is checked against a list of known ones, and each number has one owner: what `Config` owns is refused
in a preset. No deepspeed import: `maskwright validate` uses this on a login node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from trainer.config import Config
from trainer.errors import UserError, nearest
from trainer.runtime.files import shipped
from trainer.runtime.paths import user_path
from trainer.runtime.plain_text import shorten
from trainer.runtime.user_files import read_json

PRESETS = shipped("trainer", "ds_configs")

# DeepSpeed key → the key of our config that owns it.
OWNED_KEYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch (derived: global_size / (micro_size × ranks))",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.gradient_accumulation_dtype",
    "activation_checkpointing": "model.activation_checkpointing",
    "checkpoint": "checkpoint",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging",
    "csv_monitor": "logging",
    "steps_per_print": "logging.every_steps",
    "timers": "logging",
    "seed": "run.seed",
}

# Of each key that is read, the values that DeepSpeed's own models take; a test compares the two. Its models are not
# used themselves: to import them takes seconds, and a compiler where there is a GPU.
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Elements = Annotated[int, Field(ge=0, lt=2**40)]
_Flag = bool | None
_Share = Annotated[float, Field(ge=0, le=1)]
_Names = list[str] | str
_Object = dict[str, Any]
_Section = _Object | None

ALLOWED_KEYS: Mapping[str, Any] = {
    "zero_optimization": _Section,
    "zero_force_ds_cpu_optimizer": bool,
    "communication_data_type": Literal["fp32", "fp16", "bf16"] | None,
    "prescale_gradients": bool,
    "gradient_predivide_factor": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "comms_logger": _Object,
    "flops_profiler": _Object,
    "aio": _Section,
}

ALLOWED_ZERO_KEYS: Mapping[str, Any] = {
    "stage": Literal[0, 1, 2, 3],
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": Annotated[int, Field(gt=0, lt=2**40)],
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": _Elements,
    "overlap_comm": _Flag,
    "offload_param": _Section,
    "offload_optimizer": _Section,
    "sub_group_size": _Count,
    "prefetch_bucket_size": _Elements,
    "param_persistence_threshold": _Count,
    "model_persistence_threshold": _Count,
    "max_live_parameters": _Count,
    "max_reuse_distance": _Count,
    "module_granularity_threshold": Annotated[int, Field(gt=-(2**63), lt=2**63)],
    "use_all_reduce_for_fetch_params": bool,
    "allgather_sequential": bool,
    "ignore_unused_parameters": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
    "zero_hpz_partition_size": _Count,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "leaf_module": _Section,
}

_Device = Literal["none", "cpu", "nvme"]
_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "zero_optimization.offload_param": {
        "device": _Device,
        "nvme_path": str | None,
        "buffer_count": _Count,
        "buffer_size": _Elements,
        "max_in_cpu": _Count,
        "pin_memory": bool,
    },
    "zero_optimization.offload_optimizer": {
        "device": _Device,
        "nvme_path": str | None,
        "buffer_count": _Count,
        "pin_memory": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "fast_init": bool,
        "ratio": _Share,
    },
    "zero_optimization.leaf_module": {"classes": _Names, "names": _Names, "name_suffixes": _Names},
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list[str]},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": Annotated[float, Field(ge=0, allow_inf_nan=False)],
        "profile_step": _Count,
        "module_depth": int,
        "top_modules": _Count,
        "detailed": bool,
        "output_file": str | None,
    },
    "aio": {
        "block_size": _Count,
        "queue_depth": _Count,
        "intra_op_parallelism": _Count,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
}
_QUANTIZED_FROZEN = "zero_quantized_nontrainable_weights"
QUANTIZED_KEYS = ("zero_quantized_weights", _QUANTIZED_FROZEN, "zero_quantized_gradients")
"""Of zero_optimization: what has kernels on GPUs only."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name_or_path: str) -> dict[str, Any]:
    """Read a preset by name or path and check every key of it.

    Raises:
        UserError: for an unknown preset, bad JSON, an unknown key, or a key that our config owns.
    """
    path = user_path(name_or_path, "deepspeed")
    if not path.is_file():
        path = PRESETS / f"{name_or_path}.json"
    if not path.is_file():
        names = preset_names()
        raise UserError(
            f"No DeepSpeed preset or file '{name_or_path}'.{nearest(name_or_path, names)}",
            where=f"deepspeed={name_or_path}",
            remedy=f"Give the path of a JSON file or one of the presets: {', '.join(names)}.",
        )
    preset = read_json(path)
    check_preset(preset, str(path))
    return preset


def check_preset(preset: Any, where: str) -> None:
    """Raise UserError for anything in a preset that DeepSpeed would ignore or that our config owns."""
    if not isinstance(preset, dict):
        raise UserError("A DeepSpeed preset is a JSON object.", where=where, remedy="See ds_configs/zero1.json.")
    for key in preset:
        if key in OWNED_KEYS:
            raise UserError(
                f"DeepSpeed key '{key}' is owned by the run config, so that the number has one place.",
                where=f"{where}: {key}",
                remedy=f"Remove it there and set {OWNED_KEYS[key]} in the run config.",
            )
        _check(preset, key, ALLOWED_KEYS, "", where)
    zero = preset.get("zero_optimization") or {}
    for key in zero:
        _check(zero, key, ALLOWED_ZERO_KEYS, "zero_optimization.", where)
    for path, known in _SECTIONS.items():
        prefix, _, name = path.rpartition(".")
        section = (zero if prefix else preset).get(name) or {}
        for key in section:
            _check(section, key, known, f"{path}.", where)
        if section.get("device") == "nvme":
            raise UserError(
                "State that is offloaded to NVMe is not in the checkpoint's tensors, so such a run could not resume.",
                where=f"{where}: {path}.device",
                remedy="Set it to cpu; an encoder's optimizer state fits in the memory of any host.",
            )
    _refuse_what_cannot_run(preset, zero, where)
    if "stage" not in zero:
        raise UserError(
            "zero_optimization.stage must be 0, 1, 2 or 3, got None.",
            where=f"{where}: zero_optimization.stage",
            remedy="Set the stage.",
        )


def _refuse_what_cannot_run(preset: Mapping[str, Any], zero: Mapping[str, Any], where: str) -> None:
    """Refuse what DeepSpeed 0.19.8 takes and fails of later, or computes wrongly."""
    if zero.get("round_robin_gradients") and zero.get("stage") in (1, 2):
        raise UserError(
            "DeepSpeed records other places of weights than round_robin_gradients gives them: such a checkpoint can "
            "neither be converted nor resumed in another layout.",
            where=f"{where}: zero_optimization.round_robin_gradients",
            remedy="Remove it, and begin anew: a run that was begun with it would go on without it with wrong weights.",
        )
    has_ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0) < 1.0
    if has_ratio or preset.get("zero_force_ds_cpu_optimizer"):
        key = "zero_optimization.offload_optimizer.ratio" if has_ratio else "zero_force_ds_cpu_optimizer"
        raise UserError(
            "It needs DeepSpeed's own AdamW on the host, and optimizers here are torch's and ours.",
            where=f"{where}: {key}",
            remedy="Remove it.",
        )


def _check(section: Mapping[str, Any], key: str, known: Mapping[str, Any], prefix: str, where: str) -> None:
    """Refuse a key that is not read, and a value that DeepSpeed does not take."""
    if key not in known:
        raise UserError(
            f"Unknown DeepSpeed key '{prefix}{key}'.{nearest(key, list(known))}",
            where=f"{where}: {prefix}{key}",
            remedy=f"Known here: {', '.join(known)}.",
        )
    try:
        TypeAdapter(known[key]).validate_python(section[key])
    except ValidationError as error:
        must = (
            "must be an object"
            if known[key] in (_Object, _Section)
            else error.errors()[0]["msg"].replace("Input should", "must")
        )
        raise UserError(
            f"{prefix}{key} {must}, got {shorten(repr(section[key]))}.",
            where=f"{where}: {prefix}{key}",
            remedy="Correct the value; the presets in ds_configs/ are examples.",
        ) from None


def zero_stage(preset: dict[str, Any]) -> int:
    return preset["zero_optimization"]["stage"]


def check_precision(config: Config, preset: dict[str, Any]) -> None:
    """Refuse half precision at stage 0, and weights that are to stay as they are in 8 bits.

    DeepSpeed 0.19.8 runs it through optimizers of its own whose losses are off (docs/decisions.md has the figures),
    and with fp32 gradient accumulation not at all. Stage 1 on one rank is the same computation, done right.
    """
    precision = config.train.precision
    if zero_stage(preset) == 0 and precision != "fp32":
        raise UserError(
            f"DeepSpeed's {precision} at ZeRO stage 0 gives other losses than fp32 and than the other stages.",
            where=f"deepspeed={config.deepspeed}, train.precision={precision}",
            remedy="Set deepspeed: zero1 (on one rank it costs nothing), or train.precision: fp32.",
        )
    if config.model.frozen and preset["zero_optimization"].get(_QUANTIZED_FROZEN):
        raise UserError(
            f"{_QUANTIZED_FROZEN} keeps frozen weights in 8 bits, and model.frozen keeps them as they are.",
            where=f"deepspeed={config.deepspeed}: zero_optimization.{_QUANTIZED_FROZEN}",
            remedy="Remove it.",
        )


class BatchSizes(Protocol):
    """What DeepSpeed wants to know of a batch: `trainer.schedule.batch_plan.BatchPlan` has it."""

    @property
    def global_size(self) -> int: ...
    @property
    def micro_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


def compose(config: Config, preset: dict[str, Any], plan: BatchSizes) -> dict[str, Any]:
    """Compose the full DeepSpeed dict: the preset and every number that our config owns, none left to a default."""
    precision = config.train.precision
    composed: dict[str, Any] = {
        "train_batch_size": plan.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": precision == "bf16"},
        # initial scale 2^16, doubled after 1,000 good steps, halved after 2 overflows
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        # AdamW comes from torch, which DeepSpeed has not on its list of tested optimizers.
        "zero_allow_untested_optimizer": True,
        # The throughput timer synchronises the device at every forward and step.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        **preset,
    }
    if preset["zero_optimization"].get("offload_optimizer"):  # DeepSpeed's own is compiled on the node
        composed["zero_force_ds_cpu_optimizer"] = False
    if config.train.gradient_accumulation_dtype is not None:
        composed["data_types"] = {"grad_accum_dtype": config.train.gradient_accumulation_dtype}
    return composed
