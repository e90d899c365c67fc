"""Numbers that nobody means are cards, at once: no endless loop, no overflow, no list without an end."""

from __future__ import annotations

import itertools
import math
import typing
from typing import Any

import pytest
import typer

from launcher.command import parse_count
from trainer.config import BatchConfig, Config, DataConfig, PhaseConfig, SourceConfig, StageConfig, TrainConfig
from trainer.config.base import MOST_SEQUENCES, fields_by_key, section_in
from trainer.config.file import parse_config
from trainer.data.order.mixture import mixture_order
from trainer.errors import UserError
from trainer.schedule.batch_plan import plan_batch
from trainer.schedule.phases import lay_out

MINIMAL: dict[str, Any] = {
    "run": {"dir": "r"},
    "model": {"from_pretrained": "m"},
    "data": {"train": "d"},
    "train": {"steps": 5},
}


def number_keys(section: type[Any] = Config, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key that takes a number, those in entries of lists included."""
    found = []
    for key, field in fields_by_key(section).items():
        inner = section_in(field.annotation)
        if inner is not None:
            found += number_keys(inner, (*prefix, key))
        elif entry := {"train": SourceConfig, "stages": StageConfig, "phases": PhaseConfig}.get(key):
            found += number_keys(entry, (*prefix, key, "0"))
        elif {int, float} & set(_kinds(field.annotation)):
            found.append((*prefix, key))
    return found


def _kinds(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    return [kind for argument in arguments for kind in _kinds(argument)] if arguments else [annotation]


def set_to(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The minimal config with one key set; what stands in the way of it is left out."""
    raw: Any = {name: dict(section) for name, section in MINIMAL.items()}
    if path[0] == "train":
        raw["train"] = {} if path[1] in ("steps", "tokens", "epochs") else raw["train"]
    place: Any = raw
    for part, following in itertools.pairwise(path):
        if part == "0":
            place = place[0]
        else:
            if not isinstance(place.get(part), list if following == "0" else dict):
                place[part] = [{}] if following == "0" else {}
            place = place[part]
    if path[-1] == "momentum":
        place["name"] = "muon"  # which alone has one
    place[path[-1]] = [value, value] if path[-1] == "betas" else {"d": value} if path[-1] == "weights" else value
    return raw


@pytest.mark.parametrize("path", number_keys(), ids=".".join)
@pytest.mark.parametrize("value", [10**32, -(10**32), 1e300, -1e300])
def test_every_number_of_the_config_has_bounds(path: tuple[str, ...], value: float) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(set_to(path, value), "test")
    assert path[-1] in caught.value.where and str(value) in caught.value.problem


def test_there_are_such_keys() -> None:
    names = {".".join(path) for path in number_keys()}
    assert {"train.epochs", "data.stages.0.from_tokens", "batch.micro_size", "optimizer.betas"} <= names


def plan_of(batch: dict[str, Any], train: dict[str, Any], blocks: int = 100) -> Any:
    sizes = BatchConfig.model_validate(batch)
    phases = lay_out(DataConfig.model_validate({"train": "x"}), sizes)
    return plan_batch(sizes, TrainConfig.model_validate(train), phases, 1, [blocks])


@pytest.mark.parametrize("train", [{"steps": 2**48 - 1}, {"epochs": 1e9}])
def test_a_run_longer_than_samples_have_numbers_is_refused(train: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="their numbers end at") as caught:
        plan_of({"global_size": MOST_SEQUENCES}, train, blocks=2**40)
    assert next(iter(train)) in caught.value.remedy


def test_a_large_batch_that_does_not_divide_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="does not divide") as caught:
        plan_of({"global_size": MOST_SEQUENCES - 1, "micro_size": 2}, {"steps": 5})
    assert str(MOST_SEQUENCES - 1) in caught.value.remedy, "its divisors are listed"


def order_of(blocks: list[int], tokens: list[int], **data: Any) -> Any:
    settings = DataConfig.model_validate({"seq_len": 32, **data})
    return mixture_order(settings, lay_out(settings, BatchConfig()), [blocks], tokens, 0)


def test_two_stages_in_one_block_are_named() -> None:
    stages = [{"from_tokens": number, "weights": {"d": 1}} for number in (1, 2)]
    with pytest.raises(UserError, match="from token 1 and from token 2 would begin with the same block") as caught:
        order_of([9], [300], train="d", stages=stages)
    assert caught.value.where == "data.stages[1].from_tokens=2"
    apart = [{**stages[0]}, {**stages[1], "from_tokens": 33}]
    assert len(order_of([9], [300], train="d", stages=apart).orders[0].spans) == 3


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1e6])
def test_a_source_of_which_nothing_is_left_is_refused_with_a_temperature_too(temperature: float) -> None:
    train = [{"path": "a"}, {"path": "b"}]
    for sources, blocks, tokens in ((train[:1], [0], [0]), (train, [9, 0], [300, 0])):
        with pytest.raises(UserError, match="is smaller than one block"):
            order_of(blocks, tokens, train=sources, temperature=temperature)
    found = order_of([2**40, 1], [2**45, 32], train=train, temperature=temperature)
    assert math.isclose(sum(found.orders[0].spans[0].places), 65_536)


@pytest.mark.parametrize("text", ["1E99999999", "9" * 5000, "inf", "nan", "-1", "1e", "T", ""])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no whole number"):
        parse_count(text)
