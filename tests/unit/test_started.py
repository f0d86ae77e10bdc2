"""Ranks that torchrun, srun or mpiexec has started, told apart by the environment."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from unit_helpers import assert_explained

from bigtrain.comm.started import (
    Starter,
    adopt,
    interface_towards,
    num_nodes_given,
    slurm_names,
    starter_of,
)
from bigtrain.config.launching import LaunchSection
from bigtrain.errors import LaunchError
from bigtrain.joined import wrong_world

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
        ({**TASK, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(os.getpid())}, "srun"),
        ({**TASK, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "1"}, "srun"),
    ],
)
def test_who_has_started_this(env: dict[str, str], starter: Starter | None) -> None:
    assert starter_of(env) == starter


def test_who_types_in_a_shell_of_srun_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    shell = {**TASK, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "1"}
    assert starter_of(shell) is None
    assert starter_of({**shell, "SLURM_TASK_PID": str(os.getpid())}) == "srun"


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({}, None),
        ({**BATCH, "SLURM_JOB_NUM_NODES": "4"}, 4),
        ({**TASK, "SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "2"}, 2),
        ({**TASK, "SLURM_STEP_NUM_NODES": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, None),
    ],
)
def test_nodes_that_slurm_has_given(env: dict[str, str], nodes: int | None) -> None:
    assert num_nodes_given(env) == nodes


def rank_of(node: str, given: int | None = None) -> dict[str, object]:
    return {"node": node, "given": given}


@pytest.mark.parametrize(
    ("launch", "everyone", "words"),
    [
        ({"nodes": 2}, [rank_of("a"), rank_of("a")], "the 2 ranks are on 1 node"),
        ({"nodes": "3:4"}, [rank_of("a"), rank_of("b")], "launch.nodes = 3:4"),
        ({}, [rank_of("a", 2), rank_of("a", 2)], "given 2 nodes, but the 2 ranks are on 1"),
        # One node has been reached by a step of its own, which is told of one node.
        ({}, [rank_of("a", 3), rank_of("b", 1)], "given 3 nodes"),
        ({"processes": 8}, [rank_of("a"), rank_of("b")], "but nodes have 1 rank(s)"),
    ],
)
def test_worlds_that_were_not_meant(
    launch: dict[str, object], everyone: list[dict[str, object]], words: str
) -> None:
    problem = wrong_world(LaunchSection.model_validate(launch), everyone)
    assert problem is not None
    assert_explained(problem, words)
    assert problem.exit_code == 2


@pytest.mark.parametrize("launch", [{}, {"nodes": 1}, {"processes": 2}, {"nodes": "1:2"}])
def test_worlds_that_were_meant(launch: dict[str, object]) -> None:
    given = 3 if "nodes" in launch else 1  # who says how many is believed
    everyone = [rank_of("a", given), rank_of("a", given)]
    assert wrong_world(LaunchSection.model_validate(launch), everyone) is None


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
