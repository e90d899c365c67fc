"""`maskwright convert`: from a checkpoint of any ZeRO stage to a `save_pretrained` folder, proven before it is kept.

Three comparisons stand between the checkpoint and "done": the weights give the logits that the training engine
recorded; the written folder, loaded back by plain transformers, has no missing or unexpected weight; and it gives
the same logits as the weights that went in. The folder appears only when all hold, for each model in it. Of a mean of
checkpoints each one is held against its own recorded logits, and the folder against the mean.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from tools.average import OPTION, Found, MeanFiles, locate_several
from tools.full_disk import full_disk_explained
from tools.load_model import code_of_checkpoint, load_model, quiet
from tools.model_card import write_model_card
from tools.open_tokenizer import left_open, write_with_vocab_txt
from trainer.checkpoint.contents import (
    PROBE_TOLERANCE,
    Probe,
    export_names,
    kept_weights,
    probe_folder,
    read_probe,
    worst_difference,
)
from trainer.checkpoint.find import candidates, find_best, locate, locate_best
from trainer.checkpoint.manifest import MODEL_FOLDER, CheckpointManifest
from trainer.errors import DamagedError, UserError
from trainer.runtime.files import give_usual_mode, sync_files, sync_folder
from trainer.runtime.paths import new_folder, user_path

if TYPE_CHECKING:
    from trainer.model.model_code import ModelCode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What was converted and how well it agrees (differences are absolute, over the probe's logits).

    Attributes:
        checkpoint, step: of a mean the newest.
    """

    output: Path
    checkpoint: Path
    step: int
    difference_from_training: float
    difference_after_reload: float


def convert(
    source: str,
    output: str,
    dtype: str,
    max_shard_size: str,
    console: Console,
    run_code: bool = False,
    best: bool = False,
    average: Sequence[str] = (),
) -> Conversion:
    """Convert a run's newest whole checkpoint, or the one given.

    Args:
        run_code: run the code of its own that the checkpoint's model may have.
        best: convert that of the run's best evaluation.
        average: convert the mean of these, as `locate_several` finds them.

    Raises:
        UserError: no such checkpoint, unknown dtype, an output folder that is not empty, or code that may not be run.
        DamagedError: a checkpoint is damaged, or the logits do not agree.
    """
    _check_arguments(dtype, max_shard_size, best, average)
    target = new_folder(output)
    found = locate_several(source, average) if average else [locate_best(source) if best else locate(source)]
    folder, manifest = found[-1]
    steps = ", ".join(f"{each.step:,}" for _, each in found)
    what = (
        f"the mean of {len(found)} checkpoints of {source} (steps {steps})" if average else f"{folder} (step {steps})"
    )
    console.print(f"converting {what}", markup=False)
    if not best and not average and (note := _note_on_best(source, manifest)):
        console.print(note, markup=False)
    _remove_leftovers(target)
    code = code_of_checkpoint(folder, manifest, run_code)
    temporary = target.with_name(_temporary_prefix(target) + str(os.getpid()))
    try:
        temporary.mkdir(parents=True)
        written = {
            name: _convert_model(found, name, code, target, temporary, dtype, max_shard_size)
            for name in export_names(folder)
        }
        with full_disk_explained(target, "model"):
            _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    from_training = max(each.difference_from_training for each in written.values())
    after_reload = max(each.difference_after_reload for each in written.values())
    of_each, of_mean = ("of each checkpoint ", "of the mean, which training never ran, ") if average else ("", "")
    console.print(
        f"logits: {of_each}{from_training:.3g} from the training engine's, "
        f"{of_mean}{after_reload:.3g} after reload as {dtype}"
    )
    for name, each in written.items():
        loader = f"{each.auto_class}.from_pretrained{'' if code is None else '(…, trust_remote_code=True)'}"
        console.print(f"wrote {target / name}: {each.class_name}, load it with {loader}", markup=False)
    return Conversion(target, folder, manifest.step, from_training, after_reload)


def _note_on_best(source: str, manifest: CheckpointManifest) -> str:
    """Say that a run has a better checkpoint than its newest one; empty where it has not, and for a checkpoint."""
    found = find_best(candidates(user_path(source)))
    if found is None or found.manifest is None or found.step == manifest.step:
        return ""
    loss = found.manifest.state["best_loss"]
    return f"the best evaluation was that of step {found.step:,}, loss {loss:.4f}: --best converts its checkpoint"


