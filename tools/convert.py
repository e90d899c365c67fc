"""`maskwright convert`: from a checkpoint of any ZeRO stage to a `save_pretrained` folder, proven before it is kept.

Three comparisons stand between the checkpoint and "done": the weights give the logits that the training engine
recorded; the written folder, loaded back by plain transformers, has no missing or unexpected weight; and it gives
the same logits as the weights that went in. The folder appears only when all hold.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tools.model_card import write_model_card
from trainer.checkpoint.contents import Probe, read_probe
from trainer.checkpoint.find import locate
from trainer.checkpoint.manifest import MODEL_FOLDER, CheckpointManifest
from trainer.errors import DamagedError, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of a logit from what the training engine recorded, relative to the largest logit. Equal kernels
# give 0; these leave room for another device's order of summation, at the precision that trained.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Conversion:
    """What was converted and how well it agrees (differences are absolute, over the probe's logits)."""

    output: Path
    checkpoint: Path
    step: int
    difference_from_training: float
    difference_after_reload: float


def convert(source: str, output: str, dtype: str, max_shard_size: str, console: Console) -> Conversion:
    """Convert a run's newest whole checkpoint, or the one given.

    Raises:
        UserError: no such checkpoint, unknown dtype, or an output folder that is not empty.
        DamagedError: the checkpoint is damaged, or the logits do not agree.
    """
    target = Path(output).expanduser()
    _check_arguments(target, dtype, max_shard_size)
    folder, manifest = locate(source)
    console.print(f"converting {folder} (step {manifest.step:,})", markup=False)
    model = _load_into_stock_class(folder, manifest)
    probe = read_probe(folder)
    from_training = _compare_with_training(model, probe, folder)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        after_reload = _write_and_reload(model, folder, temporary, DTYPES[dtype], max_shard_size, probe)
        write_model_card(temporary, folder, manifest, dtype)
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"logits: {from_training:.3g} from the training engine's, {after_reload:.3g} after reload as {dtype}")
    console.print(
        f"wrote {target}: {type(model).__name__}, load it with AutoModelForMaskedLM.from_pretrained", markup=False
    )
    return Conversion(target, folder, manifest.step, from_training, after_reload)


def _check_arguments(target: Path, dtype: str, max_shard_size: str) -> None:
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", max_shard_size.upper()):
        raise UserError(
            f"Not a size: '{max_shard_size}'.", where=f"--max-shard-size {max_shard_size}", remedy="Write 5GB or 500MB."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create '{target.parent}': {error.strerror}.", where=f"--output {target}", remedy="Choose another."
        ) from None
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'.", where=f"--dtype {dtype}", remedy=f"One of {', '.join(DTYPES)}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"'{target}' exists already.", where=f"--output {target}", remedy="Choose another or remove it."
        )


def _load_into_stock_class(folder: Path, manifest: CheckpointManifest) -> Any:
    """The stock model with the checkpoint's fp32 weights, strictly loaded, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    from trainer.engine import read_weights

    with _quiet():
        weights = read_weights(folder, manifest.layout["stage"])
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder / MODEL_FOLDER))
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    not_finite = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise DamagedError(
            f"The checkpoint holds values that are not finite, in {not_finite[0]}"
            + (f" and {len(not_finite) - 1} more." if len(not_finite) > 1 else "."),
            where=str(folder),
            remedy="Convert an earlier checkpoint: `maskwright checkpoint list`.",
        )
    return model.eval()


def _compare_with_training(model: Any, probe: Probe, folder: Path) -> float:
    """Largest difference from the logits that the training engine recorded, in the precision that trained."""
    from trainer.model.build import fp32_buffers, restore_fp32_buffers

    dtype = probe.logits.dtype
    buffers = fp32_buffers(model)
    trained = model
    if dtype is not torch.float32:
        import copy

        trained = copy.deepcopy(model).to(dtype)
        restore_fp32_buffers(trained, buffers)
    difference, scale = _difference(_probe_logits(trained, probe), probe.logits)
    if not difference <= PROBE_TOLERANCE[dtype] * scale:
        raise DamagedError(
            f"The weights do not give the logits that training recorded: they differ by {difference:.3g} "
            f"(largest logit {scale:.3g}, allowed {PROBE_TOLERANCE[dtype] * scale:.3g}).",
            where=str(folder),
            remedy="Convert an earlier checkpoint, and report this with the run's versions.",
        )
    return difference


def _write_and_reload(
    model: Any, folder: Path, temporary: Path, dtype: torch.dtype, max_shard_size: str, probe: Probe
) -> float:
    """Save, load back with plain transformers, and compare; returns the largest difference of a logit."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    before = _probe_logits(model, probe)
    with _quiet():
        model.to(dtype).save_pretrained(temporary, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(folder / MODEL_FOLDER).save_pretrained(temporary)
        loaded, report = AutoModelForMaskedLM.from_pretrained(temporary, output_loading_info=True, dtype=torch.float32)
    faults = {name: list(keys) for name, keys in report.items() if keys}
    if faults:
        raise DamagedError(
            f"The written folder does not load cleanly: {faults}.", where=str(temporary), remedy="Report this."
        )
    difference, scale = _difference(_probe_logits(loaded.eval(), probe), before)
    allowed = 0.0 if dtype is torch.float32 else PROBE_TOLERANCE[dtype] * scale
    if not difference <= allowed:
        raise DamagedError(
            f"The written folder gives other logits: they differ by {difference:.3g} (allowed {allowed:.3g}).",
            where=str(temporary),
            remedy="Try --dtype float32.",
        )
    return difference


@torch.no_grad()
def _probe_logits(model: Any, probe: Probe) -> torch.Tensor:
    """Logits [rows, vocabulary] of the probe, computed over its micro-batch as in training."""
    from trainer.model.build import constant_inputs
    from trainer.model.prediction_head import install

    positions = install(model)
    constants = constant_inputs(model, probe.input_ids.shape[1], torch.device("cpu"))
    with positions.select(probe.prediction_index), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(input_ids=probe.input_ids, **constants).logits
    return positions.logits(logits, probe.prediction_index)[: len(probe.logits)]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the largest magnitude expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max()), float(expected.abs().max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' prints and progress bars off the console; errors are exceptions and get through."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished folder its name."""
    mask = os.umask(0)
    os.umask(mask)
    for path in temporary.iterdir():
        path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
    if target.is_dir():  # empty: checked at the start
        target.rmdir()
    os.replace(temporary, target)
