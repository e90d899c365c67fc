"""The last hidden states of a model that is called as a whole, head and all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.errors import UserError


@contextmanager
def showing_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect what the encoder of a model puts out in each forward pass, eagerly where it is compiled.

    Texts have lengths that blocks have not: each would be compiled, and count among the shapes that a run may have.
    By a hook, as heads are restricted: it composes with DeepSpeed's own, which gather a ZeRO-3 partition. Not
    `output_hidden_states`, which keeps those of all layers, and which not every class has.
    """
    shown: list[torch.Tensor] = []
    encoder: Any = model.base_model
    handle = encoder.register_forward_hook(lambda _encoder, _args, output: shown.append(output[0]))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield shown
    finally:
        handle.remove()


def last_states(model: PreTrainedModel, shown: Sequence[torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Return the last of the states that were shown, [B, S, H].

    Raises:
        UserError: when there are none, or they are not of the shape of `input_ids`, [B, S].
    """
    name, shape = type(model).__name__, list(input_ids.shape)
    if not shown:
        raise cannot_be_probed(f"{name} does not call its encoder as a whole")
    if list(shown[-1].shape[:-1]) != shape:
        raise cannot_be_probed(f"The last hidden states of {name} are {list(shown[-1].shape)} for {shape} tokens")
    return shown[-1]


def cannot_be_probed(problem: str) -> UserError:
    """Make the error for a model whose last hidden states are not to be had."""
    return UserError(
        f"{problem}.",
        where="eval.probe",
        remedy="Leave the probe out, or take a model of another type.",
    )
