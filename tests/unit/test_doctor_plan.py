"""Which ranks doctor starts, and who of them measures with whom."""

from __future__ import annotations

from itertools import combinations

import pytest

from bigtrain.config.schema import Config
from bigtrain.doctor.together import rounds_of
from bigtrain.launch.doctor import plan_of
from bigtrain.launch.plan import Allocation


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 16])
def test_every_pair_meets_once(count: int) -> None:
    rounds = rounds_of(count, quick=False)
    pairs = [pair for some in rounds for pair in some]
    assert sorted(pairs) == list(combinations(range(count), 2))
    for some in rounds:
        places = [node for pair in some for node in pair]
        assert len(set(places)) == len(places)
        assert count > 4 or len(some) == 1
    if count > 4:
        assert len(rounds) == count - 1 + count % 2


def test_quick_leaves_out_rounds_of_many_nodes() -> None:
    rounds = rounds_of(64, quick=True)
    assert len(rounds) == 8
    assert all(len(some) == 32 for some in rounds)
    assert len(rounds_of(6, quick=True)) == 5


@pytest.mark.parametrize(
    ("gpus", "device", "asked", "ranks"),
    [
        (None, "cpu", None, 1),
        (8, "auto", None, 8),
        (8, "cpu", None, 1),
        (0, "auto", None, 1),
        (8, "auto", 2, 2),
    ],
)
def test_ranks_on_all_nodes(gpus: int | None, device: str, asked: int | None, ranks: int) -> None:
    wanted = {"run": {"device": device}, "parallel": {"tp": 16}, "launch": {"nodes": 2}}
    allocation = Allocation("7", ("a", "b", "c"), cores=4, gpus=gpus)
    config, plan = plan_of(Config.model_validate(wanted), allocation, ranks_per_node=asked)
    assert (plan.nodes, plan.ranks_per_node) == (("a", "b", "c"), ranks)
    assert config.launch.processes == ranks


def test_doctor_starts_ranks_itself_also_where_runs_are_started_by_mpi() -> None:
    wanted = {"run": {"device": "cpu"}, "launch": {"mpi": {}}}
    config, plan = plan_of(Config.model_validate(wanted), None)
    assert (plan.start, config.launch.mpi) == ("here", None)


def test_hosts_of_the_config() -> None:
    wanted = {"run": {"device": "cpu"}, "launch": {"hosts": ["a", "b"]}}
    _, plan = plan_of(Config.model_validate(wanted), None)
    assert (plan.start, plan.num_ranks) == ("ssh", 2)
