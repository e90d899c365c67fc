"""What a checkpoint says of the run that saved it, for a resume to compare with."""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import PretrainedConfig

from trainer.checkpoint.manifest import CheckpointManifest, Records
from trainer.engine.deepspeed_config import zero_stage
from trainer.inputs.inputs import Inputs, sha256_of
from trainer.model.build import BuiltModel
from trainer.model.classes import MAIN
from trainer.model.hidden_matrices import hidden_matrices
from trainer.model.model_code import code_of
from trainer.model.rope_theta import put_theta
from trainer.model.teacher import TeacherModel
from trainer.runtime.distributed import World

_CODE = "model.code "  # before the names of files


def run_identity(inputs: Inputs, built: BuiltModel, world: World, teacher: TeacherModel | None) -> Records:
    """Make the records of this start, before the engine: at ZeRO stage 3 that leaves no weight in the module."""
    taught = {} if teacher is None else {"teacher": teacher.identity}
    identity = {**_identity(inputs, built), **taught}
    return Records(_layout(inputs, world), identity, inputs.data_order(), _model_summary(inputs, built))


def has_own_code(manifest: CheckpointManifest) -> bool:
    """Tell whether the model of a checkpoint has code of its own: neither transformers' nor maskwright's."""
    return any(name.startswith(_CODE) for name in manifest.identity)


def _layout(inputs: Inputs, world: World) -> dict[str, Any]:
    """Collect what the shape of DeepSpeed's files depends on."""
    return {
        "world_size": world.size,
        "stage": zero_stage(inputs.ds_config),
        "precision": inputs.config.train.precision,
        "gradient_accumulation_dtype": inputs.config.train.gradient_accumulation_dtype,
    }


def _identity(inputs: Inputs, built: BuiltModel) -> dict[str, Any]:
    """Collect what would change the result in silence if it changed over a resume."""
    shapes = [(name, list(tensor.shape)) for name, tensor in built.module.state_dict().items()]
    fields = {name: _fields(_at_the_beginning(model.config, inputs)) for name, model in built.exports.items()}
    if "tie_word_embeddings" in fields[MAIN]:  # as its source says: earlier versions did not correct it
        fields[MAIN]["tie_word_embeddings"] = built.says_tied
    configs = [json.dumps(each, default=str) for each in fields.values()]
    # Named only where it is on: a checkpoint from before there was such a key is one of a run without it.
    attention = {"document attention": "on"} if inputs.config.model.document_attention else {}
    code = code_of(built.model.config)  # maskwright's own is of its version, which may change, as transformers' classes
    own_code = {} if code is None or code.is_shipped else code.hashes()
    return {
        **attention,
        **{f"{_CODE}{name}": digest[:16] for name, digest in own_code.items()},
        "tokenizer": inputs.vocabulary.sha256[:16],
        "model": f"{type(built.model).__name__} {sha256_of([shapes, *configs])[:16]}",
        "objective": _objective(inputs),
        "optimizer": inputs.config.optimizer.family,
        "seed": inputs.config.run.seed,
        "seq_len": inputs.order.phases[0].seq_len,  # of what is always consumed; the rest is in the data order
    }


def _objective(inputs: Inputs) -> dict[str, Any]:
    """Dump the section; of a generator what its config does not say, and a resume does not read weights anew."""
    section = inputs.config.objective.model_dump()
    if section["generator"] is not None:
        section["generator"] = {name: section["generator"][name] for name in ("share", "weight")}
    return section


def _at_the_beginning(config: PretrainedConfig, inputs: Inputs) -> PretrainedConfig:
    """Return the config with the theta of what is always consumed, the first phase; the rest is in the data order."""
    if (theta := inputs.order.phases[0].rope_theta) is None:
        return config
    config = copy.deepcopy(config)
    put_theta(config, theta)
    return config


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """Collect all that the forward pass depends on: neither the library's version nor dropouts, a training choice."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if "dropout" not in name
        and "pdrop" not in name
        and name not in ("transformers_version", "_name_or_path", "architectures", "dtype")
    }


def _model_summary(inputs: Inputs, built: BuiltModel) -> dict[str, Any]:
    sizes = {name: parameter.numel() for name, parameter in built.module.named_parameters()}
    matrices = hidden_matrices(built.module, built.exports) if inputs.config.optimizer.name == "muon" else ()
    frozen = {"frozen": sum(sizes[name] for name in built.frozen)} if built.frozen else {}
    return {
        "class": type(built.model).__name__,
        "type": built.model.config.model_type,
        "parameters": sum(sizes.values()),
        **frozen,
        **({"matrices": sum(sizes[name] for name in matrices)} if matrices else {}),
    }
