"""The model card (README.md) of a converted model, from the run's own records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.manifest import RUN_CONFIG, CheckpointManifest
from trainer.checkpoint.resume import recorded_objective
from trainer.config import BatchConfig, DataConfig, RopeTheta
from trainer.data.order.compare import recorded_phases
from trainer.data.order.mixture import mixture_order
from trainer.model.classes import GENERATOR, MAIN
from trainer.objectives.objective import ObjectiveCard
from trainer.objectives.registry import card_of
from trainer.runtime.paths import real_path
from trainer.schedule.phases import changes, lay_out, tokens_before
from trainer.state import TrainState
from trainer.tracking.jsonl import read_metrics

CURVE_POINTS = 12


def write_model_card(
    folder: Path,
    checkpoint: Path,
    manifest: CheckpointManifest,
    model: str,
    export: str = MAIN,
    has_code: bool = False,
    kept: Sequence[str] = (),
    mean_of: Sequence[int] = (),
) -> None:
    """Write `folder/README.md`: data, tokens seen, hyper-parameters, curve, final perplexity, versions.

    Args:
        model: its class, number of parameters and dtype, in a line.
        export: which of the models that were trained it is, of `trainer.checkpoint.contents.export_names`.
        has_code: whether it has code of its own, which is to be told that it may be run.
        kept: names of the weights in the folder that were not trained, but are those of the source.
        mean_of: the steps of the checkpoints whose weights were averaged, if there are several.
    """
    run_dir = real_path(checkpoint).parent.parent
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] <= manifest.step]
    config_path = checkpoint / RUN_CONFIG
    config = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.is_file() else None
    evaluations = [line for line in lines if line.get("eval/loss") is not None]
    name = config["run"]["name"] if config else manifest.model["class"]
    card = card_of(recorded_objective(manifest.identity), of_generator=export == GENERATOR)
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {card.tags[0]}\n"
        f"tags: [{', '.join([*card.tags[1:], 'maskwright'])}]\n---",
        f"# {' '.join(filter(None, (name, export)))}",
        _summary(manifest, card, model, evaluations, mean_of),
        f"```python\n{_use(card, has_code)}\n```",
        _data(config, manifest) if config else "",
        _training(config, card, manifest, kept) if config else "",
        _curve(lines, card, evaluations),
        _versions(manifest),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _use(card: ObjectiveCard, has_code: bool) -> str:
    """Write how the model is used; one with code of its own has to be told that it may be run."""
    return re.sub(r'("PATH_OF_THIS_FOLDER")(?=\))', r"\1, trust_remote_code=True", card.use) if has_code else card.use


def _summary(
    manifest: CheckpointManifest,
    card: ObjectiveCard,
    model: str,
    evaluations: list[dict[str, Any]],
    mean_of: Sequence[int],
) -> str:
    state = TrainState(**manifest.state)
    lengths = [(phase["first_sample"], phase["seq_len"]) for phase in recorded_phases(manifest.data_order)]
    tokens = state.tokens - state.skipped_tokens(lambda samples: tokens_before(lengths, samples))
    rows = [
        ("class", model),
        ("steps", f"{manifest.step:,}"),
        ("tokens seen", f"{tokens:,}"),
    ]
    if mean_of:
        rows.append(
            (
                "weights",
                f"the mean of the checkpoints of steps {', '.join(map('{:,}'.format, mean_of))} (arXiv:2505.12082)",
            )
        )
    if evaluations:
        last, whose = evaluations[-1], "the weights of step" if mean_of else "step"  # nobody has evaluated the mean
        for name, (what, form) in card.results.items():
            if last.get(name) is not None:
                rows.append((what, f"{last[name]:{form}} ({whose} {last['step']:,})"))
    return _table(("", ""), rows)


def _evaluations(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Say which share evaluations predict, where it is one of their own."""
    ratio = config["eval"].get("mask_ratio")  # not before there was such a key
    return [] if ratio is None else [("evaluations", f"{ratio:.0%} of the tokens are predicted")]


def _data(config: dict[str, Any], manifest: CheckpointManifest) -> str:
    recorded, blocks = (
        manifest.data_order["sources"],
        [phase["blocks"] for phase in recorded_phases(manifest.data_order)],
    )
    data, batch = DataConfig.model_validate(config["data"]), BatchConfig.model_validate(config["batch"])
    tokens = [source["tokens"] for source in recorded]
    order = mixture_order(data, lay_out(data, batch), blocks, tokens, config["run"]["seed"])
    rows = [
        (source["name"], f"{source['tokens']:,}", f"{source['documents']:,}", f"{passes:.2f}")
        for source, passes in zip(recorded, order.epochs(manifest.state["samples"]), strict=True)
    ]
    return "## Data\n\n" + _table(("source", "tokens", "documents", "times seen"), rows)


