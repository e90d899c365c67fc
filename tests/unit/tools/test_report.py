"""The report: what it gathers, what it draws, and that nothing of a file becomes markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.ranks import tiny_config
from tests.unit.data.test_shards import write_data_set
from tools.report import facts
from tools.report.gather import gather
from tools.report.page import render
from tools.report.panels import MOST_POINTS, make_panels, thin_out
from tools.report.run import MARKER, write_report
from trainer.errors import UserError

HOSTILE = "<script>alert(1)</script>\"'&lt;<img src=x onerror=alert(1)>{{ 7*7 }}\u202e\x1b[31m$\\frac"
QUIET = Console(quiet=True)


def training(step: int, loss: float, **others: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 256 * step,
        "time": 1.7e9 + step,
        "train/loss": loss,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 1.5,
        "throughput/tokens_per_second": 5000.0 + step,
        **others,
    }


def evaluation(step: int, loss: float, **others: Any) -> dict[str, Any]:
    counters = {"step": step, "samples": 8 * step, "tokens": 256 * step, "time": 1.7e9 + step}
    return {**counters, "eval/loss": loss, "eval/perplexity": math.exp(loss), **others}


def examples(step: int, answer: str, text: str = " Paris") -> dict[str, Any]:
    asked = {"text": text, "shown": "<mask>", "answer": answer, "right": answer == text}
    return {"step": step, "examples": [{"t": 0, "pieces": [{"text": "It is"}, asked, {"text": "."}]}]}


LINES = [
    evaluation(0, 6.25, **{"eval/masked_accuracy": 0.0}),
    *[training(step, 6.0 - step / 10) for step in range(1, 11)],
    evaluation(10, 5.0625, **{"eval/masked_accuracy": 0.125, "eval/probe/accuracy": 0.75, "eval/probe/f1": 0.5}),
]


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    shown: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    starts: int = 1,
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown or []))
    (folder / "config.yaml").write_text(json.dumps(config or {"run": {"name": folder.name, "dir": str(folder)}}))
    start = {"time": 1.7e9, "step": 0, "job": "", "restart": 0, "nodes": "n1", "world": 2}
    records = [{**start, "step": 5 * number} for number in range(starts)]
    (folder / "starts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


class Page(HTMLParser):
    """Reads a page; fails on an element that is not closed."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def values(self) -> list[str]:
        return [str(attributes["value"]) for tag, attributes in self.elements if tag == "data" and attributes["value"]]


def page_of(*runs: str) -> Page:
    return Page(render(gather(list(runs)), MARKER))


def test_a_run_is_on_its_page_with_the_numbers_of_its_files(tmp_path: Path) -> None:
    shown = [examples(0, " the"), examples(10, " Paris")]
    page = page_of(write_run(tmp_path / "a", LINES, shown, starts=2))
    exact = page.values()
    for line in LINES:
        if "eval/loss" in line:
            assert all(json.dumps(line[name]) in exact for name in line if name != "time" and name != "samples")
    last = {name: json.dumps(value) for name, value in LINES[-2].items() if "/" in name}
    assert set(last.values()) <= set(exact)
    assert "a restart" in page.text and "2 ranks on n1" in page.text
    assert "It is" in page.text and "1 of 1" in page.text and "0 of 1" in page.text and "Paris ✓" in page.text
    titles = [panel.title for panel in make_panels(gather([str(tmp_path / "a")]))]
    assert titles[:3] == ["Loss", "Perplexity", "Accuracy"] and titles[-1] == "eval/probe/f1", "any metric has a chart"
    assert not [tag for tag, _ in page.elements if tag in ("script", "img", "iframe", "object", "form")]
    assert len([tag for tag, _ in page.elements if tag == "figure"]) == len(titles)


def test_nothing_of_a_file_becomes_markup(tmp_path: Path) -> None:
    config = {"run": {"name": HOSTILE, "dir": HOSTILE}, HOSTILE: {HOSTILE: [HOSTILE]}, "data": {"train": HOSTILE}}
    lines = [
        training(1, 5.0, **{f"source/{HOSTILE}/loss": 4.0, f"eval/{HOSTILE}": 2.0}),
        {**training(2, 4.0), f"{HOSTILE}/{HOSTILE}": 1.0},
        {"step": 2, "event": HOSTILE, "event/reason": HOSTILE, "event/first_sample": HOSTILE},
    ]
    shown = [examples(1, HOSTILE, HOSTILE), examples(2, HOSTILE, HOSTILE)]
    run = write_run(tmp_path / "run", lines, shown, config)
    write_run(tmp_path / "other", LINES, shown, config)
    harmless = page_of(write_run(tmp_path / "plain", LINES, shown=[examples(1, "a", "b")]))
    for page in (page_of(run), page_of(run, str(tmp_path / "other"))):
        assert "<script>alert(1)</script>" in page.text, "it is shown as it is"
        assert {tag for tag, _ in page.elements} <= {tag for tag, _ in harmless.elements} | {"details", "summary"}
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert "\x1b" not in page.text and "\u202e" not in page.text and "{{ 7*7 }}" in page.text


