"""Gradients in 4 bits to owners, what parameters lack in 8 bits back; errors go with the next.

An owner updates exact main parameters with any optimizer; what all ranks compute with follows them
by deltas, the same on all, whose errors stay in the difference of the two and take no memory. Of
gradients each rank keeps what was lost, 4 bytes for each element. Sources: error feedback
(https://arxiv.org/abs/1901.09847), 4-bit gradients with it (LoCo, https://arxiv.org/abs/2407.04480),
weight differences (SDP4Bit, https://arxiv.org/abs/2410.15526).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import (
    Pending,
    start_all_gather_into,
    start_all_to_all,
    start_reduce_scatter,
)
from bigtrain.comm.mesh import Axis
from bigtrain.comm.wire import Wire
from bigtrain.onebit.frame import Content, Frame
from bigtrain.ops.delta import delta_apply_, delta_pack_
from bigtrain.ops.message import per_element
from bigtrain.ops.op import Kernels
from bigtrain.ops.quantize import dequantize_mean, quantize_

GRADIENT_BITS, DELTA_BITS = 4, 8
DELTA_BLOCK = 1024  # elements of a scale: with 8 bits, smaller blocks gain nothing


class FeedbackWire:
    """A wire that loses something, and keeps what it has lost.

    Wire, of each element: 4 bits to the owner and a bf16 scale for each `block`, 8 bits back and
    one for each 1024; (n-1)/n of it, as an all_reduce of fp32 takes of 64. Buckets that are not
    compressed go by `plain`.

    resync_every: publishes of a bucket of which one is exact; 0: only where a run begins or saves.
    """

    keeps = True

    def __init__(
        self,
        plain: Wire,
        *,
        block: int = 256,
        resync_every: int = 500,
        kernels: Kernels = "auto",
    ) -> None:
        self.plain, self.block, self.resync_every = plain, block, resync_every
        self.kernels: Kernels = kernels
        self._errors: dict[int, torch.Tensor] = {}
        self._turns: dict[tuple[str, int], int] = {}  # messages of a bucket, both ways
        self._since: dict[int, int] = {}  # publishes since the one that was exact

    def bytes_per_element(self, bucket: Bucket) -> float:
        if not bucket.sharing.compressed:
            return self.plain.bytes_per_element(bucket)
        n = max(1, bucket.numel // bucket.sharing.inner.degree)
        return Frame("gradient", 0, 0, n, GRADIENT_BITS, self.block).size / n

    def bytes_of_update(self, bucket: Bucket) -> int:
        if not bucket.sharing.compressed or bucket.sharing.sharded_params:
            return 0
        degree = bucket.sharing.inner.degree
        n = bucket.numel // degree
        return degree * Frame("delta", 0, 0, n, DELTA_BITS, DELTA_BLOCK).size

    # -- gradients -----------------------------------------------------------------------------

    def leave(self, bucket: Bucket, axis: Axis) -> Pending[list[torch.Tensor]]:
        if not bucket.sharing.compressed:
            return self.plain.leave(bucket, axis)
        rows = bucket.open_grads().view(axis.degree, -1)
        bucket.clear_gaps()
        errors = self.errors(bucket).view(axis.degree, -1)
        frame = self._frame("gradient", bucket, rows.shape[1])
        messages = torch.empty(len(rows), frame.size, dtype=torch.uint8, device=rows.device)
        frame.begin(messages)
        for row, error, message in zip(rows, errors, messages, strict=True):
            self._quantize(frame, row, error, message)
        return start_all_to_all(messages, axis, f"all_to_all of {frame}")

    def _quantize(
        self, frame: Frame, row: torch.Tensor, error: torch.Tensor, message: torch.Tensor
    ) -> None:
        scales, codes = frame.open(message)
        quantize_(
            row,
            error,
            num_bits=frame.num_bits,
            block=frame.block,
            scale_dtype=scales.dtype,
            out=(scales, codes),
            kernels=self.kernels,
        )

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        if not bucket.sharing.compressed:
            self.plain.add_up(bucket, arrived, out, first=first)
            return
        # Buckets arrive in the order in which they left; of one, several may be on their way.
        turn = self._turns.get(("arrived", bucket.index), 0)
        self._turns["arrived", bucket.index] = turn + 1
        frame = Frame("gradient", bucket.index, turn, out.numel(), GRADIENT_BITS, self.block)
        for rank, message in zip(bucket.sharing.inner.ranks, arrived, strict=True):
            frame.check(message, rank)
        pairs = [frame.open(message) for message in arrived]
        total = dequantize_mean(
            torch.stack([codes for _, codes in pairs]),
            torch.stack([scales for scales, _ in pairs]),
            out.numel(),
            num_bits=frame.num_bits,
            block=frame.block,
            weight=1.0,
            out=out if first else None,
            kernels=self.kernels,
        )
        if not first:
            out.add_(total)

    # -- parameters ----------------------------------------------------------------------------

    def publish(self, bucket: Bucket, axis: Axis) -> Pending[torch.Tensor]:
        if not bucket.sharing.compressed:
            return self.plain.publish(bucket, axis)
        since = self._since.get(bucket.index, 0)
        self._since[bucket.index] = since + 1
        if since == 0 or (self.resync_every and since % self.resync_every == 0):
            bucket.shard.copy_(bucket.main_params)
            return self.plain.publish(bucket, axis)
        frame = self._frame("delta", bucket, bucket.shard.numel())
        shape = (axis.degree, frame.size)
        messages = torch.empty(shape, dtype=torch.uint8, device=bucket.params.device)
        own = messages[axis.rank]
        frame.begin(own[None])
        scales, codes = frame.open(own)
        delta_pack_(
            bucket.main_params,
            bucket.shard,
            num_bits=frame.num_bits,
            block=frame.block,
            scale_dtype=scales.dtype,
            out=(scales, codes),
            kernels=self.kernels,
        )
        _spread_nan(bucket.shard, scales, frame.block)
        pending = start_all_gather_into(messages, axis, f"all_gather of {frame}")
        return pending.then(lambda arrived: self._move(bucket, axis, frame, arrived))

    def _move(
        self, bucket: Bucket, axis: Axis, frame: Frame, arrived: torch.Tensor
    ) -> torch.Tensor:
        """Move the other owners' parameters as they have moved theirs."""
        rows = bucket.params.view(axis.degree, -1)
        for rank, (row, message) in enumerate(zip(rows, arrived, strict=True)):
            if rank != axis.rank:  # which delta_pack_ has moved
                frame.check(message, axis.ranks[rank])
                scales, codes = frame.open(message)
                delta_apply_(
                    row,
                    scales,
                    codes,
                    num_bits=frame.num_bits,
                    block=frame.block,
                    kernels=self.kernels,
                )
                _spread_nan(row, scales, frame.block)
        return bucket.params

    def _frame(self, content: Content, bucket: Bucket, n: int) -> Frame:
        """Return what the next message of a bucket is."""
        turn = self._turns.get((content, bucket.index), 0)
        self._turns[content, bucket.index] = turn + 1
        if content == "gradient":
            return Frame(content, bucket.index, turn, n, GRADIENT_BITS, self.block)
        return Frame(content, bucket.index, turn, n, DELTA_BITS, DELTA_BLOCK)

    # -- what is kept --------------------------------------------------------------------------

    def errors(self, bucket: Bucket) -> torch.Tensor:
        """Return what this rank's gradients have lost so far and not made good, [numel] fp32."""
        if bucket.index not in self._errors:
            self._errors[bucket.index] = torch.zeros(
                bucket.numel, dtype=torch.float32, device=bucket.params.device
            )
        return self._errors[bucket.index]

    def consolidate(self, bucket: Bucket) -> None:
        """Gather at each owner what ranks keep of its block; the next publish is exact.

        The sum over ranks is what matters for later sums, so it may be anywhere. Communicates a
        reduce-scatter of fp32.
        """
        if bucket.sharing.compressed:
            rows = self.errors(bucket).view(bucket.sharing.inner.degree, -1)
            what = f"reduce_scatter of what bucket {bucket.index} has lost"
            total = start_reduce_scatter(rows, bucket.sharing.inner, what).wait()
            self.restore(bucket, total.clone())

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        if not bucket.sharing.compressed:
            return None
        inner = bucket.sharing.inner
        return self.errors(bucket).view(inner.degree, -1)[inner.rank]

    def shrink(self, bucket: Bucket, factor: float) -> None:
        if bucket.sharing.compressed:
            self.errors(bucket).mul_(factor)

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        if not bucket.sharing.compressed:
            return
        inner = bucket.sharing.inner
        errors = self.errors(bucket).zero_()
        if kept is not None:
            errors.view(inner.degree, -1)[inner.rank].copy_(kept)
        self._since[bucket.index] = 0


def _spread_nan(params: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Let blocks whose scale is a NaN be NaN: main parameters have one there, for all to see."""
    bad = scales.isnan()
    if bad.any():
        params.masked_fill_(per_element(bad, params.numel(), block), torch.nan)
