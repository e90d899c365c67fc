"""Four users go by the documents: their commands, word for word, with small models where the documents name large ones.

Each of them has a folder with what the commands name. Numbers that make a run small are appended to a command.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForPreTraining, PreTrainedTokenizerFast

from tests.commands import maskwright, start_maskwright
from tests.conftest import write_text
from tests.e2e.test_documentation import ROOT, blocks, maskwright_commands
from tests.gate import Gate
from tests.preparing import CHINESE
from tests.ranks import TINY_ROBERTA, losses, metrics
from tests.waiting import wait_for_step
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING

SIZES: dict[str, Any] = TINY_ROBERTA
HUB_NAME = "FacebookAI/roberta-base"
"""The model that most commands name; a folder of that name goes before the hub."""
SMALL = ("data.seq_len=32", "data.workers=0", "train.min_steps=16", "train.epochs=0.1", "train.precision=fp32")
"""What makes a recipe fit a model of 34 positions."""
LEARNT_NOTHING = ("optimizer.lr=5e-3", "schedule.warmup_steps=2")
"""What such models, which are drawn at random, learn by."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own, where commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented(page: str, *words: str) -> list[str]:
    """The arguments of the first command on a page that begins with the first word and has the others."""
    found = [arguments for document, arguments in maskwright_commands() if document == ROOT / page]
    return next(arguments for arguments in found if arguments[0] == words[0] and {*words} <= {*arguments})


def do(arguments: list[str], *more: str) -> str:
    """Run a command that must end well; returns what it says."""
    done = maskwright(*arguments, *more)
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    return done.stdout + done.stderr


def measured(arguments: list[str], *more: str) -> list[dict[str, Any]]:
    """What `evaluate` finds, by model."""
    done = maskwright(*arguments, *more, "--json")
    assert done.returncode == EXIT_FINISHED, done.stderr
    return json.loads(done.stdout)["models"]


def evaluations(run_dir: Path) -> list[float]:
    return [line["eval/loss"] for line in metrics(run_dir) if "eval/loss" in line]


def answers(model: Path, text: str) -> list[str]:
    """What plain transformers fills in for `[]`, by the folder alone; nothing of the model is drawn at random."""
    _, report = AutoModelForMaskedLM.from_pretrained(model, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    fill: Any = transformers.pipeline("fill-mask", model=str(model))
    return [answer["token_str"].strip() for answer in fill(text.replace("[]", fill.tokenizer.mask_token))]


def lines(path: Path, count: int, seed: int) -> Path:
    """A text with a sample a line."""
    paragraphs = write_text(path, documents=count, seed=seed).read_text().split("\n\n")
    path.write_text("".join(f"{paragraph.split('.')[0]}.\n" for paragraph in paragraphs))
    return path


def write_roberta(folder: Path, text: Path) -> None:
    """A RoBERTa with a byte-level BPE, as transformers' own classes save them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train([str(text)], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    names = {f"{role}_token": token for role, token in roles.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, vocab_size=400)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)


def test_run_mlms_user_has_the_perplexity_of_a_test_file_before_and_after_line_by_line(folder: Path) -> None:
    page = "docs/adapt.md"
    train_command = documented(page, "train", "model.from_pretrained=my-roberta")
    evaluate_command = documented(page, "evaluate", "my-roberta", "out")
    text = lines(folder / "train.txt", 300, seed=1)
    lines(folder / "test.txt", 60, seed=2)
    write_roberta(folder / "my-roberta", text)

    said = do(train_command, *SMALL, *LEARNT_NOTHING)
    assert "documents: 300 in " in said
    before, *_, after = evaluations(folder / "out")
    assert after < before - 0.1
    of_source, of_run = measured(evaluate_command)
    assert (of_source["loss"], of_run["loss"]) == (before, after), "by the run's settings, the same lines and masks"

    do(documented(page, "convert", "out"))
    given = ["evaluate", "my-roberta", "adapted", "--data", "test.txt"]
    assert f"`maskwright {' '.join(given)} --documents line`" in (ROOT / page).read_text()
    assert "If each line is one: --documents line." in do(given), "the note has this command's words"
    source, adapted = measured(given, "--documents", "line")
    assert adapted["perplexity"] < source["perplexity"]
    assert len(answers(folder / "adapted", "ka lo[] mi.")) == 5


def write_chinese_bert(folder: Path, text: str, config: dict[str, Any]) -> None:
    """As people keep one: vocab.txt, config.json and weights with all of BERT's heads, and no file of a tokenizer."""
    folder.mkdir(parents=True)
    characters = sorted({*text.lower()} - {*" \n"})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    own = BertConfig(**SIZES, vocab_size=len(tokens))
    plain = {name: value for name, value in own.to_dict().items() if name not in {"model_type", "architectures"}}
    (folder / "config.json").write_text(json.dumps({**plain, **config}))
    torch.manual_seed(0)
    torch.save(BertForPreTraining(own).state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("config", "is_extended"),
    [({}, False), ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, True)],
    ids=["ernie", "roberta-wwm and words of jieba's"],
)
def test_the_user_of_a_chinese_bert_masks_jiebas_words(config: dict[str, Any], is_extended: bool, folder: Path) -> None:
    page, name = "docs/adapt.md", "hfl/chinese-roberta-wwm-ext"
    text = [f"{CHINESE[number % 4]}{CHINESE[number % 3]}" for number in range(240)]
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("\n\n".join(f"{line}{number}" for number, line in enumerate(text)))
    (folder / "held-out.txt").write_text("\n\n".join(text[:40]))
    write_chinese_bert(folder / name, "".join(text) + "0123456789", config)

    own = []
    if is_extended:
        do(documented(page, "tokenizer", name))
        own = ["model.tokenizer=more-tokenizer"]
    said = do(documented(page, "train", f"model.from_pretrained={name}"), *own, *SMALL, *LEARNT_NOTHING)
    assert ("model type: bert, as the names of the weights are" in said) == (not config)
    before, *_, after = evaluations(folder / "out")
    assert after < before - 0.1

    do(documented(page, "convert", "out"))
    given = [name if word == HUB_NAME else word for word in documented("README.md", "evaluate", "adapted")]
    source, adapted = measured(given)
    assert adapted["bits_per_byte"] < source["bits_per_byte"], "which are of the same text whatever its tokens are"
    tokens = AutoTokenizer.from_pretrained(folder / "adapted").tokenize("我们去公园")
    assert tokens == (["我们", "去", "公园"] if is_extended else [*"我们去公园"])
    assert len(answers(folder / "adapted", "今天天气[]好。")) == 5


