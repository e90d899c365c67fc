"""`maskwright evaluate`: the numbers of training, of plain transformers, of loops by hand, and its cards."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.objective_cases import CASES
from tests.preparing import prepare_text
from tests.ranks import metrics, run_ranks, tiny_config, train
from tests.teachers import make_teacher
from tools.convert import convert
from tools.evaluate.options import EvaluateOptions
from tools.evaluate.run import evaluate, this_process
from trainer.config.file import parse_config
from trainer.data.batch import Batch
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE, MaskwrightError
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.probe import cross_validate
from trainer.objectives.registry import family_of

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def measure(*models: str | Path, **options: Any) -> dict[str, Any]:
    """What the command prints as JSON, found in this process."""
    asked = EvaluateOptions(models=tuple(map(str, models)), **options)
    return json.loads(evaluate(asked, this_process(), Console(file=io.StringIO())).to_json())


@pytest.fixture(scope="module")
def marked(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The workspace's text with its words and sentences marked, in two splits."""
    marks = {"word_starts": "tokenizer", "sentence_starts": "rules", "validation_fraction": 0.2}
    folder = tmp_path_factory.mktemp("marked") / "data"
    return str(prepare_text(workspace / "text.txt", workspace, folder, **marks))


@pytest.fixture(scope="module")
def run_of(workspace: Path, marked: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a case of the table for two steps, once, with an evaluation at the end; returns its run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, ranks: int = 1) -> Path:
        case, run_dir, tokenizer = CASES[name], folder / f"{name}-{ranks}", str(workspace / "tokenizer")
        if run_dir.exists():
            return run_dir
        raw = case.raw(tokenizer, marked, str(run_dir), 0.1)
        raw["data"]["validation"] = marked
        raw["train"]["steps"], raw["schedule"]["warmup_steps"] = 2, 1
        raw["checkpoint"]["every_steps"] = None
        raw["eval"] = {"every_steps": 2, "samples": 22}  # which no batch divides
        if case.teacher is not None:
            family = family_of(case.config("unused", "unused", "unused"))
            teacher = make_teacher(folder / "teacher", tokenizer, case.preset, case.teacher, family)
            raw["objective"]["teacher"] = {**case.objective["teacher"], "model": teacher}
        config = parse_config(raw, "test")
        assert train(config, ranks) == EXIT_FINISHED
        return run_dir

    return make


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "eval/loss" in line]


@pytest.mark.parametrize(
    "name",
    [
        "mlm",
        "mlm by words",
        "mlm by words, documents, code of its own",
        "mlm, documents",
        "mlm and nsp",
        "mlm, taught",
        "clm",
        "plm",
        "rtd, disentangled",
    ],
)
def test_a_checkpoint_gives_the_loss_that_training_wrote_bit_for_bit(name: str, run_of: Any) -> None:
    run_dir = run_of(name)
    (found,) = measure(run_dir)["models"]
    written = evaluations(run_dir)[-1]
    assert found["step"] == written["step"] == 2 and found["samples"] == 22
    if CASES[name].teacher is not None:  # which no other model has: its own term is compared
        assert found["loss"] == written["eval/mlm/loss"]
        return
    values = {key.removeprefix("eval/"): value for key, value in written.items() if key.startswith("eval/")}
    assert values and {key: found[key] for key in values} == values


def rank(options: EvaluateOptions, folder: Path) -> int:
    """Runs on each rank."""
    from trainer.runtime import distributed

    world = distributed.start()
    try:
        report = evaluate(options, world, make_console())
    finally:
        distributed.stop()
    (folder / f"rank-{world.rank}.json").write_text(report.to_json())
    return EXIT_FINISHED


def measure_on(ranks: int, folder: Path, *models: str | Path, **options: Any) -> dict[str, Any]:
    """As `measure`, on several ranks, which all find the same."""
    folder.mkdir()
    asked = EvaluateOptions(models=tuple(map(str, models)), **options)
    assert run_ranks(rank, ranks, asked, folder) == [EXIT_FINISHED] * ranks
    found = [(folder / f"rank-{number}.json").read_text() for number in range(ranks)]
    assert len(set(found)) == 1
    return json.loads(found[0])


