"""What makes a checkpoint self-contained: the Hugging Face config, the tokenizer, and a probe of the logits.

The probe is a block of the training data with the logits that the training engine itself gives for it. The
conversion must reproduce them, which proves that what comes out is what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoint.manifest import MODEL_FOLDER, PROBE
from trainer.distributed import World
from trainer.engine import TrainingEngine
from trainer.inputs import Inputs

PROBE_ROWS = 8  # logits kept; at a vocabulary of 50,265 a row is 200 kB


@dataclass(frozen=True)
class Probe:
    """One forward pass of the training engine, dropout off.

    Attributes:
        input_ids: int64 [B, S], one block repeated to the training micro-batch, so that kernels see equal shapes.
        prediction_index: int64 [B·k], flat positions.
        logits: [PROBE_ROWS, vocabulary] at the first positions, in the training precision.
    """

    input_ids: torch.Tensor
    prediction_index: torch.Tensor
    logits: torch.Tensor


def write_contents(folder: Path, engine: TrainingEngine, inputs: Inputs, world: World) -> None:
    """Write config, tokenizer and probe into a checkpoint folder; every rank calls it, rank 0 writes."""
    probe = take_probe(engine, inputs)
    if not world.is_main:
        return
    config = engine.module.config
    config.architectures = [type(engine.module).__name__]
    config.save_pretrained(folder / MODEL_FOLDER)
    inputs.tokenizer.save_pretrained(folder / MODEL_FOLDER)
    tensors = {name: value.cpu().contiguous() for name, value in vars(probe).items()}
    save_file(tensors, folder / PROBE)


def take_probe(engine: TrainingEngine, inputs: Inputs) -> Probe:
    """Run the probe through the engine; a collective at ZeRO stage 3."""
    objective, plan = inputs.objective, inputs.plan
    block = inputs.sources[0].read_blocks(np.zeros(1, np.int64), objective.payload)
    tokens = np.repeat(objective.frame(block), plan.micro_size, axis=0)
    row = np.linspace(0, plan.seq_len - 1, objective.predictions_per_block).astype(np.int64)
    index = (np.arange(plan.micro_size)[:, None] * plan.seq_len + row).reshape(-1)
    input_ids, prediction_index = torch.from_numpy(tokens), torch.from_numpy(index)
    with engine.evaluating():
        logits = engine.network(input_ids.to(engine.device), prediction_index.to(engine.device))
    return Probe(input_ids, prediction_index, logits[:PROBE_ROWS])


def read_probe(folder: Path) -> Probe:
    return Probe(**load_file(folder / PROBE))