def write_bert(folder: Path, tokenizer: Path) -> None:
    """With all its heads: that for pairs, and the pooler below it."""
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.save_pretrained(folder)
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(**SIZES, vocab_size=len(own), pad_token_id=1)).save_pretrained(folder)


def test_a_domain_then_a_task_then_a_classifier(folder: Path, workspace: Path) -> None:
    page, source = "docs/adapt.md", folder / HUB_NAME
    write_bert(source, workspace / "tokenizer")
    (folder / "texts").mkdir()
    write_text(folder / "texts" / "a.txt", documents=240, seed=4)
    write_text(folder / "held-out.txt", documents=40, seed=5)
    lines(folder / "task.txt", 300, seed=6)

    do(documented(page, "train", "adapt", "data.train=texts/", "run.dir=out"), *SMALL, *LEARNT_NOTHING)
    do(documented(page, "convert", "out", "adapted"))
    do(documented(page, "train", "tapt"), *SMALL, *LEARNT_NOTHING)
    do(documented(page, "convert", "task-run"))
    for run_dir in ("out", "task-run"):
        before, *_, after = evaluations(folder / run_dir)
        assert after < before
    at_first, of_domain = measured(documented("README.md", "evaluate", "adapted"))
    assert of_domain["perplexity"] < at_first["perplexity"]

    (shown,) = [body for path, body in blocks("python") if path == ROOT / page and "num_labels=3" in body]
    names: dict[str, Any] = {}
    exec(shown.replace('"adapted"', '"task-model"'), names)
    classifier, tokenizer = names["model"], names["tokenizer"]
    _, report = type(classifier).from_pretrained(folder / "task-model", num_labels=3, output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"} and not report["mismatched_keys"]
    given: Any = BertForPreTraining.from_pretrained(source)
    assert torch.equal(classifier.bert.pooler.dense.weight, given.bert.pooler.dense.weight)
    assert not torch.equal(classifier.bert.embeddings.LayerNorm.bias, given.bert.embeddings.LayerNorm.bias)
    assert classifier(**tokenizer("ka lo mi", return_tensors="pt")).logits.shape == (1, 3)


def test_a_model_of_ones_own_text_from_nothing_stopped_on_the_way(folder: Path) -> None:
    page = "docs/first-run.md"
    (folder / "texts").mkdir()
    write_text(folder / "texts" / "a.txt", documents=400, seed=7)
    (body,) = [body for path, body in blocks("yaml") if path == ROOT / page]
    config = yaml.safe_load(body)
    config["model"]["overrides"] |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config["train"]["steps"], config["checkpoint"]["every_steps"], config["eval"]["every_steps"] = 24, 12, 12
    (folder / "my.yaml").write_text(yaml.safe_dump(config))

    do(["400" if word == "8000" else word for word in documented(page, "tokenizer")])
    do(documented(page, "prepare"))
    assert "from       texts" in do(documented(page, "data"))
    do(documented(page, "validate"))
    command, run_dir = [word for word in documented(page, "train") if word != "--dry-run"], folder / "runs" / "my"
    gate = Gate(folder)
    gate.close_after(8)
    first = start_maskwright(*command, fresh=False, **gate.environment)
    wait_for_step(first, run_dir, 8)
    first.send_signal(signal.SIGINT)  # Ctrl-C
    said = first.communicate()[0]
    assert first.returncode == EXIT_STOPPED_AFTER_SAVING, said
    assert "stopped at step 8 on SIGINT; the same command goes on from here" in said

    assert "resuming from step-00000008 at step 8" in do(command)
    assert len(losses(run_dir)) == 24, "each step once"
    before, *_, after = evaluations(run_dir)
    assert after < before - 0.1
    do(documented(page, "report"))
    assert (run_dir / "report.html").stat().st_size > 0
    do(documented(page, "convert"))
    assert len(answers(folder / "my-model", "ka lo [] mi.")) == 5
