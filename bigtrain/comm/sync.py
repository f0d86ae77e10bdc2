"""How gradients leave a rank, what the rank updates, and how new parameters come back.

Every data-parallel technique is an answer to the three questions of GradientSync. The gradient
path calls them; the trainer and the optimizer do not know which one answers.
"""

from __future__ import annotations

from typing import Protocol

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending, start_all_reduce
from bigtrain.comm.mesh import Axis


class GradientSync(Protocol):
    """A strategy of data parallelism, asked bucket by bucket.

    All ranks of the axis call `reduce` for the same buckets in the same order. A bucket says itself
    over which ranks it is summed: those of the axis, and for parameters that several pipeline
    stages share, those of all these stages.
    """

    axis: Axis

    def reduce(self, bucket: Bucket) -> None:
        """Begin to sum `bucket.main_grads` over its axis; called while backward still runs."""

    def finish(self) -> None:
        """Return when the owned part of every reduced bucket holds its sum."""

    def owned(self, bucket: Bucket) -> tuple[int, int]:
        """Return [start, stop) of the elements of `bucket` that this rank updates."""

    def publish(self, bucket: Bucket) -> None:
        """Give every rank of the axis the new `bucket.params`, from the owners' main parameters."""

    def replica(self) -> tuple[int, int]:
        """Return (number of this rank, how many) among the ranks that own the same elements."""

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the axis of what each owner computed from the elements it owns."""


class Replicated:
    """Every rank holds and updates everything (ZeRO-0).

    reduce: one asynchronous all-reduce of the bucket in fp32, 2(n-1)/n of its bytes per rank.
    owned: the whole bucket. publish: nothing on the wire.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._pending: list[Pending] = []

    def reduce(self, bucket: Bucket) -> None:
        what = f"all_reduce of gradient bucket {bucket.index}"
        self._pending.append(start_all_reduce(bucket.main_grads, bucket.axis, what))

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def owned(self, bucket: Bucket) -> tuple[int, int]:
        return 0, bucket.numel

    def publish(self, bucket: Bucket) -> None:
        bucket.round()

    def replica(self) -> tuple[int, int]:
        return self.axis.rank, self.axis.degree

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        return value  # everyone owns everything, and has computed it
