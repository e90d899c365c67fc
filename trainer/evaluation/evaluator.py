"""Evaluation: the same validation blocks with the same masks every time, each rank taking its share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from trainer.data.batch import Batch, Samples
from trainer.data.block_reader import BlockReader, block_count
from trainer.data.dataset import ShardSet
from trainer.data.order.permutation import KeyPurpose, another, fold_key, permute
from trainer.errors import MaskwrightError
from trainer.evaluation.evaluated import Evaluated
from trainer.evaluation.examples import SAMPLES, ExampleGuesses, Passage, passages, shown_term, texts
from trainer.evaluation.probe import Probe
from trainer.objectives.objective import Criterion, Tally, tally_of
from trainer.runtime import distributed
from trainer.runtime.distributed import World

EVALUATION_SEED = 0  # of the masks, whatever the run's seed: evaluations are comparable between runs


class Evaluator:
    """The loss, and what the criterion names beside it, over `samples` validation blocks (all, when there are fewer).

    Args:
        micro_size: blocks a rank in one forward pass.
        probe: what is to be found beside it.
        tokenizer: writes examples; without one there are none.

    Attributes:
        examples: what the model told of the first samples in the last evaluation (`trainer.evaluation.examples`), on
            rank 0.
    """

    def __init__(
        self,
        data: ShardSet,
        objective: Samples,
        criterion: Criterion,
        samples: int,
        micro_size: int,
        probe: Probe | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.data, self.objective, self.criterion, self.micro_size = data, objective, criterion, micro_size
        self._probe = probe
        self._reader = BlockReader(data, objective)
        available = block_count(data, objective)
        self.samples = min(samples, available)
        numbers = np.arange(self.samples, dtype=np.uint64)
        self.blocks = permute(numbers, available, fold_key(KeyPurpose.EVALUATION)).astype(np.int64)
        others = another(numbers, self.samples, fold_key(KeyPurpose.PARTNER, EVALUATION_SEED, numbers))
        self._partners = self.blocks[others.astype(np.int64)] if objective.view.partner else None
        self.examples: list[dict[str, Any]] = []
        self._tokenizer, self._passages = tokenizer, list[Passage]()
        self._shown_term = shown_term(criterion.terms) if tokenizer is not None else None

    def run(
        self, engine: Evaluated, world: World, stop_early: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Evaluate; every rank calls it. None when a rank was asked to stop meanwhile."""
        micro_size = self.micro_size
        passes = math.ceil(self.samples / (micro_size * world.size))  # the same on all ranks: ZeRO-3 gathers in step
        terms = self.criterion.terms
        sums = torch.zeros(len(terms), len(Tally._fields), dtype=torch.float64, device=engine.device)
        guesses = None if self._shown_term is None else ExampleGuesses(self._shown_term, self.samples)
        with engine.evaluating():
            for number in range(passes):
                first = (number * world.size + world.rank) * micro_size
                batch, error = self._read(np.arange(first, first + micro_size))
                stop, failed = distributed.all_reduce_sum(world, [stop_early(), error is not None])
                if failed:
                    distributed.raise_on_all_ranks(world, error)
                if stop:
                    return None
                assert batch is not None
                moved = batch.to(engine.device)
                predicted = self.criterion.predict(engine.network, moved)
                sums += tally_of(terms, predicted, moved)
                if guesses is not None:
                    guesses.add(first, batch, predicted)
        told = [] if guesses is None else guesses.numbers()
        totals = iter(distributed.all_reduce_sum(world, [*sums.flatten().tolist(), *told]))
        tallies = {term.name: Tally(*itertools.islice(totals, len(Tally._fields))) for term in terms}
        if told and world.is_main:
            self.examples = texts(self._first_passages(), self._tokenizer, list(totals))
        loss = sum(term.weight * tallies[term.name].mean for term in terms if tallies[term.name].labels)
        of_terms = self._term_values(tallies) if len(terms) > 1 else {}
        probed = self._probe.run(engine, world, stop_early) if self._probe is not None else {}
        if probed is None:
            return None
        return {"eval/loss": loss, **self.criterion.metrics(tallies), **of_terms, **probed}

    def _first_passages(self) -> list[Passage]:
        """Read the samples of which examples are shown, once."""
        if not self._passages and self._shown_term is not None:
            batch, _ = self._read(np.arange(min(SAMPLES, self.samples)))  # just read: whatever is wrong was said
            self._passages = [] if batch is None else passages(self._shown_term, batch, batch.rows)
        return self._passages

    def _term_values(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        values: dict[str, float] = {}
        for term in self.criterion.terms:
            found = tallies[term.name]
            values[f"eval/{term.name}/loss"] = found.mean
            if term.has_answers:
                values[f"eval/{term.name}/accuracy"] = found.accuracy
            if term.one_a_block:
                values[f"eval/{term.name}/ignored"] = 1.0 - found.labels / self.samples
        return values

    def batch(self, places: np.ndarray) -> Batch:
        """Make a batch of blocks by their numbers from 0 on, int64 [B]; one beyond the last predicts nothing.

        Raises:
            DamagedError: when a part of the data cannot be read.
        """
        inside = places < self.samples
        places = np.where(inside, places, 0)
        partners = None if self._partners is None else self._partners[places]
        blocks = self._reader.read(self.blocks[places], partners)
        batch = self.objective.make_batch(blocks, places.astype(np.uint64), EVALUATION_SEED)
        batch.leave_out(~inside)
        return batch

    def _read(self, places: np.ndarray) -> tuple[Batch | None, MaskwrightError | None]:
        """Make the batch, or return why it cannot be read."""
        try:
            return self.batch(places), None
        except MaskwrightError as error:
            return None, error
