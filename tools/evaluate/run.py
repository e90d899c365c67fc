"""`maskwright evaluate`: find the models, open the text for each of them, and measure one after the other."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from tools.evaluate.at_rest import ModelAtRest
from tools.evaluate.baselines import find_baselines
from tools.evaluate.data import Data, choose_passages, find_texts, open_data, scratch_folder, text_settings
from tools.evaluate.options import USUAL_WORDS, EvaluateOptions
from tools.evaluate.pieces import PieceTokenizer, find_units
from tools.evaluate.pll import PseudoLikelihood, make_batches, pseudo_likelihood
from tools.evaluate.report import Measured, Report
from tools.evaluate.settings import Settings, choose_settings, config_of
from tools.evaluate.subject import Subject, cannot, find_subject
from tools.evaluate.words import Hidden, hide_words, recover
from tools.load_model import quiet
from tools.progress import StepProgress
from trainer.config import ProbeConfig
from trainer.data.block_reader import block_count
from trainer.data.labels import LabelledTexts, read_labelled, tokenize
from trainer.errors import UserError
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.probe import Probe
from trainer.inputs.probe import need_scikit_learn
from trainer.model.classes import MASKED, PAIRED
from trainer.model.rehearsal import rehearse_states
from trainer.objectives.registry import make_criterion
from trainer.runtime import distributed
from trainer.runtime.distributed import World

_PASSAGE_BYTES = 480
_PASSAGES_A_WORD = 2  # that are looked at, at most: a short one may have no word to hide
_OF_LANGUAGE = ("mlm", "clm", "plm")  # objectives with a term of their own name over the vocabulary


@dataclass(frozen=True)
class _Texts:
    """What is asked of masked models beside their loss.

    Attributes:
        hidden: by the name of a model, the passages with words hidden.
        passages: for the pseudo-log-likelihood.
    """

    hidden: dict[str, list[Hidden]]
    passages: list[str]


def this_process() -> World:
    """Return the world of a process that is alone; on the first GPU, where there is one."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank=0, size=1, local_rank=0, device=device, control=None)


def evaluate(options: EvaluateOptions, world: World, console: Console) -> Report:
    """Evaluate; every rank calls it, and every rank has the result.

    Args:
        console: for what is said meanwhile, of rank 0 alone.

    Raises:
        UserError: for a model or data that there is not, or that do not go together.
        DamagedError: for a damaged checkpoint or data set.
    """
    console = console if world.is_main else Console(file=io.StringIO())
    with quiet():
        subjects: list[Subject] = distributed.run_on_all_ranks(
            world, lambda: [find_subject(name, options.run_code) for name in options.models]
        )
    settings: Settings = distributed.run_on_all_ranks(world, lambda: _checked_settings(subjects, options))
    labelled = distributed.run_on_all_ranks(world, lambda: _read_labels(options))
    evaluation = _Evaluation(options, settings, world, console, labelled)
    with scratch_folder(world) as scratch:
        data = evaluation.open_all(subjects, scratch)
        texts = distributed.run_on_all_ranks(world, lambda: _choose_texts(subjects, data, settings, options))
        models = [evaluation.measure(subject, its, texts) for subject, its in zip(subjects, data, strict=True)]
    notes = evaluation.notes
    if len({subject.tokenizer_id for subject in subjects}) > 1:
        notes.append("tokenizers differ: losses are of other tokens each; compare bits a byte, and recovered words")
    path = data[0].config.data.validation_path
    assert path is not None
    return Report(path, settings, options.precision, models, options.against, tuple(dict.fromkeys(notes)))


def _is_masked(subject: Subject) -> bool:
    return subject.family in (MASKED, PAIRED)


def _checked_settings(subjects: Sequence[Subject], options: EvaluateOptions) -> Settings:
    """Refuse what a model cannot do before anything is computed."""
    others = [subject for subject in subjects if not _is_masked(subject)]
    if options.pll_documents and others:
        raise cannot(
            others[0],
            f"is trained by {others[0].config.objective.name}: a pseudo-log-likelihood is of models that fill masks.",
            "--pll",
            "Leave --pll out; the loss of a causal model is that of its log-likelihood.",
        )
    if options.words and len(others) == len(subjects):
        raise cannot(others[0], "fills no masks, so no words can be hidden from it.", "--words", "Leave --words out.")
    if options.probe is not None:
        for subject in subjects:
            _rehearse(subject)
    return choose_settings(subjects, options)


