"""slurm/README.md: the first run on a cluster, every command of it, as it stands there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM

from tests.conftest import write_text
from tests.ranks import metrics
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import submitted, write_site

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## A first run on your cluster\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRAINING_ENDS = "status runs/first --watch"


def run_block(body: str, folder: Path, variables: dict[str, str]) -> str:
    """Run a block in a shell; one that ends with TensorBoard is ended when that is there."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", body],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    output, serves = "", False
    try:
        for line in process.stdout:
            output += line
            if serves := line.startswith("TensorBoard 2"):
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == 0 or serves, output
    return output


def test_the_first_run_of_the_readme_works_word_for_word(cluster: SlurmCluster, tmp_path: Path) -> None:
    section = SECTION.search((ROOT / "slurm" / "README.md").read_text(encoding="utf-8"))
    assert section is not None
    (tmp_path / "texts").mkdir()
    for number in range(2):
        write_text(tmp_path / "texts" / f"{number}.txt", documents=300, seed=number)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    variables = {
        **cluster.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), cluster.environ["PATH"]]),
        "MASKWRIGHT_SITE": str(write_site(tmp_path / "site.yaml")),  # in the place of slurm/site.yaml
    }

    said = ""
    for language, body in BLOCK.findall(section[1]):
        if language == "yaml":
            (tmp_path / "first.yaml").write_text(body)
            continue
        if TRAINING_ENDS in body:  # "When it has started"
            started = tmp_path / "runs" / "first" / "status.json"
            cluster.wait_for(started.exists, "the start of the run")
        said += run_block(body, tmp_path, variables)
    assert submitted(said) and "--- settings of this run ---" in said, said
    assert "finished" in said and "TensorBoard 2" in said, said
    assert metrics(tmp_path / "runs" / "first")[-1]["step"] == 40, said
    AutoModelForMaskedLM.from_pretrained(tmp_path / "first-model")
