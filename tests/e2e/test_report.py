"""`maskwright report` of a real run, opened in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import assert_one_card, maskwright
from tests.ranks import losses, metrics, tiny_config, train
from tests.unit.tools.test_report import Page
from tests.waiting import TIMEOUT_S
from tools.report.run import MARKER
from trainer.errors import EXIT_FINISHED

BROWSER = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own errands
)


@dataclass(frozen=True)
class Opened:
    """What a browser has made of a page: its elements, what it complained of, and what it asked for elsewhere."""

    page: Page
    complaints: list[str]
    requests: list[str]


def open_in_browser(path: Path, scratch: Path) -> Opened:
    """Open a page in Chromium; skips where that is not installed."""
    if BROWSER is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    log = scratch / "net.json"
    places = (f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--dump-dom", path.as_uri())
    done = subprocess.run([BROWSER, *FLAGS, *places], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    content = json.loads(log.read_text(encoding="utf-8", errors="replace"))
    begins = content["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event.get("params", {}) for event in content["events"] if event["type"] == begins]
    return Opened(
        page=Page(done.stdout),
        complaints=[line for line in done.stderr.splitlines() if ":CONSOLE:" in line],
        requests=[of["url"] for of in asked if "file://" in of.get("network_isolation_key", "")],
    )


@pytest.fixture(scope="module")
def run_dir(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on two ranks, of which the last ten are done again after a resume."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    sections = {"eval": {"every_steps": 5, "samples": 8}, "checkpoint": {"every_steps": 10}}
    config = tiny_config(workspace, folder, data={"validation": str(workspace / "data")}, **sections)
    assert train(config, 2) == EXIT_FINISHED
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    assert train(config, 2) == EXIT_FINISHED
    assert len(losses(folder)) == 20
    return folder


def test_a_browser_shows_the_page_of_a_run_with_the_numbers_of_its_metrics(run_dir: Path, tmp_path: Path) -> None:
    done = maskwright("report", run_dir)
    assert done.returncode == 0 and f"wrote {run_dir / 'report.html'}" in done.stdout, done.stderr
    assert done.stderr == ""
    opened = open_in_browser(run_dir / "report.html", tmp_path)
    assert opened.complaints == [] and opened.requests == []
    exact, text = opened.page.values(), opened.page.text
    evaluations = [line for line in metrics(run_dir) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 15, 20]
    for line in evaluations:
        for name in ("step", "tokens", "eval/loss", "eval/perplexity", "eval/masked_accuracy"):
            assert json.dumps(line[name]) in exact, name
    last = [line for line in metrics(run_dir) if "train/loss" in line][-1]
    assert {json.dumps(value) for name, value in last.items() if "/" in name and value is not None} <= set(exact)
    for said in ("finished", "20 of 20", "RobertaForMaskedLM", "a restart", "2 ranks on", "guessing by frequency"):
        assert said in text, said
    lines = [json.loads(line) for line in (run_dir / "examples.jsonl").read_text().splitlines()]
    for sample in lines[-1]["examples"]:
        for piece in sample["pieces"]:
            assert piece["text"] in text, "the examples are there, blanks and all"
    pictures = [attributes for tag, attributes in opened.page.elements if attributes.get("role") == "img"]
    assert len(pictures) >= 8 and all(picture["aria-label"] for picture in pictures)
    shown = [attributes for tag, attributes in opened.page.elements if tag == "path" and "d" in attributes]
    assert len(shown) > 50, "the curves are drawn"


def test_what_a_page_should_not_do_would_be_seen(run_dir: Path, tmp_path: Path) -> None:
    """The policy of the page blocks what a mistake of ours would fetch; without the policy the request is seen."""
    assert maskwright("report", run_dir, "--output", tmp_path / "a.html").returncode == 0
    html = (tmp_path / "a.html").read_text()
    wrong = html.replace("<main>", '<main><img alt="" src="http://127.0.0.1:9/x.png"><script>alert(1)</script>')
    (tmp_path / "wrong.html").write_text(wrong)
    blocked = open_in_browser(tmp_path / "wrong.html", tmp_path)
    assert len(blocked.complaints) == 2 and blocked.requests == []
    (tmp_path / "open.html").write_text(
        wrong.replace("default-src 'none'", "default-src *").replace("img-src", "x-src")
    )
    assert open_in_browser(tmp_path / "open.html", tmp_path).requests == ["http://127.0.0.1:9/x.png"]


def test_several_runs_and_a_run_that_was_killed(run_dir: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(run_dir, killed)
    for name in ("metrics.jsonl", "examples.jsonl"):
        content = (killed / name).read_bytes()
        (killed / name).write_bytes(content[: -len(content) // 3])  # in the middle of a line
    status = json.loads((killed / "status.json").read_text())
    (killed / "status.json").write_text(json.dumps({**status, "state": "training", "pid": 2**31 - 1}))
    done = maskwright("report", run_dir, killed, "--output", "compared.html", cwd=tmp_path)
    assert done.returncode == 0 and "1 of its lines cannot be understood" in done.stdout + done.stderr
    opened = open_in_browser(tmp_path / "compared.html", tmp_path)
    assert opened.complaints == [] and opened.requests == []
    assert "it looks dead" in opened.page.text and "2 runs over each other" in opened.page.text
    assert json.dumps(metrics(run_dir)[-1]["eval/loss"]) in opened.page.values()


def test_a_file_of_the_users_stays_and_a_folder_without_a_run_is_a_card(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    output = tmp_path / "mine.html"
    assert_one_card(maskwright("report", run_dir, "--output", output), 2, "no report of maskwright's", "--output")
    assert output.read_text() == "mine" and MARKER not in output.read_text()
    assert_one_card(maskwright("report", tmp_path), 2, "There is no run")
