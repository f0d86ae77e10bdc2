"""A worker's gradients go to servers, whatever the ranks of the worker do among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.sync import GradientSync, Passage
from bigtrain.comm.wire import Ledger
from bigtrain.server.client import Client
from bigtrain.server.placement import place
from bigtrain.server.table import BlockSpec, Stretch, bytes_of, key_of


class Pushing:
    """The strategy of ranks whose owners are servers.

    Around `inner`, the strategy among the ranks of one worker: each rank pushes the block of a
    bucket that it would update, as soon as it has the worker's sum of it, and pulls it back.
    reduce: what `inner` does, and then 4 bytes of each owned element to each server that holds it;
    a rank that shares with no other pushes a bucket while backward still runs. publish: the bytes
    of the parameters from one server, first what the next forward uses first, and what `inner`
    does.
    """

    def __init__(self, inner: GradientSync) -> None:
        self.inner, self.axis = inner, inner.axis
        self.buckets: list[Bucket] = []
        self._client: Client | None = None
        self._rank = 0
        self._clock = 0  # the round that gradients are for
        self._pushed: set[int] = set()
        self._pulling: set[int] = set()
        self.version = 0  # of the parameters that are here, the oldest

    def connect(self, client: Client, rank: int) -> None:
        """Send and receive by `client` from now on, as this rank of the worker."""
        self._client, self._rank = client, rank

    def specs(self, servers: int, replicas: int) -> list[BlockSpec]:
        """Return the blocks of this rank, and which servers hold them."""
        sizes = [bucket.main_grads.numel() for bucket in self.buckets]
        names = [f"{self._rank}/{bucket.index}" for bucket in self.buckets]
        found = []
        for bucket, size, where in zip(
            self.buckets, sizes, place(names, sizes, servers, replicas), strict=True
        ):
            begin = bucket.owned[0]
            stretches = tuple(
                Stretch(s.kind, s.num_replicas, s.start - begin, s.stop - begin)
                for s in sorted(bucket.segments(), key=lambda s: s.start)
            )
            dtype = str(self.pulled_into(bucket).dtype).removeprefix("torch.")
            found.append(BlockSpec(self.key(bucket), size, dtype, where, stretches))
        return found

    def key(self, bucket: Bucket) -> int:
        return key_of(self._rank, bucket.index)

    @staticmethod
    def pulled_into(bucket: Bucket) -> torch.Tensor:
        """Return what is to be as the servers' parameters of a block: what ranks compute with."""
        return bucket.main_params if bucket.low_params is None else bucket.low_params

    def begin(self, clock: int) -> None:
        """Push what comes from now on for round `clock`."""
        self._clock = clock
        self._pushed.clear()

    def pull(self, version: int) -> None:
        """Ask for all parameters, of `version` or later; `publish` waits for them."""
        assert self._client is not None
        order = list(reversed(self.buckets))  # that of the next forward
        self._pulling = {bucket.index for bucket in order}
        self._client.pull([(self.key(b), 0, version, bytes_of(self.pulled_into(b))) for b in order])

    # -- as a strategy -------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger | None:
        return self.inner.ledger

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        self.buckets = [bucket for bucket in buckets if bucket.trained]
        self.inner.attach(model, buckets)

    def reduce(self, bucket: Bucket) -> None:
        self.inner.reduce(bucket)
        if bucket.axis.degree == 1 and bucket.sharing.inner.degree == 1:
            self._push(bucket)

    def finish(self) -> None:
        self.inner.finish()
        for bucket in self.buckets:
            self._push(bucket)

    def _push(self, bucket: Bucket) -> None:
        if self._client is not None and self._clock and bucket.index not in self._pushed:
            self._pushed.add(bucket.index)
            self._client.push(self._clock, self.key(bucket), bytes_of(bucket.main_grads))

    def publish(self, bucket: Bucket) -> None:
        if bucket.index in self._pulling:
            assert self._client is not None
            came = self._client.wait_pulled(self.key(bucket))
            first = len(self._pulling) == len(self.buckets)
            self.version = came if first else min(came, self.version)
            self._pulling.discard(bucket.index)
            bucket.rounded = True
        self.inner.publish(bucket)

    def published(self) -> None:
        self.inner.published()

    def settle(self) -> None:
        self.inner.settle()

    def passage(self, kind: Passage, stage: int) -> AbstractContextManager[None]:
        return self.inner.passage(kind, stage)

    def unsharded(self) -> AbstractContextManager[None]:
        return self.inner.unsharded()

    def replica(self) -> tuple[int, int]:
        return self.inner.replica()

    def sum_over_owners(self, value: torch.Tensor) -> torch.Tensor:
        return self.inner.sum_over_owners(value)
