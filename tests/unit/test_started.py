"""Ranks that torchrun, srun or mpiexec has started, told apart by the environment."""

from __future__ import annotations

import pytest
from unit_helpers import assert_explained

from bigtrain.comm.started import Starter, adopt, interface_towards, slurm_names, starter_of
from bigtrain.errors import LaunchError

TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}


def expand(names: str) -> list[str]:
    assert names == "n[1-3]"
    return ["n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("env", "starter"),
    [
        ({}, None),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        (BATCH, None),
        ({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_STEP_NUM_TASKS": "4"}, None),
        (TASK, "srun"),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "many"}, None),
        ({"PMI_SIZE": "4"}, "mpiexec"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpiexec"),
        ({"PMI_SIZE": "1"}, None),
        ({**TASK, "PMI_SIZE": "6"}, "srun"),
        ({**TASK, "PMI_SIZE": "12"}, "mpiexec"),
    ],
)
def test_who_has_started_this(env: dict[str, str], starter: Starter | None) -> None:
    assert starter_of(env) == starter


def test_a_task_of_srun_gets_the_names_of_torchrun() -> None:
    names = slurm_names(TASK, expand)
    assert names.items() >= {
        "RANK": "3",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "n1",
    }.items()  # fmt: skip
    assert 20000 <= int(names["MASTER_PORT"]) < 32000


def test_steps_of_a_job_meet_at_ports_of_their_own() -> None:
    other = slurm_names({**TASK, "SLURM_STEP_ID": "1"}, expand)
    assert other["MASTER_PORT"] != slurm_names(TASK, expand)["MASTER_PORT"]


def test_where_to_meet_can_be_set() -> None:
    env = {**TASK, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert not {"MASTER_ADDR", "MASTER_PORT"} & slurm_names(env, expand).keys()


@pytest.mark.parametrize("name", sorted(TASK.keys() - {"SLURM_STEP_ID"}))
def test_a_variable_is_missing(name: str) -> None:
    with pytest.raises(LaunchError) as caught:
        slurm_names({**TASK, name: ""}, expand)
    assert_explained(caught.value, name)


def test_variables_that_do_not_fit_together() -> None:
    with pytest.raises(LaunchError) as caught:
        slurm_names({**TASK, "SLURM_NODEID": "3"}, expand)
    assert_explained(caught.value, "SLURM_NODEID=3", "3 node(s)")


def test_ranks_of_our_own_launcher_are_left_alone() -> None:
    env = {**TASK, "BIGTRAIN_LAUNCHER_PID": "1"}
    assert adopt(env) is None
    assert "RANK" not in env


def test_interface_towards_an_address() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("") is None
    assert interface_towards("no.such.machine.invalid") is None
