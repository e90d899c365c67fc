"""The names in a run folder that belong to the run: what a config reads may not lie there.

A start writes there what it resolved, and a fresh one moves an earlier run's files away; a file of the user's would be
replaced, or be gone at the next start.
"""

from __future__ import annotations

from pathlib import Path

from trainer.config import Config, run_folder
from trainer.errors import UserError
from trainer.runtime.paths import real_path, user_path

RUN_NAMES = (  # beside previous-N
    *("config.yaml", "deepspeed.json", "data_order.json", "metrics.jsonl", "examples.jsonl", "starts.jsonl"),
    *("status.json", "lock.json", ".lock", "micro_size.json", "attention_backend.json"),
    *("checkpoints", "heartbeats", "logs", "profile", "tensorboard", "report.html"),
)


def check_named_files(config: Config, run_dir: Path) -> None:
    """Refuse a config that reads what the run itself writes, or what a fresh start moves away.

    Raises:
        UserError: naming the key.
    """
    run_dir = real_path(run_dir)
    model, data, generator = config.model, config.data, config.objective.generator
    named = {
        "deepspeed": config.deepspeed,
        "model.tokenizer": model.tokenizer,
        "model.config": model.config,
        "model.from_pretrained": model.from_pretrained,
        "model.layers_from.model": model.layers_from and model.layers_from.model,
        "objective.teacher.model": config.objective.teacher and config.objective.teacher.model,
        "objective.generator.from_pretrained": generator.from_pretrained if generator is not None else None,
        "data.validation": None if data.holds_out else data.validation,
        "eval.probe.path": config.eval.probe and config.eval.probe.path,
        **{f"data.train[{number}].path": source.path for number, source in enumerate(data.train)},
    }
    for key, name in named.items():
        path = user_path(name, key) if name else None
        if path is None or not path.exists() or not real_path(path).is_relative_to(run_dir):
            continue
        inside = real_path(path).relative_to(run_dir).parts
        if inside and inside[0] in RUN_NAMES:
            raise UserError(
                f"'{name}' lies where the run writes its own {inside[0]}.",
                where=f"{key}={name}, run.dir={config.run.dir}",
                remedy="Move it to another place, or give another run.dir.",
            )


def check_run_folder(config: Config) -> None:
    """Raise UserError when the run folder is a file, or lies in one."""
    folder = run_folder(config).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(
            f"The run folder cannot be made: '{existing}' is a file.",
            where=f"run.dir={config.run.dir}",
            remedy="Give a run.dir that is, or can be made, a folder that you may write to.",
        )
