"""Done once in the fork server, for all commands and ranks of tests: what only a process's first start has to do.

To be imported. Modules that are read in the course of a run, versions of packages, pydantic's schemas, and what torch
remembers of a first model on its meta device take half of a small start. No process group, thread or random state is
left behind.
"""

from __future__ import annotations

import importlib

from tests.ranks import TINY_ROBERTA
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.save import RECORDED_PACKAGES
from trainer.config import ModelConfig
from trainer.data.manifest import Manifest, ShardEntry
from trainer.data.tokenizer import Vocabulary
from trainer.inputs.consistency import _sources_hash
from trainer.model.rehearsal import rehearse
from trainer.runtime.run_lock import Holder
from trainer.runtime.typed_json import _adapter
from trainer.runtime.versions import installed_version
from trainer.state import TrainState
from trainer.tracking.starts import StartRecord
from trainer.tracking.status import Status

for _module in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.original_muon",
    "numpy.ma",
    "pytest",
    "rich._emoji_codes",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "tokenizers.trainers",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.roberta.modeling_roberta",
    "transformers.processing_utils",
):
    importlib.import_module(_module)
for _package in RECORDED_PACKAGES:
    installed_version(_package)
for _kind in (CheckpointManifest, Holder, Manifest, ShardEntry, StartRecord, Status, TrainState):
    _adapter(_kind)
_sources_hash()
rehearse(
    ModelConfig(preset="roberta-base", tokenizer="unused", overrides=dict(TINY_ROBERTA)),
    Vocabulary(500, 0, 2, 2, 499, 1, (0, 1, 2, 3, 499), ""),
    [32],
)
