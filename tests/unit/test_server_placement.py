"""Which servers hold a block: all who know the same blocks come to the same answer."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from unit_helpers import ROOT

from bigtrain.server.placement import place

HERE = ["here"]  # a host of servers


def loads(
    placed: list[tuple[int, ...]], sizes: list[int], servers: int
) -> tuple[list[int], list[int]]:
    """Return how many elements each server holds, and for how many it answers."""
    held, answers = [0] * servers, [0] * servers
    for chosen, size in zip(placed, sizes, strict=True):
        answers[chosen[0]] += size
        for server in chosen:
            held[server] += size
    return held, answers


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("blocks", [80, 97])
def test_equal_blocks_are_shared_out_evenly(servers: int, replicas: int, blocks: int) -> None:
    """To ten percent of what each would have, or to a block."""
    names, sizes = [f"blocks.{i}" for i in range(blocks)], [1000] * blocks
    copies = min(replicas, servers)
    for load, mean in zip(
        loads(place(names, sizes, HERE * servers, replicas), sizes, servers),
        (sum(sizes) * copies / servers, sum(sizes) / servers),
        strict=True,
    ):
        assert all(abs(one - mean) <= max(0.1 * mean, 1000) for one in load), load


def test_uneven_blocks_are_shared_out_evenly() -> None:
    """As those of a model: a large embedding, and what is in each layer."""
    sizes = [4_000_000] + [1_600_000, 800_000, 2_000, 50] * 24
    names = [f"b{i}" for i in range(len(sizes))]
    for replicas in (1, 2):
        held, answers = loads(place(names, sizes, HERE * 4, replicas), sizes, 4)
        for load in (held, answers):
            assert max(load) <= 1.1 * sum(load) / 4


@pytest.mark.parametrize("servers", [1, 2, 3, 7])
@pytest.mark.parametrize("replicas", [1, 2, 3, 9])
def test_copies_are_on_different_servers(servers: int, replicas: int) -> None:
    """More copies than servers are as many as there are servers."""
    rng = random.Random(servers)
    sizes = [rng.randrange(0, 10_000) for _ in range(50)]
    placed = place([f"b{i}" for i in range(50)], sizes, HERE * servers, replicas)
    for chosen in placed:
        assert len(set(chosen)) == len(chosen) == min(servers, replicas)
        assert set(chosen) <= set(range(servers))


@pytest.mark.parametrize("servers_of", [(2, 2), (1, 1, 1), (3, 1), (1, 2, 3)])
@pytest.mark.parametrize("replicas", [2, 3])
def test_copies_are_on_different_hosts(servers_of: tuple[int, ...], replicas: int) -> None:
    """As far as there are so many; each server of a host has its share."""
    hosts = [f"host {i}" for i, number in enumerate(servers_of) for _ in range(number)]
    sizes = [1000] * 60
    placed = place([f"b{i}" for i in range(60)], sizes, hosts, replicas)
    for chosen in placed:
        assert len(set(chosen)) == len(chosen) == min(len(hosts), replicas)
        assert len({hosts[server] for server in chosen}) == min(len(servers_of), replicas)
    held, _ = loads(placed, sizes, len(hosts))
    for host in set(hosts):
        each = [number for number, its in zip(held, hosts, strict=True) if its == host]
        assert max(each) - min(each) <= 1000


def test_the_order_of_blocks_does_not_matter() -> None:
    rng = random.Random(3)
    blocks = [(f"b{i}", rng.choice([10, 100, 1000])) for i in range(60)]
    asked = {}
    for _ in range(5):
        rng.shuffle(blocks)
        names, sizes = [name for name, _ in blocks], [size for _, size in blocks]
        asked[tuple(sorted(zip(names, place(names, sizes, HERE * 5, 2), strict=True)))] = True
    assert len(asked) == 1


def test_other_processes_come_to_the_same_answer() -> None:
    """Whatever the seed of their own hashes."""
    script = (
        "from bigtrain.server.placement import place;"
        "print(place([f'b{i}' for i in range(40)], [100] * 40, ['here'] * 5, 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(place([f"b{i}" for i in range(40)], [100] * 40, HERE * 5, 2))


def test_no_blocks() -> None:
    assert place([], [], HERE * 3, 2) == []
