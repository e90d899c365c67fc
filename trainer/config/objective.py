"""The section `objective`: what is learnt, and which tokens are masked."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.config.base import (
    Fraction,
    Line,
    ModelFields,
    NaturalInt,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    Section,
)


class MaskRatioStage(Section):
    from_tokens: NaturalInt
    """First position, counted as `tokens` in the metrics; rounded up to a whole block. That of the first stage is 0."""
    ratio: OpenFraction
    """Share of a block's content tokens that is predicted from there on."""


# Kinds of a value, for pydantic to tell which one is meant; they are no part of a key.
NUMBER, STAGES = KINDS = ("<number>", "<stages>")


def _kind(value: Any) -> str:
    return STAGES if isinstance(value, list) else NUMBER


_NAMES = ("mlm", "clm", "plm", "rtd")
_USED_BY = {
    **dict.fromkeys(("mask_ratio", "scheme", "lengths"), ("mlm", "plm", "rtd")),
    **dict.fromkeys(("replace_by", "replace_mask", "replace_random"), ("mlm", "rtd")),
    "pair": ("mlm",),
    "teacher": ("mlm", "clm"),
    "generator": ("rtd",),
}
"""Key → the objectives that read it."""


class PairConfig(Section):
    task: Literal["nsp", "sop"]
    """What is told of two segments A and B.

    nsp: whether B follows A or is from another place of the source (BERT, arXiv:1810.04805); sop: whether they stand in
    their order or were exchanged (ALBERT, arXiv:1909.11942). Either head serves for both. The data need the starts of
    sentences that `prepare --sentence-starts` marks."""
    weight: PositiveFloat = 1.0
    """Weight of the mean loss of the pairs beside that of the masked tokens."""


class TeacherConfig(Section):
    model: Line
    """A Hugging Face checkpoint folder or hub name, of a class of the same kind and with the run's tokenizer. It is not
    trained, and no part of a checkpoint; its weights belong to a run, wherever they lie."""
    temperature: Annotated[float, Field(ge=0.1, le=1000.0)] = 2.0
    """Both models' logits are divided by it for the soft targets."""
    soft: PositiveFloat = 5.0
    """Weight of the soft targets: the mean of temperature² · KL(teacher, student) over the positions below."""
    hard: NonNegativeFloat = 2.0
    """Weight of the loss without a teacher, over the labels of the text; 0 leaves it out."""
    cosine: NonNegativeFloat = 1.0
    """Weight of 1 − the cosine between both models' last hidden states, over all tokens; 0 leaves it out, and then the
    teacher may be of another width."""
    positions: Literal["predicted", "all"] = "predicted"
    """Where the soft targets are compared: at the predicted positions, or at all tokens, as DistilBERT was trained,
    which computes all logits of both models. With clm all positions are predicted."""


class GeneratorConfig(Section):
    overrides: ModelFields = Field(default_factory=dict)
    """Fields of the generator's Hugging Face config that differ from the model's; with `from_pretrained`, from that
    checkpoint's. Default, where none is given: of ELECTRA a quarter of the width, the heads and the intermediate size,
    of others half as many layers."""
    from_pretrained: Line | None = None
    """A Hugging Face checkpoint of the model's type whose weights the generator starts from. Default: random weights,
    with the embeddings of `model.from_pretrained`, if there is one and they are shared."""
    share: Literal["embeddings", "disentangled", "nothing"] = "embeddings"
    """What the generator and the model have in common.

    embeddings: all of their embeddings, as ELECTRA (arXiv:2003.10555), which both of their losses train; disentangled:
    the model reads the generator's table of tokens, and a difference of its own is added, as DeBERTa-v3
    (arXiv:2111.09543): the generator's loss alone trains the table, the model's the difference, from 0 on."""
    weight: PositiveFloat = 50.0
    """Weight of the mean loss of replaced tokens beside that of the generator's masked tokens. 50 is ELECTRA's;
    microsoft/DeBERTa has 10 for a default."""


