"""Collectives in two hops: inside a node, and across nodes among ranks of the same place there.

What leaves a node has been added up there, and what comes is passed on there. So a node sends, and
each rank keeps for what it sends, a part as large as it is beside all of the node. Ranks own rows
in the order of the whole axis: of nodes one after the other. Where each rank is a node of its own
all is one hop, as without nodes.
"""

from __future__ import annotations

import torch

from bigtrain.comm.collectives import (
    Chain,
    Pending,
    start_all_gather,
    start_all_gather_into,
    start_reduce_scatter,
)
from bigtrain.comm.mesh import Nodes


def leaving(flat: torch.Tensor, nodes: Nodes) -> torch.Tensor:
    """Return the rows of `flat` that this rank sends across nodes, [across.degree, n]: a view."""
    return _by_owner(flat, nodes)[:, nodes.node.rank]


def start_sum_on_node(flat: torch.Tensor, nodes: Nodes, what: str) -> Pending[torch.Tensor]:
    """Begin to add up, over this rank's node, the rows that are `leaving`; the result is these.

    Wire: (l-1)/l of the bytes of `flat` per rank of l on a node, and nothing across nodes.
    """
    if nodes.node.degree == 1:
        return Pending((), what, nodes.node, lambda: leaving(flat, nodes))
    by_place = _by_owner(flat, nodes).transpose(0, 1).contiguous()
    pending = start_reduce_scatter(by_place, nodes.node, f"{what} on a node")
    return pending.then(lambda total: leaving(flat, nodes).copy_(total))


def start_all_gather_by_nodes(
    own: torch.Tensor, nodes: Nodes, what: str, out: torch.Tensor | None = None
) -> Pending[torch.Tensor]:
    """Begin to collect the tensors [n] of all ranks, of one size; the result is [degree, n].

    That is `out`, if given, where this rank's own is in its place already. Wire: of m nodes, m-1
    times the bytes of `own` per rank across nodes, then m(l-1) times among l ranks on a node.
    """
    whole, node, across = nodes.whole, nodes.node, nodes.across
    if node.degree == 1:
        if out is None:
            return start_all_gather(own, whole, what)
        return start_all_gather_into(out, whole, what)
    by_place = own.new_empty(node.degree, across.degree, own.numel())
    by_place[node.rank, across.rank].copy_(own)
    first = start_all_gather_into(by_place[node.rank], across, what)
    second = Chain(first, lambda _: start_all_gather_into(by_place, node, f"{what} on a node"))

    def in_order(arrived: torch.Tensor) -> torch.Tensor:
        rows = arrived.new_empty(whole.degree, own.numel()) if out is None else out
        _by_owner(rows.view(-1), nodes).copy_(arrived.transpose(0, 1))
        return rows

    return second.then(in_order)


def _by_owner(flat: torch.Tensor, nodes: Nodes) -> torch.Tensor:
    """Return what is of each owner: [nodes, places on a node, n], a view."""
    return flat.view(nodes.across.degree, nodes.node.degree, -1)
