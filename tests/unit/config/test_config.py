"""How a config is read: what is refused and with which words, what `extends` and `a.b=c` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import Config
from trainer.config.file import dump_config, find_config, load_config, parse_config, recipe_names
from trainer.errors import EXIT_USER_MISTAKE, UserError, nearest

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/a"},
    "model": {"preset": "roberta-base", "tokenizer": "tokenizer"},
    "data": {"train": "data"},
    "train": {"steps": 10},
}


def with_(**sections: Any) -> dict[str, Any]:
    """MINIMAL with sections merged in; a section of None is left out."""
    raw = {name: dict(section) for name, section in MINIMAL.items()}
    for name, section in sections.items():
        if section is None:
            raw.pop(name)
        else:
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


def refusal(raw: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_config(raw, "my.yaml")
    assert caught.value.exit_code == EXIT_USER_MISTAKE
    assert "my.yaml" in caught.value.remedy
    return caught.value


def write(folder: Path, name: str, text: str | dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("raw", "key", "suggestion"),
    [
        (with_(modle={}), "modle", "model"),
        (with_(batch={"global_sise": 8}), "batch.global_sise", "global_size"),
        (with_(optimizer={"learning_rate": 1e-3, "weight_decy": 0.1}), "optimizer.weight_decy", "weight_decay"),
        (with_(data={"train": [{"path": "a"}, {"path": "b", "wieght": 2}]}), "data.train.1.wieght", "weight"),
        (with_(schedule={"warm_up_steps": 5}), "schedule.warm_up_steps", "warmup_steps"),
        (with_(train={"step": 5}), "train.step", "steps"),
        (
            with_(data={"train": "a", "phases": [{"seq_len": 8, "until_token": 9}]}),
            "data.phases.0.until_token",
            "until_tokens",
        ),
        (with_(batch={"warmup": {"start_sise": 8}}), "batch.warmup.start_sise", "start_size"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(raw: dict[str, Any], key: str, suggestion: str):
    error = refusal(raw)
    assert f"Unknown key '{key}'. Did you mean '{suggestion}'?" in error.problem
    assert key in error.where


def test_an_unknown_key_like_no_other_lists_what_is_known():
    problem = refusal(with_(batch={"zzz": 1})).problem
    assert "Unknown key 'batch.zzz'. Known here: global_size, memory_gib, micro_size, warmup." in problem


def test_all_mistakes_are_named_at_once():
    error = refusal(with_(batch={"micro_size": 0}, run={"seeed": 1}, data=None))
    assert error.where == "run.seeed, data, batch.micro_size"
    assert "Key 'data' is missing." in error.problem
    assert "Key 'batch.micro_size' must be greater than 0, got 0." in error.problem


def test_a_key_that_has_moved_is_named_with_its_new_place() -> None:
    problem = refusal(with_(train={"max_skipped_steps": 3})).problem
    assert problem == "Key 'train.max_skipped_steps' is now 'resilience.max_skipped_steps'."


@pytest.mark.parametrize(
    ("sections", "where", "words"),
    [
        ({"train": {"tokens": 5}}, "train", "exactly one of steps, tokens, epochs; got steps and tokens"),
        ({"train": {"steps": None}}, "train", "exactly one of steps, tokens, epochs; got none"),
        ({"model": {"config": "x"}}, "model", "exactly one of preset, config, from_pretrained; got preset and config"),
        ({"model": {"preset": None}}, "model", "got none"),
        ({"model": {"tokenizer": None}}, "model", "tokenizer is needed"),
        ({"data": {"train": []}}, "data.train", "at least 1 item"),
        ({"data": {"train": [{"path": "a", "weight": 0}]}}, "data", "a weight above 0"),
        ({"data": {"train": [{"path": "a", "weight": -1}]}}, "data.train.0.weight", "greater than or equal to 0"),
        ({"data": {"seq_len": 4}}, "data.seq_len", "greater than or equal to 8, got 4"),
        ({"objective": {"mask_ratio": 0}}, "objective.mask_ratio", "greater than 0"),
        ({"objective": {"replace_mask": 0.8, "replace_random": 0.3}}, "objective", "at most 1, got 1.1"),
        ({"objective": {"scheme": "spam"}}, "objective.scheme", "'token', 'word', 'ngram' or 'span', got 'spam'"),
        ({"objective": {"lengths": [1.0]}}, "objective", "lengths does nothing with scheme token"),
        ({"objective": {"scheme": "span", "lengths": [0, 0.0]}}, "objective", "lengths needs a share above 0"),
        ({"objective": {"replace_by": "unit"}}, "objective", "replace_by=unit does nothing with scheme token"),
        ({"objective": {"teacher": {"model": "a", "soft": 0}}}, "objective.teacher.soft", "greater than 0, got 0"),
        ({"objective": {"teacher": {"model": "a"}, "pair": {"task": "nsp"}}}, "objective", "cannot have pair"),
        ({"objective": {"name": "plm", "teacher": {"model": "a"}}}, "objective", "teacher does nothing with name plm"),
        ({"model": {"layers_from": {"model": "a", "layers": []}}}, "model.layers_from.layers", "at least 1 item"),
        (
            {"model": {"layers_from": {"model": "a"}}},
            "model.layers_from",
            "needs layers: which of that model's become",
        ),
        (
            {"model": {"preset": None, "from_pretrained": "a", "layers_from": {"model": "a", "layers": [0]}}},
            "model",
            "has both from_pretrained and layers_from",
        ),
        ({"optimizer": {"name": "muno"}}, "optimizer.name", "'adamw', 'stable_adamw' or 'muon', got 'muno'"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer", "momentum does nothing with name adamw"),
        ({"optimizer": {"name": "muon", "momentum": 1}}, "optimizer.momentum", "less than 1, got 1"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr", "greater than 0, got -1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1", "missing"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1", "less than 1, got 1.0"),
        ({"schedule": {"name": "triangle"}}, "schedule.name", "'linear', 'cosine', 'wsd' or 'constant'"),
        ({"train": {"precision": "fp8"}}, "train.precision", "got 'fp8'"),
        ({"train": {"precision": "fp32", "gradient_accumulation_dtype": "fp32"}}, "train", "needs precision bf16"),
        ({"batch": {"global_size": "many"}}, "batch.global_size", "got 'many'"),
        ({"batch": {"global_size": 2.5}}, "batch.global_size", "got 2.5"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last", "greater than 0"),
        (
            {"checkpoint": {"keep_best": True}},
            "my.yaml",
            "with checkpoint.keep_best=true needs data.validation: without",
        ),
        ({"eval": {"patience": 3}}, "my.yaml", "with eval.patience=3 needs data.validation: without evaluations"),
        ({"eval": {"patience": 0}}, "eval.patience", "greater than 0"),
        (
            {"data": {"validation": "v"}, "eval": {"patience": 1, "every_steps": None}},
            "my.yaml",
            "with eval.patience=1 needs eval.every_steps",
        ),
        ({"run": {"dir": None}}, "run.dir", "got None"),
        ({"model": {"document_attention": "some"}}, "model.document_attention", "got 'some'"),
    ],
)
def test_a_value_out_of_range_names_key_range_and_value(sections: dict[str, Any], where: str, words: str):
    error = refusal(with_(**sections))
    assert error.where == where
    assert words in error.problem


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr={}", "optimizer.lr"),
        ("optimizer.betas=[0.9, {}]", "optimizer.betas.1"),
        ("train.steps={}", "train.steps"),
        ("run.seed={}", "run.seed"),
        ("checkpoint.every_minutes={}", "checkpoint.every_minutes"),
        ("data.train=[{{path: a, weight: {}}}]", "data.train.0.weight"),
        ("model.overrides.hidden_dropout_prob={}", "model.overrides.hidden_dropout_prob"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_key(override: str, key: str, value: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "a.yaml", MINIMAL), [override.format(value)])
    assert caught.value.where == key
    assert f"Key '{key}' must be a finite number, got {float(value.replace('.', '', value.count('.')))}" in (
        caught.value.problem
    )


def test_yaml_merge_keys_and_anchors_work(tmp_path: Path):
    text = """
