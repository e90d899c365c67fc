"""The reference of config keys and of metric names, from the code that defines them.

python -m tools.config_reference > docs/config.md
python -m tools.config_reference metrics > docs/metrics.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import typing
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.checkpoint.manifest import CheckpointManifest
from trainer.config import Config, MaskRatioStage, PhaseConfig, SourceConfig, StageConfig
from trainer.config.base import LARGEST, LIMIT, fields_by_key, section_in
from trainer.data.manifest import Manifest, ShardEntry
from trainer.liveness.heartbeat import Heartbeat
from trainer.state import TrainState
from trainer.tracking.metrics import (
    BATCH_METRICS,
    COUNTERS,
    EVALUATION_METRICS,
    EVENT_METRICS,
    PHASE_EVALUATION_METRICS,
    PROBE_METRICS,
    SOURCE_METRICS,
    TERM_EVALUATION_METRICS,
    TERM_METRICS,
    TRAINING_METRICS,
)
from trainer.tracking.status import Status

_TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
_BOUNDS = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "at most"),
)

CONFIG_INTRODUCTION = """\
# Config keys

Made by `python -m tools.config_reference > docs/config.md` from the docstrings in `trainer/config/`.

A run is described by one YAML file: `maskwright train my.yaml`. In place of a path, the name of a recipe will do
({recipes}; they lie in `trainer/recipes/`).

- **Unknown keys are errors**, and the message names the nearest known one: `Unknown key 'optimizer.weigth_decay'. Did
  you mean 'weight_decay'?` A key that appears twice is an error as well.
- **`extends: NAME_OR_PATH`** at the top of a file inherits from a recipe or from another file (looked up beside this
  one first). Sections are merged key by key; lists and single values are replaced. Where only one of several keys
  may be set (`model.preset`, `config`, `from_pretrained`; `train.steps`, `tokens`, `epochs`; `schedule.warmup_steps`,
  `warmup_fraction`, `warmup_tokens`; `schedule.decay_fraction`, `decay_steps`, `decay_tokens`), setting one replaces
  the parent's.
- **`section.key=value`** on the command line overrides, with YAML on the right: `train.steps=1000`,
  `optimizer.betas=[0.9,0.999]`, `'data.train=[{{path: a, weight: 2}}, {{path: b}}]'`.
- Numbers may be written as `6e-4`. Beside the bounds below, whole numbers are below 2^48, and others at most 1e9.
- Paths are relative to where the command runs.
- What was used, every default spelled out, lies in `RUN/config.yaml`.

Only `run.dir`, one model source, a tokenizer, `data.train` and one length have no default.
"""

METRICS_INTRODUCTION = """\
# Metrics, and what a run leaves on disk

Made by `python -m tools.config_reference metrics > docs/metrics.md` from `trainer/tracking/metrics.py`,
`trainer/state.py` and the manifests' definitions.

Rank 0 writes one JSON object a line to `RUN/metrics.jsonl`, and each name with a `/` as a TensorBoard scalar of the
same name at the same step. A value that is not finite is `null` there and missing in TensorBoard. A resumed run first
cuts the file back to the step it resumes from, so each step stands there once. A rollback does the same, but keeps
the events of the steps that it takes back, at the step that it goes back to.
"""

RUN_FOLDER = """\
## Run folder

| path under `run.dir` | what it is |
|---|---|
| `config.yaml` | the resolved config, every default spelled out; frozen at the first start |
| `deepspeed.json` | the whole dict that DeepSpeed gets; frozen at the first start |
| `data_order.json` | all that decides which tokens sample t holds, with its sha256; frozen at the first start |
| `attention_backend.json` | on GPUs: the attention kernel that was measured to be the fastest |
| `micro_size.json` | with `batch.micro_size: auto`: the micro-batch found for each layout of ranks |
| `metrics.jsonl` | the lines described above |
| `examples.jsonl` | what the model told of the first validation samples at each evaluation, described below |
| `report.html` | the page that `maskwright report` wrote |
| `profile/steps-00000011-00000013/` | with `train.profile`: a trace of these steps for each rank that was asked for |
| `tensorboard/` | the same as scalars, and the config as text (`logging.tensorboard: false` leaves it out) |
| `logs/rank-00000.log` | all that a rank and its libraries print, tracebacks included; one file a rank |
| `checkpoints/step-00000500/` | a checkpoint: a folder whose `manifest.json` names every file with size and hash |
| `checkpoints/latest` | name of the newest one, a convenience; never read on resume |
| `status.json` | where the run stands, described below; `maskwright status` shows it |
| `heartbeats/rank-00000.json` | a sign of life of each rank, described below; one file a rank, written over |
| `starts.jsonl` | each start: `time` (since 1970), `step`, SLURM `job` and `restart`, `nodes`, `world` (ranks) |
| `slurm/` | what `maskwright submit` queued: `train.sbatch`, `convert.sbatch`, `config.yaml`, `jobs.json` (numbers) |
| `false-starts-JOB.txt` | why a SLURM job was requeued without training, if it was |
| `lock.json` | who trains here (host, process, SLURM job), renewed every 10 s, removed at the end |
| `.lock` | empty; carries the record lock by which a second job is refused |
| `previous-1/`, … | what an earlier run left here, moved aside by `--resume never`, or what a rollback took back |