def test_two_ranks_find_what_one_does_and_what_two_have_trained(
    run_of: Any, marked: str, workspace: Path, tmp_path: Path
) -> None:
    run_dir = run_of("mlm", ranks=2)
    own = measure_on(2, tmp_path / "own", run_dir)["models"][0]
    written = evaluations(run_dir)[-1]
    assert {name: own[name] for name in ("loss", "masked_accuracy")} == {
        name: written[f"eval/{name}"] for name in ("loss", "masked_accuracy")
    }

    asked: dict[str, Any] = {"data": str(workspace / "text.txt"), "samples": 50, "words": 60, "pll_documents": 9}
    one, two = measure(run_dir, **asked), measure_on(2, tmp_path / "all", run_dir, **asked)
    assert one["models"][0]["words"] == 60 and one["models"][0]["pll_tokens"] > 40
    for name, value in one["models"][0].items():
        expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert two["models"][0][name] == expected, name
    assert two["baselines"] == one["baselines"]


@pytest.fixture(scope="module")
def masked_model(run_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "masked"
    convert(str(run_of("mlm")), str(folder), "float32", "5GB", make_console())
    return folder


@pytest.fixture(scope="module")
def causal_model(run_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "causal"
    convert(str(run_of("clm")), str(folder), "float32", "5GB", make_console())
    return folder


def batches_of(model: Path, **options: Any) -> tuple[list[Any], float | None]:
    """The blocks as a model is shown them, with their labels, and the tokens a byte of the text."""
    from tools.evaluate.data import open_data
    from tools.evaluate.settings import choose_settings, config_of
    from tools.evaluate.subject import find_subject
    from trainer.evaluation.evaluator import Evaluator
    from trainer.objectives.registry import make_criterion

    subject, asked = find_subject(str(model)), EvaluateOptions(models=(str(model),), **options)
    settings = choose_settings([subject], asked)
    run_dir = str(Path(options["data"]).parent / "run")  # beside which raw text is prepared
    config, _ = config_of(subject, settings, options["data"], run_dir, subject.config.data.text, held_out=False)
    data = open_data(config, subject.vocabulary, subject.tokenizer, this_process(), print)
    evaluator = Evaluator(data.shards, data.samples, make_criterion(config), settings.samples, 7)
    places = [np.arange(first, first + 7) for first in range(0, evaluator.samples, 7)]
    return [evaluator.batch(each) for each in places], data.tokens_per_byte


@torch.no_grad()
def test_a_masked_model_has_the_loss_of_plain_transformers(masked_model: Path, run_of: Any, workspace: Path) -> None:
    data = str(workspace / "data")
    found = measure(masked_model, run_of("mlm"), data=data, seq_len=32, samples=40, mask_ratio=0.3)
    by_folder, by_run = found["models"]
    assert by_folder["loss"] == by_run["loss"]  # the folder is what was trained
    model = AutoModelForMaskedLM.from_pretrained(masked_model).eval()
    nats, right, count, original = 0.0, 0, 0, 0
    batches, tokens_per_byte = batches_of(masked_model, data=data, seq_len=32, samples=40, mask_ratio=0.3)
    for batch in batches:
        labels = torch.full(batch.inputs["input_ids"].shape, -100)
        labels.view(-1)[batch.prediction_index] = batch.labels["mlm"]
        logits = model(input_ids=batch.inputs["input_ids"]).logits
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != -100).sum())
        original += int((labels == batch.inputs["input_ids"]).sum())
    assert 0.25 * 30 * 40 < count < 0.35 * 30 * 40 and 0 < original < 0.2 * count  # a tenth is shown as it is
    assert by_folder["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert by_folder["masked_accuracy"] == pytest.approx(right / count, rel=1e-12)
    assert tokens_per_byte is not None
    assert by_folder["bits_per_byte"] == pytest.approx(nats / count * tokens_per_byte / math.log(2), rel=1e-5)


@torch.no_grad()
def test_no_more_rows_are_computed_than_there_are_blocks(
    masked_model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = list[int](), Evaluator._read

    def counted(evaluator: Evaluator, places: np.ndarray) -> tuple[Batch | None, MaskwrightError | None]:
        rows.append(len(places))
        return read(evaluator, places)

    monkeypatch.setattr(Evaluator, "_read", counted)
    asked: dict[str, Any] = {"data": str(workspace / "data"), "seq_len": 32, "samples": 6}
    found = [measure(masked_model, micro_size=size, **asked)["models"][0] for size in (6, 5000)]
    assert rows == [6, 6] and found[0] == found[1]


def test_a_causal_model_has_the_loss_of_plain_transformers(causal_model: Path, workspace: Path) -> None:
    data = str(workspace / "data")
    found = measure(causal_model, data=data, seq_len=32, samples=40)["models"][0]
    model = AutoModelForCausalLM.from_pretrained(causal_model).eval()
    nats, count = 0.0, 0
    for batch in batches_of(causal_model, data=data, seq_len=32, samples=40)[0]:
        shown, labels = batch.inputs["input_ids"], batch.labels["clm"].view(batch.rows, -1)
        known = labels[:, 0] != -100  # the last batch is filled up
        # One block of all tokens: transformers shifts the labels itself.
        whole = torch.cat([shown, labels[:, -1:]], dim=1)[known]
        nats += float(model(input_ids=whole, labels=whole).loss) * whole[:, 1:].numel()
        count += whole[:, 1:].numel()
    assert count == 40 * 32
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert "accuracy" in found and "masked_accuracy" not in found


def write_model(folder: Path, tokenizer: Any, bias: Sequence[float] | None = None) -> Path:
    """A BERT with its tokenizer; with `bias` one that finds all tokens as likely everywhere as softmax(bias) says."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=66, **SIZES)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        if bias is not None:
            for weight in model.cls.predictions.transform.parameters():
                weight.zero_()  # the last hidden state is 0 then, and what is left is the bias
            model.cls.predictions.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TINY_TEXT = "the cat sat on the mat\n\na dog ran to the cat\n\nthe dog sat on a mat and a cat ran\n"


def tokenizer_of(tokens: Sequence[str]) -> Any:
    """A WordPiece tokenizer of these tokens, after the usual special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *tokens])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "to", "and"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]


