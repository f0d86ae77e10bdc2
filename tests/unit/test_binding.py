"""Which processors a rank keeps to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigtrain import binding
from bigtrain.binding import bind, cores_for, gpu_nodes, is_bound, numa_nodes, parse_cores

TWO = {0: frozenset(range(8)), 1: frozenset(range(8, 16))}
ALL = frozenset(range(16))


@pytest.mark.parametrize(
    ("text", "cores"), [("0-2,8\n", {0, 1, 2, 8}), ("", set()), ("5", {5}), ("\n", set())]
)
def test_lists_of_processors(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


def test_nodes_of_the_system(tmp_path: Path) -> None:
    for name, text in (("node0", "0-1"), ("node1", "2-3"), ("node2", ""), ("node3", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == {0: {0, 1}, 1: {2, 3}}
    assert numa_nodes(tmp_path / "nowhere") == {}


def test_gpus_of_the_driver(tmp_path: Path) -> None:
    for bus, node in (("0000:3B:00.0", "1"), ("0000:1A:00.0", "0"), ("0000:5E:00.0", "-1")):
        (tmp_path / "driver" / bus).mkdir(parents=True)
        (tmp_path / "pci" / bus.lower()).mkdir(parents=True)
        (tmp_path / "pci" / bus.lower() / "numa_node").write_text(node + "\n")
    paths = (tmp_path / "driver", tmp_path / "pci")
    assert gpu_nodes({}, *paths) == [0, 1, None]
    assert gpu_nodes({"CUDA_VISIBLE_DEVICES": "1, 0"}, *paths) == [1, 0]
    hidden = {"SLURM_STEP_GPUS": "1-2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert gpu_nodes(hidden, *paths) == [1, None]
    assert gpu_nodes({"SLURM_JOB_GPUS": "7"}, *paths) == []
    assert gpu_nodes({"CUDA_VISIBLE_DEVICES": "GPU-abc,7"}, *paths) == [None, None]
    assert gpu_nodes({}, tmp_path / "none", tmp_path) == []


def test_ranks_are_shared_out_to_numa_nodes() -> None:
    places = [cores_for(rank, 4, TWO, [], ALL) for rank in range(4)]
    assert places == [TWO[0], TWO[0], TWO[1], TWO[1]]


def test_ranks_are_next_to_their_gpus() -> None:
    places = [cores_for(rank, 4, TWO, [1, 1, 0, None], ALL) for rank in range(4)]
    assert places == [TWO[1], TWO[1], TWO[0], None]


def test_only_what_is_allowed() -> None:
    assert cores_for(1, 2, TWO, [], frozenset({1, 2, 9})) == {9}
    assert cores_for(1, 2, TWO, [], frozenset({1, 2})) is None, "there is no choice"
    assert cores_for(0, 1, {}, [0], ALL) is None


def test_tasks_that_slurm_has_bound_are_left_alone() -> None:
    many = str(len(os.sched_getaffinity(0)) + 1)
    assert is_bound({"SLURM_CPUS_ON_NODE": many})
    assert not is_bound({"SLURM_CPUS_ON_NODE": many, "BIGTRAIN_LAUNCHER_PID": "1"})
    assert not is_bound({"SLURM_CPUS_ON_NODE": "1"})
    assert not is_bound({})


def test_all_threads_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one processor")
    half = {0: frozenset(allowed[:1]), 1: frozenset(allowed[1:])}
    monkeypatch.setattr(binding, "numa_nodes", lambda: half)
    child = os.fork()
    if child == 0:
        bind(1, 2, {})
        os._exit(os.sched_getaffinity(0) != half[1])
    assert os.waitpid(child, 0)[1] == 0
