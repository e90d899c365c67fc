"""What makes a checkpoint self-contained: model configs, tokenizer, run config, frozen weights, probes of the logits.

A probe is a block of the training data with the logits that the training engine itself gives for it, one for each model
that comes out. The conversion must reproduce them, which proves that what comes out is what was trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from trainer.checkpoint.manifest import FROZEN, KEPT, MODEL_FOLDER, PROBE, RUN_CONFIG
from trainer.config import ModelConfig
from trainer.config.file import dump_config
from trainer.data.batch import Batch
from trainer.data.blocks import Blocks
from trainer.engine.engine import TrainingEngine
from trainer.errors import UserError
from trainer.inputs.inputs import Inputs
from trainer.model.build import COMPUTE_DTYPES
from trainer.model.classes import MAIN
from trainer.model.forward import Pass
from trainer.model.kept import read_kept
from trainer.model.model_code import code_of, is_stock
from trainer.model.prediction_head import head_module
from trainer.runtime.files import give_usual_mode

PROBE_ROWS = 8  # logits kept; at a vocabulary of 50,265 a row is 200 kB
# Largest difference of a logit from what the training engine recorded, relative to the largest logit. Equal kernels
# give 0; these leave room for another device's order of summation, at the precision that trained.
_FEW = 2  # logits a row, of a head that is no vocabulary's
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Probe:
    """One forward pass of the training engine, dropout off, and each block one sequence.

    That holds for a run with document attention as well: the block is given as one document is, and as whoever loads
    the converted model will give theirs.

    Attributes:
        inputs: arguments of the forward pass, each of B rows: one block repeated to the training micro-batch, so that
            kernels see equal shapes.
        prediction_index: int64 [B·k], flat positions.
        logits: [PROBE_ROWS, vocabulary] at the first positions, in the training precision.
        device: type of the one that computed them; "cpu" in checkpoints from before it was recorded.
        pair_logits: [n, 2] of the first blocks, PROBE_ROWS at most, of a class with a head for pairs.
    """

    inputs: dict[str, torch.Tensor]
    prediction_index: torch.Tensor
    logits: torch.Tensor
    device: str = "cpu"
    pair_logits: torch.Tensor | None = None

    @property
    def outputs(self) -> list[torch.Tensor]:
        """All that the forward pass has given."""
        return [self.logits, *(() if self.pair_logits is None else (self.pair_logits,))]

    def for_cpu(self) -> Probe:
        """Reduce the probe to the least that the CPU has to compute to compare the logits.

        On the device that trained, blocks beside the first give the kernels the shapes of training and so the same
        bits. Another kind of device has other kernels, and a GPU's micro-batch would take it minutes and gigabytes.
        """
        if self.device == "cpu":
            return self
        count = len(self.prediction_index) // len(self.inputs["input_ids"])
        return replace(
            self,
            inputs={name: tensor[:1] for name, tensor in self.inputs.items()},
            prediction_index=self.prediction_index[:count],
            logits=self.logits[:count],
            pair_logits=None if self.pair_logits is None else self.pair_logits[:1],
        )


def worst_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Compare `Probe.outputs` of two passes.

    Returns:
        Of what differs most for its size: the largest absolute difference, NaN for what is none, and the size, which
        PROBE_TOLERANCE is relative to. That is the largest logit expected; of a pair, whose logits may both be near 0
        where rounding is not, 1 at least.
    """
    worst = (0.0, 0.0, -1.0)
    for one, other in zip(found, expected, strict=True):
        difference = float((one.float() - other.float()).abs().max())
        least = 1.0 if other.shape[-1] <= _FEW else 0.0
        scale = max(least, float(other.float().abs().max()))
        ratio = math.inf if math.isnan(difference) else difference / max(scale, 1e-30)
        if ratio > worst[2]:
            worst = (difference, scale, ratio)
    return worst[:2]


def read_probe_block(inputs: Inputs) -> np.ndarray:
    """Read the content of the block that the probe shows; once, because a rank that cannot read it cannot save.

    It is the start of the stream, over again where there is less than a block of it.
    """
    source, view = inputs.sources[0], inputs.objective.view
    length = view.payload + view.lookahead
    tokens = source.read(np.zeros(1, np.int64), min(length, source.tokens))
    return np.resize(tokens, (1, length))