@dataclass(frozen=True)
class _Converted:
    """One model that was written; as `Conversion`."""

    class_name: str
    auto_class: str
    difference_from_training: float
    difference_after_reload: float


def _convert_model(
    found: Sequence[Found],
    name: str,
    code: ModelCode | None,
    target: Path,
    temporary: Path,
    dtype: str,
    shard_size: str,
) -> _Converted:
    """Load, compare, write and read back one model of a checkpoint, or of the mean of several.

    Args:
        found: the checkpoints, the newest last.
        name: of `export_names`.
        code: of its class, where that is not one of transformers.
    """
    folder, manifest = found[-1]
    has_code, probe = code is not None, read_probe(probe_folder(folder, name)).for_cpu()
    model, from_training = _load_proven(found, code, name)
    class_name, before = type(model).__name__, _outputs(model, probe)
    auto_class, output = _auto_class(model), temporary / name
    kept = kept_weights(folder, name)
    _check_space(target, model, DTYPES[dtype])
    with full_disk_explained(target, "model"):
        output.mkdir(exist_ok=True)
        _write(model.to(DTYPES[dtype]), kept, folder, manifest, output, shard_size)
        if code is not None:
            code.write(output)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        described = f"`{class_name}` ({parameters:,} parameters, {dtype})"
        mean_of = [each.step for _, each in found] if len(found) > 1 else []
        write_model_card(
            output, folder, manifest, described, name, has_code=has_code, kept=sorted(kept), mean_of=mean_of
        )
    del model  # what is compared from here on is a model read back: there need not be two in memory
    with _modules_of_its_own():
        after_reload = _compare_after_reload(output, auto_class, DTYPES[dtype], probe, before, has_code, set(kept))
    return _Converted(class_name, auto_class, from_training, after_reload)


def _load_proven(found: Sequence[Found], code: ModelCode | None, name: str) -> tuple[Any, float]:
    """Load a model that gives the logits which training recorded, or the mean of several that do, one after the other.

    Returns:
        the model, and the largest difference from what was recorded.
    """
    if len(found) == 1:
        model = load_model(*found[0], code, name)
        return model, _compare_with_training(model, found[0][0], name)
    differences = [_compare_with_training(load_model(*each, code, name), each[0], name) for each in found]
    return load_model(*found[-1], code, name, MeanFiles(found)), max(differences)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.tmp-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what conversions to the same folder left that were killed on this machine."""
    for path in target.parent.glob(f"{glob.escape(_temporary_prefix(target))}*"):
        process = path.name.removeprefix(_temporary_prefix(target))
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _check_space(target: Path, model: Any, dtype: torch.dtype) -> None:
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"The model takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free.",
            where=f"--output {target}",
            remedy="Free some space, or choose another --output.",
        )


def _check_arguments(dtype: str, max_shard_size: str, best: bool, average: Sequence[str]) -> None:
    if best and average:
        raise UserError(
            f"--best is one checkpoint, and {OPTION} the mean of several.",
            where=f"--best {OPTION} {' '.join(average)}",
            remedy="Leave one of them out.",
        )
    size = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) *[KMGT]B", max_shard_size.upper())
    if size is None or float(size[1]) == 0:
        raise UserError(
            f"Not a size: '{max_shard_size}'.", where=f"--max-shard-size {max_shard_size}", remedy="Write 5GB or 500MB."
        )
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'.", where=f"--dtype {dtype}", remedy=f"One of {', '.join(DTYPES)}.")


def _auto_class(model: Any) -> str:
    from trainer.model.classes import auto_class_of

    return auto_class_of(model.config)


def _compare_with_training(model: Any, folder: Path, name: str) -> float:
    """Compute the largest difference from the logits that the training engine recorded, in training's precision."""
    from trainer.model.build import fp32_buffers, restore_fp32_buffers

    probe = read_probe(probe_folder(folder, name)).for_cpu()
    dtype = probe.logits.dtype
    buffers = fp32_buffers(model)
    trained = model
    if dtype is not torch.float32:
        import copy

        trained = copy.deepcopy(model).to(dtype)
        restore_fp32_buffers(trained, buffers)
    difference, scale = worst_difference(_outputs(trained, probe), probe.outputs)
    if not difference <= PROBE_TOLERANCE[dtype] * scale:
        raise DamagedError(
            f"The weights do not give the logits that training recorded: they differ by {difference:.3g} "
            f"(largest logit {scale:.3g}, allowed {PROBE_TOLERANCE[dtype] * scale:.3g}).",
            where=str(folder),
            remedy="Convert an earlier checkpoint, and report this with the run's versions.",
        )
    return difference


