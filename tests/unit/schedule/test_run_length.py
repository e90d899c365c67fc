"""What follows from the length of a run, and that a run which has begun keeps what it began with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Config
from trainer.config.file import dump_config, load_config, parse_config
from trainer.errors import UserError
from trainer.schedule.batch_plan import BatchPlan, divisors, plan_batch
from trainer.schedule.learning_rate import learning_rate
from trainer.schedule.phases import lay_out
from trainer.schedule.run_length import FEW_UPDATES, describe_length, few_updates, find_defaults, resolve


def config_of(**sections: Any) -> Config:
    minimal = {"run": {"dir": "r"}, "model": {"from_pretrained": "m"}, "data": {"train": "d"}, "train": {"steps": 50}}
    return parse_config({**minimal, **sections}, "test")


def plan_of(config: Config, blocks: int = 438, ranks: int = 1) -> BatchPlan:
    phases, whole_steps = lay_out(config.data, config.batch), find_defaults(config).whole_steps
    return plan_batch(config.batch, config.train, phases, ranks, [blocks] * len(phases), whole_steps)


def resolved(blocks: int = 438, **sections: Any) -> Config:
    config = config_of(**sections)
    return resolve(config, plan_of(config, blocks))


@pytest.mark.parametrize(
    ("steps", "warmup", "every"),
    [(1, 1, 1), (6, 1, 1), (17, 2, 1), (100, 6, 5), (165, 10, 8), (300, 18, 10), (20_000, 1000, 10), (10**6, 1000, 10)],
)
def test_warm_up_and_lines_follow_from_the_number_of_steps(steps: int, warmup: int, every: int) -> None:
    found = resolved(train={"steps": steps})
    assert (found.schedule.warmup_steps, found.logging.every_steps) == (warmup, every)


@given(steps=st.integers(1, 10**7))
def test_every_run_reaches_its_peak_rate(steps: int) -> None:
    found = resolved(train={"steps": steps})
    warmup = found.schedule.warmup_steps
    assert warmup is not None and 1 <= warmup <= steps
    assert learning_rate(warmup, 1.0, steps, found.schedule) == 1.0


def test_what_is_given_counts() -> None:
    assert resolved(schedule={"warmup_steps": 0}).schedule.warmup_steps == 0
    assert resolved(schedule={"warmup_steps": 50}).schedule.warmup_steps == 50
    of_share = resolved(schedule={"warmup_fraction": 0.1}).schedule
    assert (of_share.warmup_steps, of_share.warmup_fraction) == (5, None)
    assert resolved(logging={"every_steps": 7}).logging.every_steps == 7
    with pytest.raises(UserError, match="has both warmup_steps and warmup_fraction"):
        config_of(schedule={"warmup_steps": 1, "warmup_fraction": 0.1})


def test_a_share_on_the_command_line_takes_the_place_of_a_recipes_steps() -> None:
    found = load_config("roberta-base", ["schedule.warmup_fraction=0.5", "train.steps=30"])
    assert resolve(found, plan_of(found)).schedule.warmup_steps == 15


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "constant"])
def test_a_warm_up_that_does_not_fit_is_refused_with_the_number_to_write(shape: str) -> None:
    schedule = {"name": shape, "warmup_steps": 51}
    with pytest.raises(UserError, match="50 steps and would end within its warm-up of 51") as caught:
        resolved(schedule=schedule)
    assert caught.value.where == "schedule.warmup_steps=51"
    number = re.search(r"Set schedule.warmup_steps to (\d+)", caught.value.remedy)
    assert number is not None
    assert resolved(schedule={**schedule, "warmup_steps": int(number[1])}).schedule.warmup_steps == 3


GROWING: dict[str, Any] = {  # steps of 80 tokens up to token 160, then of 256: 2 and 8 steps
    "data": {"train": "d", "seq_len": 32, "phases": [{"seq_len": 10, "until_tokens": 160}]},
    "batch": {"global_size": 8, "micro_size": 1},
    "train": {"steps": 10},
}


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"warmup_tokens": 1}, {"warmup_steps": 1}),
        ({"warmup_tokens": 160}, {"warmup_steps": 2}),
        ({"warmup_tokens": 161}, {"warmup_steps": 3}),
        ({"warmup_tokens": 160 + 512}, {"warmup_steps": 4}),
        ({"warmup_steps": 0, "decay_tokens": 1}, {"decay_steps": 1}),
        ({"warmup_steps": 0, "decay_tokens": 256}, {"decay_steps": 1}),
        ({"warmup_steps": 0, "decay_tokens": 257}, {"decay_steps": 2}),
        ({"warmup_steps": 0, "decay_tokens": 8 * 256 + 80}, {"decay_steps": 9}),
        ({"warmup_steps": 0, "decay_tokens": 8 * 256 + 160}, {"decay_steps": 10}),
        ({"warmup_steps": 3, "decay_steps": 7}, {"decay_steps": 7, "decay_fraction": None}),
        ({"warmup_steps": 3}, {"decay_steps": None, "decay_fraction": 0.1}),
    ],
)
def test_warm_up_and_decay_in_tokens_are_whole_steps_of_whatever_size(
    keys: dict[str, int], steps: dict[str, Any]
) -> None:
    found = resolved(**GROWING, schedule={"name": "wsd", **keys}).schedule
    assert {name: getattr(found, name) for name in steps} == steps
    assert (found.warmup_tokens, found.decay_tokens) == (None, None)
    assert parse_config(yaml.safe_load(dump_config(config_of(**GROWING, schedule=found.model_dump()))), "again")


@pytest.mark.parametrize(
    ("keys", "words", "where", "remedy"),
    [
        (
            {"warmup_tokens": 160 + 8 * 256 + 1},
            "10 steps and would end within its warm-up of 11",
            "warmup_tokens",
            "to 1",
        ),
        ({"decay_steps": 11}, "10 steps and would begin within its decay of 11 steps", "decay_steps", "to 9 or fewer"),
        ({"decay_tokens": 2209}, "would begin within its decay of 2,209 tokens", "decay_tokens", "to 9 or fewer"),
        (
            {"warmup_steps": 4, "decay_steps": 7},
            "would begin its decay of 7 before the end of its warm-up of 4",
            "decay_steps",
            "to 6 or fewer",
        ),
        ({"warmup_steps": 10, "decay_steps": 1}, "before the end of its warm-up", "decay_steps", "Shorten the warm-up"),
    ],
)
def test_a_warm_up_or_decay_that_does_not_fit_is_refused(
    keys: dict[str, int], words: str, where: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        resolved(**GROWING, schedule={"name": "wsd", **keys})
    assert caught.value.where == f"schedule.{where}={keys[where]}" and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "wsd", "decay_steps": 5, "decay_fraction": 0.2}, "has both decay_fraction and decay_steps"),
        ({"warmup_steps": 5, "warmup_tokens": 100}, "has both warmup_steps and warmup_tokens"),
        ({"decay_steps": 5}, "decay_steps does nothing with name linear"),
        ({"name": "cosine", "decay": "1-sqrt"}, "decay does nothing with name cosine"),
        ({"name": "wsd", "decay_fraction": None}, "needs one of decay_fraction, decay_steps, decay_tokens"),
    ],
)
def test_a_schedule_says_each_thing_once(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(schedule=keys)


def test_another_decay_on_the_command_line_takes_the_place_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(resolved(schedule={"name": "wsd", "decay_fraction": 0.2})))
    assert load_config(path).schedule.decay_fraction == 0.2
    found = load_config(path, ["schedule.decay_tokens=1000", "schedule.decay=1-sqrt"]).schedule
    assert (found.decay_tokens, found.decay_fraction, found.decay) == (1000, None, "1-sqrt")
    line = describe_length(
        resolved(schedule={"name": "wsd", "decay_steps": 20, "decay": "1-sqrt"}), plan_of(config_of())
    )
    assert line == [
        "schedule: 3 steps of warm-up to 0.0006, then constant, over the last 20 steps to 0 of it, as 1-sqrt"
    ]


def test_the_resolved_config_says_the_same_again_as_a_file() -> None:
    found = resolved(train={"epochs": 3}, batch={"global_size": 8})
    again = parse_config(yaml.safe_load(dump_config(found)), "config.yaml")
    assert again == found
    assert (again.schedule.warmup_steps, again.logging.every_steps, again.defaults) == (10, 8, 2)


def test_the_first_set_of_defaults_stays_what_it_was() -> None:
    """1,000 steps of warm-up even in a run of six, epochs up to whole steps, a line every ten."""
    old = resolved(defaults=1, train={"epochs": 3})
    assert (old.schedule.warmup_steps, old.logging.every_steps) == (1000, 10)
    plan = plan_of(old)
    assert (plan.total_steps, plan.end_sample, plan.earlier) == (6, 6 * 256, ())
    assert "ENDS WITHIN THE WARM-UP of 1,000 steps" in describe_length(old, plan)[0]


def test_defaults_of_keys_have_not_changed_since_their_set_was_made() -> None:
    """A default that changes would change runs that have begun: it belongs into a new set (schedule.run_length)."""
    golden = yaml.safe_load((Path(__file__).parents[2] / "golden" / "defaults_v2.yaml").read_text())
    now = config_of().model_dump(mode="json")
    changed = {
        f"{section}.{key}": (value, now[section].get(key))
        for section, keys in golden.items()
        for key, value in keys.items()
        if now[section].get(key) != value
    }
    assert not changed


def few(blocks: int, ranks: int = 1, **sections: Any) -> str:
    config = config_of(**sections)
    return few_updates(config, plan_of(config, blocks, ranks))


def test_a_handful_of_updates_is_said_with_what_to_set() -> None:
    assert few(438, train={"epochs": 3}) == (
        "FEW UPDATES: 6 steps in all, of up to 256 sequences, teach a model little: "
        "set batch.global_size to 8 for 165, or train for longer"
    )
    assert "batch.global_size to 12 and batch.micro_size to 6" in few(438, ranks=2, train={"epochs": 3})
    assert few(2, ranks=4, train={"epochs": 3}, batch={"global_size": 32}).endswith(
        "set train.epochs to 200, batch.global_size to 4 and batch.micro_size to 1 for 100, or give more text"
    )
    assert "about 8" in few(
        438, train={"epochs": 3}, batch={"warmup": {"start_size": 64, "tokens": 999}, "global_size": 256}
    )
    assert "FEW UPDATES" in few(438, train={"tokens": 10_000})
    assert few(438, train={"steps": 6}) == "", "who asks for six steps gets six"
    assert few(10**6, train={"epochs": 3}) == ""


sizes = st.integers(1, 9)


@given(blocks=st.integers(1, 9000), ranks=sizes, micro=sizes, accumulation=st.integers(1, 40))
def test_the_remedy_for_few_updates_gives_enough_of_them(
    blocks: int, ranks: int, micro: int, accumulation: int
) -> None:
    line = few(
        blocks,
        ranks,
        train={"epochs": 3},
        batch={"global_size": ranks * micro * accumulation, "micro_size": micro},
    )
    if not line:
        return
    numbers = {name: int(text.replace(",", "")) for name, text in re.findall(r"([a-z_.]+) to ([\d,]*\d)", line)}
    batch = {"global_size": numbers["batch.global_size"], "micro_size": numbers.get("batch.micro_size", micro)}
    found = plan_of(config_of(train={"epochs": numbers.get("train.epochs", 3)}, batch=batch), blocks, ranks)
    assert found.total_steps >= FEW_UPDATES


@given(number=st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (9, 1), (46, 4), (100, 10), (7000, 500), (10**6, 500)])
def test_auto_evaluates_and_saves_ten_times_and_every_500_steps_of_a_long_run(steps: int, every: int) -> None:
    auto = {"every_steps": "auto"}
    found = resolved(train={"steps": steps}, eval=auto, checkpoint=auto)
    assert (found.eval.every_steps, found.checkpoint.every_steps) == (every, every)
    given = resolved(train={"steps": steps}, eval={"every_steps": 3}, checkpoint={"every_steps": None})
    assert (given.eval.every_steps, given.checkpoint.every_steps) == (3, None)


def test_a_run_of_epochs_or_tokens_has_the_least_number_of_steps() -> None:
    for length in ({"epochs": 3}, {"tokens": 1000}):
        plan = plan_of(config_of(train={**length, "min_steps": 100}), blocks=20)
        assert (plan.total_steps, plan.end_sample) == (100, 100 * 256)
    assert plan_of(config_of(train={"epochs": 3, "min_steps": 4}), blocks=438) == plan_of(
        config_of(train={"epochs": 3}), blocks=438
    ), "one that is longer stays what it is, to the sample"
    assert plan_of(config_of(train={"steps": 6, "min_steps": 100})).total_steps == 6


def length_lines(blocks: int, **train: Any) -> list[str]:
    config = config_of(train=train, batch={"global_size": 32})
    plan = plan_of(config, blocks)
    return describe_length(resolve(config, plan), plan, plan.end_sample / blocks)[1:]


def test_a_text_that_is_repeated_to_make_a_run_long_enough_is_said_once_with_its_numbers() -> None:
    [line] = length_lines(20, epochs=3, min_steps=100)
    assert line.startswith(
        "LITTLE TEXT: 0.625 steps a pass; train.min_steps makes 100 of them, 160 passes (null: as many as asked for). "
    )
    assert length_lines(500, epochs=3, min_steps=100) == [
        "LITTLE TEXT: 15.6 steps a pass; train.min_steps makes 100 of them, 6.4 passes (null: as many as asked for)"
    ]
    assert length_lines(5000, epochs=3, min_steps=100) == []
    assert length_lines(20, steps=100) == []
    [few_of_them] = length_lines(20, epochs=3, min_steps=10)
    assert few_of_them.startswith("FEW UPDATES: 10 steps in all")
    assert few_of_them.endswith("set train.min_steps to 100, or give more text")
