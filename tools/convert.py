"""`maskwright convert`: from a checkpoint of any ZeRO stage to a `save_pretrained` folder, proven before it is kept.

Three comparisons stand between the checkpoint and "done": the weights give the logits that the training engine
recorded; the written folder, loaded back by plain transformers, has no missing or unexpected weight; and it gives
the same logits as the weights that went in. The folder appears only when all hold, for each model in it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tools.model_card import write_model_card
from tools.open_tokenizer import left_open
from trainer.checkpoint.contents import (
    PROBE_TOLERANCE,
    Probe,
    export_names,
    probe_folder,
    read_probe,
    worst_difference,
)
from trainer.checkpoint.find import locate
from trainer.checkpoint.manifest import MODEL_FOLDER, CheckpointManifest
from trainer.checkpoint.resume import recorded_objective
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.errors import DamagedError, UserError
from trainer.model.classes import MAIN
from trainer.runtime.files import give_usual_mode, sync_files, sync_folder
from trainer.runtime.paths import new_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    _check_arguments(dtype, max_shard_size)
    target = new_folder(output)
    folder, manifest = locate(source)
    console.print(f"converting {folder} (step {manifest.step:,})", markup=False)
    _remove_leftovers(target)
    temporary = target.with_name(_temporary_prefix(target) + str(os.getpid()))
    try:
        temporary.mkdir(parents=True)
        found = {
            name: _convert_model(folder, manifest, name, target, temporary, dtype, max_shard_size)
            for name in export_names(folder)
        }
        with _full_disk_explained(target):
            _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    from_training = max(each.difference_from_training for each in found.values())
    after_reload = max(each.difference_after_reload for each in found.values())
    console.print(f"logits: {from_training:.3g} from the training engine's, {after_reload:.3g} after reload as {dtype}")
    for name, each in found.items():
        wrote = f"wrote {target / name}: {each.class_name}, load it with {each.auto_class}.from_pretrained"
        console.print(wrote, markup=False)
    return Conversion(target, folder, manifest.step, from_training, after_reload)


@dataclass(frozen=True)
class _Converted:
    """One model that was written; as `Conversion`."""

    class_name: str
    auto_class: str
    difference_from_training: float
    difference_after_reload: float


def _convert_model(
    folder: Path, manifest: CheckpointManifest, name: str, target: Path, temporary: Path, dtype: str, shard_size: str
) -> _Converted:
    """Load, compare, write and read back one model of a checkpoint.

    Args:
        name: of `export_names`.
    """
    model = _load_into_stock_class(folder, manifest, name)
    probe = read_probe(probe_folder(folder, name)).for_cpu()
    from_training = _compare_with_training(model, probe, folder)
    class_name, before = type(model).__name__, _outputs(model, probe)
    auto_class, output = _auto_class(model), temporary / name
    _check_space(target, model, DTYPES[dtype])
    with _full_disk_explained(target):
        output.mkdir(exist_ok=True)
        _write(model.to(DTYPES[dtype]), folder, manifest, output, shard_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        write_model_card(output, folder, manifest, f"`{class_name}` ({parameters:,} parameters, {dtype})", name)
    del model  # what is compared from here on is a model read back: there need not be two in memory
    after_reload = _compare_after_reload(output, auto_class, DTYPES[dtype], probe, before)
    return _Converted(class_name, auto_class, from_training, after_reload)


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


@contextlib.contextmanager
def _full_disk_explained(target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or isinstance(error, SafetensorError)
        if not full:
            raise
        raise UserError(
            f"The model could not be written: {error}.",
            where=f"--output {target}",
            remedy="Free some space and run the same command again; nothing was left behind.",
        ) from error


def _check_arguments(dtype: str, max_shard_size: str) -> None:
    size = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) *[KMGT]B", max_shard_size.upper())
    if size is None or float(size[1]) == 0:
        raise UserError(
            f"Not a size: '{max_shard_size}'.", where=f"--max-shard-size {max_shard_size}", remedy="Write 5GB or 500MB."
        )
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'.", where=f"--dtype {dtype}", remedy=f"One of {', '.join(DTYPES)}.")


def _load_into_stock_class(folder: Path, manifest: CheckpointManifest, name: str = MAIN) -> Any:
    """Load the checkpoint's fp32 weights strictly into the stock model of this name, in evaluation mode."""
    from transformers import AutoConfig

    from trainer.model.stock import stock_model, untie_if_trained_apart

    with _quiet():
        files = ZeroFiles(folder)
        config = AutoConfig.from_pretrained(folder / MODEL_FOLDER / name, trust_remote_code=False)
        weights = _weights_of(files, config, name, manifest)
        untie_if_trained_apart(config, weights.names)  # a run that an earlier version began did not
        model = stock_model(config, "cpu")
    _fill(model, weights)
    not_finite = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise DamagedError(
            f"The checkpoint holds values that are not finite, in {not_finite[0]}"
            + (f" and {len(not_finite) - 1} more." if len(not_finite) > 1 else "."),
            where=str(folder),
            remedy="Convert an earlier checkpoint: `maskwright checkpoint list`.",
        )
    return model.eval()


