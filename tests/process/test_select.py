"""`data select` finds the documents that are like a small text, the same for any number of workers."""

from __future__ import annotations

import itertools
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from rich.console import Console

from tests.commands import assert_one_card, maskwright
from tests.preparing import folder_hashes
from tests.waiting import TIMEOUT_S
from tools.select.importance import BUCKETS, buckets_of, log_ratios
from tools.select.run import Selection, choose, select_documents
from tools.training_text import ReadOptions
from trainer.errors import UserError

QUIET = Console(quiet=True)
DOCUMENTS = 3000


def make_texts(folder: Path) -> tuple[set[str], Path]:
    """Write a corpus, a tenth of it of a domain, and a text of 200 documents of that; return the tenth, and the text.

    Seven of ten words are common to both; the domain has 300 of its own, which all the rest has not.
    """
    generator = random.Random(0)
    syllables = ["ka", "lo", "mi", "ne", "ru", "sa", "ti", "vo", "an", "el", "or", "us"]
    words = ["".join(parts) for parts in itertools.product(syllables, repeat=4)]
    generator.shuffle(words)
    common, own, others = words[:1500], words[1500:1800], words[1800:3000]

    def document(special: list[str]) -> str:
        length = generator.randint(20, 60)
        return " ".join(generator.choice(special if generator.random() < 0.3 else common) for _ in range(length)) + "."

    in_domain = {number for number in range(DOCUMENTS) if number % 10 == 3}
    texts = [f"{document(own if number in in_domain else others)} {number}" for number in range(DOCUMENTS)]
    (folder / "corpus").mkdir()
    for part in range(4):
        lines = [json.dumps({"text": text}) for text in texts[part * 750 : (part + 1) * 750]]
        (folder / "corpus" / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "like.txt").write_text("\n\n".join(document(own) for _ in range(200)), encoding="utf-8")
    return {texts[number] for number in in_domain}, folder / "like.txt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    folder = tmp_path_factory.mktemp("select")
    return folder, make_texts(folder)[0]


def read_back(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        lines = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode().splitlines()
        found += [json.loads(line)["text"] for line in lines]
    return found


def test_the_top_tenth_is_the_tenth_of_the_domain(texts: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, wanted = texts
    report = select_documents(
        [str(folder / "corpus")], [str(folder / "like.txt")], tmp_path / "out", Selection(share=0.1), QUIET, workers=1
    )
    found = read_back(tmp_path / "out")
    assert (report.chosen, report.documents, len(found)) == (300, DOCUMENTS, 300)
    assert len(wanted & set(found)) / len(found) >= 0.8
    assert report.mean_log_weight["corpus"] < 0 < report.mean_log_weight["chosen"]
    assert report.chosen_bytes == sum(len(text.encode()) for text in found)
    assert all(any(text.startswith(start[:90]) for text in found) for start in report.most_like)


def test_the_files_do_not_depend_on_workers_and_are_read_by_prepare(
    texts: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    folder, _ = texts
    monkeypatch.setattr("tools.prepare.plan.MINIMUM_UNIT_BYTES", 1 << 15)
    hashes = []
    for workers in (1, 3):
        output = tmp_path / str(workers)
        select_documents(
            [str(folder / "corpus")],
            [str(folder / "like.txt")],
            output,
            Selection(documents=99),
            QUIET,
            workers=workers,
        )
        hashes.append(folder_hashes(output))
    assert hashes[0] == hashes[1] and len(hashes[0]) > 4
    assert len(read_back(tmp_path / "1")) == 99
    arguments = ("--input", str(tmp_path / "1"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "data"))
    done = maskwright("prepare", *arguments)
    assert done.returncode == 0 and "99" in done.stdout + done.stderr


def test_the_command_says_what_it_chose_and_names_mistakes(texts: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, _ = texts
    paths = ("--from", *map(str, sorted((folder / "corpus").iterdir())), "--like", str(folder / "like.txt"))
    done = maskwright("data", "select", *paths, "--share", "0.02", "--output", str(tmp_path / "a"), "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["documents"], report["chosen"]) == (0, DOCUMENTS, 60)
    for more, said in (
        ((), "How much is to be chosen is not said"),
        (("--share", "0.1", "--documents", "3"), "said twice"),
        (("--share", "0.1", "--field", "body"), "body"),
    ):
        # What fails in a worker has a new interpreter, with the workers and the end of one.
        done = maskwright("data", "select", *paths, *more, "--output", str(tmp_path / "b"), fresh=said == "body")
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "b").exists()
    (tmp_path / "empty.txt").write_text("\n\n")
    empty = (*paths[:-1], str(tmp_path / "empty.txt"), "--share", "0.1")
    done = maskwright("data", "select", *empty, "--output", str(tmp_path / "b"))
    assert done.returncode == 2 and "--like" in done.stderr


def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose files may not grow beyond 3,000 bytes."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )


def test_a_full_disk_is_a_card_and_leaves_nothing(texts: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, _ = texts
    output, corpus = tmp_path / "out", str(folder / "corpus")
    like = str(folder / "like.txt")
    selected = limited("data", "select", "--from", corpus, "--like", like, "--share", "0.9", "--output", str(output))
    assert_one_card(selected, 2, "The selection could not be written", f"--output {output}")
    trained = limited("tokenizer", "train", "--input", like, "--vocab-size", "900", "--output", str(output))
    assert_one_card(trained, 2, "The tokenizer could not be written", f"--output {output}")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_those_of_the_paper_but_for_the_prior() -> None:
    text = "The heart, the HEART. 心脏"
    assert len(buckets_of(text)) == 8 + 7, "the heart , the heart . 心 脏, and pairs of them"
    found = buckets_of(text)
    assert found[0] == found[3] and found[1] == found[4] and found.max() < BUCKETS
    assert len(buckets_of("")) == 0 and len(buckets_of("one")) == 1
    corpus, target = np.full(BUCKETS, 100), np.zeros(BUCKETS, np.int64)
    target[7] = 30_000
    ratios = log_ratios(target, corpus)
    assert ratios[7] == pytest.approx(np.log((30_000 + 1) / 40_000 * BUCKETS), rel=1e-6)
    assert ratios[8] == pytest.approx(np.log(10_000 / 40_000), rel=1e-6)


def test_documents_are_drawn_in_proportion_to_their_weights() -> None:
    weights, seeds = [np.log([1.0, 2.0]), np.array([np.log(5.0), -np.inf])], range(4000)
    drawn = [choose(weights, Selection(documents=1, seed=seed)) for seed in seeds]
    shares = np.mean([np.concatenate(each) for each in drawn], axis=0)
    assert np.abs(shares - np.array([1, 2, 5, 0]) / 8).max() < 0.03
    assert sum(part.sum() for part in choose(weights, Selection(documents=9))) == 3, "one without a word never"
    with pytest.raises(UserError, match="not said"):
        Selection()


def test_input_that_changes_meanwhile_is_named(texts: tuple[Path, set[str]], tmp_path: Path) -> None:
    from tools.prepare.inputs import find_inputs
    from tools.prepare.pieces import TextSettings
    from tools.prepare.plan import plan_units
    from tools.select.run import write_chosen

    folder, _ = texts
    (unit,) = plan_units(find_inputs([str(folder / "corpus" / "0.jsonl")], "auto"), "row")
    reading = TextSettings("jsonl", "row", ReadOptions().field, str(tmp_path))
    with pytest.raises(UserError, match="has 750 documents, not 751"):
        write_chosen(unit, reading, (np.ones(751, np.bool_), str(tmp_path / "part")))
