"""How a process was started, read from its environment."""

from __future__ import annotations

import pytest

from launcher.environment import Membership, checked_address, find_membership, first_host
from trainer.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_JOB_NODELIST": "gpu[01-05]",
}


def first_of_three(node_list: str) -> str:
    assert node_list == "gpu[03-05]"
    return "gpu03"


def no_lookup(node_list: str) -> str:
    raise AssertionError(f"looked up {node_list}")


def test_torchrun_is_joined_as_it_says() -> None:
    assert find_membership(TORCHRUN, no_lookup) == Membership("torchrun", 5, 8, 1, 4, "node7", 29400)


def test_variables_are_those_of_torchrun() -> None:
    membership = find_membership(TORCHRUN)
    assert membership is not None
    assert membership.variables() == TORCHRUN


def test_a_slurm_step_is_mapped_and_meets_on_its_first_node() -> None:
    membership = find_membership(SRUN, first_of_three)
    assert membership is not None
    assert membership.started_by == "srun"
    assert (membership.rank, membership.world_size) == (4, 5)
    assert (membership.local_rank, membership.local_world_size) == (0, 1)
    assert membership.master_address == "gpu03"


def test_every_task_of_a_step_derives_the_same_port_and_jobs_differ() -> None:
    def port(**changes: str) -> int:
        membership = find_membership({**SRUN, **changes}, first_of_three)
        assert membership is not None
        return membership.master_port

    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_JOB_ID="123457"), port(SLURM_STEP_ID="1")}) == 3
    ports = [port(SLURM_JOB_ID=str(job)) for job in range(0, 2_000_000, 9973)]
    assert min(ports) >= 10_000 and max(ports) < 32_768


def test_an_exported_meeting_point_wins() -> None:
    membership = find_membership({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"}, no_lookup)
    assert membership is not None
    assert (membership.master_address, membership.master_port) == ("10.0.0.1", 4242)


def test_torchrun_inside_a_slurm_step_counts_as_torchrun() -> None:
    membership = find_membership({**SRUN, **TORCHRUN}, no_lookup)
    assert membership is not None
    assert membership.started_by == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the batch script itself: no step
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_otherwise_ranks_are_local(environ: dict[str, str]) -> None:
    assert find_membership(environ, no_lookup) is None


def test_a_slurm_step_never_falls_back_to_localhost() -> None:
    without_nodes = {name: value for name, value in SRUN.items() if "NODELIST" not in name}
    with pytest.raises(UserError) as caught:
        find_membership(without_nodes, no_lookup)
    assert caught.value.where == "MASTER_ADDR"


def test_no_scontrol_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="scontrol") as caught:
        first_host("gpu[01-02]")
    assert "MASTER_ADDR" in caught.value.remedy


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK"),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, "LOCAL_RANK"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_NODEID": "7"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID"),
        ({**TORCHRUN, "RANK": "8"}, "RANK"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE"),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_PORT": "99999999"}, "MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT"),
        ({**SRUN, "MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({**SRUN, "SLURM_PROCID": "5"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_PROCID": "1e3"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_LOCALID": "1"}, "SLURM_LOCALID"),
    ],
)
def test_contradictions_name_the_variable(environ: dict[str, str], where: str) -> None:
    with pytest.raises(UserError) as caught:
        find_membership(environ, first_of_three)
    assert caught.value.where == where
    assert caught.value.remedy and len(str(caught.value)) < 400


@pytest.mark.parametrize("address", ["", "no such host", "é..", "a" * 300, "[::1"])
def test_an_address_that_is_none_is_refused_and_not_waited_for(address: str) -> None:
    with pytest.raises(UserError, match="is no name or address of a machine") as caught:
        checked_address(address, "MASTER_ADDR")
    assert caught.value.where == "MASTER_ADDR" and len(str(caught.value)) < 400


def test_addresses_of_this_machine_are_taken() -> None:
    assert [checked_address(address, "") for address in ("localhost", "127.0.0.1", "::1")]