def _training(config: dict[str, Any], card: ObjectiveCard, manifest: CheckpointManifest, kept: Sequence[str]) -> str:
    optimizer = config["optimizer"]
    layout = manifest.layout
    rows = [
        ("objective", card.settings(_objective(config, manifest), manifest.state["tokens"])),
        *_evaluations(config),
        ("sequence length", _by_phase(manifest, lambda phase: phase["seq_len"])),
        *_theta(manifest),
        ("attention", _attention(config)),
        *_frozen(config, manifest),
        *_kept(config, kept),
        ("batch", _batch(config)),
        (
            "optimizer",
            f"{optimizer['name']}, betas {optimizer['betas']}, eps {optimizer['eps']:g}, "
            f"weight decay {optimizer['weight_decay']:g}",
        ),
        ("learning rate", _rate(config)),
        ("gradient clipping", f"{optimizer['clip']:g}"),
        ("precision", layout["precision"]),
        ("DeepSpeed", f"ZeRO stage {layout['stage']} on {layout['world_size']} ranks"),
        ("seed", f"{config['run']['seed']}"),
        ("skipped steps", f"{manifest.state['skipped_steps']}"),
        ("rollbacks", f"{len(TrainState(**manifest.state).rollbacks)}"),
    ]
    return "## Training\n\n" + _table(("", ""), rows)


def _objective(config: dict[str, Any], manifest: CheckpointManifest) -> dict[str, Any]:
    """Return the section with the shares that are masked as the checkpoint records them, those of phases included."""
    recorded = manifest.data_order.get("mask_ratio")  # not before there were stages
    return config["objective"] if recorded is None else {**config["objective"], "mask_ratio": recorded}


def _by_phase(manifest: CheckpointManifest, read: Callable[[dict[str, Any]], Any]) -> str:
    """Write what each phase that the training has reached has, and from where on; once, where it stays."""
    phases = [
        phase for phase in recorded_phases(manifest.data_order) if phase["first_sample"] < manifest.state["samples"]
    ]
    lengths = [(phase["first_sample"], phase["seq_len"]) for phase in phases]
    kept = changes([(tokens_before(lengths, phase["first_sample"]), read(phase)) for phase in phases])
    return ", ".join(f"{value}" + (f" from token {token:,} on" if token else "") for token, value in kept)


def _theta(manifest: CheckpointManifest) -> list[tuple[str, str]]:
    """Write the rope theta of each phase; no row where none changes it."""
    if "rope_theta" not in recorded_phases(manifest.data_order)[0]:
        return []
    return [("rope theta", _by_phase(manifest, lambda phase: RopeTheta.of(phase["rope_theta"])))]


def _rate(config: dict[str, Any]) -> str:
    schedule = config["schedule"]
    factors = "".join(
        f", × {phase.lr_factor:g} up to token {phase.until_tokens:,}"
        for phase in DataConfig.model_validate(config["data"]).phases
        if phase.lr_factor != 1
    )
    shape = schedule["name"]
    if shape == "wsd" and schedule.get("decay", "linear") != "linear":
        shape += f" (decay {schedule['decay']})"
    return f"{config['optimizer']['lr']:g}, {shape}, {schedule['warmup_steps']:,} warm-up steps{factors}"


def _batch(config: dict[str, Any]) -> str:
    batch = BatchConfig.model_validate(config["batch"])
    phases = DataConfig.model_validate(config["data"]).phases
    sizes = "".join(
        f", {phase.global_size} up to token {phase.until_tokens:,}" for phase in phases if phase.global_size is not None
    )
    warmup = batch.warmup
    grown = f", grown from {warmup.start_size} over the first {warmup.tokens:,} tokens" if warmup is not None else ""
    return f"{batch.global_size} sequences{sizes}{grown}"


def _attention(config: dict[str, Any]) -> str:
    if config["model"].get("document_attention"):
        whole = ", which the samples held whole" if config["data"].get("samples") == "documents" else ""
        return (
            f"within documents only{whole}, with positions from the start of each: give one document, or part of one, "
            "as one input (the comparison of logits at the conversion was with such inputs)"
        )
    return "over whole blocks, across the borders of the documents in them"


def _frozen(config: dict[str, Any], manifest: CheckpointManifest) -> list[tuple[str, str]]:
    """Say what the start that saved the checkpoint has not trained; no row where it has trained all."""
    if not (count := manifest.model.get("frozen", 0)):
        return []
    patterns = ", ".join(f"`{pattern}`" for pattern in config["model"]["frozen"])
    return [("frozen", f"{patterns}: {count:,} of {manifest.model['parameters']:,} parameters")]


def _kept(config: dict[str, Any], kept: Sequence[str]) -> list[tuple[str, str]]:
    """Say which weights are there as the source had them, for classes other than that which was trained."""
    if not kept:
        return []
    return [
        ("kept", f"{', '.join(f'`{name}`' for name in kept)}: as in {config['model']['from_pretrained']}, untrained")
    ]


def _curve(lines: list[dict[str, Any]], card: ObjectiveCard, evaluations: list[dict[str, Any]]) -> str:
    training = [line for line in lines if line.get("train/loss") is not None]
    if not training:
        return ""
    every = max(1, len(training) // CURVE_POINTS)
    chosen = training[::every] if training[-1] in training[::every] else [*training[::every], training[-1]]
    by_step, shown = {line["step"]: line for line in evaluations}, next(iter(card.results))
    rows = []
    for line in chosen:
        found = by_step.get(line["step"], {}).get(shown)
        value = "" if found is None else f"{found:{card.results[shown][1]}}"
        rows.append((f"{line['step']:,}", f"{line['tokens']:,}", f"{line['train/loss']:.4f}", value))
    return "## Curve\n\n" + _table(("step", "tokens", "training loss", card.results[shown][0]), rows)


def _versions(manifest: CheckpointManifest) -> str:
    saved = datetime.fromtimestamp(manifest.saved_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"Checkpoint of {saved}. Trained with {versions}."


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
