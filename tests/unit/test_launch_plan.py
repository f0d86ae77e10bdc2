"""Where ranks are started: what is asked and what is there are compared, and never made to fit."""

from __future__ import annotations

import pytest
from unit_helpers import assert_explained

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.launch import plan as module
from bigtrain.launch.plan import Allocation, find_allocation, make_plan, shortened
from bigtrain.slurm_lists import counts_per_node, node_names

TWO = Allocation("17", ("n1", "n2"), cores=4, gpus=None)


def config(**sections: dict) -> Config:
    return Config.model_validate(sections)


def expand(names: str) -> list[str]:
    return {"n[1-2]": ["n1", "n2"], "n1": ["n1"]}[names]


def in_slurm(**changed: str | None) -> dict[str, str]:
    env = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_CPUS_PER_NODE": "8,4",
        **changed,
    }
    return {name: value for name, value in env.items() if value is not None}


def test_no_slurm_no_allocation() -> None:
    assert find_allocation({}) is None
    assert find_allocation({"SLURM_JOB_ID": "17"}) is None, "a login node inside of a container"


def test_an_allocation_is_as_good_as_its_poorest_node() -> None:
    found = find_allocation(in_slurm(SLURM_GPUS_ON_NODE="2"), expand)
    assert found == Allocation("17", ("n1", "n2"), cores=4, gpus=2)


def test_old_names_of_slurm() -> None:
    found = find_allocation(in_slurm(SLURM_JOB_NUM_NODES=None, SLURM_NNODES="2"), expand)
    assert found is not None
    assert found.nodes == ("n1", "n2")


@pytest.mark.parametrize("said", ["3", "", "x", None])
def test_variables_of_different_jobs(said: str | None) -> None:
    with pytest.raises(LaunchError) as caught:
        find_allocation(in_slurm(SLURM_JOB_NUM_NODES=said), expand)
    assert_explained(caught.value, "17", "n[1-2] is 2")


@pytest.mark.parametrize(("text", "gpus"), [("8", 8), ("h100:4", 4), ("a:1,b:2", 3), ("x", None)])
def test_gpus_where_salloc_was_called(text: str, gpus: int | None) -> None:
    found = find_allocation(in_slurm(SLURM_GPUS_PER_NODE=text), expand)
    assert found is not None
    assert found.gpus == gpus


@pytest.mark.parametrize("gpus", ["", "gpu:2", "-1", "N/A"])
def test_gpus_that_slurm_does_not_tell(gpus: str) -> None:
    found = find_allocation(in_slurm(SLURM_GPUS_ON_NODE=gpus), expand)
    assert found is not None
    assert found.gpus is None


def test_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError) as caught:
        node_names("n[1-2]")
    assert_explained(caught.value, "scontrol", "n[1-2]", "container")


@pytest.mark.parametrize(
    ("text", "counts"), [("4(x2),8", [4, 4, 8]), ("1", [1]), ("", []), ("nonsense", [])]
)
def test_counts_per_node(text: str, counts: list[int]) -> None:
    assert counts_per_node(text) == counts


# -- the plan ----------------------------------------------------------------------------------


def test_an_allocation_is_used_whole() -> None:
    plan = make_plan(config(launch={"processes": 3}), {}, TWO)
    assert (plan.start, plan.nodes, plan.num_ranks) == ("srun", ("n1", "n2"), 6)
    assert str(plan) == "Slurm job 17: 6 ranks, 3 on each of 2 nodes (n1, n2), started by srun"


def test_degrees_are_shared_out_to_nodes() -> None:
    plan = make_plan(config(parallel={"pp": 2, "dp": 3}), {}, TWO)
    assert plan.ranks_per_node == 3


def test_one_rank_per_core_where_nothing_is_said() -> None:
    assert make_plan(config(), {}, TWO).num_ranks == 8


def test_one_rank_per_gpu_that_slurm_has_given() -> None:
    gpus = Allocation("17", ("n1", "n2"), cores=64, gpus=8)
    assert make_plan(config(), {}, gpus).num_ranks == 16
    assert make_plan(config(run={"device": "cpu"}), {}, gpus).num_ranks == 128


def test_whole_replicas_on_all_nodes_together() -> None:
    """tp=3 pp=2 over two nodes of four cores: three ranks each, and one core idle."""
    assert make_plan(config(parallel={"tp": 3, "pp": 2}), {}, TWO).ranks_per_node == 3


def test_a_batch_script_of_one_node_starts_its_ranks_itself() -> None:
    one = Allocation("17", ("n1",), cores=4, gpus=None)
    assert make_plan(config(), {"SLURMD_NODENAME": "n1"}, one).start == "here"
    assert make_plan(config(), {}, one).start == "srun", "salloc leaves us on the login node"


def test_other_nodes_than_asked_for() -> None:
    with pytest.raises(LaunchError) as caught:
        make_plan(config(launch={"nodes": 4}), {}, TWO)
    assert_explained(caught.value, "launch.nodes = 4", "Slurm job 17 has 2", "n1, n2")


def test_nodes_without_any() -> None:
    with pytest.raises(LaunchError) as caught:
        make_plan(config(launch={"nodes": 4}), {}, None)
    assert_explained(caught.value, "this is one machine", "--slurm", "--hosts")


def test_degrees_that_nodes_cannot_share() -> None:
    with pytest.raises(LaunchError) as caught:
        make_plan(config(parallel={"dp": 3}), {}, TWO)
    assert_explained(caught.value, "3 / 2 = 1.50", "pp=1 x dp=3")


def test_hosts_go_before_the_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_cores", lambda: 64)
    plan = make_plan(config(launch={"processes": 2}), {}, TWO, ["a", "b", "c"])
    assert (plan.start, plan.nodes, plan.num_ranks) == ("ssh", ("a", "b", "c"), 6)
    named = make_plan(config(launch={"hosts": ["x"], "processes": 1}), {}, None)
    assert named.nodes == ("x",)


def test_many_names_are_shortened() -> None:
    names = [f"n{i}" for i in range(100)]
    assert shortened(names) == "n0, n1, n2, ... n99"
    assert shortened(names[:4]) == "n0, n1, n2, n3"


def test_ranks_of_hosts_are_not_counted_here() -> None:
    with pytest.raises(LaunchError) as caught:
        make_plan(config(), {}, None, ["a", "b"])
    assert_explained(caught.value, "how many ranks each host gets", "launch.processes")


def test_mpi_is_held_to_the_allocation_too() -> None:
    with pytest.raises(LaunchError) as caught:
        make_plan(config(launch={"mpi": {}, "nodes": 4}), {}, TWO)
    assert_explained(caught.value, "launch.nodes = 4, but MPI has 2: n1, n2")
    with pytest.raises(LaunchError) as caught:
        make_plan(config(launch={"mpi": {}}), {}, None, ["a"])
    assert_explained(caught.value, "-hosts")
    plan = make_plan(config(launch={"mpi": {}, "nodes": 3, "processes": 2}), {}, None)
    assert (plan.start, plan.num_ranks) == ("mpiexec", 6)
