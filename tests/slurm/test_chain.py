"""Jobs that may not be requeued: a chain of them, and what people do to it by hand."""

from __future__ import annotations

from pathlib import Path

from tests.commands import assert_one_card
from tests.gate import Gate
from tests.ranks import losses, metrics, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import (
    TWO_NODES,
    job_logs,
    run_of_60_steps,
    run_submit,
    signal_job,
    submit,
    wait_for_training,
    write_site,
)
from trainer.checkpoint.find import candidates
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_USER_MISTAKE
from trainer.tracking.starts import read_start_records


def test_a_chain_survives_a_lost_batch_host_and_scancel_and_a_script_is_submitted_by_hand(
    cluster: SlurmCluster, workspace: Path, tmp_path: Path
) -> None:
    endless = {"train": {"steps": 100_000}, "schedule": {"name": "constant"}}
    config = run_of_60_steps(workspace, tmp_path / "run", **endless)
    site = write_site(tmp_path / "site.yaml", requeue=False)
    run_dir = Path(config.run.dir)
    arguments = (write_config(config, tmp_path / "config.yaml"), "--chain", "4", "--convert")
    gate = Gate(tmp_path)
    gate.close_after(8)  # a job that waits for something to happen to it takes no time from what does
    first = submit(cluster, *arguments, site=site, **gate.environment)
    second, third, fourth, conversion = (first + offset for offset in range(1, 5))

    # While it runs, the folder is its own: `submit` knows it by SLURM, a script submitted by hand by the run's lock.
    wait_for_training(cluster, run_dir, 6)
    refused = run_submit(cluster, *arguments, *TWO_NODES, site=site)
    assert_one_card(refused, EXIT_USER_MISTAKE, f"Job {first} of this run folder is running.", str(run_dir))
    script = run_dir / "slurm" / "train.sbatch"
    rival = cluster.submit(script, cwd=tmp_path)
    (end,) = cluster.wait(rival)
    assert (end.state, end.exit_code) == ("FAILED", EXIT_USER_MISTAKE), job_logs(run_dir)
    assert f"Another job trains in this run folder: SLURM job {first}, " in job_logs(run_dir)

    cluster.kill_node("n1")  # the batch host, and rank 0
    cluster.notice("n1")
    cluster.start_node("n1")
    (end,) = cluster.wait(first)
    assert (end.state, end.restarts) == ("NODE_FAIL", 0)

    def starts_of(job: int) -> list[int]:
        return [start.step for start in read_start_records(run_dir) if start.job == str(job)]

    for job in (second, third):
        cluster.wait_for(lambda job=job: bool(starts_of(job)), f"job {job}\n{job_logs(run_dir)}")
        start = read_start_records(run_dir)[-1]
        gate.close_after(start.step + 6)
        # Until it trains, the metrics are those of the job before, which got further than its last checkpoint.
        cluster.wait_for(lambda start=start: metrics(run_dir)[-1]["time"] > start.time, f"training of job {job}")
        wait_for_training(cluster, run_dir, start.step + 4)
        if job == second:
            cluster.run("scancel", str(job))
        else:
            signal_job(cluster, job, "INT")
        (end,) = cluster.wait(job)
        assert end.state == ("CANCELLED" if job == second else "FAILED"), job_logs(run_dir)
        assert candidates(run_dir)[0].step >= start.step + 4, f"saved\n{job_logs(run_dir)}"
    assert end.exit_code == EXIT_STOPPED_AFTER_SAVING
    assert [cluster.wait(job)[0].state for job in (fourth, conversion)] == ["CANCELLED"] * 2, "stopped for good"

    last = candidates(run_dir)[0].step + 3
    gate.open()
    by_hand = cluster.submit(script, f"train.steps={last}", cwd=tmp_path)
    (end,) = cluster.wait(by_hand)
    assert (end.state, end.exit_code) == ("COMPLETED", EXIT_FINISHED), job_logs(run_dir)
    assert len(losses(run_dir)) == last, "each step once"
    assert [line["samples"] for line in metrics(run_dir)] == [16 * step for step in range(1, last + 1)]
    assert [start.job for start in read_start_records(run_dir)] == [str(job) for job in (first, second, third, by_hand)]
