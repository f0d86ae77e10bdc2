"""Which servers and workers are on which machines, of those that were named or that Slurm gave."""

from __future__ import annotations

import pytest
from unit_helpers import assert_explained

from bigtrain.config.launching import LaunchSection
from bigtrain.config.schema import Config
from bigtrain.config.serving import ServerSection
from bigtrain.errors import PlanError
from bigtrain.launch.job import visible_gpus
from bigtrain.launch.plan import Allocation, Plan, find_allocation, make_plan, without
from bigtrain.launch.seats import seat
from bigtrain.launch.slurm import make_submission
from bigtrain.launch.slurm_commands import queued_jobs
from bigtrain.launch.starters import starters

HET = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "a b",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_CPUS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "c",
    "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "3",
}


def section(servers: int, workers: int, **more: object) -> ServerSection:
    return ServerSection.model_validate({"servers": servers, "workers": workers, **more})


def config(servers: int, workers: int, dp: int = 1, **more: object) -> Config:
    server = {"servers": servers, "workers": workers, **more}
    return Config.model_validate({"server": server, "parallel": {"dp": dp}})


def by_ssh(there: Config, *hosts: str) -> Plan:
    return make_plan(there, {}, None, hosts)


def test_workers_and_servers_are_spread_in_order() -> None:
    seats = seat(section(2, 4), ["a", "b"])
    assert seats.workers == (("a",), ("a",), ("b",), ("b",))
    assert seats.servers == ("a", "b")
    assert [seats.slot(worker) for worker in range(4)] == [0, 1, 0, 1]
    assert seats.processes("a", 3) == 7


@pytest.mark.parametrize(
    ("servers", "nodes", "where"),
    [(2, "abcd", "ac"), (4, "ab", "abab"), (3, "ab", "aba"), (1, "ab", "a"), (3, "abc", "abc")],
)
def test_servers_are_far_from_each_other(servers: int, nodes: str, where: str) -> None:
    """Neighbours too, where several are on a node: the end of one takes few along."""
    assert "".join(seat(section(servers, 1), ["w"], list(nodes)).servers) == where


def test_a_worker_on_several_nodes() -> None:
    seats = seat(section(1, 2), list("abcd"), ["e"])
    assert seats.workers == (("a", "b"), ("c", "d"))
    assert seats.nodes == tuple("abcde")
    assert [seats.slot(worker) for worker in range(2)] == [0, 0]


def test_workers_that_cannot_have_equally_many_nodes() -> None:
    with pytest.raises(PlanError) as caught:
        seat(section(1, 2), list("abc"))
    assert_explained(caught.value, "2 workers cannot share 3 nodes: 3 / 2 = 1.50", "take 2 nodes")


def test_a_plan_by_ssh() -> None:
    plan = by_ssh(config(2, 2, dp=4, hosts=["c", "d"]), "a", "b")
    where = "2 workers of 4 ranks on a, b; 2 servers on c, d; started by ssh"
    assert str(plan) == f"4 hosts: {where}"
    assert plan.nodes == tuple("abcd")
    assert (plan.num_ranks, plan.ranks_per_node, plan.processes_per_node) == (4, 4, 4)


def test_ranks_of_a_worker_are_shared_out_to_its_nodes() -> None:
    plan = by_ssh(config(1, 2, dp=4), *"abcd")
    assert (plan.num_ranks, plan.ranks_per_node, plan.num_nodes) == (4, 2, 2)
    with pytest.raises(PlanError) as caught:
        by_ssh(config(1, 2, dp=1), *"abcd")
    assert_explained(caught.value, "1 ranks cannot be shared by 2 nodes")


def test_hosts_of_servers_alone() -> None:
    with pytest.raises(PlanError) as caught:
        by_ssh(config(1, 2, hosts=["c"]))
    assert_explained(caught.value, "server.hosts without hosts for workers", "--hosts")


# -- what is left ----------------------------------------------------------------------------------


def test_all_go_to_the_nodes_that_are_left() -> None:
    there = config(2, 2, hosts=["c", "d"])
    plan = by_ssh(there, "a", "b")
    left = without(plan, there.server, ["c", "b"])
    assert left is not None
    assert left.seats == seat(there.server, ["a"], ["d"])
    assert left.nodes == ("a", "d")
    among = without(plan, there.server, ["c", "d"])
    assert among is not None
    assert among.seats is not None
    assert among.seats.servers == ("a", "b")


def test_too_few_are_left() -> None:
    there = config(1, 2, dp=2)
    plan = by_ssh(there, *"abcd")
    assert without(plan, there.server, ["b"]) is None, "a worker has two nodes"
    assert without(plan, there.server, list("abcd")) is None


# -- in Slurm --------------------------------------------------------------------------------------


def test_the_second_component_is_for_servers() -> None:
    allocation = find_allocation(HET, str.split)
    assert allocation is not None
    there = config(2, 2, slurm={})
    plan = make_plan(there, HET, allocation)
    assert plan.seats == seat(there.server, ["a", "b"], ["c"])
    assert plan.apart == ("c",)
    first, second = starters(plan, LaunchSection(), HET, "/here")
    assert "--nodelist a,b --cpus-per-task 8" in " ".join(first)
    assert "--het-group" not in " ".join(first)
    assert "srun --het-group=1 --nodes 1" in " ".join(second)
    assert "--nodelist c --cpus-per-task 3" in " ".join(second)


def test_a_node_of_both_components_has_one_agent() -> None:
    allocation = Allocation("17", ("a", "b"), 8, None, ("b",))
    plan = make_plan(config(1, 2), HET, allocation)
    assert (plan.nodes, plan.apart) == (("a", "b"), ())
    assert len(starters(plan, LaunchSection(), HET, "/here")) == 1


def test_a_job_without_the_nodes_that_servers_are_to_have() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(config(2, 2, slurm={}), HET, Allocation("17", ("a",), 8, None))
    assert_explained(caught.value, "server.slurm.nodes = 1", "job 17 has 0", "--slurm")


@pytest.mark.parametrize("hosts", [(), ("a", "b")])
def test_nodes_of_slurm_for_a_run_without_slurm(hosts: tuple[str, ...]) -> None:
    """With launch.slurm it is a config for jobs, that is tried elsewhere."""
    with pytest.raises(PlanError) as caught:
        by_ssh(config(2, 2, slurm={}), *hosts)
    assert_explained(caught.value, "server.slurm without launch.slurm", "no Slurm job", "--slurm")
    server = {"servers": 2, "workers": 2, "slurm": {}}
    there = {"server": server, "parallel": {"dp": 1}, "launch": {"slurm": {}}}
    assert by_ssh(Config.model_validate(there), *hosts).servers


def test_a_submission() -> None:
    there = config(2, 2, slurm={"nodes": 2})
    assert str(make_submission(there)) == (
        "Slurm: 2 workers of 1 rank on one node, 2 servers on 2 nodes"
    )
    assert "2 servers on the same" in str(make_submission(config(2, 2)))


def test_a_job_of_two_components_is_listed_once() -> None:
    lines = ["17+0|17|RUNNING|0:01|30:00|2|None|bigtrain:/r"]
    lines.append("17+1|18|RUNNING|0:01|30:00|1|None|bigtrain:/r")
    [job] = queued_jobs(lambda command: "\n".join(lines))
    assert (job.number, job.array, job.folder) == ("17", "17", "/r")


def test_gpus_of_workers_that_share_a_node() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert visible_gpus(env, 1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 1, 2) == {}
