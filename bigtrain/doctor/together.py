"""What nodes measure with each other: every link, both ways, and an all-reduce of all ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from bigtrain.comm.collectives import explained
from bigtrain.doctor.findings import expected_gbit, is_slow_all_reduce, late_links, slow_links
from bigtrain.doctor.measured import AllReduce, Link, Measured
from bigtrain.doctor.ranks import Ranks

_FEW_NODES = 4  # up to here one pair at a time; else as many as are disjoint
_QUICK_ROUNDS = 8
_MOST_SUSPECTS = 32
_PINGS, _TIMES = 20, 3
_PROBE_BYTES = 256 << 10
_MOST_BYTES = 64 << 20
_AGAIN = 2  # times that what looks slow is measured anew: a fault stays, a disturbance goes

Pair = tuple[int, int]


def rounds_of(num_nodes: int, quick: bool) -> list[list[Pair]]:
    """Return who measures with whom, round by round: each pair once, in a round each node once.

    Of few nodes, one pair a round. `quick` leaves out rounds of many nodes.
    """
    places = list(range(num_nodes + num_nodes % 2))  # the one too many has nobody
    rounds = []
    for _ in range(len(places) - 1):
        facing = zip(places, reversed(places[len(places) // 2 :]), strict=False)
        rounds.append([(min(p), max(p)) for p in facing if max(p) < num_nodes])
        places = [places[0], places[-1], *places[1:-1]]
    if num_nodes <= _FEW_NODES:
        return [[pair] for some in rounds for pair in some]
    return rounds[:_QUICK_ROUNDS] if quick else rounds


def measure_links(ranks: Ranks, quick: bool) -> list[Link]:
    """Return every link between two nodes, measured by their first ranks. Collective."""
    links: dict[Pair, Link] = {}
    if ranks.num_nodes < 2:
        return []
    _run(ranks, rounds_of(ranks.num_nodes, quick), quick, links)
    for _ in range(_AGAIN):
        found = list(links.values())
        again = {_pair(link) for link in (*slow_links(found), *late_links(found))}
        if not 0 < len(again) <= _MOST_SUSPECTS:
            break
        _run(ranks, [[pair] for pair in sorted(again)], quick, links)
    return [links[key] for key in sorted(links)]


def _pair(link: Link) -> Pair:
    return min(link.source, link.target), max(link.source, link.target)


def _run(ranks: Ranks, rounds: list[list[Pair]], quick: bool, links: dict[Pair, Link]) -> None:
    """Measure the pairs of each round, and keep of each link the best that was seen."""
    own = []
    for pairs in rounds:
        ranks.meet()
        for pair in pairs:
            if ranks.is_first and ranks.me.node_rank in pair:
                own += _measure_pair(ranks, pair, 0.03 if quick else 0.1)
    for new in (link for some in ranks.gather(own) for link in some):
        key = new.source, new.target
        before = links.get(key, new)
        links[key] = Link(
            *key,
            max(before.gbit_per_second, new.gbit_per_second),
            min(before.latency_seconds, new.latency_seconds),
        )


def _measure_pair(ranks: Ranks, pair: Pair, seconds: float) -> list[Link]:
    """Measure both ways of a pair, one after the other; return the link that this node sends by."""
    found = []
    for source, target in (pair, pair[::-1]):
        if ranks.me.node_rank == source:
            latency, gbit = _send_all(ranks, ranks.first_of(target), seconds)
            found.append(Link(source, target, gbit, latency))
        else:
            _receive_all(ranks, ranks.first_of(source))
    return found


def _send_all(ranks: Ranks, peer: int, seconds: float) -> tuple[float, float]:
    """Return the latency in seconds and the Gbit/s to a rank, the best of several messages.

    A message is as long as what goes over in about `seconds`, and counts once it is acknowledged.
    """
    _timed(ranks, peer, 8)  # the connection is made
    latency = min(_timed(ranks, peer, 8) for _ in range(_PINGS)) / 2
    probe = min(_timed(ranks, peer, _PROBE_BYTES) for _ in range(2))
    size = min(max(int(_PROBE_BYTES * seconds / probe), _PROBE_BYTES), _MOST_BYTES)
    best = min(_timed(ranks, peer, size) for _ in range(_TIMES))
    ranks.send(torch.zeros(1, dtype=torch.int64, device=ranks.carrier), peer)
    return latency, size * 8 / 1e9 / best


def _timed(ranks: Ranks, peer: int, size: int) -> float:
    """Return the seconds from a message of so many bytes until it is acknowledged."""
    header = torch.tensor([size], dtype=torch.int64).to(ranks.carrier)
    message = torch.zeros(size, dtype=torch.uint8, device=ranks.carrier)
    ranks.send(header, peer)
    ranks.receive(header, peer)  # it is ready
    began = time.perf_counter()
    ranks.send(message, peer)
    ranks.receive(header, peer)
    return time.perf_counter() - began


def _receive_all(ranks: Ranks, peer: int) -> None:
    header = torch.zeros(1, dtype=torch.int64, device=ranks.carrier)
    while size := int(ranks.receive(header, peer)):
        message = torch.empty(size, dtype=torch.uint8, device=ranks.carrier)
        ranks.send(header, peer)
        ranks.receive(message, peer)
        ranks.send(header, peer)


def measure_all_reduce(ranks: Ranks, measured: Measured, quick: bool) -> AllReduce | None:
    """Return the best all-reduce of all ranks, or None of a rank alone. Collective.

    It is of 64 MiB on GPUs, else of 16 MiB, and of less where the slowest of the links measured
    would need more than a second for it.
    """
    if ranks.wire is None:
        return None
    size = (64 if ranks.carrier.type == "cuda" else 16) << 20
    size = size // 4 if quick else size
    least = expected_gbit(measured)
    if least is not None:
        size = min(size, max(1 << 20, int(least * 1e9 / 8 / 4)))
    best = float("inf")
    for _ in range(1 + _AGAIN):
        best = min(best, *(_all_reduce_seconds(ranks, size // 4) for _ in range(1 + _TIMES)))
        best = min(ranks.gather(best))  # the same for all, as is what follows from it
        found = AllReduce(size, ranks.me.world_size, best)
        if not is_slow_all_reduce(
            Measured(measured.nodes, measured.devices, measured.links, found)
        ):
            break
    return found


def _all_reduce_seconds(ranks: Ranks, numel: int) -> float:
    tensor = torch.zeros(numel, device=ranks.carrier)
    ranks.meet()
    began = time.perf_counter()
    with explained("an all-reduce", ranks.everyone):
        dist.all_reduce(tensor, group=ranks.wire)
    if ranks.carrier.type == "cuda":
        torch.cuda.synchronize(ranks.carrier)
    return time.perf_counter() - began
