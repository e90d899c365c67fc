"""The site file: how jobs run on a cluster, described once (slurm/site.example.yaml)."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from trainer.config.base import Line, Section
from trainer.config.file import read_mapping, validate_section
from trainer.errors import UserError
from trainer.runtime.files import shipped
from trainer.runtime.paths import user_path
from trainer.runtime.plain_text import has_control

SLURM_FOLDER = shipped("launcher", "slurm")
EXAMPLE = SLURM_FOLDER / "site.example.yaml"
DEFAULT_SITE = SLURM_FOLDER / "site.yaml"
SITE_VARIABLE = "MASKWRIGHT_SITE"
_OF_EACH_START = ("MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_JOB_END_TIME")
"""Variables that the job script sets, and an image must not."""

SbatchOptions = dict[str, str | int | bool | None]


def _shell_words(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:  # a quote that is not closed
        message = "Input should be words as a shell reads them: {reason}"
        raise PydanticCustomError("shell_words", message, {"reason": str(error)}) from None
    return text


def _lines(value: Any) -> Any:
    if isinstance(value, str) and has_control(value.replace("\n", "").replace("\t", "")):
        raise PydanticCustomError("lines", "Input should have no control characters but line ends and tabs")
    return value


ShellLines = Annotated[str, AfterValidator(_lines)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Container(Section):
    runtime: Literal["pyxis", "apptainer"]
    """pyxis is a plugin of srun; apptainer a command that runs in each task."""
    image: Line
    mounts: list[Line] = Field(default_factory=list)
    """PATH, or PATH:PATH_INSIDE."""
    options: list[Line] = Field(default_factory=list)
    """More options, of srun for pyxis, of `apptainer exec` for apptainer."""


class Site(Section):
    sbatch: SbatchOptions = Field(default_factory=dict)
    """Options of sbatch by name without dashes."""
    convert: SbatchOptions = Field(default_factory=dict)
    """The same for the job that converts, on top of `sbatch`; null takes one away."""
    setup: ShellLines = ""
    """Shell lines that run in the job first."""
    environment: dict[VariableName, ShellLines | int] = Field(default_factory=dict)
    """Variables for the ranks."""
    command: Annotated[Line, AfterValidator(_shell_words)] | None = None
    """Words that start maskwright in a job. Default: the one that submits, `maskwright` in a container."""
    srun: list[Line] = Field(default_factory=list)
    """More options of srun."""
    requeue: bool = True
    """Whether jobs may be requeued."""
    container: Container | None = None

    def command_words(self) -> list[str]:
        """List the words that start maskwright in a task."""
        box = self.container
        if box is None:
            return shlex.split(self.command) if self.command else this_maskwright()
        words = shlex.split(self.command or "maskwright")
        if box.runtime == "pyxis":
            return words
        binds = [word for mount in box.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *binds, *box.options, box.image, *words]

    def srun_options(self) -> list[str]:
        """List the options that each srun gets."""
        box = self.container
        if box is None or box.runtime != "pyxis":
            return self.srun
        mounts = [f"--container-mounts={','.join(_both(mount) for mount in box.mounts)}"] if box.mounts else []
        # Without it the image's own values of these variables would win.
        kept = f"--container-env={','.join([*self.environment, *_OF_EACH_START])}"
        return [*self.srun, f"--container-image={box.image}", *mounts, kept, *box.options]

    def setup_lines(self) -> list[str]:
        """Write the shell lines for the start of a job."""
        prefixes = [""]
        if self.container is not None and self.container.runtime == "apptainer":
            prefixes.append("APPTAINERENV_")  # which win over the image's own values
        exports = [
            f"export {prefix}{name}={shlex.quote(str(value))}"
            for name, value in self.environment.items()
            for prefix in prefixes
        ]
        return [*exports, *self.setup.splitlines()]


def _both(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"


def this_maskwright() -> list[str]:
    """Find the command of this installation."""
    script = Path(sys.executable).with_name("maskwright")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "launcher"]


def find_site(given: str | None, environ: Mapping[str, str]) -> tuple[Site, Path | None]:
    """Read the site file that was given, else that of the variable, else slurm/site.yaml, else none.

    Raises:
        UserError: when it is not there, or not right.
    """
    path = DEFAULT_SITE
    if given is not None or environ.get(SITE_VARIABLE):
        path = user_path(environ[SITE_VARIABLE], SITE_VARIABLE) if given is None else user_path(given, "--site")
        if not path.is_file():
            where = f"--site {path}" if given is not None else f"{SITE_VARIABLE}={path}"
            raise UserError(
                f"There is no site file '{path}'.", where=where, remedy=f"Write one: {EXAMPLE} explains it."
            )
    if not path.is_file():
        return Site(), None
    raw = read_mapping(path, example=str(EXAMPLE))
    return validate_section(Site, raw, os.fspath(path), os.fspath(EXAMPLE)), path