def _auto_class(model: Any) -> str:
    from trainer.model.classes import auto_class_of

    return auto_class_of(model.config)


@dataclass(frozen=True)
class _Weights:
    """What a checkpoint holds of one model.

    Attributes:
        names, buffers: by the names in the model, those in the files.
        added: names of the model's weights that another one of the files is to be added to.
    """

    files: ZeroFiles
    names: Mapping[str, str]
    buffers: Mapping[str, str]
    added: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Read a weight, fp32, in its shape."""
        weight = self.files.read_weight(self.names[name])
        return weight + self.files.read_weight(self.added[name]) if name in self.added else weight


def _weights_of(files: ZeroFiles, config: Any, export: str, manifest: CheckpointManifest) -> _Weights:
    """Find the weights of one of the models of a checkpoint."""
    from trainer.model.classes import GENERATOR
    from trainer.model.replaced_tokens import DISENTANGLED, trained_names
    from trainer.model.stock import stock_model

    if len(export_names(files.folder)) == 1:
        names, buffers = ({name: name for name in found} for found in (files.shapes, files.buffers))
        return _Weights(files, names, buffers, {})
    skeleton = stock_model(config, "meta")
    embeddings = f"{skeleton.base_model_prefix}.embeddings."
    names, buffers = (trained_names(export, found, embeddings) for found in (files.shapes, files.buffers))
    added = {}
    if export == MAIN and recorded_objective(manifest.identity)["generator"]["share"] == DISENTANGLED:
        tables = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        name = tables[id(skeleton.get_input_embeddings().weight)]
        added[name] = trained_names(GENERATOR, files.shapes, embeddings)[name]
    return _Weights(files, names, buffers, added)


def _fill(model: Any, weights: _Weights) -> None:
    """Copy parameters and buffers into the model, each of which must be there and no other.

    Parameters that a class computes itself and freezes (RoFormer's sinusoidal positions) are in no checkpoint, and stay
    as it has computed them.

    Raises:
        DamagedError: naming those that are too many or too few.
    """
    from trainer.model.stock import origins

    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    found = origins(model, weights.names)
    differ = (
        sorted(name for name in parameters.keys() - found.keys() if parameters[name].requires_grad)
        + sorted(weights.names.keys() - parameters.keys())
        + sorted(weights.buffers.keys() - buffers.keys())
    )
    if differ:
        raise DamagedError(
            f"The checkpoint's weights are not those of {type(model).__name__}: {', '.join(differ[:5])}.",
            where=str(weights.files.folder),
            remedy="Convert with the transformers version that the checkpoint's manifest names.",
        )
    for name, parameter in model.named_parameters():
        if name in found:
            parameter.data.copy_(weights.read(found[name]))
    for name, in_files in weights.buffers.items():
        buffers[name].copy_(weights.files.buffers[in_files])


def _compare_with_training(model: Any, probe: Probe, folder: Path) -> float:
    """Compute the largest difference from the logits that the training engine recorded, in training's precision."""
    from trainer.model.build import fp32_buffers, restore_fp32_buffers

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


def _write(model: Any, folder: Path, manifest: CheckpointManifest, temporary: Path, max_shard_size: str) -> None:
    with _quiet():
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        _write_tokenizer(model, folder, temporary, manifest.data_order.get("samples") == "documents")


def _write_tokenizer(model: Any, folder: Path, temporary: Path, whole_documents: bool = False) -> None:
    """Write the tokenizer, no longer than the model's positions; with WordPiece a vocab.txt, which older code reads."""
    from transformers import AutoTokenizer

    from trainer.model.classes import CAUSAL, FAMILIES
    from trainer.model.hf_config import position_offset, position_table

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL_FOLDER, trust_remote_code=False)
    if model.config.model_type in FAMILIES[CAUSAL].classes:
        tokenizer = left_open(tokenizer, begins=whole_documents)
    table = position_table(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    positions = positions if table is None else table.num_embeddings - position_offset(model)
    if isinstance(positions, int) and 0 < positions < tokenizer.model_max_length:
        tokenizer.model_max_length = positions
    tokenizer.save_pretrained(temporary)
    pieces = tokenizer.backend_tokenizer.model
    numbers = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    if type(pieces).__name__ == "WordPiece" and max(numbers) + 1 == len(numbers):  # a line's number is its token's id
        pieces.save(str(temporary))


def _compare_after_reload(
    temporary: Path, auto_class: str, dtype: torch.dtype, probe: Probe, before: list[torch.Tensor]
) -> float:
    """Load back with plain transformers; returns the largest difference from the logits before the cast."""
    import transformers

    with _quiet():
        loaded, report = getattr(transformers, auto_class).from_pretrained(
            temporary, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' prints and progress bars off the console; errors are exceptions and get through."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


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