def take_contents(
    engine: TrainingEngine, inputs: Inputs, block: np.ndarray, kept: Mapping[str, torch.Tensor]
) -> Callable[[Path], None]:
    """Take the probes, on every rank; returns what rank 0 calls to write the contents into a checkpoint folder.

    Args:
        kept: of the source's weights those that go past the training, by name; on rank 0.
    """
    probes = take_probes(engine, inputs, block)
    # As they are now: a step that is made meanwhile may be of a phase with another theta.
    configs = {name: copy.deepcopy(model.config) for name, model in engine.exports.items()}

    def write(folder: Path) -> None:
        for name, config in configs.items():
            config.architectures = [type(engine.exports[name]).__name__]
            config.save_pretrained(folder / MODEL_FOLDER / name)
            if (code := code_of(config)) is not None:
                code.write(folder / MODEL_FOLDER / name)
        inputs.tokenizer.save_pretrained(folder / MODEL_FOLDER)
        (folder / RUN_CONFIG).write_text(dump_config(inputs.config), encoding="utf-8")
        for name, probe in probes.items():
            save_probe(probe, probe_folder(folder, name))
            give_usual_mode(probe_folder(folder, name) / PROBE)
        if kept:
            save_file(dict(kept), folder / MODEL_FOLDER / KEPT)
            give_usual_mode(folder / MODEL_FOLDER / KEPT)
        if engine.frozen:
            save_file(engine.frozen, folder / FROZEN)
            give_usual_mode(folder / FROZEN)

    return write


def kept_weights(folder: Path, export: str) -> dict[str, torch.Tensor]:
    """Read the weights that a checkpoint has for a converted model beside those of its class; the main one has some."""
    path = folder / MODEL_FOLDER / KEPT
    return load_file(path) if export == MAIN and path.is_file() else {}


def kept_of_start(checkpoint: Path | None, model: PreTrainedModel, settings: ModelConfig) -> dict[str, torch.Tensor]:
    """Find what is kept of the source beside what is trained: as the checkpoint has it, whatever lies there today.

    Args:
        checkpoint: that the run goes on from; None at its first start, which reads the source.
    """
    return read_kept(model, settings) if checkpoint is None else kept_weights(checkpoint, MAIN)


def probe_folder(folder: Path, export: str) -> Path:
    """Find where in a checkpoint the probe of a model lies: beside its config but for that of the main one."""
    return folder / MODEL_FOLDER / export if export != MAIN else folder


def export_names(folder: Path) -> list[str]:
    """List the names of the models that a checkpoint holds, the main one first."""
    others = (folder / MODEL_FOLDER).glob("*/config.json")
    return [MAIN, *sorted(path.parent.name for path in others)]


def take_probes(engine: TrainingEngine, inputs: Inputs, block: np.ndarray) -> dict[str, Probe]:
    """Run the probe through the engine, and tell of each model what it made of it; a collective at ZeRO stage 3."""
    tokens = np.repeat(block, inputs.plan.micro_size, axis=0)
    batch = inputs.objective.plain(Blocks(tokens))
    index = _evenly_spread(batch) if batch.prediction_index is None else batch.prediction_index
    with engine.evaluating():
        moved = batch.to(engine.device)
        passes = engine.network.passes(moved.inputs, index.to(engine.device))
    return {name: _probe(found, index, engine.device.type) for name, found in passes.items()}


def _probe(found: Pass, index: torch.Tensor, device: str) -> Probe:
    rows = found.logits[:PROBE_ROWS].cpu()  # a view would keep all of them
    pairs = None if found.pair_logits is None else found.pair_logits[:PROBE_ROWS].cpu()
    return Probe({name: value.cpu() for name, value in found.inputs.items()}, index, rows, device, pairs)


def _evenly_spread(batch: Batch) -> torch.Tensor:
    """Choose PROBE_ROWS positions of each block, the first and the last among them: flat positions into B·S."""
    rows, seq_len = batch.inputs["input_ids"].shape
    places = torch.linspace(0, seq_len - 1, min(PROBE_ROWS, seq_len)).long()
    return (torch.arange(rows)[:, None] * seq_len + places).flatten()


def prove_repeatable(engine: TrainingEngine, inputs: Inputs, block: np.ndarray) -> None:
    """Run the probe twice: what the engine itself does not give again, no conversion can reproduce. A collective.

    Raises:
        UserError: when the logits differ, as those of a model that hashes at random do, or are not finite.
    """
    first, second = (take_probes(engine, inputs, block) for _ in range(2))
    for name, model in engine.exports.items():
        _prove_repeated(type(model).__name__, first[name].outputs, second[name].outputs, inputs.config.train.precision)


