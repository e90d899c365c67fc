"""What is known of a run before its data, its tokenizer or its GPUs are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.prepare.on_demand import look_up, raw_paths
from trainer.config import Config
from trainer.data.manifest import read_data_manifest, split_folder
from trainer.data.order.mixture import mixture_order
from trainer.data.tokenizer import Vocabulary
from trainer.engine.deepspeed_config import check_precision, load_preset
from trainer.errors import MaskwrightError, UserError
from trainer.inputs.inputs import open_inputs
from trainer.inputs.phases import lay_out_phases
from trainer.inputs.probe import read_probe
from trainer.model.classes import attended_tokens
from trainer.model.source import load_vocabulary, source_note
from trainer.model.teacher import check_same_ids
from trainer.objectives.registry import family_of, view_of
from trainer.schedule.batch_plan import BatchPlan, plan_batch
from trainer.schedule.phases import Phases
from trainer.schedule.run_length import find_defaults, resolve

USUAL_VOCABULARY = 50_265  # RoBERTa's, and the default of `tokenizer train`


@dataclass
class Facts:
    """What a plan starts from.

    Attributes:
        plan: its micro-batch may be open, its number of steps is not to be used unless `steps_known`.
        phases: of the run.
        tokens: in the training data; None when there is none to look at.
        epochs: passes over each source by name; empty when the data are not known.
        attended_tokens: how many tokens a token attends to on average, in each phase.
        unknown: a line for each thing that was not there to be looked at, and what stands in for it.
    """

    config: Config
    vocabulary: Vocabulary
    plan: BatchPlan
    phases: Phases
    steps_known: bool = True
    tokens: int | None = None
    epochs: dict[str, float] = field(default_factory=dict)
    attended_tokens: Sequence[float] = ()
    unknown: list[str] = field(default_factory=list)

    @property
    def total_tokens(self) -> int:
        """Positions that the run trains on."""
        return self.plan.tokens_ahead(0, self.plan.total_steps)


def gather_facts(config: Config, world_size: int, vocabulary_size: int | None) -> Facts:
    """Look at what is there.

    Args:
        vocabulary_size: in place of the tokenizer's.

    Raises:
        UserError: for what no data could mend: a batch that does not divide, a preset that there is not.
    """
    check_precision(config, load_preset(config.deepspeed))
    unknown: list[str] = []
    if note := source_note(config.model):
        unknown.append(note)
    if (labelled := read_probe(config)) is not None:
        unknown.append(labelled.describe())
    vocabulary = _vocabulary(config, vocabulary_size, unknown)
    tokens = _tokens_of_sources(config, unknown)
    phases = lay_out_phases(config, vocabulary)
    whole_documents = config.data.samples == "documents"
    views = [view_of(config, phase.seq_len) for phase in phases]
    blocks = [[view.block_count(count) for count in tokens or ()] for view in views]
    epoch_blocks, whole_steps = [sum(counts) for counts in blocks], find_defaults(config).whole_steps
    plan = plan_batch(config.batch, config.train, phases, world_size, epoch_blocks, whole_steps)
    facts = Facts(
        config,
        vocabulary,
        plan,
        phases,
        unknown=unknown,
        attended_tokens=[attended_tokens(phase.seq_len, family_of(config)) for phase in phases],
    )
    facts.steps_known = config.train.epochs is None or tokens is not None
    if facts.steps_known:
        facts.config = resolve(config, plan)
    if tokens is not None:
        facts.tokens = sum(tokens)
        order = mixture_order(config.data, phases, blocks, tokens, config.run.seed)
        epochs = order.epochs(plan.end_sample)
        facts.epochs = {source.label: passes for source, passes in zip(config.data.train, epochs, strict=True)}
    if whole_documents:
        unknown.append("rows of documents: counted as if they were full; `maskwright validate` counts them")
    if config.data.phases or config.batch.warmup is not None:
        unknown.append("earlier steps: smaller batches and shorter blocks are reckoned at the speed of full steps")
    if config.model.document_attention:
        _attended(facts, world_size)
    return facts


def _vocabulary(config: Config, size: int | None, unknown: list[str]) -> Vocabulary:
    if size is None:
        try:
            vocabulary = load_vocabulary(config)
        except UserError as error:
            unknown.append(f"tokenizer: {error.problem} A vocabulary of {USUAL_VOCABULARY:,} is taken (--vocab-size)")
            size = USUAL_VOCABULARY
        else:
            note = check_same_ids(config) if config.objective.teacher is not None else None
            unknown += [note] if note is not None else []
            return vocabulary
    return Vocabulary(size, 0, 2, 2, size - 1, 1, (0, 1, 2, 3, size - 1), sha256="")


def _tokens_of_sources(config: Config, unknown: list[str]) -> list[int] | None:
    """Count the tokens of each source from manifests or, for raw text, a sample; None when one of them is not there."""
    counts: list[int] = []
    try:
        found = look_up(config) if raw_paths(config) else None
        for source in config.data.train:
            if found is not None and source.path in found.estimates:
                counts.append(found.estimates[source.path])
                unknown += [f"data: {note}" for note in found.notes]
            else:
                folder = (found.folders if found is not None else {}).get(source.path, Path(source.path))
                counts.append(read_data_manifest(split_folder(folder, "train")).tokens)
    except MaskwrightError as error:
        unknown.append(f"data: {error.problem} So how often they are passed over is not known")
        return None
    return counts


def _attended(facts: Facts, world_size: int) -> None:
    try:
        facts.attended_tokens = open_inputs(facts.config, world_size).attended_tokens
    except MaskwrightError:
        facts.unknown.append(
            f"documents: their lengths are not known; FLOPs are counted for {facts.config.data.seq_len:,} tokens each"
        )
