"""`maskwright data show CONFIG`: what training would see, each sample as its text and as what the model is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from tools.prepare.on_demand import look_up
from trainer.checkpoint.begun import as_begun
from trainer.config import Config
from trainer.data.batch import RANKS, Batch
from trainer.data.block_reader import BlockReader
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.decoding import decode_runs
from trainer.errors import UserError
from trainer.inputs.inputs import Inputs, open_inputs
from trainer.runtime.plain_text import printable

_KINDS = ("masked", "random", "kept")
_STYLES = {"masked": "bold red", "random": "magenta", "kept": "green"}
_PREDICTED_STYLE = "bold yellow"


@dataclass(frozen=True)
class ShownPair:
    """What is told of a sample's two segments.

    Attributes:
        task: nsp or sop.
        label: 0 where the second belongs where it stands, 1 where not; None where that is not asked.
        second_begins: position of its first token.
    """

    task: str
    label: int | None
    second_begins: int

    def __str__(self) -> str:
        said = {
            ("nsp", 0): "B follows A",
            ("nsp", 1): "B is from elsewhere",
            ("sop", 0): "in order",
            ("sop", 1): "not in order",
        }
        if self.label is None:
            return f"{self.task}: no pair, all is A"
        return f"{self.task}: {said[self.task, self.label]}, B begins at token {self.second_begins}"


@dataclass(frozen=True)
class ShownSample:
    """One sample of a run.

    Attributes:
        t: its number.
        source: its name.
        input_ids: [S], what the model is shown.
        labels: (position, id) of each predicted token, ascending. What a causal model is to tell stands at the position
            that it tells it from.
        order: positions as they are predicted one after the other; None where they are predicted at once.
        counts: labels that count, of each term of the loss.
        mask_id, pad_id, tokenizer: of the run.
        pair: only in a run with objective.pair.
    """

    t: int
    source: str
    input_ids: list[int]
    labels: list[tuple[int, int]]
    counts: dict[str, int]
    mask_id: int | None
    pad_id: int | None
    tokenizer: Any
    causal: bool = False
    order: list[int] | None = None
    pair: ShownPair | None = None

    @cached_property
    def original_ids(self) -> list[int]:
        """The tokens of the text."""
        ids = list(self.input_ids)
        if self.causal:
            return ids
        for position, token in self.labels:
            ids[position] = token
        return ids

    @cached_property
    def kinds(self) -> dict[int, str]:
        """What was done to each predicted position; nothing, where it is shown to a causal model."""
        kinds: dict[int, str] = {}
        if self.causal:
            return kinds
        if self.order is not None:
            return dict.fromkeys(self.order, "kept")
        for position, token in self.labels:
            shown = self.input_ids[position]
            kinds[position] = "masked" if shown == self.mask_id else "kept" if shown == token else "random"
        return kinds

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            [token for token in ids if token != self.pad_id], clean_up_tokenization_spaces=False
        )

    def facts(self) -> dict[str, Any]:
        return {
            "t": self.t,
            "source": self.source,
            "input_ids": self.input_ids,
            "labels": self.labels,
            "text": self.text(self.original_ids),
            "masked_text": self.text(self.input_ids),
            "terms": self.counts,
            **({} if self.order is None else {"order": self.order}),
            **({} if self.pair is None else {"pair": asdict(self.pair)}),
        }

    def lines(self) -> tuple[Text, Text]:
        """Write the text with what is predicted in yellow, and what the model is shown, coloured by what was done.

        Where tokens are predicted one after the other nothing is done to them; they follow in their order.
        """
        original = self._coloured(self.original_ids, lambda kind: _PREDICTED_STYLE)
        if self.order is not None:
            told = (f"{self.text([self.input_ids[place]])!r} ({place})" for place in self.order)
            return original, Text("in this order: " + ", ".join(told))
        return original, self._coloured(self.input_ids, _STYLES.__getitem__)

    def _coloured(self, ids: list[int], style: Callable[[str], str]) -> Text:
        shown = [token for token in ids if token != self.pad_id]  # padding is at the end
        kinds = [self.kinds.get(place, "") for place in range(len(shown))]
        groups = [(kind, len(list(same))) for kind, same in groupby(kinds)]
        parts = decode_runs(self.tokenizer, shown, list(accumulate(length for _, length in groups)))
        text = Text()
        for (kind, _), part in zip(groups, parts, strict=True):
            text.append(part, style(kind) if kind else None)
        return text


def show_samples(config: Config, samples: int, as_json: bool, console: Console | None) -> None:
    """Print the first samples of a run; they are a function of the config and the data alone.

    Raises:
        UserError: for what no run could start from, or raw text that is not prepared yet.
        DamagedError: when a file is missing or differs from its sums.
    """
    config = as_begun(config)
    found = look_up(config)
    if found.estimates:
        (path, *_) = found.estimates
        raise UserError(
            f"'{path}' is raw text that has not been prepared yet, so there are no samples.",
            where="data.train",
            remedy="Run `maskwright train` with this config and --dry-run, which prepares it and keeps that, or "
            "prepare it with `maskwright prepare`.",
        )
    inputs = open_inputs(config, 1, thorough=False, folders=found.folders, micro_size=1)
    shown = [_sample(inputs, number) for number in range(min(samples, inputs.plan.end_sample))]
    if as_json:
        sys.stdout.write(json.dumps([sample.facts() for sample in shown], indent=1, ensure_ascii=False) + "\n")
        return
    coloured = console is not None and console.color_system is not None and not console.no_color
    for sample in shown:
        done = ", ".join(f"{list(sample.kinds.values()).count(kind)} {kind}" for kind in _KINDS)
        drawn = sample.causal or sample.order is not None
        predicted = f"{len(sample.labels)} predicted" + ("" if drawn else f" ({done})")
        pair = "" if sample.pair is None else f"; {sample.pair}"
        head = f"═══ sample {sample.t:,} of {sample.source}: {predicted}{pair} ═══"
        sys.stdout.write(printable(head) + "\n")
        for text in sample.lines()[: 1 if sample.causal else 2]:
            if coloured and console is not None:
                console.print(text, soft_wrap=True)
            else:
                sys.stdout.write(printable(text.plain) + "\n")
        sys.stdout.write("\n")


def _sample(inputs: Inputs, number: int) -> ShownSample:
    (source,), block = inputs.order.locate(np.array([number]))
    objective = inputs.objectives[inputs.order.phases.number_at(number)]
    partner = inputs.order.partners(np.array([number])) if objective.view.partner else None
    read = BlockReader(inputs.sources[source], objective).read(block, partner)
    batch = objective.make_batch(read, np.array([number], np.uint64), inputs.config.run.seed)
    return ShownSample(
        t=number,
        source=inputs.config.data.train[source].label,
        input_ids=batch.inputs["input_ids"][0].tolist(),
        labels=_labels(batch),
        counts={term: batch.count(term) for term in batch.labels},
        mask_id=inputs.vocabulary.mask_id,
        pad_id=inputs.vocabulary.pad_id,
        tokenizer=inputs.tokenizer,
        causal=batch.prediction_index is None,
        order=_order(batch),
        pair=_pair(inputs.config, batch),
    )


def _pair(config: Config, batch: Batch) -> ShownPair | None:
    if (pair := config.objective.pair) is None:
        return None
    (label,), types = batch.labels[pair.task].tolist(), batch.inputs["token_type_ids"][0]
    return ShownPair(pair.task, None if label == IGNORED_LABEL else label, int(types.argmax()))


def _labels(batch: Batch) -> list[tuple[int, int]]:
    """List what the head over the vocabulary predicts: the first term, whose labels stand at `prediction_index`."""
    labels, index = next(iter(batch.labels.values())), batch.prediction_index
    positions = range(batch.head_rows) if index is None else index.tolist()
    pairs = zip(positions, labels.tolist(), strict=True)
    return sorted((position, label) for position, label in pairs if label != IGNORED_LABEL)


def _order(batch: Batch) -> list[int] | None:
    """List the positions of the first block in the order in which they are predicted."""
    if RANKS not in batch.inputs:
        return None
    ranks = batch.inputs[RANKS][0].tolist()
    return sorted((place for place, rank in enumerate(ranks) if rank >= 0), key=ranks.__getitem__)