def _prove_repeated(name: str, first: list[torch.Tensor], second: list[torch.Tensor], precision: str) -> None:
    if not all(found.isfinite().all() for found in first):
        raise UserError(
            f"The logits of {name} are not finite (NaN or infinity) before the first step.",
            where=f"model, train.precision={precision}",
            remedy="Correct the model's config (is its layer_norm_eps positive?), or set train.precision=fp32.",
        )
    difference, scale = worst_difference(second, first)
    if difference > PROBE_TOLERANCE[COMPUTE_DTYPES[precision]] * scale:
        raise UserError(
            f"{name} gives other logits for the same input each time: they differ by {difference:.3g} (largest logit "
            f"{scale:.3g}), so nothing could prove that what is converted is what was trained.",
            where="model",
            remedy="Train a model without random parts in its forward pass.",
        )


def prove_head(engine: TrainingEngine, inputs: Inputs, block: np.ndarray) -> None:
    """Predict some positions twice, among others each time, where a model's own code names the head that is restricted.

    A collective. Whoever loads the converted model computes the head at all positions. The shapes are those of
    training, so that nothing is compiled for it.

    Raises:
        UserError: when their logits differ, as those of a head do that looks at other positions.
    """
    model = engine.exports[MAIN]
    declared = head_module(model)
    if declared is None or is_stock(type(model)):
        return
    batch = inputs.objective.plain(Blocks(np.repeat(block, inputs.plan.micro_size, axis=0)))
    index = _evenly_spread(batch) if batch.prediction_index is None else batch.prediction_index
    rows, seq_len = batch.inputs["input_ids"].shape
    places = index.view(rows, -1)
    if places.shape[1] < 2:  # there are no others
        return
    others = places.clone()
    others[:, ::2] += torch.where(places[:, ::2] % seq_len == seq_len - 1, -1, 1)
    with engine.evaluating():
        moved = batch.to(engine.device).inputs
        found = [engine.network(moved, each.flatten().to(engine.device)).logits for each in (places, others.flip(1))]
    first, second = (logits.unflatten(0, places.shape) for logits in found)
    difference, scale = worst_difference([second.flip(1)[:, 1::2]], [first[:, 1::2]])
    if not difference <= PROBE_TOLERANCE[COMPUTE_DTYPES[inputs.config.train.precision]] * scale:
        raise UserError(
            f"The head of {type(engine.module).__name__} gives a position other logits when others are predicted with "
            f"it: they differ by {difference:.3g} (largest logit {scale:.3g}).",
            where=f"model.code, maskwright_head = '{declared}'",
            remedy="Name the submodule that first receives the encoder's output and works on each position alone, or "
            "leave maskwright_head out.",
        )


def prove_causal(engine: TrainingEngine, inputs: Inputs, block: np.ndarray) -> None:
    """Change the later half of the probe: the logits before it must stay, or the model is shown what it is to tell.

    A collective. Classes with a causal head may attend to both sides by their config.

    Raises:
        UserError: when a logit depends on a later token.
    """
    half = inputs.objective.seq_len // 2
    changed = block.copy()
    changed[:, half:] = np.where(block[:, half:] == inputs.vocabulary.end_id, block.min(), inputs.vocabulary.end_id)
    first, second = (take_probes(engine, inputs, each)[MAIN] for each in (block, changed))
    before = first.prediction_index[: len(first.logits)] < half
    difference = float((first.logits - second.logits)[before].float().abs().max())
    if difference > PROBE_TOLERANCE[COMPUTE_DTYPES[inputs.config.train.precision]] * float(first.logits.abs().max()):
        raise UserError(
            f"{type(engine.exports[MAIN]).__name__}, as configured, looks at later tokens: the logits of earlier ones "
            f"change by {difference:.3g}.",
            where="model, objective.name=clm",
            remedy="Train a model whose attention is causal, such as gpt2 or llama.",
        )


def save_probe(probe: Probe, folder: Path) -> None:
    tensors = {**probe.inputs, "prediction_index": probe.prediction_index, "logits": probe.logits}
    if probe.pair_logits is not None:
        tensors["pair_logits"] = probe.pair_logits
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / PROBE, None if probe.device == "cpu" else {"device": probe.device})


def read_probe(folder: Path) -> Probe:
    with safe_open(folder / PROBE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        index, logits = tensors.pop("prediction_index"), tensors.pop("logits")
        pairs = tensors.pop("pair_logits", None)
        return Probe(tensors, index, logits, (file.metadata() or {}).get("device", "cpu"), pairs)
