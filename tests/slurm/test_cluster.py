"""The cluster itself: what a dead node, or the end of the tests, leaves running is nothing."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import SlurmCluster


def test_a_killed_node_and_a_stopped_cluster_leave_nothing_running(cluster: SlurmCluster, tmp_path: Path) -> None:
    """`cluster` sees to it that SLURM is installed; the one that is killed is another."""
    own = SlurmCluster()
    try:
        own.start()
        jobs, pids = {}, {}
        for node in ("n1", "n2"):
            # Without its environment: a job must be found all the same.
            sleep = f"env -i sh -c 'echo $$ > {tmp_path}/{node}; exec sleep 300'"
            jobs[node] = own.submit(f"--nodelist={node}", "--wrap", sleep, cwd=tmp_path)
        for node in jobs:
            path = tmp_path / node
            own.wait_for(lambda path=path: path.exists() and path.read_text().endswith("\n"), f"the job on {node}")
            pids[node] = int(path.read_text())
        assert pids["n1"] in own.processes("n1") and pids["n2"] in own.processes("n2")

        own.kill_node("n2")
        assert own.processes("n2") == [] and pids["n1"] in own.processes("n1")
        assert own.states(jobs["n1"])[0].state == "RUNNING"
    finally:
        own.stop()
    assert own.processes() == [] and not own.folder.exists()
    assert cluster.processes(), "another cluster goes on"