def test_it_fetches_nothing_and_says_so(tmp_path: Path) -> None:
    html = render(gather([write_run(tmp_path / "a", LINES)]), MARKER)
    assert "default-src 'none'" in html
    for tag, attributes in Page(html).elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_each_id_is_there_once_and_each_reference_leads_to_one(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", LINES), write_run(tmp_path / "b", LINES))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 5
    named = re.findall(r'(?:href="#|url\(#)([^")]+)', render(gather([str(tmp_path / "a")]), MARKER))
    alone = [attributes.get("id") for _, attributes in page_of(str(tmp_path / "a")).elements]
    assert set(named) <= set(alone)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", LINES, [examples(0, " the")])
    assert render(gather([run]), MARKER) == render(gather([run]), MARKER)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 40,
        b"\xff\xfe",
        b"null",
        b"{}",
        b'{"step": 3, "tra',
        b"[" * 100_000,
        b'{"step": 1, "train/loss": 1e300}',
    ],
)
def test_files_that_nobody_understands_are_notes(content: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", LINES, [examples(0, " the")])
    for name in ("metrics.jsonl", "examples.jsonl", "starts.jsonl"):
        path = tmp_path / "a" / name
        path.write_bytes(path.read_bytes() + content + b"\n")
    (tmp_path / "a" / "status.json").write_bytes(content)
    page = page_of(run)
    assert json.dumps(LINES[-1]["eval/loss"]) in page.values()
    for name in ("metrics.jsonl", "examples.jsonl", "starts.jsonl", "config.yaml"):
        (tmp_path / "a" / name).write_bytes(content)
    page = page_of(run)
    is_line = b"1e300" in content
    assert content in (b"", b"\xff\xfe") or is_line or "metrics.jsonl: 1 of its lines cannot be understood" in page.text
    assert is_line or "Nothing has been measured yet" in page.text


@pytest.mark.parametrize("value", [None, 0, -1.0, 1e-300, 1e300, -1e308, 10**30])
def test_any_number_can_be_drawn(value: float | None, tmp_path: Path) -> None:
    names = ("samples", "tokens", "time", "train/loss", "train/grad_norm", "eval/perplexity", "a/b", "c/accuracy")
    odd = [{**training(11 + number, 1.0), name: value} for number, name in enumerate(names)]
    lines = [*LINES, *odd, {**training(0, 1.0), "step": value}, dict.fromkeys(names, value) | {"step": 30}]
    assert json.dumps(LINES[-1]["eval/loss"]) in page_of(write_run(tmp_path / "a", lines)).values()


def test_a_run_without_anything_yet_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    page = page_of(str(tmp_path / "a"))
    assert "Nothing has been measured yet" in page.text and "config.yaml is not there" in page.text


def test_long_curves_are_thinned_out_without_losing_a_spike(tmp_path: Path) -> None:
    x, y = np.arange(50_000.0), np.sin(np.arange(50_000.0) / 900)
    y[31_234], y[31_235], y[40_000] = 99.0, -99.0, math.nan
    thin_x, thin_y = thin_out(x, y)
    assert len(thin_x) <= MOST_POINTS + 2 and (np.diff(thin_x) > 0).all()
    assert (np.nanmax(thin_y), np.nanmin(thin_y)) == (99.0, -99.0) and thin_x[-1] == 49_999
    run = write_run(tmp_path / "a", [training(step, 5 + step % 7) for step in range(1, 3000)])
    (curve,) = next(iter(make_panels(gather([run])))).curves
    assert curve.faint is not None and np.ptp(curve.ys[50:-50]) < 1 < np.ptp(curve.faint), "smooth before what jumps"
    assert curve.last == 5 + 2999 % 7
    assert "Bold: the mean" in page_of(run).text


def test_a_loss_is_shown_with_what_it_compares_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        write_data_set(tmp_path / "data" / split, [[[7, 7, 7, 8], [7, 9]]])
    config = {"run": {"dir": "runs/a"}, "data": {"train": [{"path": "data"}], "validation": "data"}}
    run = write_run(tmp_path / "runs" / "a", LINES, config=config)
    (record,) = gather([run])
    assert record.notes == [] and record.vocabulary_size is not None, "found from where the run was started"
    loss, perplexity = (panel.levels for panel in make_panels([record])[:2])
    assert [level.value for level in loss] == [math.log(record.vocabulary_size), record.unigram]
    assert [level.value for level in perplexity] == pytest.approx(
        [record.vocabulary_size, math.exp(record.unigram or 0)]
    )
    (tmp_path / "data" / "train" / "shard-00000.tok").unlink()
    (record,) = gather([run])
    assert record.unigram is None and "guessing by frequency is not shown" in record.notes[0]
    several_terms = [training(1, 5.0, **{"train/loss/mlm": 4.0, "train/loss/nsp": 1.0})]
    (record,) = gather([write_run(tmp_path / "runs" / "a", several_terms, config=config)])
    assert make_panels([record])[0].levels == [], "a sum of several terms is no loss of tokens"


def test_several_runs_are_over_each_other_with_what_differs(tmp_path: Path) -> None:
    one, two = (
        {"run": {"name": "x", "dir": name}, "optimizer": {"lr": rate, "clip": 1.0}, "data": {"train": [{"path": "d"}]}}
        for name, rate in (("a", 1e-3), ("b", 2e-3))
    )
    first = write_run(tmp_path / "a", LINES, config=one)
    doubled = [{**line, "tokens": 2 * line["tokens"]} for line in LINES[:-1]]
    second = write_run(tmp_path / "b", doubled, config=two)
    runs = gather([first, second])
    assert [run.name for run in runs] == [first, second], "the same name twice tells nothing"
    assert facts.differing_settings(runs) == [("optimizer.lr", ["0.001", "0.002"])]
    loss, over_tokens, *_ = make_panels(runs)
    assert (loss.xs, over_tokens.xs) == ("step", "tokens"), "their steps are not of the same size"
    assert [curve.colour for curve in loss.curves] == [0, 0, 1, 1]
    assert over_tokens.curves[-1].xs[0] == 0 and over_tokens.curves[-2].xs[-1] == 2 * 256 * 10
    rows = dict(facts.last_values(runs))
    assert [value.exact for value in rows["eval/loss"]] == ["5.0625", "6.25"]
    assert [value.text for value in rows["eval/probe/accuracy"]] == ["75.00%", "–"]


def test_a_key_that_an_earlier_version_did_not_know_is_no_difference(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "a")
    earlier = config.model_dump(mode="json")
    del earlier["model"]["frozen"], earlier["eval"]
    earlier["optimizer"]["lr"] = 0.125
    runs = [
        write_run(tmp_path / name, LINES, config=each)
        for name, each in (("a", config.model_dump(mode="json")), ("b", earlier))
    ]
    assert [name for name, _ in facts.differing_settings(gather(runs))] == ["eval.every_steps", "optimizer.lr"]


def test_what_happened_is_marked_on_the_curves_and_told(tmp_path: Path) -> None:
    event = {"step": 4, "tokens": 1024, "event": "rollback", "event/reason": "the loss is 99", "event/from_step": 7}
    lines = [*LINES, {**event, "event/first_sample": 32, "event/end_sample": 56}]
    (run,) = gather([write_run(tmp_path / "a", lines, starts=2)])
    assert [(mark.kind, mark.x) for mark in make_panels([run])[0].marks] == [("start", 5), ("rollback", 4)]
    assert [row[:2] for row in facts.happenings(run)] == [("0", "start"), ("4", "rollback"), ("5", "restart")]
    assert facts.happenings(run)[1][2] == "at step 7: the loss is 99 (samples t = 32 to 55)"


def test_an_example_is_followed_as_long_as_its_text_is_the_same(tmp_path: Path) -> None:
    other = examples(0, " the", " Rome")
    shown = [other, *[examples(step, " Paris" if step > 50 else " the") for step in range(10, 101, 2)]]
    (run,) = gather([write_run(tmp_path / "a", LINES, shown)])
    (table,) = facts.example_tables(run)
    assert len(table.rows) == facts.MOST_EXAMPLE_ROWS
    assert table.rows[0] == (10, [(" the", False)], 0) and table.rows[-1] == (100, [(" Paris", True)], 1)
    assert [facts.visible(text) for text in (" a ", " ", "\n", "")] == ["a", "␣", "⏎", "∅"]


def test_a_report_is_replaced_and_no_file_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = write_run(tmp_path / "a", LINES), write_run(tmp_path / "b", LINES)
    path = write_report([run], None, QUIET)
    assert path == tmp_path / "a" / "report.html"
    before = path.read_bytes()
    assert write_report([run], None, QUIET) == path and path.read_bytes() == before
    assert not list((tmp_path / "a").glob(".*")), "no temporary file is left"
    monkeypatch.chdir(tmp_path)
    assert write_report([run, other], None, QUIET) == tmp_path / "report.html"
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    (tmp_path / "link.html").symlink_to(mine)
    for output in ("mine.html", "link.html"):
        with pytest.raises(UserError, match="no report of maskwright's"):
            write_report([run], output, QUIET)
    assert mine.read_text() == "<p>mine</p>"
    mine.write_text("")
    with pytest.raises(UserError, match="no report of maskwright's"):
        write_report([run], "mine.html", QUIET)


@pytest.mark.parametrize(
    ("runs", "output", "problem"),
    [
        (["a"], "b", "is a folder"),
        (["a"], "nowhere/x.html", "There is no folder"),
        (["a"], "/proc/x.html", "Cannot write"),
        (["a"], "", "The path is empty"),
        (["a"], "x" * 300, "too long"),
        (["a", "b", "a"], "x.html", "given already"),
        (["a", "./b/../a"], "x.html", "given already"),
        (["nothing"], None, "There is no run"),
        (["a", "empty"], "x.html", "There is no run"),
        (["a/metrics.jsonl"], None, "There is no run"),
    ],
)
def test_a_slip_is_one_card(
    runs: list[str], output: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", LINES)
    write_run(tmp_path / "b", LINES)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        write_report(runs, output, QUIET)
    assert not (tmp_path / "x.html").exists()
