"""How gradients leave a rank, what the rank updates, and how new parameters come back.

Every data-parallel technique is an answer to the three questions of GradientSync. The gradient
path calls them; the trainer and the optimizer do not know which one answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending, start_all_reduce
from bigtrain.comm.mesh import Axis
from bigtrain.comm.wire import Ledger

Passage = Literal["forward", "backward", "inputs", "weights", "evaluation"]


class GradientSync(Protocol):
    """A strategy of data parallelism, asked bucket by bucket.

    What a rank owns of a bucket, the bucket knows (`Bucket.sharing`). All ranks of its axis call
    `reduce` and `publish` for the same buckets in the same order. A bucket says itself over which
    ranks it is summed: those of the data-parallel axis, and for parameters that several pipeline
    stages share, those of all these stages.
    """

    axis: Axis

    @property
    def ledger(self) -> Ledger | None:
        """What is kept of buckets between steps, if there may be anything."""

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        """Begin to look after `buckets`, which are all that there are, frozen ones too."""

    def reduce(self, bucket: Bucket) -> None:
        """Begin to sum `bucket.grads` over its axis; called while backward still runs."""

    def finish(self) -> None:
        """Return when `main_grads` of every reduced bucket has its sum."""

    def publish(self, bucket: Bucket) -> None:
        """Begin to give every rank the new parameters, from the owners' main parameters."""

    def published(self) -> None:
        """Take note that the buckets of this step are published, on all ranks alike."""

    def settle(self) -> None:
        """Return when everything that was published has arrived."""

    def passage(self, kind: Passage, stage: int) -> AbstractContextManager[None]:
        """Surround what computes with parameters of `stage`: one forward, one backward."""

    def unsharded(self) -> AbstractContextManager[None]:
        """Have all parameters whole inside; all ranks of the axis enter it together."""

    def replica(self) -> tuple[int, int]:
        """Return (number of this rank, how many) among the ranks that own the same elements."""

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the axis of what each owner computed from the elements it owns."""


class Replicated:
    """Every rank holds and updates everything (ZeRO-0).

    reduce: one asynchronous all-reduce of the bucket in fp32, 2(n-1)/n of its bytes per rank.
    publish: nothing on the wire.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.ledger: Ledger | None = None
        self._pending: list[Pending[torch.Tensor]] = []

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        assert all(bucket.sharing.inner.degree == 1 for bucket in buckets)

    def reduce(self, bucket: Bucket) -> None:
        what = f"all_reduce of gradient bucket {bucket.index}"
        self._pending.append(start_all_reduce(bucket.main_grads, bucket.axis, what))

    def finish(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def publish(self, bucket: Bucket) -> None:
        bucket.round()

    def published(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def passage(self, kind: Passage, stage: int) -> AbstractContextManager[None]:
        return nullcontext()

    def unsharded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def replica(self) -> tuple[int, int]:
        return self.axis.rank, self.axis.degree

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        return value  # everyone owns everything, and has computed it
