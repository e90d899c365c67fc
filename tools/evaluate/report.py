"""What an evaluation has found: as JSON, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.evaluate.baselines import Baselines
from tools.evaluate.pll import PseudoLikelihood
from tools.evaluate.settings import Settings
from tools.evaluate.subject import Subject

_COLUMNS: Mapping[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "masked_accuracy": ("masked accuracy", ".2%"),
    "accuracy": ("accuracy", ".2%"),
    "bits_per_byte": ("bits a byte", ".4f"),
    "word_recovery": ("words recovered", ".2%"),
    "probe/accuracy": ("probe accuracy", ".3f"),
    "probe/accuracy_std": ("±", ".3f"),
    "probe/macro_f1": ("probe F1", ".3f"),
    "probe/majority": ("majority", ".3f"),
    "pll_nats_per_token": ("PLL, nats a token", ".4f"),
    "pll_nats_per_word": ("PLL, nats a word", ".4f"),
    "pll_perplexity": ("PLL, perplexity", ",.2f"),
}
"""Number of a model → title and format of its column."""


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        values: of its evaluation, as `Evaluator.run` gives them.
        samples: blocks that it was evaluated on.
        bits_per_byte: of its term of language; None where the text's bytes are not known, or there is no such term.
        baselines: None where there is no such term.
        words: how many hidden words it recovered, and how many were hidden; None where none was.
        pll: None where it was not asked for.
    """

    subject: Subject
    values: Mapping[str, float]
    samples: int
    bits_per_byte: float | None
    baselines: Baselines | None
    words: tuple[int, int] | None
    pll: PseudoLikelihood | None

    @property
    def numbers(self) -> dict[str, float | None]:
        """What is compared, by the names of JSON: those of the metrics without `eval/`, and what is beside them."""
        found: dict[str, float | None] = {name.removeprefix("eval/"): value for name, value in self.values.items()}
        found["bits_per_byte"] = self.bits_per_byte
        if self.words is not None:
            right, hidden = self.words
            found["word_recovery"] = right / hidden if hidden else None
        if self.pll is not None:
            found |= {f"pll_{name}": value for name, value in self.pll.facts().items()}
        return found

    def facts(self) -> dict[str, Any]:
        """Write all that is known of it."""
        subject = self.subject
        return {
            "model": subject.name,
            "step": subject.step,
            "objective": subject.config.objective.name,
            "tokenizer": subject.tokenizer_id,
            "vocabulary": subject.vocabulary.size,
            "samples": self.samples,
            **self.numbers,
            **({} if self.words is None else {"words": self.words[1]}),
        }


@dataclass(frozen=True)
class Report:
    """All models, in the order in which they were named.

    Attributes:
        data: what they were evaluated on.
        against: the name of the model, the last one, that the others are compared with; None where they are not.
        notes: lines for the user.
    """

    data: str
    settings: Settings
    precision: str
    models: Sequence[Measured]
    against: str | None
    notes: Sequence[str]

    def to_json(self) -> str:
        """Write it as JSON; what is no finite number is null."""
        models = [
            {**each.facts(), **({"difference": self._differences(each)} if self._is_compared(each) else {})}
            for each in self.models
        ]
        content = {
            "models": models,
            "baselines": self._baselines(),
            "data": self.data,
            "settings": {**asdict(self.settings), "precision": self.precision},
            **({} if self.against is None else {"against": self.against}),
            "notes": list(self.notes),
        }
        return json.dumps(_finite(content), indent=1, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the table, the baselines and the notes."""
        numbers = [each.numbers for each in self.models]
        shown = [name for name in _COLUMNS if any(found.get(name) is not None for found in numbers)]
        table = Table("model", "step", "objective", box=None, pad_edge=False)
        for name in shown:
            table.add_column(_COLUMNS[name][0], justify="right")
        for each in self.models:
            differences = self._differences(each) if self._is_compared(each) else {}
            cells = [self._cell(name, each.numbers.get(name), differences.get(name)) for name in shown]
            step = "" if each.subject.step is None else f"{each.subject.step:,}"
            table.add_row(each.subject.name, step, each.subject.config.objective.name, *cells)
        console.print(table)
        keyed = self._keyed_baselines()
        for found in keyed.values():
            names = [each.subject.name for each in self.models if each.baselines == found]
            of = f" ({', '.join(dict.fromkeys(names))})" if len(keyed) > 1 else ""
            console.print(
                f"baselines{of}: {found.uniform:.4f} nats by guessing among {found.vocabulary:,} tokens, "
                f"{found.unigram:.4f} by how frequent tokens are in {found.unigram_of}"
            )
        for note in self.notes:
            console.print(note)

    def _cell(self, name: str, value: float | None, difference: float | None) -> str:
        if value is None:
            return "–"
        form = _COLUMNS[name][1]
        return f"{value:{form}}" + ("" if difference is None else f" ({difference:+{form}})")

    def _is_compared(self, measured: Measured) -> bool:
        return self.against is not None and measured is not self.models[-1]

    def _differences(self, measured: Measured) -> dict[str, float]:
        """Subtract the numbers of the model that this one is compared with, as far as both have them."""
        theirs = self.models[-1].numbers
        pairs = ((name, own, theirs.get(name)) for name, own in measured.numbers.items())
        return {name: own - other for name, own, other in pairs if own is not None and other is not None}

    def _keyed_baselines(self) -> dict[str, Baselines]:
        """Collect them by tokenizer; and by objective where one tokenizer serves several."""
        found: dict[tuple[str, str], Baselines] = {}
        for each in self.models:
            if each.baselines is not None:
                found.setdefault((each.subject.tokenizer_id, each.subject.config.objective.name), each.baselines)
        tokenizers = [tokenizer for tokenizer, _ in found]
        return {
            tokenizer if tokenizers.count(tokenizer) == 1 else f"{tokenizer} {objective}": baselines
            for (tokenizer, objective), baselines in found.items()
        }

    def _baselines(self) -> dict[str, Any]:
        found = {key: baselines.facts() for key, baselines in self._keyed_baselines().items()}
        return next(iter(found.values())) if len(found) == 1 else found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
