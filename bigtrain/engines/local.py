"""A worker that takes steps of its own, and meets the others at the servers from time to time.

After `local_steps` steps of any optimizer, a worker pushes how far it came since the last meeting;
servers move by the mean of that, with a momentum of their own, and all go on from there. Sources:
local SGD (https://arxiv.org/abs/1805.09767), DiLoCo (https://arxiv.org/abs/2311.08105).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.buckets import Bucket
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import Config
from bigtrain.engines.native import OUTER, NativeState
from bigtrain.engines.seam import Place
from bigtrain.engines.seat import Seat
from bigtrain.engines.served import bring, flats_of, make_blocks
from bigtrain.errors import CheckpointError
from bigtrain.optim.optimizer import Optimizer
from bigtrain.server.environment import Environment
from bigtrain.server.table import bytes_of
from bigtrain.server.worker import Blocks


class Meetings:
    """Takes a worker's parameters to servers and back.

    `anchors` are the parameters of the last meeting, in fp32 on the CPU: 4 bytes for each element
    that this rank owns.
    """

    def __init__(self, path: GradientPath, seat: Seat) -> None:
        self.path, self.seat = path, seat
        self.blocks: Blocks = make_blocks(path, seat)
        self.buckets = self.blocks.buckets
        self.anchors = {b.index: b.main_params.detach().cpu().clone() for b in self.buckets}
        self._ways = {b.index: torch.empty_like(self.anchors[b.index]) for b in self.buckets}
        self.version: int | None = None  # that the parameters here are of

    def anchor(self, bucket: Bucket) -> torch.Tensor:
        return self.anchors[bucket.index]

    def remember(self) -> None:
        """Let anchors be what parameters are."""
        self.path.settle()
        for bucket in self.buckets:
            self.anchor(bucket).copy_(bucket.main_params)

    def go(self) -> None:
        """Push how far this worker came, of the blocks that meet in this round."""
        self.path.settle()
        clock = self.seat.turn["clock"]
        for bucket in self.blocks.meeting(clock - 1, clock):
            way = self._ways[bucket.index]
            torch.sub(self.anchor(bucket), bucket.main_params.cpu(), out=way)
            self.blocks.push(clock, bucket, way)

    def come_back(self) -> None:
        """Take up the servers' parameters that have changed, on all ranks of the worker."""
        version = self.seat.turn["version"]
        known, self.version = self.version, version
        changed = self.buckets if known is None else self.blocks.meeting(known, version)
        self.blocks.pull(version, self.anchor, changed)
        for bucket in reversed(changed):
            self.blocks.wait(bucket, self.anchor(bucket))
            bucket.main_params.copy_(self.anchor(bucket))
            bucket.rounded = False
        self.path.publish()


class LocalClock:
    """The clock of such a worker: a round is `local_steps` steps, shared out to fragments."""

    def __init__(self, seat: Seat, meetings: Meetings, config: Config) -> None:
        self.seat, self.meetings, self.config = seat, meetings, config
        self.batch = config.train.global_batch
        self.each = seat.server.steps_of_round
        self.has_begun = not seat.fills
        self.fill: Callable[[dict[str, Any]], None] = lambda about: None
        self.step = self.cursor = 0
        self._taken = 0  # steps since the last meeting
        self._totals: torch.Tensor | None = None

    @property
    def place(self) -> Place:
        return self.seat.place(self._taken * self.batch)

    @property
    def fellows(self) -> int:
        """Workers that take such steps: totals are of this one alone."""
        return max(1, len(self.seat.workers))

    @property
    def speaks(self) -> bool:
        leads = self.seat.leads and (self.seat.is_new or self._taken > 0)
        return self.seat.inherits or leads

    def go_to(self, step: int, cursor: int) -> None:
        """Go on after `step`.

        Raises:
            CheckpointError: no round begins there.
        """
        if step % self.each:
            raise _between_rounds(self.config, step)
        self.step, self.cursor = step, cursor

    def begin(self, items_per_sample: int) -> None:
        if not self.has_begun:
            rounds = self.step // self.each
            self.fill({"step": rounds, "cursor": self.cursor, "num_updates": rounds})
        self.seat.begin()
        self._meet()

    def read(self, samples: list[int]) -> None:
        self.seat.read(samples)

    def counted(self) -> list[tuple[int, list[int]]]:
        return [
            ((number - 1) * self.each + step, samples)
            for number, steps in self.seat.counted()
            for step, samples in enumerate(steps, 1)
        ]

    def agree(self, totals: torch.Tensor) -> torch.Tensor:
        self._totals = totals.clone() if self._totals is None else self._totals + totals
        return totals

    def advance(self, batch: int, votes: list[float]) -> list[float]:
        self._taken += 1
        self.step += 1
        if self._taken < self.each:
            return [0.0] * len(votes)
        assert self._totals is not None
        self.meetings.go()
        self.seat.report(self.meetings.version or 0, self._totals)
        together = self.seat.totals(self._totals)
        self._meet()
        return together.tolist()[2:]

    def _meet(self) -> None:
        self.meetings.come_back()
        turn = self.seat.turn
        self.step, self.cursor = turn["version"] * self.each, turn["cursor"]
        self._taken, self._totals = 0, None

    def evaluation(self) -> Place | None:
        return self.seat.evaluation() if self._taken == 0 else None

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        return self.seat.add_up(totals, what)

    def must_save(self, saved: bool) -> bool:
        return self.seat.must_save(saved)

    def leave(self) -> None:
        self.seat.client.leave()