A checkpoint holds DeepSpeed's files (`*_model_states.pt`, `*_optim_states.pt`), `huggingface/` (config and tokenizer),
`config.yaml` (the run config),
with `model.frozen` `frozen.safetensors` (these weights in fp32, which are in no other file),
in `huggingface/` `kept.safetensors` (of the source's weights those that the trained class has not, for `convert`),
`probe.safetensors` (logits that the training engine computed, which `convert` must reproduce) and `manifest.json`. A
folder without a valid manifest is not a checkpoint. The `.pt` files are pickles; they are read as tensors, numbers and
text alone, and nothing in them is run.

## examples.jsonl

One JSON object a line, an evaluation each, cut back on a resume as `metrics.jsonl` is:
`{"step": 500, "examples": [{"t": 0, "pieces": [{"text": "The capital of"}, {"text": " France", "shown": "<mask>",
"answer": " Spain", "right": false}, …]}, …]}`. `t` is the number of a validation sample; always the first four are
there, whatever the ranks. The `text` of their pieces, one after the other, is the start of the sample, at most 72
tokens.
A piece with an `answer` is a predicted token, the first eight of them (with `clm`, where each token is predicted, eight
that are spread over the passage): `shown` is what the model saw in its place (not with `clm`, which hides nothing),
`answer` the token that it found likeliest. Of `rtd` it is the generator that answers. There is no such file without
validation data, nor with a teacher and `hard: 0`, where no token is told.
"""


_ENTRIES = {
    "objective.mask_ratio": MaskRatioStage,
    "data.train": SourceConfig,
    "data.phases": PhaseConfig,
    "data.stages": StageConfig,
}


def config_reference() -> str:
    """Write the text of docs/config.md."""
    from trainer.config.file import recipe_names

    parts = [CONFIG_INTRODUCTION.format(recipes=", ".join(f"`{name}`" for name in recipe_names()))]
    single = []
    for name, field in fields_by_key(Config).items():
        section = section_in(field.annotation)
        if section is None:
            single.append((name, field))
            continue
        parts.append(f"## {name}\n\n" + _table_of_keys(_keys_of(name, section)))
        for key, entry in _ENTRIES.items():
            if key.startswith(f"{name}."):
                keys = list(fields_by_key(entry).items())
                parts.append(f"Keys of an entry of the list `{key}`:\n\n" + _table_of_keys(keys))
    parts.append("## Outside any section\n\n" + _table_of_keys(single))
    return "\n".join(parts)


def _keys_of(prefix: str, section: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """List the keys of a section; those of an inner section stand in its place, after it if it may be left out."""
    keys = []
    for key, field in fields_by_key(section).items():
        inner = section_in(field.annotation)
        if inner is not field.annotation:
            keys.append((f"{prefix}.{key}", field))
        keys += _keys_of(f"{prefix}.{key}", inner) if inner is not None else []
    return keys


def metrics_reference() -> str:
    """Write the text of docs/metrics.md."""
    parts = [
        METRICS_INTRODUCTION,
        "## Every line\n\n" + _table(("name", "meaning"), COUNTERS.items()),
        "## Training lines\n\nEvery `logging.every_steps` steps, and at the first and the last step.\n\n"
        + _table(("name", "meaning"), TRAINING_METRICS.items()),
        "In a run whose batches or blocks change their size (`batch.warmup`, `data.phases`, a smaller last step), "
        "also:\n\n" + _table(("name", "meaning"), BATCH_METRICS.items()),
        "In a run that mixes several sources, also for each of them:\n\n"
        + _table(("name", "meaning"), SOURCE_METRICS.items()),
        "In a run whose loss has several terms (`objective.pair`), also:\n\n"
        + _table(("name", "meaning"), TERM_METRICS.items()),
        "## Evaluation lines\n\nBefore the first step, every `eval.every_steps` steps and at the last one.\n\n"
        + _table(("name", "meaning"), EVALUATION_METRICS.items()),
        "In a run whose loss has several terms, also:\n\n"
        + _table(("name", "meaning"), TERM_EVALUATION_METRICS.items()),
        "In a run of several phases (`data.phases`), also:\n\n"
        + _table(("name", "meaning"), PHASE_EVALUATION_METRICS.items()),
        "With `eval.probe` ([probe.md](probe.md)), also:\n\n" + _table(("name", "meaning"), PROBE_METRICS.items()),
        "## Event lines\n\nWhere a step was skipped or training diverged (`resilience`). They have no other values.\n\n"
        + _table(("name", "meaning"), EVENT_METRICS.items()),
        RUN_FOLDER,
        "## Status\n\n`status.json`, replaced as a whole by rank 0.\n\n"
        + _table(("field", "meaning"), _attributes(Status)),
        "## Heartbeats\n\n`heartbeats/rank-*.json`, written over every second, in large runs less often.\n\n"
        + _table(("field", "meaning"), _attributes(Heartbeat)),
        "## Checkpoint manifest\n\n`checkpoints/step-*/manifest.json`; also `format`, `version` and `checksum` "
        "(xxh3_128 of the rest, as JSON with sorted keys).\n\n"
        + _table(("field", "meaning"), _attributes(CheckpointManifest)),
        "`state` holds:\n\n" + _table(("field", "meaning"), _attributes(TrainState)),
        "## Data manifest\n\n`manifest.json` in a folder that `maskwright prepare` wrote; also `format`, `version` and "
        "`checksum`, as above.\n\n" + _table(("field", "meaning"), _DATA_MANIFEST.items()),
    ]
    return "\n".join(parts)


_DATA_MANIFEST = {
    "dtype": "of the stored tokens: `<u2` for vocabularies up to 65,536, else `<u4`",
    "tokenizer_sha256": "identity of the tokenizer: model, vocabulary, added tokens, normalizer, pre-tokenizer",
    "vocabulary_size": "ids of the tokenizer, added tokens included",
    "separator_id": "the token stored after each document",
    "tokens": "tokens of all shards, separators included",
    "documents": "documents of all shards",
    "shards": "a list: `name`, `tokens`, `documents`, `files` (suffix → bytes, xxh3_128)",
    "sources": "what was read: names relative to what was given, and sizes",
    "settings": "what decided the cut into documents and splits",
    "statistics": "bytes of text, longest document, empty documents, refused documents by reason",
    "written_by": "the command that wrote it",
    "tokenizer_files": "of the copy of the tokenizer: file name → bytes, xxh3_128; none in older data sets",
}
assert _DATA_MANIFEST.keys() == {field.name for field in dataclasses.fields(Manifest)}
assert {field.name for field in dataclasses.fields(ShardEntry)} == {"name", "tokens", "documents", "files"}


def _table_of_keys(fields: list[tuple[str, FieldInfo]]) -> str:
    rows = [
        (f"`{name}`", _describe_type(field), _describe_default(field), " ".join((field.description or "").split()))
        for name, field in fields
    ]
    return _table(("key", "type", "default", "meaning"), rows)


def _describe_type(field: FieldInfo) -> str:
    bounds = [text for item in field.metadata for text in _bounds(item)]
    return ", ".join([_describe_annotation(field.annotation), *bounds])


def _describe_annotation(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [text for item in arguments[1:] for text in _bounds(item)]
        return ", ".join([_describe_annotation(arguments[0]), *bounds])
    if origin is Literal:
        return ", ".join(_as_yaml(value) for value in arguments)
    if origin is list:
        return "a list" if arguments[0] is not SourceConfig else "a path, or a list of entries"
    if origin is tuple:
        return f"[{'; '.join(_describe_annotation(argument) for argument in arguments)}]"
    if origin is dict:
        return "mapping"
    if section_in(annotation) is not None:
        return "a section, or null"
    if arguments:  # X | None
        return " or ".join(_describe_annotation(argument) for argument in arguments)
    return _TYPE_NAMES[annotation]


def _bounds(item: Any) -> list[str]:
    if isinstance(item, FieldInfo):
        return [text for part in item.metadata for text in _bounds(part)]
    bounds = [(word, getattr(item, name)) for kind, name, word in _BOUNDS if isinstance(item, kind)]
    return [f"{word} {_number(value)}" for word, value in bounds if value not in (LIMIT, LARGEST)]


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:,}" if isinstance(value, int) and value >= 10**6 else f"{value:g}"


def _describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    return _as_yaml(field.get_default(call_default_factory=True))


def _as_yaml(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _attributes(kind: type) -> list[tuple[str, str]]:
    """Read the fields of a dataclass with their meaning from the `Attributes:` of its docstring and of its bases'."""
    meanings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        text = inspect.getdoc(owner) if owner.__doc__ else None
        if text and "Attributes:" in text:
            meanings |= dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text.split("Attributes:")[1], re.MULTILINE))
    return [(field.name, " ".join(meanings[field.name].split())) for field in dataclasses.fields(kind)]


def _table(header: tuple[str, ...], rows: typing.Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        if len(header) == 2:
            cells[0] = f"`{cells[0]}`"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("config", "metrics"), default="config")
    print({"config": config_reference, "metrics": metrics_reference}[parser.parse_args().what](), end="")


if __name__ == "__main__":
    main()
