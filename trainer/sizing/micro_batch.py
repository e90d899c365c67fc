"""`batch.micro_size: auto`: the largest micro-batch that fits, the same on all ranks, remembered in the run folder.

On GPUs it is found by trial (`trainer.sizing.micro_batch_trial`). On CPU, where a trial would take minutes and running
out of memory ends the process, it comes from the memory model, which is within 15 % of what is measured
(tests/distributed/test_plan_memory.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trainer.config import Config, run_folder
from trainer.data.tokenizer import Vocabulary
from trainer.engine.deepspeed_config import load_preset
from trainer.errors import UserError
from trainer.model.source import load_vocabulary
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.host_memory import available_bytes
from trainer.runtime.tuning_cache import recall, remember
from trainer.schedule.batch_plan import micro_sizes
from trainer.schedule.mask_ratio import mask_ratios
from trainer.schedule.phases import lay_out
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.zero_memory import CPU_SHARE

RECORD = "micro_size.json"
Trial = Callable[[Config, Vocabulary, World, int, Sequence[int]], int | None]
"""(config, vocabulary, world, tokens a block, ascending sizes) → the largest that fits on every rank; a collective."""


def resolve_micro_size(
    config: Config, world: World, say: Callable[[str], None], trial: Trial, keep: bool = True
) -> int | None:
    """Find what `batch.micro_size: auto` stands for in this run; every rank calls it. None if the config has a number.

    Raises:
        UserError: on every rank, when not even the smallest fits.
    """
    if config.batch.micro_size != "auto":
        return None
    sizes = micro_sizes(config.data, config.batch, world.size)
    if not sizes:
        return None  # which open_inputs refuses, with the remedy
    layout = memory_layout(config, world.size, world.device_name)
    records = distributed.broadcast_from_main(world, read_records(config) if world.is_main else None)
    found = next((record for record in records if is_of_layout(record, layout) and record["micro_size"] in sizes), None)
    if found is not None:
        say(f"micro-batch: {found['micro_size']}, as in the first start of this layout ({run_folder(config) / RECORD})")
        return found["micro_size"]
    if records:
        say(f"micro-batch: searching anew: {_what_differs(records[-1]['layout'], layout)}")
    elif (path := run_folder(config) / RECORD).exists():
        say(f"micro-batch: searching anew: {path} cannot be read; with another number dropout is drawn otherwise")
    vocabulary = distributed.run_on_all_ranks(world, lambda: load_vocabulary(config))
    if world.device.type == "cuda":
        size, how = trial(config, vocabulary, world, longest_blocks(config), sizes), "by trial steps"
    else:
        size, how = _by_model(config, vocabulary, world, sizes)
    if size is None:
        raise _nothing_fits(config, sizes[0], how)
    say(f"micro-batch: {size}, the largest of {_listed(sizes)} that fits ({how})")
    if keep:
        record, path = {"layout": layout, "micro_size": size}, run_folder(config) / RECORD
        distributed.run_on_all_ranks(world, lambda: remember(path, record) if world.is_main else None)
    return size


def predict_micro_size(config: Config, world_size: int) -> tuple[int | None, list[str]]:
    """Say for `validate` what auto will be, or would be on this machine, with a line on it; nothing for a number.

    Returns:
        None for the number where only a trial on GPUs can tell.
    """
    sizes = micro_sizes(config.data, config.batch, world_size)
    if config.batch.micro_size != "auto" or not sizes:
        return None, []
    for record in reversed(read_records(config)):
        device = record["layout"]["device"]
        if is_of_layout(record, memory_layout(config, world_size, device)):
            return record["micro_size"], [f"micro-batch: {record['micro_size']}, as in the first start on {device}"]
    trial = f"micro-batch: auto, one of {_listed(sizes)}: on GPUs it is found by trial steps when training starts"
    if torch.cuda.is_available():
        return None, [f"{trial}; 1 stands for it above"]
    estimate = MemoryEstimate(
        config, load_vocabulary(config), load_preset(config.deepspeed), "cpu", longest_blocks(config)
    )
    budget = _cpu_budget(config, world_size)
    size = estimate.largest(sizes, world_size, budget)
    if size is None:
        return None, [f"{trial}; on this machine's CPU none fits into {budget / 2**30:.1f} GiB a rank"]
    return size, [f"{trial}; on this machine's CPU it is {size} ({_fit(estimate, size, world_size, budget)})"]


def longest_blocks(config: Config) -> int:
    """Count the tokens of the longest blocks that `batch.micro_size` is for."""
    own = [phase.seq_len for phase in config.data.phases if phase.micro_size is None]
    return max(config.data.seq_len, *own) if own else config.data.seq_len


_NEWER_KEYS = {"attention_backend": "auto", "kernels": "auto", "frozen": [], "layers_from": None, "code": False}


def memory_layout(config: Config, world_size: int, device: str) -> dict[str, Any]:
    """Collect all that the memory of a rank depends on beside the micro-batch."""
    model = config.model.model_dump(mode="json")
    for key, default in _NEWER_KEYS.items():
        if model[key] == default:  # records that are older than the key have none
            del model[key]
    if "layers_from" in model and not model["layers_from"]["tile"]:
        del model["layers_from"]["tile"]
    optimizer = {} if config.optimizer.name == "adamw" else {"optimizer": config.optimizer.name}  # it is a newer key
    return {
        **optimizer,
        "objective": config.objective.model_dump(mode="json", include={"name", "pair", "teacher", "generator"}),
        "samples": config.data.samples,
        "ranks": world_size,
        "device": device,
        "sizes": micro_sizes(config.data, config.batch, world_size),
        "memory_gib": config.batch.memory_gib,
        "model": model,
        "seq_len": longest_blocks(config),
        "mask_ratio": max(
            ratio for _, ratio in mask_ratios(config.objective, config.data, lay_out(config.data, config.batch))
        ),
        "precision": config.train.precision,
        "gradient_accumulation_dtype": config.train.gradient_accumulation_dtype,
        "deepspeed": load_preset(config.deepspeed),
    }


def is_of_layout(record: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    """Tell whether a record is of a layout.

    Older ones do not say of which objective they are. They are of the run's own, if there was such a one then: teachers
    and generators came later.
    """
    is_new = any(layout["objective"][key] is not None for key in ("teacher", "generator"))
    unsaid = {} if is_new else {key: layout[key] for key in ("objective", "samples")}
    return {**unsaid, **record["layout"]} == layout


def read_records(config: Config) -> list[dict[str, Any]]:
    """Read what earlier starts found, oldest first; what is no such record is left out."""

    def is_whole(record: dict[str, Any]) -> bool:
        size, layout = record.get("micro_size"), record.get("layout")
        return isinstance(size, int) and size > 0 and isinstance(layout, dict) and bool(layout.get("device"))

    return [record for record in recall(run_folder(config) / RECORD) if is_whole(record)]


def _by_model(config: Config, vocabulary: Vocabulary, world: World, sizes: Sequence[int]) -> tuple[int | None, str]:
    """Find the size by the memory model. The least memory that a rank sees decides, so that all come to the same."""
    budget = min(
        distributed.all_gather(world, _cpu_budget(config, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    )
    estimate = distributed.run_on_all_ranks(
        world, lambda: MemoryEstimate(config, vocabulary, load_preset(config.deepspeed), "cpu", longest_blocks(config))
    )
    size = estimate.largest(sizes, world.size, budget)
    return size, _fit(estimate, size or sizes[0], world.size, budget)


def _cpu_budget(config: Config, local_ranks: int) -> float:
    """Compute the bytes that a rank on CPU may take."""
    if config.batch.memory_gib is not None:
        return config.batch.memory_gib * 2**30
    return CPU_SHARE * available_bytes() / local_ranks


def _fit(estimate: MemoryEstimate, size: int, world_size: int, budget: float) -> str:
    accumulation = estimate.config.batch.global_size // (size * world_size)
    memory = estimate.memory(size, world_size, accumulation)
    return f"modelled: {memory.peak / 2**30:.2f} of {budget / 2**30:.1f} GiB a rank"


def _nothing_fits(config: Config, smallest: int, how: str) -> UserError:
    return UserError(
        f"Not even a micro-batch of {smallest} fits into memory ({how}).",
        where=f"batch.micro_size=auto, batch.memory_gib={config.batch.memory_gib}",
        remedy="Use more ranks, deepspeed=zero2 or zero3, model.activation_checkpointing=true or a smaller "
        "data.seq_len; or allow more with batch.memory_gib.",
    )


def _what_differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [name for name in now if before.get(name) != now[name]]
    plain = [f"{name} {before.get(name)} → {now[name]}" for name in changed if not isinstance(now[name], dict)]
    return ", ".join([*plain, *(f"another {name}" for name in changed if isinstance(now[name], dict))])


def _listed(sizes: Sequence[int]) -> str:
    shown = [str(size) for size in sizes]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]])
