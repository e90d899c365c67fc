"""The command that works a run out before it is queued: plan."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.command import MOST_LOCAL_RANKS, MOST_RANKS, AsJson, ConfigSource, Overrides, console_of_results


def plan(
    config: ConfigSource,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_RANKS, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="G", min=1, max=MOST_LOCAL_RANKS, help="Ranks on each node, one a GPU.")
    ] = 1,
    device: Annotated[
        Literal["h200", "h100", "a100", "cpu"] | None,
        typer.Option(help="What to time it on: a GPU by its data sheet, or this machine's CPU.", show_default="this"),
    ] = None,
    bench: Annotated[
        str | None, typer.Option(metavar="FILE", help="Time it by the output of `maskwright bench step --json`.")
    ] = None,
    vocabulary_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", min=8, help="In place of a tokenizer's.")
    ] = None,
    network_gbit: Annotated[
        float | None,
        typer.Option(metavar="GBIT", min=0.01, help="Of a GPU's network port, Gbit/s.", show_default="the DGX's"),
    ] = None,
    storage_gb_s: Annotated[
        float | None,
        typer.Option("--storage-gb-s", metavar="GB", min=0.001, help="Written in a second.", show_default="1"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Work a run out before it is queued: batch, memory, traffic, time, checkpoints, and what to change.

    Neither GPUs nor data nor tokenizer need to be there, and the model takes no memory.

    \b
    Examples:
      maskwright plan roberta-base --nodes 4 --gpus-per-node 8 --device h200
      maskwright plan my.yaml batch.micro_size=16 --gpus-per-node 2
      maskwright plan my.yaml --bench step.json --json
    """
    from trainer.config.file import load_config

    loaded = load_config(config, overrides or ())
    from tools.plan.page import print_plan, to_json
    from tools.plan.run import PlanOptions, make_plan

    options = PlanOptions(nodes, gpus_per_node, device, bench, vocabulary_size, network_gbit, storage_gb_s)
    result = make_plan(loaded, options)
    if as_json:
        print(to_json(result))
    else:
        print_plan(result, console_of_results(as_json))
