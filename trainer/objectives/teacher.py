"""Learning from a trained model: soft targets, and states like its own, beside the labels of the text.

Hinton et al., arXiv:1503.02531, for soft targets; DistilBERT (Sanh et al., arXiv:1910.01108) for the three terms

    soft · T² · KL(p_T ‖ q_T) + hard · cross-entropy + cosine · (1 − cos(states))

with p_T of the teacher and q_T of the model, both at temperature T. The teacher sees what the model sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from trainer.config import TeacherConfig
from trainer.data.batch import Batch, Documents, Samples, Score
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.objectives.framing import row_lengths
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import Network, ObjectiveCard, Predicted, Tally, Term
from trainer.objectives.soft_cross_entropy import soft_cross_entropies

SOFT, COSINE = "soft", "cosine"
_COUNTED = 0  # the label of a position that counts in either term


class Teacher(Protocol):
    """A trained model that is not trained: see `trainer.model.teacher`."""

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        prediction_index: torch.Tensor | None,
        documents: Documents | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run it on the inputs of a batch, without gradients; see `Network`.

        Returns:
            [B, S, H], the states that its head is given, None of a class whose head is not known; and rows [N, …], of
            which `logits` makes its logits.
        """
        ...

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Make the logits [n, V] of some of its rows."""
        ...


class TaughtSamples:
    """Adds the labels of a teacher's terms to batches of other samples; see `trainer.data.batch.Samples`.

    A label of theirs says only that a position counts. Soft targets count where the text has a label or, with
    `positions: all`, at all tokens; states count at all tokens. Padding counts nowhere.

    Args:
        samples: what makes the batches.
        term: name of their labels.
    """

    def __init__(self, samples: Samples, term: str, settings: TeacherConfig) -> None:
        self._samples, self._term, self._settings = samples, term, settings
        self.seq_len, self.view, self.marks = samples.seq_len, samples.view, samples.marks
        self.head_rows = samples.seq_len if settings.positions == "all" else samples.head_rows
        self.shape_count = samples.shape_count

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Make the batch, with more labels; see `Samples.make_batch`."""
        lengths = row_lengths(blocks) if self.view.whole_documents else None
        return self._taught(self._samples.make_batch(blocks, samples, seed), lengths)

    def plain(self, blocks: Blocks) -> Batch:
        """Show blocks as they are; see `Samples.plain`."""
        return self._taught(self._samples.plain(blocks), None)

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find where documents begin; see `Samples.document_starts`."""
        return self._samples.document_starts(blocks)

    def _taught(self, batch: Batch, lengths: np.ndarray | None) -> Batch:
        """Add labels.

        Args:
            lengths: int64 [B], tokens of each row but for the padding; None where there is none.
        """
        of_text, index = batch.labels[self._term], batch.prediction_index
        shown = torch.full((batch.rows, self.seq_len), _COUNTED)
        if lengths is not None:
            shown[torch.arange(self.seq_len) >= torch.from_numpy(lengths)[:, None]] = IGNORED_LABEL
        shown = shown.view(-1)
        if self._settings.positions == "all":
            if index is not None:
                counted = of_text != IGNORED_LABEL
                spread = torch.full_like(shown, IGNORED_LABEL)
                spread[index[counted]] = of_text[counted]
                of_text, index = spread, None
            soft = shown
        else:
            soft = torch.where(of_text == IGNORED_LABEL, IGNORED_LABEL, _COUNTED)
        labels = {self._term: of_text} if self._settings.hard else {}
        labels[SOFT] = soft
        if self._settings.cosine:
            labels[COSINE] = shown.clone()
        return replace(batch, labels=labels, prediction_index=index)


class TaughtLoss:
    """The loss of a model that a teacher teaches; see `trainer.objectives.objective.Criterion`.

    Args:
        language: the loss without a teacher.
        teacher: None for a loss whose terms alone are asked for.
    """

    def __init__(self, settings: TeacherConfig, language: LanguageModelLoss, teacher: Teacher | None) -> None:
        self._settings, self._language, self._teacher = settings, language, teacher
        (of_text,) = language.terms
        terms = [of_text._replace(weight=settings.hard), Term(SOFT, settings.soft)]
        terms.append(Term(COSINE, settings.cosine, has_answers=False))
        self.terms: tuple[Term, ...] = tuple(term for term in terms if term.weight)

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Run the batch through both models; see `Criterion.predict`."""
        assert self._teacher is not None
        states, rows = self._teacher(batch.inputs, batch.prediction_index, batch.documents)
        of_text = [batch.labels[self.terms[0].name]] if self._settings.hard else []
        score = Score(self._score, (rows, batch.labels[SOFT], *of_text))
        wants_states = bool(self._settings.cosine)
        output = network(batch.inputs, batch.prediction_index, batch.documents, score, wants_states)
        soft, *others = output.logits.unbind(dim=1)
        evaluating = not torch.is_grad_enabled()
        predicted = {SOFT: Predicted(soft, others.pop(0).long() if evaluating else None)}
        if others:
            losses, *guesses = others
            predicted[self.terms[0].name] = Predicted(losses, guesses[0].long() if evaluating else None)
        if wants_states:
            assert states is not None
            predicted[COSINE] = Predicted(_distances(output.states, states, batch.labels[COSINE]), None)
        return predicted

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Name those of the text, and how often both find the same token likeliest; see `Criterion.metrics`."""
        of_text = self._language.metrics(tallies) if self._settings.hard else {}
        return {**of_text, f"eval/{SOFT}/accuracy": tallies[SOFT].accuracy}

    def describe(self, values: Mapping[str, float]) -> str:
        """Say what `metrics` has named; see `Criterion.describe`."""
        of_text = f"{self._language.describe(values)}  " if self._settings.hard else ""
        return f"{of_text}agrees with its teacher {values[f'eval/{SOFT}/accuracy']:.2%}"

    def _score(
        self, logits: torch.Tensor, rows: torch.Tensor, counted: torch.Tensor, *labels: torch.Tensor
    ) -> torch.Tensor:
        """Compute of some rows, each column [n] in fp32: the soft losses and those of the text, if it has labels.

        In evaluations a guess follows each of them. That for the teacher is _COUNTED where both find the same token
        likeliest.
        """
        assert self._teacher is not None
        with torch.no_grad():
            targets = self._teacher.logits(rows)[:, : logits.shape[1]]
        soft = soft_cross_entropies(logits, targets, self._settings.temperature).where(counted == _COUNTED, 0.0)
        columns = [soft.unsqueeze(1)]
        if not torch.is_grad_enabled():
            differ = logits.argmax(dim=1) != targets.argmax(dim=1)
            columns.append(torch.where(differ, _COUNTED + 1, _COUNTED).float().unsqueeze(1))
        columns += [self._language.score(logits, each) for each in labels]
        return torch.cat(columns, dim=1)


def _distances(states: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute 1 − the cosine between states [B, S, H] in fp32: [B·S], 0 where the label is IGNORED_LABEL."""
    cosines = cosine_similarity(states.float(), targets.float(), dim=-1)
    return (1.0 - cosines).flatten().where(labels == _COUNTED, 0.0)


def described(teacher: Mapping[str, Any]) -> str:
    """Say what is learnt of a teacher.

    Args:
        teacher: the section `objective.teacher` of a config.
    """
    at = "at all tokens" if teacher["positions"] == "all" else "at the predicted positions"
    terms = [f"{teacher['soft']:g} × soft targets at temperature {teacher['temperature']:g} {at}"]
    for name, what in (("hard", "the labels of the text"), ("cosine", "the cosine of the last hidden states")):
        if teacher[name]:
            terms.append(f"{teacher[name]:g} × {what}")
    return " + ".join(terms)


def taught_card(card: ObjectiveCard, teacher: Mapping[str, Any]) -> ObjectiveCard:
    """Add a teacher to what a model card says of an objective; `teacher` as for `described`."""
    taught = f"taught by `{teacher['model']}`: {described(teacher)}"
    return replace(
        card,
        settings=lambda settings, tokens: f"{card.settings(settings, tokens)}; {taught}",
        results={**card.results, f"eval/{SOFT}/accuracy": ("its teacher's likeliest token found", ".1%")},
    )