def test_two_tokenizers_are_compared_by_bits_a_byte_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{TINY_TEXT}\n" * 4)
    words, letters = tokenizer_of(WORDS), tokenizer_of(LETTERS)
    by_word = write_model(tmp_path / "words", words, [0.0] * len(words))
    by_letter = write_model(tmp_path / "letters", letters, [0.0] * len(letters))
    found = measure(by_word, by_letter, against=str(by_letter), data=str(tmp_path / "text.txt"), seq_len=10)
    one, other = found["models"]

    # Nothing is known: ln V nats for each token of either kind, over documents of 22, 20 and 34 bytes.
    text_bytes = sum(len(line) for line in TINY_TEXT.strip().split("\n\n"))
    word_count, letter_count = len(TINY_TEXT.split()), len(TINY_TEXT.replace("\n", "").replace(" ", ""))
    assert (text_bytes, word_count, letter_count) == (76, 22, 57)
    assert one["loss"] == pytest.approx(math.log(15), rel=1e-6) and other["loss"] == pytest.approx(math.log(57))
    assert one["bits_per_byte"] == pytest.approx(22 * math.log2(15) / 76, rel=1e-6)
    assert other["bits_per_byte"] == pytest.approx(57 * math.log2(57) / 76, rel=1e-6)
    assert one["difference"]["bits_per_byte"] == one["bits_per_byte"] - other["bits_per_byte"]
    assert "difference" not in other and found["against"] == str(by_letter)
    assert any("tokenizers differ" in note for note in found["notes"])

    # The baseline knows how frequent each word is in the text, and is asked for the same labels.
    assert found["baselines"].keys() == {one["tokenizer"], other["tokenizer"]}
    baseline = found["baselines"][one["tokenizer"]]
    assert baseline["uniform"] == pytest.approx(math.log(15)) and baseline["unigram_of"] == "the evaluated text"
    batches, _ = batches_of(by_word, data=str(tmp_path / "text.txt"), seq_len=10)
    labels = words.convert_ids_to_tokens([label for batch in batches for label in batch.labels["mlm"] if label >= 0])
    seen = Counter(TINY_TEXT.split())
    asked = sum(-math.log(seen[label] / 22) for label in labels) / len(labels)
    assert baseline["unigram"] == pytest.approx(asked, rel=1e-12) and 1.5 < asked < math.log(10)