def _write(
    model: Any,
    kept: Mapping[str, torch.Tensor],
    folder: Path,
    manifest: CheckpointManifest,
    temporary: Path,
    max_shard_size: str,
) -> None:
    weights = {**model.state_dict(), **{name: weight.to(model.dtype) for name, weight in kept.items()}}
    with quiet():
        model.save_pretrained(temporary, max_shard_size=max_shard_size, state_dict=weights if kept else None)
        _write_tokenizer(model, folder, temporary, manifest.data_order.get("samples") == "documents")


def _write_tokenizer(model: Any, folder: Path, temporary: Path, whole_documents: bool = False) -> None:
    """Write the tokenizer, no longer than the model's positions; with WordPiece a vocab.txt, which older code reads."""
    from transformers import AutoTokenizer

    from trainer.model.classes import CAUSAL, is_in
    from trainer.model.hf_config import position_offset, position_table

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL_FOLDER, trust_remote_code=False)
    if is_in(model.config, CAUSAL):
        tokenizer = left_open(tokenizer, begins=whole_documents)
    table = position_table(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    positions = positions if table is None else table.num_embeddings - position_offset(model)
    if isinstance(positions, int) and positions > 0 and not 0 < tokenizer.model_max_length <= positions:
        tokenizer.model_max_length = positions
    write_with_vocab_txt(tokenizer, temporary)


@contextlib.contextmanager
def _modules_of_its_own() -> Iterator[None]:
    """Let transformers keep its copies of models' own code in a folder of this conversion alone, for so long.

    Its usual place is shared by all processes of a user, which write there without a lock, and may be read-only.
    """
    from transformers import dynamic_module_utils

    modules: Any = dynamic_module_utils
    usual, path = modules.HF_MODULES_CACHE, list(sys.path)
    with tempfile.TemporaryDirectory(prefix="maskwright-modules-") as folder:
        modules.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            modules.HF_MODULES_CACHE, sys.path[:] = usual, path
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
                del sys.modules[name]


def _compare_after_reload(
    temporary: Path,
    auto_class: str,
    dtype: torch.dtype,
    probe: Probe,
    before: list[torch.Tensor],
    has_code: bool,
    kept: set[str],
) -> float:
    """Load back with plain transformers; returns the largest difference from the logits before the cast.

    Args:
        kept: names of weights that the class has no use for, and that are to be there.
    """
    import transformers

    with quiet():
        loaded, report = getattr(transformers, auto_class).from_pretrained(
            temporary, output_loading_info=True, dtype=torch.float32, trust_remote_code=has_code
        )
    report = {**report, "unexpected_keys": kept.symmetric_difference(report["unexpected_keys"])}
    faults = {name: list(keys) for name, keys in report.items() if keys}
    if faults:
        raise DamagedError(
            f"The written folder does not load cleanly: {faults}.", where=str(temporary), remedy="Report this."
        )
    difference, scale = worst_difference(_outputs(loaded.eval(), probe), before)
    allowed = 0.0 if dtype is torch.float32 else PROBE_TOLERANCE[dtype] * scale
    if not difference <= allowed:
        raise DamagedError(
            f"The written folder gives other logits: they differ by {difference:.3g} (allowed {allowed:.3g}).",
            where=str(temporary),
            remedy="Try --dtype float32.",
        )
    return difference


@torch.no_grad()
def _outputs(model: Any, probe: Probe) -> list[torch.Tensor]:
    """Compute `Probe.outputs` over the probe's micro-batch, as in training."""
    from trainer.model.forward import Forward

    forward = Forward(model, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = forward(probe.inputs, probe.prediction_index)
    logits = output.logits[: len(probe.logits)]
    return [logits] if probe.pair_logits is None else [logits, output.pair_logits[: len(probe.pair_logits)]]


def _publish(temporary: Path, target: Path) -> None:
    """Make the finished folder durable, and give it its name."""
    for path in temporary.rglob("*"):
        if path.is_file():
            give_usual_mode(path)
    for folder in (temporary, *(path for path in temporary.iterdir() if path.is_dir())):
        sync_files(folder)
    if target.is_dir():  # empty: checked at the start
        target.rmdir()
    os.replace(temporary, target)
    sync_folder(target.parent)
