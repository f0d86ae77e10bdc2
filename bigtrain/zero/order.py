"""In which order ranks gather what is sharded: the same on all of them, whatever each computes.

An all-gather needs all ranks of its axis, but data may lead each of them through the model in its
own way. The first time that ranks go through it they agree, before each gather, on what to gather.
What came of that is the order of all later times: who needs something earlier gathers up to it, and
who did not need something takes part nevertheless.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

import torch

from bigtrain.comm.collectives import start_all_gather
from bigtrain.comm.mesh import Axis
from bigtrain.comm.sync import Passage
from bigtrain.errors import BigtrainError

CARRIED = 2  # buckets gathered last, which the next passage begins with
NOTHING = -1
Key = tuple[Passage, int, tuple[int, ...]]


class Gatherer(Protocol):
    """Who gathers, as a journey sees it: buckets by their index."""

    def is_here(self, index: int) -> bool:
        """Is the bucket whole, or about to be?"""

    def gather(self, index: int) -> bool:
        """Begin to make it whole; say if it was not."""

    def arrive(self, index: int) -> None:
        """Return when it is whole."""

    def give_up(self, index: int) -> None:
        """Give it up, if nobody uses it here."""


class Orders:
    """The orders that are known: one for each kind of passage, stage, and what was here before.

    alike: whenever ranks agreed, all wanted the same. Where they do not, none may wait for another
    but in a gather: the other may wait for this one to gather.
    """

    def __init__(self, axis: Axis, device: torch.device, prefetch: int, agreed: bool) -> None:
        self.axis, self.device, self.prefetch, self.agreed = axis, device, prefetch, agreed
        self.known: dict[Key, list[int]] = {}
        self.carry: tuple[int, ...] = ()  # what the passage before has left, on all ranks alike
        self.alike = True

    def begin(
        self,
        kind: Passage,
        stage: int,
        buckets: Sequence[int],
        gatherer: Gatherer,
        *,
        keeps_all: bool,
    ) -> Journey:
        """Return the passage that begins; `buckets` are those that it may need."""
        key = kind, stage, self.carry
        return Journey(self, key, buckets, gatherer, keeps_all=keeps_all)


class Journey:
    """One passage, on one rank.

    stays: buckets that are not given up on the way. keeps_all: none is, until the next passage.
    """

    def __init__(
        self,
        orders: Orders,
        key: Key,
        buckets: Sequence[int],
        gatherer: Gatherer,
        *,
        keeps_all: bool,
    ) -> None:
        self.orders, self.key, self.buckets, self.keeps_all = orders, key, buckets, keeps_all
        self._gatherer = gatherer
        self._plan = None if orders.agreed else orders.known.get(key)
        self._next = 0
        self._log: list[int] = []
        self._ahead: set[int] = set()  # gathered, and not needed yet
        self._kept: set[int] = set()  # were here when the plan had them gathered again
        self.stays: frozenset[int] = frozenset()
        if self._plan is not None and key[0] != "evaluation":
            last = dict.fromkeys(reversed([*key[2], *self._plan]))
            self.stays = frozenset(list(last)[:CARRIED])
            self._plan = _without_repeats(self._plan, self.stays, key[2])

    def go_to(self, bucket: int) -> None:
        """Return when the gather of `bucket` has begun, if it was not here; look ahead.

        Raises:
            BigtrainError: it was given up, and is not in the order again.
        """
        self._ahead.discard(bucket)
        if self._plan is None:
            while not self._gatherer.is_here(bucket):
                self._agree(bucket)
            return
        while not self._gatherer.is_here(bucket):
            if self._next == len(self._plan):
                raise BigtrainError(
                    f"bucket {bucket} of sharded parameters is used again in this {self.key[0]}",
                    why="it was given up after its last use in the steps before, and the other "
                    "ranks do not expect to gather it now: data decides how often a module runs",
                    mend="set zero.order=agreed, or zero.reshard_after_forward=false",
                )
            self._advance(self._plan)
        self._ahead.discard(bucket)
        self._gatherer.arrive(bucket)
        while len(self._ahead) < self.orders.prefetch and self._next < len(self._plan):
            following = self._plan[self._next]
            if self._gatherer.is_here(following):
                break  # it is given up before that gather's use
            self._advance(self._plan)

    def keeps(self, bucket: int) -> bool:
        """Must it not be given up on the way, since the plan will not gather it again?"""
        return self.keeps_all or bucket in self.stays or bucket in self._kept

    def end(self) -> tuple[int, ...]:
        """Take part in what others still gather; return what is to stay for the next passage."""
        if self._plan is None:
            for bucket in self.buckets if self.keeps_all else ():
                self.go_to(bucket)  # so that all ranks have the same
            while self._agree(NOTHING):
                pass
            if not self.orders.agreed:
                self.orders.known[self.key] = self._learned()
        else:
            for bucket in self._plan[self._next :]:
                self._gatherer.gather(bucket)
                if not (self.keeps_all or bucket in self.stays):
                    self._gatherer.give_up(bucket)
        stay = self.buckets if self.keeps_all else [b for b in self.buckets if b in self.stays]
        others = [bucket for bucket in self.key[2] if bucket not in self.buckets]
        self.orders.carry = (*others, *stay)
        return self.orders.carry

    def _learned(self) -> list[int]:
        """Return the order from now on: what no rank needed this time may be needed later."""
        if self.key[0] == "weights":
            return self._log
        known = {*self._log, *self.key[2]}
        return [*self._log, *(bucket for bucket in self.buckets if bucket not in known)]

    def _advance(self, plan: Sequence[int]) -> None:
        bucket = plan[self._next]
        self._next += 1
        if self._gatherer.gather(bucket):
            self._ahead.add(bucket)
        else:
            self._kept.add(bucket)

    def _agree(self, wanted: int) -> bool:
        """Gather one of the buckets that ranks want now; False if none wants any more."""
        mine = torch.tensor([wanted], dtype=torch.int64, device=self.orders.device)
        everyone = start_all_gather(mine, self.orders.axis, "agreement on what to gather").wait()
        wishes = everyone.flatten().tolist()
        self.orders.alike = self.orders.alike and len(set(wishes)) == 1
        asked = [bucket for bucket in wishes if bucket != NOTHING]
        if asked:
            self._gatherer.gather(min(asked))
            self._gatherer.arrive(min(asked))
            self._log.append(min(asked))
        return bool(asked)


def _without_repeats(plan: Sequence[int], stays: Set[int], carried: Sequence[int]) -> list[int]:
    """Return `plan` less the gathers of what is here already: buckets that stay, on all ranks."""
    here = stays & set(carried)
    left = []
    for bucket in plan:
        if bucket not in here:
            left.append(bucket)
            here |= stays & {bucket}
    return left
