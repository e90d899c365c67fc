"""Open the files that torch.save wrote for DeepSpeed without running anything that may be in them.

They are pickles, and a pickle may call whatever it names. torch's restricted reader (`weights_only=True`) builds
tensors and plain Python values, and nothing else. DeepSpeed's files name a few classes of its own beside these; here
each has a stand-in that holds its values, so that neither DeepSpeed nor anything else is imported. A file that names
anything more is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class FragmentAddress:
    """Where a parameter's fragment lies in a flat tensor: deepspeed.utils.tensor_fragment.fragment_address."""

    numel: int
    start: int


class LossScalerState:
    """The values of DeepSpeed's loss scaler: static, or dynamic as in fp16."""


# What each class of DeepSpeed becomes, by the name that the pickles have for it.
_STAND_INS = [
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScalerState, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScalerState, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]

_SHOWN_CHARACTERS = 200


def load_without_code(path: Path) -> dict[str, Any]:
    """Load the content of a file that torch.save wrote, its tensors on the CPU and mapped from the file.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it cannot be read, or names more than tensors, plain values and the classes above.
    """
    with torch.serialization.safe_globals(_STAND_INS):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever the bytes of a pickle make of torch's reader
            raise ValueError(_problem(path, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} in the place of named values")
    return content


def _problem(path: Path, error: Exception) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive of torch, or no pickle in it
        foreign = []
    if foreign:
        names = ", ".join(sorted(foreign)[:4])
        return f"it names {names}, which no checkpoint of maskwright does; nothing in it was run"
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return message.splitlines()[0][:_SHOWN_CHARACTERS] if message else type(error).__name__