def _between_rounds(config: Config, step: int) -> CheckpointError:
    """Return what to say of a checkpoint in the middle of a round: servers count rounds alone."""
    server = config.server
    multiples = (config.train.steps, config.checkpoint.every, config.eval.every)
    good = (
        steps
        for steps in range(server.local_steps, 0, -server.fragments)
        if step % (steps // server.fragments) == 0 and not any(m % steps for m in multiples)
    )
    fits = next(good, None)
    return CheckpointError(
        f"no round of server.local_steps = {server.local_steps} begins after step {step}, "
        "where the last checkpoint is",
        why=f"rounds begin after multiples of {server.steps_of_round} steps, and the run would go "
        f"back to step {step - step % server.steps_of_round} with the parameters of step {step}",
        mend=(f"set server.local_steps={fits}, or " if fits is not None else "")
        + "go on with server.mode=sync, or without servers, which may begin after any step",
    )


class LocalState:
    """What a checkpoint holds: the worker's own state, and the servers' momentum."""

    def __init__(
        self,
        model: nn.Module,
        path: GradientPath,
        optimizer: Optimizer,
        mesh: Mesh,
        config: Config,
        env: Environment,
    ) -> None:
        self.path = path
        self._own = NativeState(model, path, optimizer, mesh.dp)
        self.seat = Seat(mesh, config, env)
        self.meetings = Meetings(path, self.seat)
        blocks = self.meetings.blocks
        specs = blocks.specs(self.seat.hosts, config.server.replicas, torch.float32)
        self.seat.start(specs)
        self.clock = LocalClock(self.seat, self.meetings, config)
        self.clock.fill = self._fill
        self._flats: dict[tuple[int, str], torch.Tensor] = {}
        if self.seat.fills:
            self._make_room()

    def _make_room(self) -> None:
        self._flats = flats_of(self.meetings.buckets, self.seat.moments)

    def _fill(self, about: dict[str, Any]) -> None:
        """Give servers the parameters to begin with, and of a run that goes on their momentum."""
        self.meetings.remember()
        values = {}
        for bucket in self.meetings.buckets:
            key = self.meetings.blocks.key(bucket)
            values[key, 0] = bytes_of(self.meetings.anchor(bucket))
            for part, name in enumerate(self.seat.moments):
                values[key, 1 + part] = bytes_of(self._flats[bucket.index, name])
        self.seat.client.fill(values, {**about, "items_per_sample": 1})
        self.saved()

    def blocks(self) -> Iterator[NamedBlock]:
        return self._own.blocks()

    def consolidate(self) -> None:
        self._make_room()
        rooms = [
            (self.meetings.blocks.key(bucket), 1 + part, self._flats[bucket.index, name])
            for bucket in self.meetings.buckets
            for part, name in enumerate(self.seat.moments)
        ]
        bring(self.seat, self.meetings.blocks.newest, rooms)
        self._own.consolidate()

    def saved(self) -> None:
        self._flats = {}

    @property
    def progress(self) -> dict[str, Any] | None:
        return self._own.progress

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        self._own.progress = saved

    def errors(self) -> Iterator[NamedBlock]:
        yield from self._own.errors()
        yield from self._outer()

    def _outer(self) -> Iterator[NamedBlock]:
        for name in self.seat.moments if self._flats else ():
            flats = [s.of(self._flats[s.bucket.index, name]) for s in self.path.segments()]
            yield from self.path.blocks(f"{OUTER}{name}.", flats)

    def replicas(self) -> Iterator[NamedBlock]:
        return self._own.replicas()

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        self._own.take_up(load, saved)
        load([block for block in self._outer() if block.name in saved])
