"""What is evaluated: a checkpoint of a run, or a model of Hugging Face, as training would read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from tools.load_model import code_of_checkpoint, load_model
from trainer.checkpoint.contents import export_names
from trainer.checkpoint.find import candidates, locate
from trainer.checkpoint.manifest import MANIFEST, MODEL_FOLDER, RUN_CONFIG
from trainer.config import Config
from trainer.config.file import load_config, parse_config
from trainer.data.tokenizer import Vocabulary, load_tokenizer, means_folder, read_vocabulary
from trainer.errors import MaskwrightError, UserError
from trainer.model.account import account_for_weights
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL, FAMILIES, GENERATOR, MAIN, MASKED, PERMUTED
from trainer.model.hf_config import build_config, most_tokens
from trainer.model.replaced_tokens import GeneratorAndDiscriminator
from trainer.model.source import read_source
from trainer.model.stock import read_config, stock_model
from trainer.model.weight_files import weight_shapes
from trainer.objectives.registry import family_of
from trainer.runtime.paths import is_local, real_path, user_path

_STEP_FOLDER = re.compile(r"step-\d+$")
_OBJECTIVES = {MASKED: "mlm", CAUSAL: "clm", PERMUTED: "plm"}
_SHORTEST = 8  # tokens a block, of which a config is checked before the length is known


@dataclass(frozen=True)
class Subject:
    """A model that was found, and is not loaded yet.

    Attributes:
        name: as the user wrote it.
        run: the folder of the run that it is a checkpoint of; None for a model of Hugging Face.
        step: of the checkpoint.
        config: the run's or, where there is none, what a run that goes on from the model would begin with.
        family: of `trainer.model.classes.FAMILIES`.
        tokenizer, vocabulary: its own, from `tokenizer_folder`, a folder or a name on the hub.
        model_config: of its class.
        load: the config that it is evaluated by → its module in fp32 on the CPU, and lines for the user.
    """

    name: str
    run: Path | None
    step: int | None
    config: Config
    family: str
    tokenizer: Any
    tokenizer_folder: str
    vocabulary: Vocabulary
    model_config: PretrainedConfig
    load: Callable[[Config], tuple[nn.Module, tuple[str, ...]]]

    @property
    def tokenizer_id(self) -> str:
        """The start of the tokenizer's sha256, which tells it from others."""
        return self.vocabulary.sha256[:12]

    @cached_property
    def most_tokens(self) -> int | None:
        """The most tokens of a block; None where nothing bounds them."""
        return most_tokens(stock_model(self.model_config, "meta"))


def find_subject(name: str, run_code: bool = False) -> Subject:
    """Find what is meant by a run folder, a checkpoint folder, a folder of Hugging Face or a name on the hub.

    Its weights are not read yet, but of a checkpoint every file is compared with its sum.

    Args:
        run_code: run code that lies in its folder, where its class is not known otherwise.

    Raises:
        UserError: when there is no such model, or it cannot be evaluated.
        DamagedError: when the checkpoint is damaged.
    """
    with _named(name):
        if _is_of_a_run(name):
            return _checkpoint(name, run_code)
        _refuse_what_is_no_model(name)
        return _of_hugging_face(name, run_code)


def _is_of_a_run(name: str) -> bool:
    if not is_local(name):
        return False
    folder = user_path(name, "MODEL")
    is_step = _STEP_FOLDER.match(real_path(folder).name) is not None
    has_model = (folder / "config.json").exists()
    return bool(candidates(folder)) or (is_step and not has_model) or (is_step and (folder / MANIFEST).exists())


def _refuse_what_is_no_model(name: str) -> None:
    if not means_folder(name):
        return
    folder = user_path(name, "MODEL")
    if not any(folder.glob("*config.json")):
        found = "it has no checkpoints and no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"'{name}' is neither a run nor a model: {found}.",
            where=f"MODEL {name}",
            remedy="Give a run that has saved, one of its checkpoints, a folder as save_pretrained writes it, or a "
            "name on the hub with its owner in front.",
        )


def _checkpoint(name: str, run_code: bool) -> Subject:
    folder, manifest = locate(name)
    code = code_of_checkpoint(folder, manifest, run_code)
    config = load_config(folder / RUN_CONFIG)
    tokenizer_folder = str(folder / MODEL_FOLDER)
    tokenizer = load_tokenizer(tokenizer_folder)

    def load(_config: Config) -> tuple[nn.Module, tuple[str, ...]]:
        models = {each: load_model(folder, manifest, code, each) for each in export_names(folder)}
        # What they share is in both of them now; a difference from a shared table has been added to it.
        module = GeneratorAndDiscriminator(models[GENERATOR], models[MAIN]) if GENERATOR in models else models[MAIN]
        return module, ()

    return Subject(
        name=name,
        run=real_path(folder).parent.parent,
        step=manifest.step,
        config=config,
        family=family_of(config),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        vocabulary=read_vocabulary(tokenizer, tokenizer_folder),
        model_config=read_config(folder / MODEL_FOLDER, code),
        load=load,
    )


def _of_hugging_face(name: str, run_code: bool) -> Subject:
    """Read what a run with `model.from_pretrained` would; a head without weights is refused, for it tells nothing."""
    fields, note = read_source(name, "model.from_pretrained", run_code)
    family = _family(fields)
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"from_pretrained": name, "code": run_code and "auto_map" in fields},
            "data": {"train": "unused", "seq_len": _SHORTEST},
            "objective": {"name": _OBJECTIVES[family]},
            "train": {"steps": 1},
        },
        name,
    )
    tokenizer = load_tokenizer(name)
    vocabulary = read_vocabulary(tokenizer, name)
    model_config = build_config(config.model, vocabulary, _SHORTEST, family)
    account_for_weights(model_config, name, weight_shapes(name), whole=True)

    def load(config: Config) -> tuple[nn.Module, tuple[str, ...]]:
        built = build_model(config.model, vocabulary, config.data.seq_len, config.run.seed, family)
        return built.module, (*([note] if note else []), *built.notes)

    return Subject(
        name=name,
        run=None,
        step=None,
        config=config,
        family=family,
        tokenizer=tokenizer,
        tokenizer_folder=name,
        vocabulary=vocabulary,
        model_config=model_config,
        load=load,
    )


def _family(fields: Mapping[str, Any]) -> str:
    """Choose the first family that has a class for the model, as its type or its own code says; else the usual one."""
    own = fields.get("auto_map")
    for family in _OBJECTIVES:
        kind = FAMILIES[family]
        if fields["model_type"] in kind.classes or (isinstance(own, dict) and kind.auto_class in own):
            return family
    return MASKED  # which says what is wrong with it


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let cards of what training reads by its config name what was given here."""
    try:
        yield
    except MaskwrightError as error:
        error.where = error.where.replace("model.from_pretrained", f"MODEL {name}") or f"MODEL {name}"
        error.remedy = error.remedy.replace("model.from_pretrained", "MODEL").replace("data.seq_len", "--seq-len")
        if "model.code" in error.remedy:
            error.remedy = "If you trust the code in its folder, add --code."
        raise


def cannot(subject: Subject, what: str, option: str, remedy: str) -> UserError:
    """Make the error for something that is asked of a model that cannot do it."""
    return UserError(f"{subject.name} {what}", where=f"{option}, MODEL {subject.name}", remedy=remedy)
