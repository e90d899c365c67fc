"""Random configs: plausible ones, extreme ones, and what is no config at all. All of a case follows from its seed."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml
from pydantic import BaseModel

from tests.objective_cases import CASES
from tests.ranks import tiny_config
from tests.teachers import make_teacher
from trainer.config import Config
from trainer.objectives.registry import family_of

INTEGERS = (0, -1, 1, 2, 3, 7, 12, 2**31, 2**48, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**32, 10**1000)
FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    1e-3,
    1e-300,
    5e-324,
    1e16,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
)
STRINGS = (
    *(
        "",
        " ",
        "x",
        "null",
        "true",
        "1e5",
        "0x_",
        "2024-02-30",
        "%j",
        "~",
        "~nobody-of-that-name/x",
        "/",
        ".",
        "../..",
        "-",
    ),
    *(
        "x" * 300,
        "x" * 5000,
        "/".join("y" * 4000),
        "a\nb",
        "a\tb",
        "a\x00b",
        "\x1b[2J\x1b]0;title\x07",
        "é̲𝕏",
        "\u202e\ufeff",
    ),
    *(
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/proc/1/x",
        "hub:x:y",
        "nosuch/model",
        "roberta-base",
        "zero1",
        "[dim]",
        "${x}",
    ),
)
OTHERS = (None, True, False, [], {}, [1], [None], {"a": 1}, {"": {}}, {1: 2}, [[[]]], [{}], [{"path": 3}], {"path": []})
SCHEDULES = ("linear", "cosine", "wsd", "constant")
LENGTHS = (("steps", 1), ("steps", 30), ("tokens", 5_000), ("tokens", 1), ("epochs", 0.01), ("epochs", 3))


def any_value(generator: Random) -> Any:
    return generator.choice(generator.choice((INTEGERS, FLOATS, STRINGS, OTHERS)))


def leaves(model: type[BaseModel] = Config, path: str = "") -> list[str]:
    """All keys of the config, also those that are added later."""
    found = []
    for name, field in model.model_fields.items():
        key = f"{path}{field.alias or name}"
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += leaves(section, f"{key}.")
        found.append(key)
    return found


def put(raw: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    raw[name] = value


def plausible(generator: Random, workspace: Path) -> dict[str, Any]:
    """Values that somebody might want, of keys that go together or not, for a model that a CPU trains in a moment."""
    pick, number = generator.choice, generator.randint
    data = [str(workspace / "data" / split) for split in ("train", "validation")]
    weights = [pick((None, 0.0, 0.3, 1, 5)), pick((None, 0.0, 2.5))]
    names = ["a", "b"]
    sources = [
        {"path": path, "name": name, "weight": weight, "max_epochs": pick((None, None, 0.5, 3))}
        for path, name, weight in zip(data, names, weights, strict=True)
    ]
    if generator.random() < 0.2:
        sources[0]["quarantine"] = [pick(("shard-00000", "shard-00009"))]
    boundaries = sorted(generator.sample((1, 2, 100, 1_000, 5_000, 20_000, 10**6, 10**9), 2))
    stages = [
        {
            "from_tokens": tokens,
            "weights": {name: pick((0, 0.5, 1, 3)) for name in generator.sample(names, number(1, 2))},
        }
        for tokens in boundaries
    ]
    phases = [
        {"seq_len": pick((8, 16, 24, 32)), "until_tokens": tokens, "micro_size": pick((None, 1, 2, 4)),
         "global_size": pick((None, 8, 12)),
         **({"mask_ratio": pick((None, 0.05, 0.4)), "lr_factor": pick((0.1, 1, 3)),
             "weights": pick((None, None, {"a": 1}, {"b": 2, "a": 0}, {"b": 0})),
             "rope_theta": pick((None, None, None, 10_000)), "local_rope_theta": pick((None, None, None, 500))}
            if generator.random() < 0.5 else {})}
        for tokens in sorted(generator.sample((256, 1_000, 3_000, 5_120, 10**7), number(1, 2)))
    ]  # fmt: skip
    values: dict[str, list[Any]] = {
        "data.train": [sources, sources[:1], data[0], [{"path": data[0]}, {"path": data[0]}]],
        "data.validation": [data[1], str(workspace / "data"), None, "auto"],
        "data.stages": [stages, stages[:1], []],
        "data.phases": [phases, phases[:1], []],
        "data.temperature": [None, 0.5, 1, 2, 100],
        "data.seq_len": [8, 16, 32, 33, 34],
        "data.samples": ["stream", "documents"],
        "data.workers": [0, 0, 1],
        "data.chunk_blocks": [1, 3, 8, 1000],
        "data.window_chunks": [1, 4, 1000],
        "data.mixture_block": [1, 64, 1000],
        "data.read": ["mmap", "pread"],
        "data.verify_reads": [True, False],
        "objective.name": ["mlm", "clm", "plm", "rtd"],
        "objective.generator": [
            None, {}, {"share": pick(("embeddings", "disentangled", "nothing", "half")), "weight": pick((0, 10, 1e30))},
            {"overrides": {pick(("hidden_size", "num_hidden_layers", "vocab_size", "no")): pick((0, 1, 16, "x"))}},
            {"from_pretrained": str(workspace / "data")},
        ],
        "objective.scheme": ["token", "word", "span"],
        "objective.pair": [None, {"task": "nsp"}, {"task": "sop", "weight": pick((0.1, 3))}, {"task": "so"}],
        "objective.teacher": [None, {"model": str(workspace / "tokenizer")}, {"model": "nosuch", "positions": "all"}],
        "objective.mask_ratio": [
            0.001, 0.15, 0.5, 0.99,
            [{"from_tokens": tokens, "ratio": pick((0.01, 0.3, 0.9))} for tokens in (0, *boundaries)],
        ],
        "objective.replace_mask": [0, 0.5, 1],
        "objective.replace_random": [0, 0.2, 0.9],
        "batch.global_size": [1, 2, 6, 8, 12, 64, 1000],
        "batch.micro_size": [1, 2, 3, 4, 8, "auto"],
        "batch.memory_gib": [None, 0.001, 1, 64],
        "batch.warmup": [
            None,
            {"start_size": pick((1, 2, 4, 8, 100)), "tokens": pick((1, 300, 2_000, 10**9))},
            {"start_size": 2, "increment": pick((1, 2, 3, 100)), "tokens": 1_000},
        ],
        "optimizer.name": ["adamw", "stable_adamw", "muon", "lamb"],
        "optimizer.momentum": [0.0, 0.95],
        "optimizer.lr": [1e-6, 1e-3, 1],
        "optimizer.betas": [[0.0, 0.0], [0.9, 0.999]],
        "optimizer.clip": [0, 0.1, 1],
        "schedule": [{"name": name, "warmup_steps": pick((0, 1, 5, 100))} for name in SCHEDULES],
        "schedule.decay_fraction": [0.01, 0.5, 1, None],
        "schedule.decay": ["linear", "cosine", "1-sqrt"],
        "schedule.decay_steps": [None, 1, 20, 10**6],
        "schedule.decay_tokens": [None, 1, 3_000, 10**9],
        "schedule.warmup_tokens": [None, 1, 3_000, 10**9],
        "schedule.min_ratio": [0, 0.1, 1],
        "train": [
            {key: value, "precision": pick(("fp32", "fp32", "bf16"))}
            for key, value in LENGTHS
        ],
        "train.min_steps": [None, 1, 7],
        "train.precision": ["fp32", "bf16", "fp16"],
        "deepspeed": ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"],
        "checkpoint.every_steps": [None, 1, 1000, "auto"],
        "checkpoint.async": [True, False],
        "eval.every_steps": [None, 1, 10, "auto"],
        "checkpoint.keep_best": [True, False],
        "eval.samples": [1, 16, 10**6],
        "eval.patience": [None, 1, 3],
        "eval.probe": [None, {"path": "nosuch.csv"}, {"path": str(workspace / "text.txt"), "folds": 2}],
        "resilience.on_divergence": ["stop", "rollback"],
        "resilience.max_loss_ratio": [None, 1.5],
        "model.layers_from": [
            None,
            {"model": str(workspace), "layers": [0]},
            {"model": str(workspace), "tile": True},
            {"model": "nosuch", "layers": []},
        ],
        "model.document_attention": [True, False],
        "model.activation_checkpointing": [True, False],
        "model.frozen": [[], ["roberta.encoder.*"], ["*.bias"], ["roberta.*"], ["nosuch.*"], ["*"], ["[", "*r*"]],
        "model.attention_backend": ["auto", "math", "efficient"],
        "model.overrides.hidden_size": [16, 32, 33, 64],
        "model.overrides.num_attention_heads": [1, 2, 3],
        "model.overrides.num_hidden_layers": [1, 3],
        "model.overrides.max_position_embeddings": [10, 34, 66],
        "model.overrides.vocab_size": [100, 500, 501, 512, 600],
        "model.overrides.hidden_act": ["gelu", "relu", "nosuch"],
        "model.overrides.tie_word_embeddings": [True, False],
        "model.overrides.type_vocab_size": [0, 1, 2],
        "model.overrides.initializer_range": [0.0, 0.02, 10.0],
        "model.overrides.chunk_size_feed_forward": [0, 7],
        "model.preset": ["roberta-base", "bert-base-uncased", "modernbert-base", "xlm-roberta-base"],
    }  # fmt: skip
    chosen = generator.sample(sorted(values), number(1, 6))
    return {path: pick(values[path]) for path in chosen}


def zero_file(generator: Random, folder: Path) -> str:
    """A DeepSpeed file with odd values, or none at all."""
    path = folder / "zero.json"
    zero: dict[str, Any] = {"stage": generator.choice((0, 1, 2, 3))}
    names = (
        *(
            "reduce_bucket_size",
            "allgather_bucket_size",
            "stage3_prefetch_bucket_size",
            "sub_group_size",
            "overlap_comm",
        ),
        *(
            "contiguous_gradients",
            "offload_optimizer",
            "offload_param",
            "stage3_max_live_parameters",
            "round_robin_gradients",
        ),
        *("leaf_module", "zero_quantized_weights", "zero_hpz_partition_size", "mics_shard_size", "nosuch"),
    )
    for name in generator.sample(names, generator.randint(1, 4)):
        value = (
            any_value(generator)
            if generator.random() < 0.5
            else generator.choice((1e6, 500_000, True, {"device": "cpu"}))
        )
        zero[name] = value
    whole: Any = {"zero_optimization": zero}
    if generator.random() < 0.3:
        name = generator.choice(("bf16", "train_batch_size", "zero_optimization", "wall_clock_breakdown", "x"))
        whole[name] = any_value(generator)
    text = json.dumps(whole)
    if generator.random() < 0.15:
        text = generator.choice(
            ("", "[" * 100_000, "{", "null", "3", '"x"', text[: len(text) // 2], "\x00", '{"a":1,"a":2}')
        )
    path.write_text(text)
    return str(path)


def model_file(generator: Random, folder: Path) -> str:
    """A config.json of a small RoBERTa with odd values."""
    raw: dict[str, Any] = {
        "model_type": "roberta", "vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1,
        "initializer_range": 0.02, "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.1, "hidden_act": "gelu",
    }  # fmt: skip
    for name in generator.sample(sorted(raw), generator.randint(0, 2)):
        raw[name] = any_value(generator)
    if generator.random() < 0.3:
        name = generator.choice(("chunk_size_feed_forward", "is_decoder", "auto_map", "architectures", "x"))
        raw[name] = any_value(generator)
    text = json.dumps(raw)
    if generator.random() < 0.15:
        text = generator.choice(("", "[" * 100_000, "{", "null", "[]", text[:-20]))
    path = folder / "config.json"
    path.write_text(text)
    return str(path)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
TEXTS = (
    *(BOMB, "run: &r {dir: *r}\n", "x: " + "[" * 3000, "? {a: 1}\n: 2\n", "<<: 3\n", "<<: {run: 1}\n", "{" * 50 + "\n"),
    *(
        "run: !!python/object:os.system ls\n",
        "%YAML 9.9\n---\n",
        "---\na\n---\nb\n",
        "\t\n",
        "a: b: c\n",
        "- 1\n",
        "3\n",
    ),
    *(
        "train: !!int 99999999999999999999999999999\n",
        "x: !!float abc\n",
        "x: 2024-02-30\n",
        "x: 0x_\n",
        "\x00",
        "\ufeff",
    ),
    *("".join(f"k{number}: 1\n" for number in range(20_000)), "x: " + "9" * 5000 + "\n", "extends: nosuch\n"),
    *("extends: 3\n", "extends: /dev/null\n", "extends: .\n", "'': 1\n", "1: 2\n", "null: 3\n"),
)


def damaged_text(generator: Random, text: str) -> str:
    """YAML with a piece removed, doubled, or replaced by something odd."""
    lines = text.splitlines(keepends=True)
    at = generator.randrange(len(lines))
    kind = generator.randrange(5)
    if kind == 0:
        return "".join(lines[:at] + lines[at + 1 :])
    if kind == 1:
        return "".join(lines[: at + 1] + lines[at:])
    if kind == 2:
        place = generator.randrange(len(text))
        return text[:place] + generator.choice("\x00\t:[]{}&*!|>'\"%@`\x1b\ud7ff#,-?") + text[place + 1 :]
    if kind == 3:
        return generator.choice(TEXTS) + (text if generator.random() < 0.5 else "")
    return text + generator.choice(TEXTS)


def random_config(seed: int, workspace: Path, folder: Path) -> list[str]:
    """Write a config; returns the arguments that name it: its path, and overrides."""
    generator = Random(seed)
    raw = tiny_config(workspace, folder / "run").model_dump(mode="json", by_alias=True, exclude_unset=True)
    if generator.random() < 0.3:
        case = generator.choice(list(CASES.values()))
        whole = case.raw(raw["model"]["tokenizer"], raw["data"]["train"], raw["run"]["dir"])
        if case.teacher is not None:
            family = family_of(case.config("unused", "unused", "unused"))
            there = make_teacher(folder / "teacher", raw["model"]["tokenizer"], case.preset, case.teacher, family)
            whole["objective"]["teacher"] = {**whole["objective"]["teacher"], "model": there}
        raw |= {name: whole[name] for name in ("objective", "model")}
    for path, value in plausible(generator, workspace).items():
        put(raw, path, value)
    overrides = []
    kind = generator.random()
    if kind < 0.55:  # else a plausible one
        for _ in range(generator.randint(1, 2)):
            path, value = generator.choice(leaves()), any_value(generator)
            if generator.random() < 0.1:
                path += generator.choice((".x", "s", ".0", "."))
            if generator.random() < 0.3:
                overrides.append(f"{path}={value}".replace("\x00", "\\0"))
            else:
                put(raw, path, value)
    if generator.random() < 0.12:
        raw["deepspeed"] = zero_file(generator, folder)
    if generator.random() < 0.1:
        put(raw, "model.preset", None)
        put(raw, generator.choice(("model.config", "model.from_pretrained")), model_file(generator, folder))
    text = yaml.safe_dump(raw, allow_unicode=generator.random() < 0.5)
    if generator.random() < 0.12:
        text = damaged_text(generator, text)
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return [str(path), *overrides]
