"""Which servers and workers of a run are on which nodes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.config.serving import ServerSection
from bigtrain.errors import PlanError


@dataclass(frozen=True)
class Seats:
    """The nodes of each worker, and the node of each server."""

    workers: tuple[tuple[str, ...], ...]
    servers: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, those of workers first."""
        of_workers = [node for nodes in self.workers for node in nodes]
        return tuple(dict.fromkeys([*of_workers, *self.servers]))

    @property
    def nodes_per_worker(self) -> int:
        return len(self.workers[0])

    @property
    def most_workers(self) -> int:
        """Workers on the node that has most of them."""
        return max(sum(node in nodes for nodes in self.workers) for node in self.nodes)

    def slot(self, worker: int) -> int:
        """Return how many workers before that one are on its node."""
        return self.workers[:worker].count(self.workers[worker])

    def processes(self, node: str, ranks_per_node: int) -> int:
        """Return how many processes share the processors of a node."""
        workers = sum(node in nodes for nodes in self.workers)
        return workers * ranks_per_node + self.servers.count(node)


def seat(server: ServerSection, nodes: Sequence[str], apart: Sequence[str] = ()) -> Seats:
    """Return who is where: workers on `nodes` in order, servers on those apart, or among workers.

    Raises:
        PlanError: workers cannot have equally many nodes.
    """
    count = server.workers
    each = server.nodes_per_worker(len(nodes))
    if len(nodes) > count and len(nodes) % count:
        raise PlanError(
            f"{count} workers cannot share {len(nodes)} nodes: {len(nodes)} / {count} = "
            f"{len(nodes) / count:.2f}",
            why="a worker is on one node, or on as many as the others",
            mend=f"set server.workers to {len(nodes)}, or take {len(nodes) // count * count} nodes"
            + ("" if apart else " (and the others for servers: server.hosts)"),
        )
    first = [i * each if each > 1 else i * len(nodes) // count for i in range(count)]
    return Seats(
        workers=tuple(tuple(nodes[i : i + each]) for i in first),
        servers=_far_apart(server.servers, apart or nodes),
    )


def _far_apart(count: int, nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes of servers: the end of one node takes few of them along."""
    if count >= len(nodes):
        return tuple(nodes[i % len(nodes)] for i in range(count))
    return tuple(nodes[i * len(nodes) // count] for i in range(count))
