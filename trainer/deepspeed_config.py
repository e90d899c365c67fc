"""The DeepSpeed configuration: a preset from ds_configs/, plus the numbers that our config owns.

DeepSpeed accepts an unknown top-level key in silence and takes some numbers from two places. Here every
key is checked against a list of known ones, and each number has one owner: what `Config` owns is refused
in a preset. No deepspeed import: `maskwright validate` uses this on a login node.
"""

from __future__ import annotations

from typing import Any

from trainer.batch_plan import BatchPlan
from trainer.config import Config
from trainer.errors import UserError, nearest
from trainer.files import shipped
from trainer.paths import user_path
from trainer.user_files import read_json

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

ALLOWED_KEYS = (
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
)

ALLOWED_ZERO_KEYS = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
)

_OFFLOAD_KEYS = {
    "offload_param": ("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    "offload_optimizer": (
        "device",
        "nvme_path",
        "buffer_count",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
        "ratio",
    ),
}


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
        _check_known(key, ALLOWED_KEYS, "", where)
    zero = _object(preset, "zero_optimization", "", where)
    for key in zero:
        _check_known(key, ALLOWED_ZERO_KEYS, "zero_optimization.", where)
    for section, known in _OFFLOAD_KEYS.items():
        for key in _object(zero, section, "zero_optimization.", where):
            _check_known(key, known, f"zero_optimization.{section}.", where)
        if zero.get(section, {}).get("device") == "nvme":
            raise UserError(
                "State that is offloaded to NVMe is not in the checkpoint's tensors, so such a run could not resume.",
                where=f"{where}: zero_optimization.{section}.device",
                remedy="Set it to cpu; an encoder's optimizer state fits in the memory of any host.",
            )
    if zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(
            f"zero_optimization.stage must be 0, 1, 2 or 3, got {zero.get('stage')!r}.",
            where=f"{where}: zero_optimization.stage",
            remedy="Set the stage.",
        )


def _object(parent: dict[str, Any], key: str, prefix: str, where: str) -> dict[str, Any]:
    """The JSON object at `key`; empty when there is none."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{prefix}{key} must be an object, got {value!r}.",
            where=f"{where}: {prefix}{key}",
            remedy="See ds_configs/zero3_offload.json.",
        )
    return value or {}


def _check_known(key: str, known: tuple[str, ...], prefix: str, where: str) -> None:
    if key not in known:
        raise UserError(
            f"Unknown DeepSpeed key '{prefix}{key}'.{nearest(key, known)}",
            where=f"{where}: {prefix}{key}",
            remedy=f"Known here: {', '.join(known)}.",
        )


def stage_of(preset: dict[str, Any]) -> int:
    return preset["zero_optimization"]["stage"]


def check_precision(config: Config, preset: dict[str, Any]) -> None:
    """Refuse half precision at stage 0.

    DeepSpeed 0.19.8 runs it through optimizers of its own whose losses are off (docs/decisions.md has the figures),
    and with fp32 gradient accumulation not at all. Stage 1 on one rank is the same computation, done right.
    """
    precision = config.train.precision
    if stage_of(preset) == 0 and precision != "fp32":
        raise UserError(
            f"DeepSpeed's {precision} at ZeRO stage 0 gives other losses than fp32 and than the other stages.",
            where=f"deepspeed={config.deepspeed}, train.precision={precision}",
            remedy="Set deepspeed: zero1 (on one rank it costs nothing), or train.precision: fp32.",
        )


def compose(config: Config, preset: dict[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """The full DeepSpeed dict: the preset and every number that our config owns, none left to a default."""
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
    if config.train.gradient_accumulation_dtype is not None:
        composed["data_types"] = {"grad_accum_dtype": config.train.gradient_accumulation_dtype}
    return composed