def test_words_are_hidden_from_all_and_recovered_by_who_knows_them(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("cat " * count + "cat" for count in range(9)))
    words, letters = tokenizer_of(WORDS), tokenizer_of(LETTERS)
    likes_cat = [9.0 if token == "cat" else 0.0 for token in words.convert_ids_to_tokens(range(len(words)))]
    likes_a = [9.0 if token == "##a" else 0.0 for token in letters.convert_ids_to_tokens(range(len(letters)))]
    by_word = write_model(tmp_path / "words", words, likes_cat)
    by_letter = write_model(tmp_path / "letters", letters, likes_a)
    right, wrong = measure(by_word, by_letter, data=str(text), seq_len=40)["models"]
    assert right["words"] == wrong["words"] > 5
    assert right["word_recovery"] == 1.0
    assert wrong["word_recovery"] == 0.0, "a part of a word is not the word"
    assert measure(by_word, by_letter, data=str(text), seq_len=40, words=3)["models"][0]["words"] == 3
    assert "words" not in measure(by_word, data=str(text), seq_len=40)["models"][0]  # with one tokenizer it is optional


@torch.no_grad()
def test_pseudo_log_likelihood_is_that_of_one_mask_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a cat and a dog, sat.\n\nthe mat\n\n" + "dog " * 12 + "\n")
    tokenizer = tokenizer_of([*LETTERS, "cat", "##at", "the", ",", "."])
    folder = write_model(tmp_path / "model", tokenizer)
    found = measure(folder, data=str(tmp_path / "text.txt"), seq_len=50, samples=2, pll_documents=10)["models"][0]

    model, nats, tokens, plain = AutoModelForMaskedLM.from_pretrained(folder).eval(), 0.0, 0, 0.0
    for line in ("a cat and a dog, sat.", "the mat", ("dog " * 12).strip()):
        ids = [2, *tokenizer(line, add_special_tokens=False).input_ids, 3]
        names = tokenizer.convert_ids_to_tokens(ids)
        for place in range(1, len(ids) - 1):
            end = place + 1
            while names[end].startswith("##"):
                end += 1
            scores = []
            for until in (end, place + 1):  # the word's later tokens are hidden as well, or the token alone is
                masked = [*ids[:place], *[4] * (until - place), *ids[until:]]
                logits = model(input_ids=torch.tensor([masked])).logits[0, place]
                scores.append(-float(logits.log_softmax(-1)[ids[place]]))
            nats, plain = nats + scores[0], plain + scores[1]
            tokens += 1
    assert abs(nats - plain) > 0.1  # what is measured is not the score that a word's own tokens give away
    assert found["pll_tokens"] == tokens and found["pll_words"] == 6 + 2 + 12
    assert found["pll_nats"] == pytest.approx(nats, rel=1e-5)
    assert found["pll_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["pll_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def run(*arguments: str | Path) -> Any:
    return maskwright("evaluate", *arguments)


def test_the_command_prints_json_alone_or_a_table_and_ranks_of_its_own_find_the_same(
    masked_model: Path, run_of: Any, workspace: Path
) -> None:
    options = ("--data", workspace / "data", "--seq-len", "32", "--samples", "20")
    one = run(masked_model, "--against", run_of("mlm"), *options, "--json")
    assert one.returncode == EXIT_FINISHED, one.stderr
    found = json.loads(one.stdout)
    assert [each["model"] for each in found["models"]] == [str(masked_model), str(run_of("mlm"))]
    assert found["models"][0]["difference"]["loss"] == 0.0
    assert found["baselines"]["unigram_of"] == "the training split"
    assert found["baselines"]["uniform"] == pytest.approx(math.log(500))
    two = run(masked_model, "--against", run_of("mlm"), *options, "--json", "--nproc-per-node", "2")
    assert two.returncode == EXIT_FINISHED, two.stderr
    assert json.loads(two.stdout)["models"][0]["loss"] == pytest.approx(found["models"][0]["loss"], rel=1e-12)

    table = run(masked_model, *options)
    assert table.returncode == EXIT_FINISHED and table.stdout.count("\n") >= 3, table.stderr
    assert "bits a byte" in table.stdout and "by guessing among 500 tokens" in table.stdout


@pytest.fixture(scope="module")
def labelled(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of the workspace's text, by whether they are long."""
    lines = [line for line in (workspace / "text.txt").read_text().splitlines() if len(line) > 5][:60]
    middle = sorted(map(len, lines))[30]
    file = tmp_path_factory.mktemp("labelled") / "labels.jsonl"
    rows = [json.dumps({"line": line, "kind": "long" if len(line) > middle else "short"}) for line in lines]
    file.write_text("\n".join(rows) + "\n")
    return file


def test_the_probe_is_that_of_plain_mean_pooling_and_scikit_learn(
    masked_model: Path, run_of: Any, workspace: Path, labelled: Path
) -> None:
    options = {
        "data": str(workspace / "data"),
        "seq_len": 32,
        "samples": 4,
        "probe_text": "line",
        "probe_label": "kind",
    }
    run_dir = run_of("mlm")
    found = measure(masked_model, run_dir, probe=str(labelled), **options)
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    classes = sorted({row["kind"] for row in rows})
    model = AutoModel.from_pretrained(masked_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(masked_model)
    with torch.no_grad():
        features = [
            model(**tokenizer(row["line"], truncation=True, max_length=32, return_tensors="pt"))[0][0].mean(0).numpy()
            for row in rows
        ]
    expected = cross_validate(np.stack(features), np.array([classes.index(row["kind"]) for row in rows]), 5)
    for each in found["models"]:
        assert each["probe/accuracy"] == pytest.approx(expected.accuracy, abs=1e-9)
        assert each["probe/macro_f1"] == pytest.approx(expected.macro_f1, abs=1e-9)
        assert each["probe/majority"] == expected.majority
    assert any(note.startswith("probe: 60 texts, 2 classes") for note in found["notes"])
    result = run(masked_model, "--data", options["data"], "--seq-len", "32", "--probe", labelled)
    assert_one_card(result, EXIT_USER_MISTAKE, "text", f"--probe {labelled}")
    ranks = run(masked_model, "--data", options["data"], "--seq-len", "32", "--samples", "4", "--probe", labelled,
                "--probe-text", "line", "--probe-label", "kind", "--json", "--nproc-per-node", "2")  # fmt: skip
    assert ranks.returncode == EXIT_FINISHED, ranks.stderr
    assert json.loads(ranks.stdout)["models"][0]["probe/accuracy"] == pytest.approx(expected.accuracy, abs=1e-9)


def test_a_mistake_is_one_card(
    masked_model: Path, causal_model: Path, run_of: Any, workspace: Path, tmp_path: Path
) -> None:
    data, text = ("--data", workspace / "data"), ("--data", workspace / "text.txt")
    result = run(masked_model)
    assert_one_card(result, EXIT_USER_MISTAKE, "no text to evaluate on", "--data")
    result = run(masked_model, "--data", tmp_path / "nothing")
    assert_one_card(result, EXIT_USER_MISTAKE, "nothing at this path", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", *data)
    assert_one_card(result, EXIT_USER_MISTAKE, "neither a run nor a model: it has no", str(tmp_path / "empty"))
    result = run(tmp_path / "missing", *data)
    assert_one_card(result, EXIT_USER_MISTAKE, "there is no such folder", str(tmp_path / "missing"))
    result = run("mistyped", *data)  # which the hub is not asked for
    assert_one_card(result, EXIT_USER_MISTAKE, "there is no such folder", "MODEL mistyped", "its owner in front")
    result = run(masked_model, *data, "--seq-len", "65")
    assert_one_card(result, EXIT_USER_MISTAKE, "65 tokens", "positions for 62", "--seq-len 62")
    result = run(masked_model, causal_model, *data, "--seq-len", "32", "--pll")
    assert_one_card(result, EXIT_USER_MISTAKE, str(causal_model), "clm", "--pll")
    result = run(causal_model, *data, "--seq-len", "32", "--words", "5")
    assert_one_card(result, EXIT_USER_MISTAKE, "fills no masks", "--words")

    other = write_model(tmp_path / "other", tokenizer_of(WORDS))
    result = run(run_of("mlm"), other, *data)
    assert_one_card(result, EXIT_USER_MISTAKE, "another tokenizer", str(workspace / "data"), "Give the text itself")
    (tmp_path / "short.txt").write_text("the cat\n")
    result = run(other, "--data", tmp_path / "short.txt")
    assert_one_card(result, EXIT_USER_MISTAKE, "not one block of 66", "a smaller --seq-len")
    (tmp_path / "unknown.txt").write_text("\N{SNOWMAN} " * 40 + "\n")
    result = run(other, "--data", tmp_path / "unknown.txt", "--seq-len", "16")
    assert_one_card(result, EXIT_USER_MISTAKE, "Nothing in the text is asked for", "unknown.txt")
    result = run(run_of("mlm"), "--documents", "line")
    assert_one_card(result, EXIT_USER_MISTAKE, "--documents says how text is read", "Add --data")
    (tmp_path / "rows.jsonl").write_text('{"body": "the cat"}\n')
    for ranks in ("1", "2"):
        result = run(other, "--data", tmp_path / "rows.jsonl", "--nproc-per-node", ranks)
        assert_one_card(result, EXIT_USER_MISTAKE, "rows.jsonl", "--field text", "Its fields are: body.")
    result = run(other, *text, "--documents", "row")
    assert_one_card(result, EXIT_USER_MISTAKE, "cannot be 'row'", "--documents")

    without_head = tmp_path / "without-head"
    AutoModelForMaskedLM.from_pretrained(other).base_model.save_pretrained(without_head)
    tokenizer_of(WORDS).save_pretrained(without_head)
    result = run(without_head, "--data", tmp_path / "short.txt")
    assert_one_card(result, EXIT_USER_MISTAKE, "drawn at random", str(without_head))


def test_a_damaged_checkpoint_is_named(run_of: Any, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_of("mlm"), copy)
    victim = next((copy / "checkpoints" / "step-00000002").glob("*states.pt"))
    os.truncate(victim, 100)
    assert_one_card(run(copy), EXIT_DAMAGED, f"step-00000002: {victim.name}: 100 bytes instead of")


@pytest.mark.parametrize("how", ["auto", "fraction"])
def test_a_run_on_text_is_evaluated_on_the_part_that_it_held_out(how: str, workspace: Path, tmp_path: Path) -> None:
    text, evaluating = str(workspace / "text.txt"), {"every_steps": 2, "samples": 16}
    data = {"train": text, "validation": "auto"}
    if how == "fraction":
        data |= {"validation": text, "text": {"validation_fraction": 0.1}}
    schedule = {"warmup_steps": 1}
    config = tiny_config(workspace, tmp_path / "run", data=data, train={"steps": 2}, eval=evaluating, schedule=schedule)
    assert train(config) == EXIT_FINISHED
    before = sorted((tmp_path / "text-cache").iterdir())
    found = measure(tmp_path / "run", words=10)
    assert found["models"][0]["loss"] == evaluations(tmp_path / "run")[-1]["eval/loss"]
    assert found["models"][0]["words"] == 10
    assert sorted((tmp_path / "text-cache").iterdir()) == before, "what training has prepared is used"


def test_settings_are_those_of_the_first_run_for_all(run_of: Any, masked_model: Path, workspace: Path) -> None:
    data = str(workspace / "data")
    found = measure(masked_model, run_of("mlm"), data=data, samples=10)
    assert found["settings"]["source"] == str(run_of("mlm")) and found["settings"]["seq_len"] == 32
    assert found["models"][0]["loss"] == found["models"][1]["loss"]
    assert measure(masked_model, data=data, samples=10)["settings"]["seq_len"] == 62  # all that it has positions for
    in_bf16 = measure(masked_model, run_of("mlm"), data=data, samples=10, precision="bf16")["models"][0]["loss"]
    assert 0 < abs(in_bf16 - found["models"][0]["loss"]) < 0.05
