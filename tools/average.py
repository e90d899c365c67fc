"""Which checkpoints `convert --average` means, and the mean of their weights (Li et al., arXiv:2505.12082)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.checkpoint.find import candidates_of_run, checkpoints_folder, locate
from trainer.checkpoint.manifest import KEPT, MODEL_FOLDER, CheckpointManifest, step_folder
from trainer.checkpoint.resume import identity_differences
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import RopeTheta
from trainer.errors import UserError
from trainer.model.rope_theta import theta_of
from trainer.runtime.paths import real_path, user_path
from trainer.runtime.user_files import read_json

OPTION = "--average"
_STEP = re.compile(r"(?:step-)?(\d{1,18})")
_LAST = re.compile(r"last:(\d{1,9})")

Found = tuple[Path, CheckpointManifest]


def locate_several(run: str, names: Sequence[str]) -> list[Found]:
    """Find the checkpoints of a run that are to be averaged, each of them whole; the oldest first.

    Args:
        names: steps (`500`, `step-00000500`), `last:N` for the newest N, or paths of checkpoints, which may lie in a
            branch of the run: what counts is that model, tokenizer, objective and seed are the same.

    Raises:
        UserError: when there is no such checkpoint, fewer than two, one twice, or one that belongs to another run or
            was trained with another rope theta.
        DamagedError: when one is not whole.
    """
    where = f"{OPTION} {' '.join(names)}"
    paths = [path for name in names for path in _paths(run, name, where)]
    if len({real_path(path) for path in paths}) < len(paths):
        raise UserError("A checkpoint is named twice.", where=where, remedy="Name each once.")
    if len(paths) < 2:
        raise UserError(
            f"A mean is of two checkpoints or more, and {len(paths)} is named.",
            where=where,
            remedy=f"Name more, such as {OPTION} last:4, or leave {OPTION} out.",
        )
    found = sorted((locate(path) for path in paths), key=lambda each: each[1].step)
    for each in found[:-1]:
        _refuse_another_run(each, found[-1], where)
    return found


def _paths(run: str, name: str, where: str) -> list[Path]:
    in_run = candidates_of_run(run, OPTION, "is of several of a run")
    if match := _STEP.fullmatch(name):
        return [step_folder(checkpoints_folder(user_path(run)), int(match[1]))]
    if not (match := _LAST.fullmatch(name)):
        return [user_path(name, OPTION)]
    if not 0 < int(match[1]) <= len(in_run):
        raise UserError(
            f"'{run}' has {len(in_run)} checkpoints.", where=where, remedy=f"Give at most last:{len(in_run)}."
        )
    return [candidate.folder for candidate in in_run[: int(match[1])]]


def _refuse_another_run(one: Found, newest: Found, where: str) -> None:
    kept = f"{MODEL_FOLDER}/{KEPT}"
    differences = identity_differences(one[1].identity, newest[1].identity)
    if one[1].files.get(kept) != newest[1].files.get(kept):
        differences.append("the weights that went past the training are others")
    if differences:
        raise UserError(
            f"{one[0].name} and {newest[0].name} are not of one run: {'; '.join(differences)}.",
            where=where,
            remedy="Average checkpoints of one run, or of branches that go on from one of them.",
        )
    before, now = (_theta(folder) for folder, _ in (one, newest))
    if before != now:  # phases change it in the course of a run, so it is no part of what a run is
        raise UserError(
            f"{one[0].name} was trained with a rope theta of {before}, and {newest[0].name} with {now}: the mean of "
            "their weights fits neither.",
            where=where,
            remedy="Average checkpoints of phases that have one theta (data.phases[].rope_theta).",
        )


def _theta(folder: Path) -> RopeTheta | None:
    config: Any = SimpleNamespace(**read_json(folder / MODEL_FOLDER / "config.json"))
    return theta_of(config)


class MeanFiles:
    """The weights of several checkpoints of a run by parameter, each the mean of all, in the place of `ZeroFiles`.

    A sum of fp32 numbers is taken in fp64, so a mean is rounded once. No more than a parameter is held.
    """

    def __init__(self, found: Sequence[Found]) -> None:
        self._files = [ZeroFiles(folder) for folder, _ in found]
        self.folder, self.shapes = self._files[-1].folder, self._files[-1].shapes

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Tensors that are not trained, which have to be the same in all.

        Raises:
            UserError: naming one that is not: a mean of statistics is not that of the mean weights.
        """
        buffers = self._files[-1].buffers
        for name, value in buffers.items():
            if not all(torch.equal(files.buffers[name], value) for files in self._files):
                raise _differs(name)
        return buffers

    def read_weight(self, name: str) -> torch.Tensor:
        """Read the mean of a parameter, fp32, in its shape.

        Raises:
            UserError: when none of the checkpoints has trained it, and they differ nevertheless.
        """
        first = self._files[0].read_weight(name)
        total, is_frozen = first.double(), all(name in files.frozen for files in self._files)
        for files in self._files[1:]:
            weight = files.read_weight(name)
            if is_frozen and not torch.equal(weight, first):
                raise _differs(name)
            total += weight
        return (total / len(self._files)).float()


def _differs(name: str) -> UserError:
    return UserError(
        f"{name} is not trained, and yet differs between the checkpoints: there is no mean of it.",
        where=OPTION,
        remedy="Average checkpoints that have it in common.",
    )