def _read_labels(options: EvaluateOptions) -> LabelledTexts | None:
    """Read the labelled texts of a probe, if one is asked for."""
    if options.probe is None:
        return None
    need_scikit_learn(f"--probe {options.probe}")
    usual = ProbeConfig(path=options.probe)
    columns = options.probe_text, options.probe_label
    try:
        return read_labelled(options.probe, *columns, usual.folds, usual.samples, "--probe")
    except UserError as error:
        keys, options_of_it = "in a config eval.probe.text and eval.probe.label", "--probe-text and --probe-label"
        error.remedy = error.remedy.replace(keys, options_of_it)
        raise


def _rehearse(subject: Subject) -> None:
    """See that a model can be probed."""
    try:
        rehearse_states(subject.model_config)
    except UserError as error:
        error.where = f"--probe, MODEL {subject.name}"
        raise


def _choose_texts(
    subjects: Sequence[Subject], data: Sequence[Data], settings: Settings, options: EvaluateOptions
) -> _Texts:
    masked = [subject for subject in subjects if _is_masked(subject)]
    several = len({subject.tokenizer_id for subject in masked}) > 1
    words = options.words if options.words is not None else USUAL_WORDS if several else 0
    wanted = max(_PASSAGES_A_WORD * words, options.pll_documents)
    if not wanted:
        return _Texts({}, [])
    most_bytes = max(4, min(_PASSAGE_BYTES, settings.seq_len - 2))  # most tokens stand for a byte or more
    passages = choose_passages(find_texts(data[0], wanted), wanted, most_bytes)
    passages = [passage for passage in passages if any(unit.is_word for unit in find_units(passage))]
    tokenizers = [PieceTokenizer(subject.tokenizer) for subject in masked]
    hidden = hide_words(passages, tokenizers, [each.vocabulary for each in masked], settings.seq_len, words)
    fitting = [
        passage
        for passage in passages[: options.pll_documents]
        if all(len(tokenizer(passage).ids) + 2 <= settings.seq_len for tokenizer in tokenizers)
    ]
    if options.pll_documents and not fitting:
        raise UserError(
            "The text has no line with a word.", where="--pll", remedy="Give other text, or a larger --seq-len."
        )
    return _Texts({subject.name: found for subject, found in zip(masked, hidden, strict=True) if words}, fitting)