run: {dir: runs/a}
model: {preset: roberta-base, tokenizer: tokenizer}
data:
  train:
    - &first {path: a, weight: 2}
    - {<<: *first, path: b}
    - <<: [{weight: 3}, *first]
      path: c
train: &length {steps: 10, precision: fp32}
<<: {batch: {micro_size: 4}, train: {steps: 5}}
"""
    config = load_config(write(tmp_path, "a.yaml", text))
    assert [(source.path, source.weight) for source in config.data.train] == [("a", 2.0), ("b", 2.0), ("c", 3.0)]
    assert (config.batch.micro_size, config.train.steps) == (4, 10)  # what is written beside a merge wins
    with pytest.raises(UserError, match="key 'path' appears twice"):
        load_config(write(tmp_path, "b.yaml", text.replace("path: b", "path: b, path: d")))


def test_a_mixture_or_a_single_folder():
    assert [(source.path, source.label) for source in parse_config(with_(), "x").data.train] == [("data", "data")]
    entries = [{"path": "x/a"}, {"path": "y/a", "weight": 3, "name": "b"}]
    mixed = parse_config(with_(data={"train": entries}), "x").data.train
    assert [(source.path, source.label, source.weight) for source in mixed] == [("x/a", "a", None), ("y/a", "b", 3.0)]


TWO_SOURCES = [{"path": "a"}, {"path": "b"}]


def phase(**keys: Any) -> list[dict[str, Any]]:
    return [{"seq_len": 8, "until_tokens": 99, **keys}]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"mask_ratio": [{"from_tokens": 0, "ratio": 0.3}]}, "needs one number for objective.mask_ratio"),
        ({"name": "clm"}, "data.phases[0].mask_ratio does nothing with name clm"),
    ],
)
def test_a_share_of_masks_has_one_place(objective: dict[str, Any], words: str):
    assert words in refusal(with_(data={"train": "a", "phases": phase(mask_ratio=0.2)}, objective=objective)).problem
    assert parse_config(with_(data={"train": "a", "phases": phase()}, objective=objective), "x").data.phases


def test_evaluations_have_a_share_of_their_own_where_something_is_masked():
    assert parse_config(with_(eval={"mask_ratio": 0.2}), "x").eval.mask_ratio == 0.2
    causal = with_(objective={"name": "clm"}, eval={"mask_ratio": 0.2})
    assert "eval.mask_ratio does nothing with name clm" in refusal(causal).problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": [{"path": "x/a"}, {"path": "y/a"}]}, "two sources called 'a'"),
        ({"train": [{"path": "a", "weight": 1}], "temperature": 2}, "both temperature and weights"),
        ({"train": [{"path": "a", "weight": 0}]}, "at least one source with a weight above 0"),
        ({"train": TWO_SOURCES, "stages": [{"from_tokens": 9, "weights": {"c": 1}}]}, "name 'c', which is no source"),
        ({"train": TWO_SOURCES, "stages": [{"from_tokens": 9, "weights": {"a": 0}}]}, "has no weight above 0"),
        (
            {"train": TWO_SOURCES, "stages": [{"from_tokens": at, "weights": {"a": 1}} for at in (9, 9)]},
            "stages must ascend: from_tokens 9 after 9",
        ),
        ({"train": TWO_SOURCES, "phases": phase(weights={"c": 1})}, "phases[0].weights name 'c', which is no source"),
        ({"train": TWO_SOURCES, "phases": phase(weights={"a": 0})}, "phases[0].weights have none above 0"),
        (
            {
                "train": TWO_SOURCES,
                "phases": phase(weights={"a": 1}),
                "stages": [{"from_tokens": 9, "weights": {"a": 1}}],
            },
            "both stages and weights in phases",
        ),
        (
            {"train": TWO_SOURCES, "phases": phase(weights={"a": 1}), "temperature": 2},
            "both temperature and weights in phases",
        ),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(data: dict[str, Any], words: str):
    error = refusal(with_(data=data))
    assert words in error.problem
    assert error.where == "data"


def test_a_mistyped_key_of_a_source_or_a_stage_names_the_nearest():
    assert "Did you mean 'weight'?" in refusal(with_(data={"train": [{"path": "a", "weigth": 1}]})).problem
    stages = [{"from_token": 9, "weights": {"a": 1}}]
    assert "Did you mean 'from_tokens'?" in refusal(with_(data={"train": TWO_SOURCES, "stages": stages})).problem


def test_a_config_cannot_be_changed_and_comes_back_from_its_dump():
    config = parse_config(with_(optimizer={"lr": 3e-5}), "x")
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    assert parse_config(yaml.safe_load(dump_config(config)), "x") == config


@pytest.mark.parametrize(
    ("text", "value"), [("6e-4", 6e-4), ("6.0e-4", 6e-4), ("6.e-4", 6e-4), ("1E+1", 10.0), ("2e5", 2e5), ("0.1", 0.1)]
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: float, tmp_path: Path):
    path = write(tmp_path, "a.yaml", yaml.safe_dump(MINIMAL) + f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == value
    assert load_config(path, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_words_that_begin_like_numbers_stay_words(tmp_path: Path):
    path = write(tmp_path, "a.yaml", {**MINIMAL, "run": {"dir": "runs/1", "name": "x"}})
    assert load_config(path, ["run.name=1e4b"]).run.name == "1e4b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch: {micro_size: 1}\nbatch: {micro_size: 2}\n", "key 'batch' appears twice"),
        ("batch:\n  micro_size: 1\n  micro_size: 2\n", "key 'micro_size' appears twice"),
        ("run: {dir: [}\n", "Not valid YAML"),
        ("- run\n- model\n", "mapping of sections"),
        ("just words\n", "mapping of sections"),
        ("? [a, b]\n: 1\n", "Not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(text: str, words: str, tmp_path: Path):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(UserError, match=words) as caught:
        load_config(path)
    assert caught.value.where == str(path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"run: {name: \xff\xfe}\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_config(path)


def test_an_empty_file_lacks_every_required_section(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "a.yaml", ""))
    assert caught.value.where == "run, model, data, train"


def test_an_unknown_recipe_names_the_nearest_and_all():
    with pytest.raises(UserError, match="Did you mean 'roberta-base'") as caught:
        load_config("roberta-bse")
    assert all(name in caught.value.remedy for name in recipe_names())


def test_recipes_are_found_by_name_from_any_folder_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").run.name == "demo"
    assert find_config("demo").name == "demo.yaml"
    (tmp_path / "demo").write_text("run: {name: mine}")
    assert find_config("demo") == Path("demo")


def test_extends_inherits_and_overrides_key_by_key(tmp_path: Path):
    write(tmp_path, "base.yaml", with_(batch={"global_size": 64, "micro_size": 4}, optimizer={"lr": 1e-3}))
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nbatch: {micro_size: 8}\nrun: {name: child}\n")
    config = load_config(child)
    assert (config.batch.global_size, config.batch.micro_size) == (64, 8)
    assert (config.run.dir, config.run.name, config.optimizer.lr) == ("runs/a", "child", 1e-3)


def test_extends_looks_beside_its_own_file_then_among_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "configs/base.yaml", MINIMAL)
    write(tmp_path, "configs/deep/middle.yaml", "extends: ../base.yaml\nbatch: {global_size: 16}\n")
    child = write(tmp_path, "child.yaml", "extends: configs/deep/middle.yaml\nrun: {name: grandchild}\n")
    config = load_config(child)
    assert (config.batch.global_size, config.run.name, config.train.steps) == (16, "grandchild", 10)
    recipe = write(tmp_path, "mine.yaml", "extends: roberta-base\nrun: {dir: runs/mine}\n")
    assert load_config(recipe).batch.global_size == load_config("roberta-base").batch.global_size == 8192


def test_a_missing_parent_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="No config file or recipe 'nosuch'"):
        load_config(write(tmp_path, "a.yaml", "extends: nosuch\n"))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_extends_in_a_circle_shows_the_circle(length: int, tmp_path: Path):
    for number in range(length):
        write(tmp_path, f"{number}.yaml", f"extends: {(number + 1) % length}.yaml\n")
    with pytest.raises(UserError, match="circle") as caught:
        load_config(tmp_path / "0.yaml")
    assert " → ".join([*(f"{number}.yaml" for number in range(length)), "0.yaml"]) in caught.value.problem


@pytest.mark.parametrize(("given", "value"), [("steps", 5), ("tokens", 10**9), ("epochs", 2.5)])
def test_a_length_replaces_the_parents_choice(given: str, value: float, tmp_path: Path):
    for parent in ("steps: 10", "tokens: 1000", "epochs: 3"):
        write(tmp_path, "base.yaml", yaml.safe_dump({**MINIMAL, "train": {}}).replace("{}", f"{{{parent}}}"))
        child = write(tmp_path, "child.yaml", f"extends: base.yaml\ntrain: {{{given}: {value}}}\n")
        for config in (load_config(child), load_config(tmp_path / "base.yaml", [f"train.{given}={value}"])):
            lengths = config.train.model_dump(include={"steps", "tokens", "epochs"}, exclude_none=True)
            assert lengths == {given: value}


@pytest.mark.parametrize("given", ["preset", "config", "from_pretrained"])
def test_a_model_replaces_the_parents_choice_and_keeps_the_rest(given: str, tmp_path: Path):
    base = with_(model={"overrides": {"hidden_size": 32}})
    write(tmp_path, "base.yaml", base)
    child = write(tmp_path, "child.yaml", f"extends: base.yaml\nmodel: {{{given}: other}}\n")
    for config in (load_config(child), load_config(tmp_path / "base.yaml", [f"model.{given}=other"])):
        chosen = config.model.model_dump(include={"preset", "config", "from_pretrained"}, exclude_none=True)
        assert chosen == {given: "other"}
        assert (config.model.tokenizer, config.model.overrides) == ("tokenizer", {"hidden_size": 32})


def test_a_checkpoint_takes_the_place_of_the_layers_that_a_parent_begins_with(tmp_path: Path):
    write(tmp_path, "base.yaml", with_(model={"layers_from": {"model": "a", "layers": [0, 2]}}))
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nmodel: {from_pretrained: other}\n")
    for config in (load_config(child), load_config(tmp_path / "base.yaml", ["model.from_pretrained=other"])):
        assert (config.model.from_pretrained, config.model.layers_from) == ("other", None)
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nmodel: {preset: bert-base}\n")
    assert load_config(child).model.layers_from is not None


def test_two_lengths_in_one_file_are_refused_also_over_a_parent(tmp_path: Path):
    write(tmp_path, "base.yaml", MINIMAL)
    child = write(tmp_path, "child.yaml", "extends: base.yaml\ntrain: {tokens: 5, epochs: 1}\n")
    with pytest.raises(UserError, match="got tokens and epochs"):
        load_config(child)


def test_overrides_set_values_of_every_kind(tmp_path: Path):
    path = write(tmp_path, "a.yaml", MINIMAL)
    config = load_config(
        path,
        [
            "run.seed=7",
            "batch.micro_size=4",
            "optimizer.betas=[0.8, 0.9]",
            "checkpoint.every_steps=null",
            "logging.tensorboard=false",
            "data.train=[{path: x, weight: 2}]",
            "model.overrides.hidden_size=64",
            "deepspeed=zero3",
            "run.name=a=b",
        ],
    )
    assert (config.run.seed, config.batch.micro_size, config.optimizer.betas) == (7, 4, (0.8, 0.9))
    assert config.checkpoint.every_steps is None
    assert config.logging.tensorboard is False
    assert (config.data.train[0].path, config.data.train[0].weight) == ("x", 2.0)
    assert config.model.overrides == {"hidden_size": 64}
    assert (config.deepspeed, config.run.name) == ("zero3", "a=b")


def test_the_last_override_wins_and_the_file_is_left_alone(tmp_path: Path):
    path = write(tmp_path, "a.yaml", MINIMAL)
    before = path.read_bytes()
    assert load_config(path, ["run.seed=1", "run.seed=2"]).run.seed == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.micro_size", "Not an override"),
        ("=4", "Not an override"),
        ("batch.micro_size=[", "Not valid YAML"),
        ("batch.micro_siz=4", "Unknown key 'batch.micro_siz'. Did you mean 'micro_size'?"),
        ("batch=4", "Key 'batch'"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "a.yaml", MINIMAL), [override])
    assert words in caught.value.problem


def test_every_key_of_the_config_is_documented():
    """One docstring a field, so that docs/config.md can be complete; the names that say it all have none."""
    self_explaining = {"optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "train.precision"}
    undocumented = set()
    for name, field in Config.model_fields.items():
        section = field.annotation
        for key, inner in getattr(section, "model_fields", {}).items():
            if not inner.description:
                undocumented.add(f"{name}.{key}")
    assert undocumented <= self_explaining | {"logging.tensorboard"}


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("qqq", ["steps", "tokens"]) == ""
    assert nearest("step", ["steps", "tokens"]) == " Did you mean 'steps'?"
