"""ZeRO 1, 2 and 3 as answers to the three questions of GradientSync."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import (
    Chain,
    Pending,
    all_reduce,
    start_all_reduce,
)
from bigtrain.comm.mesh import Axis, Nodes
from bigtrain.comm.nodes import leaving, start_sum_on_node
from bigtrain.comm.sync import Passage
from bigtrain.comm.wire import Ledger, Wire
from bigtrain.zero.keeper import Keeper


class Sharded:
    """Each rank owns a block of every bucket: it updates that one, and holds its state alone.

    reduce: each rank sends every other the block that it owns; blocks are summed in fp32. (n-1)/n
    of the bucket's bytes per rank, in every microbatch where gradients are sharded (stages 2, 3),
    but not where the wire holds them until the last one. On nodes of several ranks, these first add
    up there what each sends across nodes. At most
    `in_flight` buckets are on their way at once, where ranks go through the model in one order.
    With an outer axis (hybrid sharding, parameters that stages share) owners of the same block then
    all-reduce it.
    publish: an all-gather, (n-1)/n of the parameters' bytes per rank; where parameters are sharded
    (stage 3), nothing, and an all-gather before each use.

    Of two hops, the second begins when the next bucket leaves, or the last one has: so each process
    group sees buckets in one order, in whatever order ranks come to use them.

    axis: data parallel, over which gradients are averaged; inner, outer: as in Sharing, but without
    stages; nodes: those of `inner`, for publishing. keeper: brings parameters where they are used.
    """

    def __init__(
        self,
        axis: Axis,
        inner: Axis,
        outer: Axis,
        nodes: Nodes,
        wire: Wire,
        keeper: Keeper,
        in_flight: int = 2,
    ) -> None:
        self.axis, self.inner, self.outer, self.nodes = axis, inner, outer, nodes
        self.wire, self.keeper, self.in_flight = wire, keeper, in_flight
        self._leaving: deque[tuple[Bucket, Pending[list[torch.Tensor]]]] = deque()
        self._beside: deque[tuple[Bucket, Pending[torch.Tensor]]] = deque()
        self._published: deque[Pending[torch.Tensor]] = deque()

    @property
    def ledger(self) -> Ledger:
        return self.wire

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        self.keeper.attach(model, buckets)

    def reduce(self, bucket: Bucket) -> None:
        while len(self._leaving) >= self.in_flight and self.keeper.orders.alike:
            self._arrive()
        if self.keeper.orders.alike:
            self._advance()
        self._leaving.append((bucket, self._leave(bucket)))
        if bucket.sharing.sharded_grads:
            bucket.grads = None  # what is on the wire holds its memory until it has left

    def _leave(self, bucket: Bucket) -> Pending[list[torch.Tensor]]:
        """Begin to send gradients: on the node, if there are several ranks, then across nodes."""
        nodes, grads = bucket.sharing.nodes, bucket.open_grads()
        bucket.clear_gaps()
        if nodes.node.degree == 1:
            return self._send(bucket, leaving(grads, nodes), last=bucket.last)
        summed, last = start_sum_on_node(grads, nodes, f"sum of bucket {bucket.index}"), bucket.last
        return Chain(summed, lambda rows: self._send(bucket, rows, last=last))

    def _send(
        self, bucket: Bucket, rows: torch.Tensor, *, last: bool
    ) -> Pending[list[torch.Tensor]]:
        across = bucket.sharing.nodes.across
        if not last and self.wire.hold(bucket, rows):
            return Pending((), "nothing", across, list)
        return self.wire.leave(bucket, rows, across)

    def _advance(self) -> None:
        for _, pending in self._leaving:
            pending.advance()

    def _arrive(self) -> None:
        """Add up this rank's block of the bucket that left first."""
        bucket, pending = self._leaving.popleft()
        rows, sharing, block = pending.wait(), bucket.sharing, bucket.main_grads
        if not rows:
            return  # they are held
        first = not bucket.collected
        if sharing.outer.degree == 1 and block.device == rows[0].device:
            self.wire.add_up(bucket, rows, block, first=first)
            bucket.collected = True
            return
        if sharing.sharded_grads or block.device != rows[0].device:
            block = torch.empty_like(block, device=rows[0].device)
        self.wire.add_up(bucket, rows, block, first=True)
        what = f"all_reduce of gradient bucket {bucket.index}"
        self._beside.append((bucket, start_all_reduce(block, sharing.outer, what)))
        # Another stage may come to its part of a tied bucket only after what this one sends next.
        if len(self._beside) > self.in_flight and self._beside[0][0].sharing.outer is self.outer:
            self._collect()

    def _collect(self) -> None:
        bucket, pending = self._beside.popleft()
        block = pending.wait()
        if block is not bucket.main_grads:
            add = bucket.main_grads.add_ if bucket.collected else bucket.main_grads.copy_
            add(block.to(bucket.main_grads.device))
        bucket.collected = True

    def finish(self) -> None:
        self._advance()
        while self._leaving:
            self._arrive()
        while self._beside:
            self._collect()

    def publish(self, bucket: Bucket) -> None:
        sharing = bucket.sharing
        if not sharing.sharded_params and sharing.inner.degree > 1:
            self.published()
            self._published.append(self.wire.publish(bucket, self.nodes))
            self.keeper.expect(bucket, self._published[-1])
            return
        bucket.round()
        if sharing.sharded_params:
            self.keeper.forget()

    def published(self) -> None:
        while self._published:
            self._published.popleft().advance()

    def settle(self) -> None:
        self.keeper.settle()

    def passage(self, kind: Passage, stage: int) -> AbstractContextManager[None]:
        return self.keeper.passage(kind, stage)

    def unsharded(self) -> AbstractContextManager[None]:
        return self.keeper.unsharded()

    def replica(self) -> tuple[int, int]:
        return self.outer.rank, self.outer.degree

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        all_reduce(value, self.inner, "all_reduce of what owners have computed")
        return value
