"""What a rank of a worker sends to servers and gets back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.sync import GradientSync, Passage
from bigtrain.comm.wire import Ledger
from bigtrain.errors import BigtrainError
from bigtrain.server.client import Client
from bigtrain.server.coding import Coding
from bigtrain.server.placement import place
from bigtrain.server.table import BlockSpec, Stretch, bytes_of, key_of


class Blocks:
    """The blocks that a rank of a worker owns in its worker, on their way to servers and back.

    Sends and receives by `client`, as number `rank` of the worker. push, pull: what gradients, and
    updates, look like on the way.
    """

    def __init__(
        self, buckets: Sequence[Bucket], client: Client, rank: int, push: Coding, pull: Coding
    ) -> None:
        self.buckets = [bucket for bucket in buckets if bucket.trained]
        self.client, self._rank, self._push, self._pull = client, rank, push, pull
        self._kept: dict[int, Any] = {}
        self._messages: dict[int, torch.Tensor] = {}
        self._versions: dict[int, int] = {}  # of each block that is here

    @property
    def exact(self) -> bool:
        """Do parameters come back whole?"""
        return self._pull.exact

    def key(self, bucket: Bucket) -> int:
        return key_of(self._rank, bucket.index)

    def fragment(self, bucket: Bucket) -> int:
        """Return which fragment a block is in: neighbours are in different ones."""
        return self.buckets.index(bucket) % self.client.fragments.count

    def meeting(self, after: int, until: int) -> list[Bucket]:
        """Return the blocks that servers have updated in the rounds after `after` until `until`."""
        meetings = self.client.fragments.meetings
        return [b for b in self.buckets if meetings(self.fragment(b), after, until)]

    def specs(self, hosts: Sequence[str], replicas: int, dtype: torch.dtype) -> list[BlockSpec]:
        """Return what servers must know of the blocks, and which of them hold each.

        hosts: of the servers. dtype: of the parameters that come back.

        Raises:
            BigtrainError: there are fewer blocks than fragments.
        """
        if len(self.buckets) < self.client.fragments.count:
            raise BigtrainError(
                f"server.fragments = {self.client.fragments.count}, and this rank has "
                f"{len(self.buckets)} bucket(s)",
                why="a fragment is whole buckets",
                mend="set a smaller parallel.bucket_mb, or fewer server.fragments",
            )
        sizes = [bucket.main_grads.numel() for bucket in self.buckets]
        names = [f"{self._rank}/{bucket.index}" for bucket in self.buckets]
        where = place(names, sizes, hosts, replicas)
        found = []
        for bucket, size, holders in zip(self.buckets, sizes, where, strict=True):
            begin = bucket.owned[0]
            stretches = tuple(
                Stretch(s.kind, s.num_replicas, s.start - begin, s.stop - begin)
                for s in sorted(bucket.segments(), key=lambda s: s.start)
            )
            name = str(dtype).removeprefix("torch.")
            fragment = self.fragment(bucket)
            spec = BlockSpec(self.key(bucket), size, name, holders, stretches, fragment)
            found.append(spec)
        return found

    def push(self, clock: int, bucket: Bucket, values: torch.Tensor) -> None:
        """Send `values` [n, fp32, on the CPU] of a block for round `clock`; they must stay as they
        are until the next turn. What is lost of them goes with the next."""
        if self._push.exact:
            self.client.push(clock, self.key(bucket), bytes_of(values))
            return
        if bucket.index not in self._messages:
            size = self._push.num_bytes(values.numel())
            self._messages[bucket.index] = torch.zeros(size, dtype=torch.uint8)
            self._kept[bucket.index] = self._push.keep(values.numel())
        message = self._messages[bucket.index]
        self._push.pack(values, self._kept[bucket.index], message)
        self.client.push(clock, self.key(bucket), bytes_of(message))

    def pull(
        self,
        version: int,
        into: Callable[[Bucket], torch.Tensor],
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        """Ask for blocks (all), of `version` or later, in the order of the next forward.

        into(bucket): where each goes; it must be as the last pull has left it.
        """
        order = list(reversed(self.buckets if buckets is None else buckets))
        wanted = [(self.key(b), 0, version, bytes_of(into(b))) for b in order]
        have = {self.key(b): v for b in order if (v := self._versions.get(b.index)) is not None}
        self.client.pull(wanted, None if self._pull.exact else have)

    @property
    def newest(self) -> int:
        """Return the newest version that a block is of."""
        return max(self._versions.values(), default=0)

    def wait(self, bucket: Bucket, into: torch.Tensor) -> int:
        """Return the version of a block that was asked for, once it is in its place."""
        version, steps = self.client.wait_pulled(self.key(bucket))
        if steps is not None:
            size = self._pull.num_bytes(into.numel())
            for message in torch.frombuffer(steps, dtype=torch.uint8).split(size):
                self._pull.move(into, message)
        self._versions[bucket.index] = version
        return version


class Pushing:
    """The strategy of ranks whose owners are servers.

    Around `inner`, the strategy among the ranks of one worker: each rank pushes the block of a
    bucket that it would update, as soon as it has the worker's sum of it, and pulls it back.
    reduce: what `inner` does, and then each owned element to each server that holds it; a rank that
    shares with no other pushes a bucket while backward still runs. publish: the parameters from
    one server, first what the next forward uses first, and what `inner` does.
    """

    def __init__(self, inner: GradientSync) -> None:
        self.inner, self.axis = inner, inner.axis
        self.buckets: list[Bucket] = []
        self._blocks: Blocks | None = None
        self._clock = 0  # the round that gradients are for
        self._pushed: set[int] = set()
        self._pulling: set[int] = set()
        self.version = 0  # of the parameters that are here, the oldest

    def connect(self, blocks: Blocks) -> None:
        """Send and receive by `blocks` from now on."""
        self._blocks = blocks

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
        assert self._blocks is not None
        self._pulling = {bucket.index for bucket in self.buckets}
        self._blocks.pull(version, self.pulled_into)

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
        if self._blocks is not None and self._clock and bucket.index not in self._pushed:
            self._pushed.add(bucket.index)
            self._blocks.push(self._clock, bucket, bucket.main_grads)

    def publish(self, bucket: Bucket) -> None:
        if bucket.index in self._pulling:
            assert self._blocks is not None
            came = self._blocks.wait(bucket, self.pulled_into(bucket))
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
