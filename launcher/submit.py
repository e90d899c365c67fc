"""`maskwright submit`: check a run, write its jobs into the run folder, and queue them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from launcher.job_script import Options, assign, literal, render, template_options
from launcher.site import SLURM_FOLDER, Site, find_site
from launcher.slurm import parse_time, queued_jobs, require_sbatch, sbatch
from trainer.config import Config
from trainer.config.file import dump_config, load_config
from trainer.errors import UserError, cannot_write
from trainer.runtime.files import replace_synced
from trainer.runtime.paths import user_path

if TYPE_CHECKING:
    from rich.console import Console

JOBS = "jobs.json"  # in RUN/slurm
_OWN_OPTIONS = {
    **dict.fromkeys(("--nodes", "-N"), "Give --nodes to submit, in front of `--`."),
    **dict.fromkeys(
        ("--ntasks", "-n", "--ntasks-per-node", "--gpus-per-node", "--gpus", "-G", "--gres", "--gpus-per-task"),
        "Give --gpus-per-node or --tasks-per-node to submit: the batch arithmetic depends on it.",
    ),
    **dict.fromkeys(("--signal",), "Set resilience.stop_before_end_seconds: it goes by that."),
    **dict.fromkeys(("--time", "-t"), "Give --time to submit, in front of `--`."),
    **dict.fromkeys(("--requeue", "--no-requeue"), "Give --chain, or `requeue: false` in the site file."),
    **dict.fromkeys(("--job-name", "-J"), "Set run.name."),
    **dict.fromkeys(("--output", "-o", "--error", "-e", "--open-mode", "--chdir", "-D"), "The log has its place."),
    **dict.fromkeys(("--array", "-a", "--parsable", "--wrap", "--test-only"), "Submit once for each run."),
}
"""Options of sbatch that submit sets itself, and what to do instead of giving them."""
_OWN_OPTIONS_OF_CHAINS = dict.fromkeys(("--dependency", "-d"), "Leave --chain out: its jobs depend on each other.")


@dataclass(frozen=True)
class Submission:
    """What was asked for.

    Attributes:
        gpus_per_node: as sbatch takes it, `8` or `h100:8`; None or `0` on nodes without GPUs.
        tasks_per_node: ranks a node; None: one a GPU.
        sbatch: options of sbatch by name, None where not given.
        more_sbatch: words behind `--`.
        chain: how many jobs to queue, to go on one after the other; 1: one that requeues itself.
    """

    config: str
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: str | None
    tasks_per_node: int | None
    sbatch: Mapping[str, str | int | None]
    more_sbatch: Sequence[str]
    site: str | None
    chain: int
    convert: bool
    convert_best: bool
    preflight: bool
    exclude_bad_nodes: bool
    dry_run: bool

    @property
    def ranks_per_node(self) -> int:
        """
        Raises:
            UserError: when it is not given, or given twice.
        """
        gpus = _gpu_count(self.gpus_per_node) if self.gpus_per_node else 0
        if gpus and self.tasks_per_node not in (None, gpus):
            raise UserError(
                f"{gpus} GPUs a node, but {self.tasks_per_node} ranks: each GPU has one rank.",
                where=f"--tasks-per-node {self.tasks_per_node}",
                remedy="Leave it out: it is for nodes without GPUs.",
            )
        ranks = gpus or self.tasks_per_node
        if not ranks:
            raise UserError(
                "How many ranks are there to be on a node?",
                where="--gpus-per-node",
                remedy="Give --gpus-per-node G, or on nodes without GPUs --tasks-per-node R.",
            )
        return ranks


def _gpu_count(text: str) -> int:
    match = re.fullmatch(r"(?:[A-Za-z0-9_.-]+:)?([0-9]{1,4})", text)
    if match is None:
        raise UserError(
            f"'{text}' is no number of GPUs.", where="--gpus-per-node", remedy="Write 8, or TYPE:8 as in h100:8."
        )
    return int(match[1])


def submit(asked: Submission, console: Console) -> None:
    """Validate, write and queue a run; a dry run prints the scripts on stdout, then the run, and writes nothing.

    Raises:
        UserError: for a mistake in config or options, a job in the same run folder, or when SLURM refuses.
    """
    if not asked.dry_run:
        require_sbatch()
    config = load_config(asked.config, asked.overrides)
    site, site_path = find_site(asked.site, os.environ)
    jobs = _Jobs(asked, config, site)
    jobs.check()
    scripts = jobs.scripts()
    if not asked.dry_run:
        jobs.check_folder()
    from tools.validate import validate

    world_size = asked.nodes * asked.ranks_per_node
    ranks = f"{asked.nodes} nodes × {asked.ranks_per_node} ranks = {world_size} ranks"
    described = validate(config, world_size)
    if asked.dry_run:  # first, so that on a terminal the summary is what stays in view
        sys.stdout.write("\n".join(scripts.values()))
        sys.stdout.flush()
    for line in described:
        console.print(line)
    console.print(f"site: {site_path}" if site_path else "site: none (see slurm/site.example.yaml)")
    if asked.dry_run:
        console.print(f"dry run: {ranks}; the script is on stdout, nothing was written or queued")
        return
    jobs.write(scripts)
    numbers, conversion = jobs.queue()
    for line in jobs.describe(numbers, conversion, ranks):
        console.print(line)


class _Jobs:
    """The jobs of one run: the training, or a chain of it, and the conversion."""

    def __init__(self, asked: Submission, config: Config, site: Site) -> None:
        self.asked, self.config, self.site = asked, config, site
        self.run_dir = Path(os.path.abspath(user_path(config.run.dir, "run.dir")))  # keeps symbolic links
        if "\\" in str(self.run_dir):
            problem = "A backslash in --output of sbatch turns off its patterns, so the log would have no job number."
            raise UserError(problem, where=f"run.dir={config.run.dir}", remedy="Give a run.dir without a backslash.")
        self.folder = self.run_dir / "slurm"
        self.logs = self.run_dir / "logs"
        self.script, self.conversion = self.folder / "train.sbatch", self.folder / "convert.sbatch"
        self.model = self.run_dir / "model"
        # Of this run alone: a chain goes by its name.
        folder_hash = hashlib.sha256(os.fsencode(self.run_dir)).hexdigest()[:6]
        self.name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', config.run.name)}-{folder_hash}"

    def check(self) -> None:
        """Check that the options fit together.

        Raises:
            UserError: when the options contradict each other.
        """
        asked, lead = self.asked, self.config.resilience.stop_before_end_seconds
        own = {**_OWN_OPTIONS, **(_OWN_OPTIONS_OF_CHAINS if asked.chain > 1 else {})}
        for word in asked.more_sbatch:
            if remedy := own.get(word.partition("=")[0]):
                raise UserError(f"maskwright sets {word.partition('=')[0]} itself.", where=word, remedy=remedy)
        if not self.site.requeue and asked.exclude_bad_nodes:
            raise UserError(
                "Bad nodes are excluded by a requeue, which the site file forbids.",
                where="--exclude-bad-nodes",
                remedy="Use --preflight, and submit again with --exclude.",
            )
        if asked.chain > 1 and asked.exclude_bad_nodes:
            raise UserError(
                "Bad nodes are excluded by a requeue, which the jobs of a chain do not do.",
                where="--chain, --exclude-bad-nodes",
                remedy="Use --preflight, and submit again with --exclude.",
            )
        if asked.convert_best and not self.config.checkpoint.keep_best:
            raise UserError(
                "The checkpoint of the best evaluation is not kept.",
                where="--convert-best, checkpoint.keep_best=false",
                remedy="Set checkpoint.keep_best=true, or use --convert, which takes the newest.",
            )
        limit = parse_time(time) if (time := str(self._options().get("time") or "")) else None
        if limit is not None and limit < 2 * lead:
            raise UserError(
                f"A job of {limit} s that stops {lead} s before its end hardly trains.",
                where=f"--time {time}",
                remedy="Give a longer --time, or a smaller resilience.stop_before_end_seconds.",
            )

    def check_folder(self) -> None:
        """Check that no job of this run is queued, and that the conversion can be written.

        Raises:
            UserError: when jobs of this run are queued, or the conversion could not write.
        """
        try:
            known = json.loads((self.folder / JOBS).read_text(encoding="utf-8"))["train"]
        except (OSError, ValueError, KeyError):
            known = []
        for number, state in sorted(queued_jobs().items()):
            if number in known:
                raise UserError(
                    f"Job {number} of this run folder is {state.lower()}.",
                    where=f"run.dir={self.config.run.dir}",
                    remedy=f"Wait for it, end it with `scancel --name={self.name}`, or give another run.dir.",
                )
        if self.asked.convert and self.model.exists():
            raise UserError(
                f"'{self.model}' exists already.",
                where="--convert",
                remedy="Move it away, or leave --convert out and run `maskwright convert` afterwards.",
            )

    def train_script(self) -> str:
        asked = self.asked
        settings = [
            assign("config", str(self.folder / "config.yaml")),
            assign("run_dir", str(self.run_dir)),
            assign("on_stop", "chain" if asked.chain > 1 else "requeue" if self.site.requeue else "exit"),
            assign("preflight", "exclude" if asked.exclude_bad_nodes else "yes" if asked.preflight else "no"),
            *self._common_settings(),
        ]
        comment = (
            f"Written by `maskwright submit` for {self.run_dir}.",
            f"To submit it again, from anywhere: sbatch {quote(str(self.script))}",
        )
        return render(_template("train"), comment, self._options(), asked.more_sbatch, settings)

    def convert_script(self) -> str:
        inherited = {name: self.asked.sbatch.get(name) for name in ("partition", "account", "qos")}
        options = {
            **{name: value for name, value in self.site.sbatch.items() if not name.startswith(("gpu", "gres"))},
            **{name: value for name, value in inherited.items() if value is not None},
            **template_options(_template("convert")),
            **self.site.convert,
            "requeue": self.site.requeue,
            "job-name": f"convert-{self.name}",
            "chdir": os.getcwd(),
            "output": self._log,
        }
        settings = [
            assign("run_dir", str(self.run_dir)),
            assign("output", str(self.model)),
            assign("options", ["--code"] * self.config.model.code + ["--best"] * self.asked.convert_best),
            *self._common_settings(),
        ]
        comment = (f"Written by `maskwright submit --convert` for {self.run_dir}.",)
        return render(_template("convert"), comment, options, (), settings)

    def scripts(self) -> dict[Path, str]:
        """Make the scripts that are to be queued.

        Raises:
            UserError: for an option that no line of a script can hold.
        """
        scripts = {self.script: self.train_script()}
        return {**scripts, self.conversion: self.convert_script()} if self.asked.convert else scripts

    def write(self, scripts: dict[Path, str]) -> None:
        """Write the scripts and the config.

        Raises:
            UserError: when the run folder cannot be written.
        """
        for path, text in {**scripts, self.folder / "config.yaml": dump_config(self.config)}.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.logs.mkdir(exist_ok=True)
                replace_synced(path, text.encode())
            except OSError as error:
                raise cannot_write(path, self.run_dir, error) from None

    def queue(self) -> tuple[list[int], int | None]:
        """Submit all jobs; returns the numbers of those that train, and of the one that converts."""
        options = ["--dependency=singleton"] if self.asked.chain > 1 else []
        numbers: list[int] = []
        conversion = None
        try:
            for _ in range(self.asked.chain):
                numbers.append(sbatch(*options, str(self.script)))
            if self.asked.convert:  # one job of a chain finishes, those before it end with 75
                after = "?".join(f"afterok:{number}" for number in numbers)
                conversion = sbatch(f"--dependency={after}", "--kill-on-invalid-dep=yes", str(self.conversion))
        except UserError as error:
            if numbers:
                error.problem += f" Submitted before that: {', '.join(map(str, numbers))}."
            raise
        finally:
            content = json.dumps({"train": numbers, "convert": conversion}) + "\n"
            replace_synced(self.folder / JOBS, content.encode())
        return numbers, conversion

    def describe(self, numbers: list[int], conversion: int | None, ranks: str) -> list[str]:
        """Say what has been submitted, and how to follow and to end it."""
        run_dir, first = str(user_path(self.config.run.dir, "run.dir")), numbers[0]
        several = f"; {', '.join(map(str, numbers[1:]))} go on after it" if len(numbers) > 1 else ""
        lines = [f"submitted job {first}: {ranks}{several}"]
        if conversion is not None:
            what = "the best evaluation of the finished run" if self.asked.convert_best else "the finished run"
            lines.append(f"and job {conversion}, which converts {what} to {self.model}")
        rows = {
            "run folder": run_dir,
            "script": f"{quote(str(self.script))} (sbatch it to submit the run again)",
            "log": f"tail -F {quote(str(self.logs / f'slurm-{first}.log'))}",
            "status": f"maskwright status {quote(run_dir)}",
            "TensorBoard": f"tensorboard --logdir {quote(f'{run_dir}/tensorboard')}",
            "save and stop": f"scancel --batch --signal=INT {first}",
            "stop at once": f"scancel --name={self.name}",
        }
        return [*lines, *(f"  {name + ':':<15}{value}" for name, value in rows.items())]

    @property
    def _log(self) -> str:
        return literal(str(self.logs)) + "/slurm-%j.log"

    def _options(self) -> Options:
        asked = self.asked
        gpus = asked.gpus_per_node if asked.gpus_per_node and _gpu_count(asked.gpus_per_node) else None
        requeues = self.site.requeue and asked.chain == 1
        given = {name: value for name, value in asked.sbatch.items() if value is not None}
        return {
            **template_options(_template("train")),
            "cpus-per-task": 1 + self.config.data.workers,  # the rank and its loader
            **self.site.sbatch,
            **given,
            "job-name": self.name,
            "nodes": asked.nodes,
            "ntasks-per-node": asked.ranks_per_node,
            "gpus-per-node": gpus,
            "signal": f"B:USR1@{self.config.resilience.stop_before_end_seconds}",
            "requeue": requeues,
            "no-requeue": not requeues,
            "chdir": os.getcwd(),
            "output": self._log,
        }

    def _common_settings(self) -> list[str]:
        return [
            assign("maskwright", self.site.command_words()),
            assign("srun_options", self.site.srun_options()),
            *self.site.setup_lines(),
        ]


def _template(name: str) -> str:
    """Read a script of slurm/.

    Raises:
        UserError: when the installation has none.
    """
    path = SLURM_FOLDER / f"{name}.sbatch"
    if not path.is_file():
        raise UserError(
            "The job scripts are not installed.",
            where=str(path),
            remedy="Install maskwright from a clone: pip install -e .",
        )
    return path.read_text(encoding="utf-8")