@dataclass
class _Evaluation:
    """The evaluation of several models, on one rank."""

    options: EvaluateOptions
    settings: Settings
    world: World
    console: Console
    labelled: LabelledTexts | None
    notes: list[str] = field(default_factory=list)

    def open_all(self, subjects: Sequence[Subject], scratch: Path) -> list[Data]:
        """Open the data once for each model; raw text is prepared once for each tokenizer and way of marking.

        Args:
            scratch: an empty folder, for raw text that is no run's own.
        """
        options, path = self.options, self.options.data
        first = next((subject for subject in subjects if subject.run is not None), None)
        unread = [name for name in ("field", "documents") if getattr(options, name) is not None]
        if path is None and unread:
            raise UserError(
                f"--{unread[0]} says how text is read that --data gives, and a run's own data are read as in its run.",
                where=f"--{unread[0]} {getattr(options, unread[0])}",
                remedy=f"Add --data, or leave --{unread[0]} out.",
            )
        if path is None:
            if first is None or first.config.data.validation_path is None:
                raise UserError(
                    "There is no text to evaluate on: no run that is given has a data.validation.",
                    where="--data",
                    remedy="Add --data with a prepared data set or with text: a file, a folder or a glob.",
                )
            of_run = first.config.data
            path, text, run_dir, held_out = of_run.validation_path, of_run.text, str(first.run), of_run.holds_out
            assert path is not None
        else:
            own = (first or subjects[0]).config.data.text
            text = text_settings(own, options.field, options.documents)
            run_dir, held_out = str(scratch / "run"), False
        opened = []
        for subject in subjects:
            if options.data is not None:
                text = text.model_copy(update={"cache": str(scratch / subject.tokenizer_id)})
            config, notes = config_of(subject, self.settings, path, run_dir, text, held_out)
            self.notes += notes
            opened.append(open_data(config, subject.vocabulary, subject.tokenizer, self.world, self._say))
        return opened

    def measure(self, subject: Subject, data: Data, texts: _Texts) -> Measured:
        """Load a model, measure it, and let go of it."""
        config, world = data.config, self.world
        with quiet():
            module, of_model = distributed.run_on_all_ranks(world, lambda: subject.load(config))
        self.notes += [f"{subject.name}: {note}" for note in of_model]
        model = ModelAtRest(module, world.device, self.options.precision, config.model.document_attention)
        samples, micro_size = self.settings.samples, self.settings.micro_size
        if self.options.micro_size is not None:  # that of a run stays: its numbers are those of training, bit for bit
            there = min(samples, block_count(data.shards, data.samples))
            micro_size = min(micro_size, math.ceil(there / world.size))  # rows beyond would be padding
        probe = distributed.run_on_all_ranks(world, lambda: self._probe(subject))
        evaluator = Evaluator(data.shards, data.samples, make_criterion(config), samples, micro_size, probe)
        values = self._run(evaluator, model, subject.name)
        baselines = bits = None
        if (term := config.objective.name) in _OF_LANGUAGE:
            baselines = distributed.run_on_all_ranks(world, lambda: find_baselines(data, evaluator))
            if (per_byte := data.tokens_per_byte) is not None:
                bits = values.get(f"eval/{term}/loss", values["eval/loss"]) * per_byte / math.log(2)
        return Measured(
            subject=subject,
            values=values,
            samples=evaluator.samples,
            bits_per_byte=bits,
            baselines=baselines,
            words=self._recover(subject, model, texts.hidden) if subject.name in texts.hidden else None,
            pll=self._pll(subject, model, texts.passages) if texts.passages else None,
        )

    def _probe(self, subject: Subject) -> Probe | None:
        """Read the labelled texts for a model, if they were asked for."""
        labelled, seq_len = self.labelled, self.settings.seq_len
        if labelled is None:
            return None
        self.notes.append(labelled.describe())
        tokens = tokenize(labelled, subject.tokenizer, seq_len)
        return Probe(labelled, tokens, subject.vocabulary.filler_id, seq_len, self.settings.micro_size)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _run(self, evaluator: Evaluator, model: ModelAtRest, name: str) -> dict[str, float]:
        blocks, done = evaluator.micro_size * self.world.size, 0
        with StepProgress(self.console, name, evaluator.samples) as progress:

            def tick() -> bool:
                nonlocal done
                progress.show(done, f"{done:,} of {evaluator.samples:,} blocks")
                done = min(done + blocks, evaluator.samples)
                return False

            values = evaluator.run(model, self.world, tick)
        assert values is not None, "nothing asks it to stop"
        return values

    def _recover(self, subject: Subject, model: ModelAtRest, hidden: Mapping[str, Sequence[Hidden]]) -> tuple[int, int]:
        own = hidden[subject.name][self.world.rank :: self.world.size]
        right, total = distributed.all_reduce_sum(self.world, recover(model, subject.vocabulary, own))
        return int(right), int(total)

    def _pll(self, subject: Subject, model: ModelAtRest, passages: Sequence[str]) -> PseudoLikelihood:
        tokens = self.settings.micro_size * self.settings.seq_len
        batches = make_batches(passages, PieceTokenizer(subject.tokenizer), subject.vocabulary, tokens)
        own, done = len(batches[self.world.rank :: self.world.size]), 0
        with StepProgress(self.console, f"{subject.name}: pseudo-log-likelihood", own) as progress:

            def tick() -> None:
                nonlocal done
                done += 1
                progress.show(done, f"{done:,} of {own:,} batches")

            return pseudo_likelihood(model, batches, passages, self.world, tick)
