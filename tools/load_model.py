"""Loading a model of a checkpoint into its class, with all its weights and no other."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.average import MeanFiles
from trainer.checkpoint.contents import export_names
from trainer.checkpoint.identity import has_own_code
from trainer.checkpoint.manifest import MODEL_FOLDER, CheckpointManifest
from trainer.checkpoint.resume import recorded_objective
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.errors import DamagedError, UserError
from trainer.model.classes import MAIN
from trainer.runtime.user_files import read_json

if TYPE_CHECKING:
    from trainer.model.model_code import ModelCode


def code_of_checkpoint(folder: Path, manifest: CheckpointManifest, may_run: bool) -> ModelCode | None:
    """Read the code of the checkpoint's model: that which the run began with, or maskwright's own of today.

    Raises:
        UserError: when it may not be run; nothing of it was.
    """
    from transformers import CONFIG_MAPPING

    from trainer.model.model_code import SHIPPED, read_code, shipped_code

    fields = read_json(folder / MODEL_FOLDER / "config.json")
    model_type = fields.get("model_type")
    is_unknown = "auto_map" in fields and model_type not in {*CONFIG_MAPPING, *SHIPPED}
    if not (is_unknown or has_own_code(manifest)):
        return shipped_code(model_type)
    if not may_run:
        raise UserError(
            f"The model of this checkpoint, a '{model_type}', has code of its own, and none of it is run unasked.",
            where=str(folder / MODEL_FOLDER),
            remedy="If it is the code that you trained with, or you trust it, add --code.",
        )
    return read_code(folder / MODEL_FOLDER, "--code", fields)


def load_model(
    folder: Path,
    manifest: CheckpointManifest,
    code: ModelCode | None,
    name: str = MAIN,
    mean: MeanFiles | None = None,
) -> Any:
    """Load a checkpoint's fp32 weights strictly into the stock model of this name, in evaluation mode.

    Args:
        mean: where weights come from instead of the checkpoint's own files.
    """
    from trainer.model.stock import read_config, stock_model, untie_if_trained_apart

    with quiet():
        files = ZeroFiles(folder) if mean is None else mean
        config = read_config(folder / MODEL_FOLDER / name, code)
        weights = _weights_of(files, config, name, manifest)
        untie_if_trained_apart(config, weights.names)  # a run that an earlier version began did not
        model = stock_model(config, "cpu")
    _fill(model, weights)
    not_finite = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise DamagedError(
            f"The checkpoint holds values that are not finite, in {not_finite[0]}"
            + (f" and {len(not_finite) - 1} more." if len(not_finite) > 1 else "."),
            where=str(folder),
            remedy="Convert an earlier checkpoint: `maskwright checkpoint list`.",
        )
    return model.eval()


@dataclass(frozen=True)
class _Weights:
    """What a checkpoint holds of one model.

    Attributes:
        names, buffers: by the names in the model, those in the files.
        added: names of the model's weights that another one of the files is to be added to.
    """

    files: ZeroFiles | MeanFiles
    names: Mapping[str, str]
    buffers: Mapping[str, str]
    added: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Read a weight, fp32, in its shape."""
        weight = self.files.read_weight(self.names[name])
        return weight + self.files.read_weight(self.added[name]) if name in self.added else weight


def _weights_of(files: ZeroFiles | MeanFiles, config: Any, export: str, manifest: CheckpointManifest) -> _Weights:
    """Find the weights of one of the models of a checkpoint."""
    from trainer.model.classes import GENERATOR
    from trainer.model.replaced_tokens import DISENTANGLED, trained_names
    from trainer.model.stock import stock_model

    if len(export_names(files.folder)) == 1:
        names, buffers = ({name: name for name in found} for found in (files.shapes, files.buffers))
        return _Weights(files, names, buffers, {})
    skeleton = stock_model(config, "meta")
    embeddings = f"{skeleton.base_model_prefix}.embeddings."
    names, buffers = (trained_names(export, found, embeddings) for found in (files.shapes, files.buffers))
    added = {}
    if export == MAIN and recorded_objective(manifest.identity)["generator"]["share"] == DISENTANGLED:
        tables = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        name = tables[id(skeleton.get_input_embeddings().weight)]
        added[name] = trained_names(GENERATOR, files.shapes, embeddings)[name]
    return _Weights(files, names, buffers, added)


def _fill(model: Any, weights: _Weights) -> None:
    """Copy parameters and buffers into the model, each of which must be there and no other.

    Parameters that a class computes itself and freezes (RoFormer's sinusoidal positions) are in no checkpoint, and stay
    as it has computed them.

    Raises:
        DamagedError: naming those that are too many or too few.
    """
    from trainer.model.stock import origins

    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    found = origins(model, weights.names)
    differ = (
        sorted(name for name in parameters.keys() - found.keys() if parameters[name].requires_grad)
        + sorted(weights.names.keys() - parameters.keys())
        + sorted(weights.buffers.keys() - buffers.keys())
    )
    if differ:
        raise DamagedError(
            f"The checkpoint's weights are not those of {type(model).__name__}: {', '.join(differ[:5])}.",
            where=str(weights.files.folder),
            remedy="Convert with the transformers version that the checkpoint's manifest names.",
        )
    for name, parameter in model.named_parameters():
        if name in found:
            parameter.data.copy_(weights.read(found[name]))
    for name, in_files in weights.buffers.items():
        buffers[name].copy_(weights.files.buffers[in_files])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' prints and progress bars off the console; errors are exceptions and get through."""
    from trainer.model.account import quiet_library  # whose log keeps the stderr that it began with

    with quiet_library(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