class ObjectiveConfig(Section):
    name: Line = "mlm"
    """What is learnt.

    mlm: masked language modelling (BERT, arXiv:1810.04805; dynamic masks as in RoBERTa, arXiv:1907.11692); clm: causal
    language modelling, as GPT-2, for decoders such as gpt2, llama, opt and modernbert-decoder; plm: permutation
    language modelling, for xlnet (arXiv:1906.08237); rtd: a generator predicts masked tokens, and the model tells which
    of the tokens it then reads are not the original ones (ELECTRA, arXiv:2003.10555; DeBERTa-v3, arXiv:2111.09543)."""
    mask_ratio: Annotated[
        Annotated[OpenFraction, Tag(NUMBER)] | Annotated[list[MaskRatioStage], Field(min_length=1), Tag(STAGES)],
        Discriminator(_kind),
    ] = 0.15
    """Share of a block's content tokens that is predicted; round(mask_ratio × payload) a block: exactly so
    many single tokens, at most so many of words; of rows of whole documents that share of their text. Or stages, each
    from a given token on, the first from 0 (arXiv:2305.15096), or data.phases have shares of their own. A resume may
    change what lies ahead. Evaluations keep to the first of all, so that they can be compared. XLNet was trained with a
    sixth: 0.1667."""
    scheme: Literal["token", "word", "ngram", "span"] = "token"
    """What is masked as a whole; all but `token` need the starts of words that `prepare --word-starts` marks.

    token: single tokens; word: words (arXiv:1906.08101), or phrases by a function of your own; ngram: one to three
    words, as ALBERT (arXiv:1909.11942); span: one to ten words, as SpanBERT (arXiv:1907.10529). A word is predicted
    whole or not at all, and at most round(mask_ratio × payload) positions a block are."""
    lengths: Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=1, max_length=100)] | None = None
    """Shares of units of 1, 2, 3, … words, for `ngram` and `span`; default the scheme's: 1/n, and 0.2 · 0.8^(n − 1)."""
    replace_by: Literal["token", "unit"] = "token"
    """Whether each token of a unit is replaced by a draw of its own, or all of them by one, as SpanBERT does."""
    replace_mask: Fraction = 0.8
    """Share of predicted positions shown as the mask token."""
    replace_random: Fraction = 0.1
    """Share of predicted positions shown as a random token; the rest is shown unchanged."""
    pair: PairConfig | None = None
    """Beside masked tokens, pairs of segments are told, `[CLS] A [SEP] B [SEP]` a block; for albert, bert, ernie and
    megatron-bert."""
    teacher: TeacherConfig | None = None
    """Learn from a trained model as well (distillation: DistilBERT, arXiv:1910.01108); with mlm and clm."""

    generator: GeneratorConfig | None = None
    """With name rtd: the smaller model that proposes tokens, trained along by masked language modelling. Default: its
    keys' defaults."""

    @model_validator(mode="before")
    @classmethod
    def there_is_a_generator(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("name") == "rtd" and raw.get("generator") is None:
            return {**raw, "generator": {}}
        return raw

    @property
    def mask_ratios(self) -> list[tuple[int, float]]:
        """Return the stages of `mask_ratio` as (from_tokens, ratio); one where it does not change."""
        if not isinstance(self.mask_ratio, list):
            return [(0, self.mask_ratio)]
        return [(stage.from_tokens, stage.ratio) for stage in self.mask_ratio]

    @model_validator(mode="after")
    def keys_are_used(self) -> Self:
        for key in _USED_BY:
            if getattr(self, key) != type(self).model_fields[key].default:
                self.refuse_unused(key, key)
        return self

    def refuse_unused(self, key: str, place: str) -> None:
        """Refuse what the objective does not read.

        Raises:
            ValueError: naming the place where it is set.
        """
        if self.name in _NAMES and self.name not in _USED_BY[key]:
            raise ValueError(f"{place} does nothing with name {self.name}: leave it out")

    @model_validator(mode="after")
    def a_teacher_knows_no_pairs(self) -> Self:
        if self.teacher is not None and self.pair is not None:
            raise ValueError("with teacher cannot have pair, which a teacher does not tell: set pair=null")
        return self

    @model_validator(mode="after")
    def stages_fit(self) -> Self:
        starts = [start for start, _ in self.mask_ratios]
        if starts[0] != 0:
            raise ValueError(f"mask_ratio must begin with a stage from_tokens 0, got {starts[0]}")
        for before, after in itertools.pairwise(starts):
            if after <= before:
                raise ValueError(f"mask_ratio's stages must ascend: from_tokens {after} after {before}")
        return self

    @model_validator(mode="after")
    def shares_fit(self) -> Self:
        if self.replace_mask + self.replace_random > 1.0 + 1e-9:
            raise ValueError(
                f"replace_mask + replace_random must be at most 1, got {self.replace_mask + self.replace_random:g}"
            )
        if self.lengths is not None and self.scheme not in ("ngram", "span"):
            raise ValueError(f"lengths does nothing with scheme {self.scheme}: set scheme to ngram or span")
        if self.lengths is not None and not 0 < sum(self.lengths) < math.inf:
            raise ValueError("lengths needs a share above 0, and no infinite one")
        if self.replace_by == "unit" and self.scheme == "token":
            raise ValueError("replace_by=unit does nothing with scheme token: set scheme to word, ngram or span")
        return self
