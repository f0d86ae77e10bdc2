"""Gradients to owners in few bits, what parameters lack in few bits back; errors go with the next.

An owner updates exact main parameters with any optimizer; what all ranks compute with follows them
by deltas, the same on all, whose errors stay in the difference of the two and take no memory. Of
gradients each rank keeps what was lost, 4 bytes for each element. Sources: error feedback
(https://arxiv.org/abs/1901.09847), 4-bit gradients with it (LoCo, https://arxiv.org/abs/2407.04480),
weight differences (SDP4Bit, https://arxiv.org/abs/2410.15526).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import (
    Pending,
    start_all_to_all,
    start_reduce_scatter,
)
from bigtrain.comm.mesh import Axis, Nodes
from bigtrain.comm.nodes import start_all_gather_by_nodes
from bigtrain.comm.wire import Agree, Averages, Wire
from bigtrain.onebit.codec import Codec, Kept
from bigtrain.onebit.frame import Content, Frame

SPIKE = 2.0  # times as much as before that a gradient may be divided by


class FeedbackWire:
    """A wire that loses something, and keeps what it has lost.

    up, down: what packs gradients, and updates. With 4 and 8 bits a rank sends (n-1)/n of 12 bits
    of each element and of their scales, where an all_reduce of fp32 sends it of 64. Buckets that
    are not compressed go by `plain`.

    resync_every: publishes of a bucket of which one is exact; 0: only where a run begins or saves.
    """

    keeps = True
    once_a_step = False

    def __init__(self, plain: Wire, up: Codec, down: Codec, *, resync_every: int = 500) -> None:
        self.plain, self.up, self.down, self.resync_every = plain, up, down, resync_every
        self._kept: dict[int, Kept] = {}
        self._turns: dict[tuple[str, int], int] = {}  # messages of a bucket, both ways
        self._since: dict[int, int] = {}  # publishes since the one that was exact
        self._divisor: float | None = None  # of the last gradient
        self._scale = 1.0  # of the losses, and so of what is kept

    def bytes_per_element(self, bucket: Bucket) -> float:
        if not bucket.sharing.compressed:
            return self.plain.bytes_per_element(bucket)
        n = max(1, bucket.numel // bucket.sharing.inner.degree)
        return self._framed("gradient", 0, 0, n).size / n

    def bytes_of_update(self, bucket: Bucket) -> int:
        exactly = self.plain.bytes_of_update(bucket)
        if not bucket.sharing.compressed or bucket.sharing.sharded_params:
            return exactly
        degree = bucket.sharing.inner.degree
        n = bucket.numel // degree
        return max(exactly, degree * self._framed("delta", 0, 0, n).size)

    def bytes_kept(self, bucket: Bucket) -> int:
        return self.kept_of(bucket).num_bytes if bucket.sharing.compressed else 0

    # -- gradients -----------------------------------------------------------------------------

    def hold(self, bucket: Bucket, rows: torch.Tensor) -> bool:
        """Keep them with what was lost: so, of several microbatches, only the last one is sent."""
        if not bucket.sharing.compressed:
            return self.plain.hold(bucket, rows)
        assert not self.once_a_step, "its gradients are whole before they leave"
        self.kept_of(bucket).values.add_(rows)
        return True

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        if not bucket.sharing.compressed:
            return self.plain.leave(bucket, rows, axis)
        return self.send("gradient", bucket, rows, axis)

    def send(
        self, content: Content, bucket: Bucket, rows: torch.Tensor, axis: Axis, gone: float = 1.0
    ) -> Pending[list[torch.Tensor]]:
        """Begin to send each rank its row of the gradients, packed; `gone` as in `Codec.pack`."""
        frame = self._frame(content, bucket, rows.shape[1])
        messages = frame.messages(len(rows), rows.device)
        pairs = [frame.open(message) for message in messages]
        self.up.pack(rows, self.kept_of(bucket), pairs, gone)
        return start_all_to_all(messages, axis, f"all_to_all of {frame}")

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        if not bucket.sharing.compressed:
            self.plain.add_up(bucket, arrived, out, first=first)
            return
        self.receive("gradient", bucket, arrived, out, 1.0, first=first)

    def receive(
        self,
        content: Content,
        bucket: Bucket,
        arrived: Sequence[torch.Tensor],
        out: torch.Tensor,
        weight: float,
        *,
        first: bool,
    ) -> None:
        """Let `out` be `weight` times the sum of what has arrived, or add it to `out`."""
        # Buckets arrive in the order in which they left; of one, several may be on their way.
        turn = self._turns.get(("arrived", bucket.index), 0)
        self._turns["arrived", bucket.index] = turn + 1
        frame = self._framed(content, bucket.index, turn, out.numel())
        across = bucket.sharing.nodes.across
        for rank, message in zip(across.ranks, arrived, strict=True):
            frame.check(message, rank)
        total = out if first else torch.empty_like(out)
        self.up.add_up([frame.open(message) for message in arrived], total, weight)
        if not first:
            out.add_(total)

    def squares(self, bucket: Bucket) -> torch.Tensor | None:
        return None

    def divided(self, buckets: Sequence[Bucket], divisor: float) -> None:
        """Shrink what is kept of a gradient that is divided by far more than the one before.

        Beside the steps around it, it is as much too long as the gradient was. With each small rise
        it must not shrink, since it never grows again.
        """
        if not math.isfinite(divisor):  # nothing is updated, and what was held is of no use
            for bucket in buckets:
                self.abandon(bucket)
            return
        before, self._divisor = self._divisor, divisor
        if before is not None and divisor > SPIKE * before:
            for bucket in buckets:
                if bucket.sharing.compressed:
                    self.kept_of(bucket).scale(before / divisor)

    def rescale(self, buckets: Sequence[Bucket], scale: float) -> None:
        factor, self._scale = scale / self._scale, scale
        if factor == 1.0:
            return
        for bucket in buckets:
            if bucket.sharing.compressed:
                self.kept_of(bucket).scale(factor)
        if self._divisor is not None:
            self._divisor *= factor

    # -- parameters ----------------------------------------------------------------------------

    def publish(self, bucket: Bucket, nodes: Nodes) -> Pending[torch.Tensor]:
        if not bucket.sharing.compressed:
            return self.plain.publish(bucket, nodes)
        if self._publishes_exactly(bucket):
            bucket.shard.copy_(bucket.main_params)
            return self.plain.publish(bucket, nodes)
        frame = self._frame("delta", bucket, bucket.shard.numel())
        [own] = frame.messages(1, bucket.params.device)
        self.down.follow(bucket.main_params, bucket.shard, frame.open(own))
        pending = start_all_gather_by_nodes(own, nodes, f"all_gather of {frame}")
        return pending.then(lambda arrived: self._move(bucket, nodes.whole, frame, arrived))

    def _publishes_exactly(self, bucket: Bucket) -> bool:
        since = self._since.get(bucket.index, 0)
        self._since[bucket.index] = since + 1
        return since == 0 or (self.resync_every > 0 and since % self.resync_every == 0)

    def _move(
        self, bucket: Bucket, axis: Axis, frame: Frame, arrived: torch.Tensor
    ) -> torch.Tensor:
        """Move the other owners' parameters as they have moved theirs."""
        rows = bucket.params.view(axis.degree, -1)
        for rank, (row, message) in enumerate(zip(rows, arrived, strict=True)):
            if rank != axis.rank:  # which `follow` has moved
                frame.check(message, axis.ranks[rank])
                self.down.move(row, frame.open(message))
        return bucket.params

    def _frame(self, content: Content, bucket: Bucket, n: int) -> Frame:
        """Return what the next message of a bucket is."""
        way = "delta" if content == "delta" else "gradient"
        turn = self._turns.get((way, bucket.index), 0)
        self._turns[way, bucket.index] = turn + 1
        return self._framed(content, bucket.index, turn, n)

    def _framed(self, content: Content, index: int, turn: int, n: int) -> Frame:
        codec = self.down if content == "delta" else self.up
        return Frame(content, index, turn, codec.count(n), codec.num_bits, codec.block)

    # -- what is kept --------------------------------------------------------------------------

    def kept_of(self, bucket: Bucket) -> Kept:
        """Return what this rank keeps of a bucket, a row for each owner that it sends to."""
        if bucket.index not in self._kept:
            n, device = bucket.numel // bucket.sharing.inner.degree, bucket.params.device
            nodes = bucket.sharing.nodes.across.degree
            self._kept[bucket.index] = self.up.keep(nodes, n, device)
        return self._kept[bucket.index]

    def errors(self, bucket: Bucket) -> torch.Tensor:
        """Return what was lost so far of what this rank sends and not made good, flat, in fp32."""
        return self.up.residual(self.kept_of(bucket)).view(-1)

    def total_errors(self, bucket: Bucket) -> torch.Tensor:
        """Return what all ranks together keep of this rank's block, [n]; a reduce-scatter."""
        across = bucket.sharing.nodes.across
        rows = self.errors(bucket).view(across.degree, -1)
        what = f"reduce_scatter of what bucket {bucket.index} has lost"
        return start_reduce_scatter(rows, across, what).wait()

    def consolidate(self, bucket: Bucket) -> None:
        """Gather at each owner what ranks keep of its block; the next publish is exact.

        The sum over ranks is what matters for later sums, so it may be anywhere. Communicates a
        reduce-scatter of fp32.
        """
        if bucket.sharing.compressed:
            self.restore(bucket, self.total_errors(bucket) / self._scale)

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        if not bucket.sharing.compressed:
            return None
        across = bucket.sharing.nodes.across
        mine = self.errors(bucket).view(across.degree, -1)[across.rank]
        return mine if self._scale == 1.0 else mine / self._scale

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        if not bucket.sharing.compressed:
            return
        self._divisor = None
        mine = self.kept_of(bucket)
        mine.set(0.0)
        if kept is not None:
            mine.values[bucket.sharing.nodes.across.rank].copy_(kept).mul_(self._scale)
        self._since[bucket.index] = 0

    def abandon(self, bucket: Bucket) -> None:
        """Drop all that is kept: a part is of the step that must not count."""
        self.restore(bucket, None)

    # -- as all go on --------------------------------------------------------------------------

    def updated_by(self, averages: Averages) -> None:
        """Any optimizer will do."""

    def review(
        self, buckets: Sequence[Bucket], everybody: Agree, device: torch.device, *, stepped: bool
    ) -> None:
        """There is nothing to decide."""

    @property
    def progress(self) -> dict[str, Any] | None:
        return None

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        pass
