"""The section `eval`: when and over what a run is evaluated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.base import Line, OpenFraction, PositiveInt, Section, StepsOrAuto


class ProbeConfig(Section):
    path: Line
    """Labelled texts in UTF-8: .csv or .tsv with a first line that names the columns, or .jsonl."""
    text: Line = "text"
    """The column that holds the text. What is longer than data.seq_len tokens is cut."""
    label: Line = "label"
    """The column that holds the class: a text, or in .jsonl a whole number or true and false as well."""
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    """Parts of the texts, each of which is told once by what was fitted to the others; always the same ones."""
    samples: Annotated[int, Field(gt=0, le=20_000)] = 2000
    """Texts at most; of a longer file so many are drawn, always the same ones."""


class EvalConfig(Section):
    every_steps: StepsOrAuto | None = 500
    """Evaluate every so many steps and at the end; null never evaluates. auto: a tenth of the run's steps, at least 1
    and at most 500."""
    samples: PositiveInt = 1024
    """Blocks of validation data an evaluation; always the same ones, with the same masks."""
    mask_ratio: OpenFraction | None = None
    """Share of a block's content tokens that is predicted in evaluations, whatever training predicts: losses of runs
    with different masks can be compared only so. null: the share with which the run begins. A resume may change it."""
    patience: PositiveInt | None = None
    """End the run, saved and with exit code 0, when so many evaluations in a row were no better than the best before
    them. The learning rate follows the whole length all the same. With a larger number, or null, the run goes on."""
    probe: ProbeConfig | None = None
    """At each evaluation tell also how well the classes of labelled texts can be read from the encoder as it is: a
    logistic regression on the means of its last hidden states (docs/probe.md). It needs the package scikit-learn. A
    resume may change it."""
