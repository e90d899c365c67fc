"""`maskwright validate`: everything that can be checked without training."""

from __future__ import annotations

from tools.prepare.on_demand import look_up
from trainer.checkpoint.begun import as_begun
from trainer.config import Config
from trainer.inputs.inputs import describe_unprepared, open_inputs
from trainer.sizing.micro_batch import predict_micro_size


def validate(config: Config, world_size: int) -> list[str]:
    """Check a config for a number of ranks; returns lines that describe the run.

    Raw text that no run has prepared yet is estimated from a sample, not read.

    Raises:
        UserError: with the key, file or value, and the remedy.
        DamagedError: when a data file is missing or has another size than recorded.
    """
    config = as_begun(config)
    found = look_up(config)
    micro_size, lines = predict_micro_size(config, world_size)
    if not found.estimates:
        return [*open_inputs(config, world_size, folders=found.folders, micro_size=micro_size).describe(), *lines]
    described = describe_unprepared(config, world_size, found.folders, found.estimates, micro_size, found.held_out)
    return [*found.notes, *described, *lines]
