"""Evaluation: the same validation blocks with the same masks every time, each rank taking its share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from trainer.data.batch import Batch
from trainer.data.dataset import ShardSet
from trainer.data.documents import DocumentBorders
from trainer.data.order.permutation import KeyPurpose, fold_key, permute
from trainer.engine.engine import TrainingEngine
from trainer.errors import MaskwrightError
from trainer.objectives.mlm import MaskedLanguageModelling
from trainer.runtime import distributed
from trainer.runtime.distributed import World

EVALUATION_SEED = 0  # of the masks, whatever the run's seed: evaluations are comparable between runs


class Evaluator:
    """Loss, perplexity and accuracy over `samples` validation blocks (all of them, when there are fewer).

    Args:
        micro_size: blocks a rank in one forward pass.
        document_attention: evaluate with attention within documents, as the model is trained.
    """

    def __init__(
        self,
        data: ShardSet,
        objective: MaskedLanguageModelling,
        samples: int,
        micro_size: int,
        document_attention: bool,
    ) -> None:
        self.data, self.objective, self.micro_size = data, objective, micro_size
        self.borders = DocumentBorders(data) if document_attention else None
        available = data.block_count(objective.payload)
        self.samples = min(samples, available)
        numbers = np.arange(self.samples, dtype=np.uint64)
        self.blocks = permute(numbers, available, fold_key(KeyPurpose.EVALUATION)).astype(np.int64)

    def run(
        self, engine: TrainingEngine, world: World, stop_early: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Evaluate; every rank calls it. None when a rank was asked to stop meanwhile."""
        micro_size = self.micro_size
        passes = math.ceil(self.samples / (micro_size * world.size))  # the same on all ranks: ZeRO-3 gathers in step
        sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for number in range(passes):
                first = (number * world.size + world.rank) * micro_size
                batch, error = self._read(np.arange(first, first + micro_size))
                stop, failed = distributed.total(world, [stop_early(), error is not None])
                if failed:
                    distributed.raise_together(world, error)
                if stop:
                    return None
                assert batch is not None
                sums += self._score(engine, batch)
        loss_sum, right, count = distributed.total(world, sums.tolist())
        loss = loss_sum / max(1.0, count)
        perplexity = math.exp(min(loss, 700.0))
        return {"eval/loss": loss, "eval/perplexity": perplexity, "eval/masked_accuracy": right / max(1.0, count)}

    def _read(self, places: np.ndarray) -> tuple[Batch | None, MaskwrightError | None]:
        """The batch, or why it cannot be read; beyond the last sample it is padding without predictions."""
        inside = places < self.samples
        places = np.where(inside, places, 0)
        blocks, payload = self.blocks[places], self.objective.payload
        try:
            tokens = self.data.read_blocks(blocks, payload)
            starts = None if self.borders is None else self.borders.document_starts(blocks, payload)
        except MaskwrightError as error:
            return None, error
        batch = self.objective.make_batch(tokens, places.astype(np.uint64), EVALUATION_SEED, starts)
        self.objective.leave_out(batch, ~inside)
        return batch, None

    def _score(self, engine: TrainingEngine, batch: Batch) -> torch.Tensor:
        count = self.objective.predictions(batch)
        moved = self.objective.to_device(batch, engine.device)
        loss_sum, right = self.objective.score(engine.network, moved)
        return torch.stack(
            [loss_sum.double(), right.double(), torch.tensor(float(count), device=engine.device).double()]
        )
