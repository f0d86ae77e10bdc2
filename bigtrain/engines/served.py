"""A worker of servers: what the trainer asks of an engine, where parameters are owned elsewhere.

Forward, backward and the ranks' own sums are bigtrain's. Gradients go to servers as they become
ready, servers update, and parameters come back; what a step is, the board says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import Config, ZeroSection
from bigtrain.engines.native import NativeState
from bigtrain.engines.seam import Place
from bigtrain.ops.op import Kernels
from bigtrain.server.chaos import Chaos
from bigtrain.server.client import Client
from bigtrain.server.environment import Environment
from bigtrain.server.protocol import Who
from bigtrain.server.table import bytes_of
from bigtrain.server.worker import Pushing


def zero_of_worker(zero: ZeroSection, mesh: Mesh) -> ZeroSection:
    """Return how the ranks of a worker share what servers update: each pushes a block of its own,
    from CPU memory."""
    stage = max(zero.stage, 1) if mesh.dp.degree > 1 else zero.stage
    return zero.model_copy(update={"stage": stage, "offload": "cpu"})


class ServedClock:
    """The clock of a worker: which round it is, the board says.

    Rank 0 of the worker speaks with the board; the others learn from it.
    """

    def __init__(self, client: Client, sync: Pushing, path: GradientPath, mesh: Mesh) -> None:
        self.client, self.sync, self.path, self.mesh = client, sync, path, mesh
        self.step = self.cursor = self.num_updates = 0
        self.has_begun = not any(answer["fill"] for answer in client.wanted.values())
        self.outcome: dict[str, Any] | None = None  # of the last round that we know of
        self._fill: Callable[[dict[str, Any]], None] = lambda about: None
        self._turn: dict[str, Any] = {"clock": 0}
        self._is_new = False  # did the last turn bring an outcome that was not known?

    def fill_by(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Call `fill` when servers are to be given values."""
        self._fill = fill

    @property
    def place(self) -> Place:
        cursor, number = self._turn["share"]
        dp = self.mesh.dp
        return Place(cursor, number * dp.degree + dp.rank, self.num_workers * dp.degree)

    @property
    def worker(self) -> int:
        return self.client.who.index

    @property
    def num_workers(self) -> int:
        return self._turn["workers"]

    @property
    def workers(self) -> list[int]:
        """Workers whose gradients are in the last round."""
        return [part[0] for part in self.outcome["parts"]] if self.outcome is not None else []

    @property
    def speaks(self) -> bool:
        return self._is_new and self.workers[:1] == [self.worker]

    def go_to(self, step: int, cursor: int) -> None:
        self.step, self.cursor = step, cursor

    def begin(self, items_per_sample: int) -> None:
        if not self.has_begun:
            about = {
                "step": self.step,
                "cursor": self.cursor,
                "num_updates": self.num_updates,
                "items_per_sample": items_per_sample,
            }
            self._fill(about)
        if self.mesh.rank == 0:
            self.client.ready()
        self._take_turn()
        self._go_on()
        self.path.publish()

    def agree(self, totals: torch.Tensor) -> torch.Tensor:
        clock, world = self._turn["clock"], self.mesh.world
        servers = set(self.client.wait_pushed(clock))
        for others in all_gather_object(servers, world, "servers that have gradients"):
            servers &= others
        if self.mesh.rank == 0:
            self.client.report(clock, self.sync.version, totals.tolist(), sorted(servers))
        self._take_turn()
        if self.outcome is None:
            return totals
        return torch.tensor(self.outcome["totals"], dtype=totals.dtype, device=totals.device)

    def _take_turn(self) -> None:
        """Wait for the board's word, and ask for the parameters that go with it."""
        known = self.outcome["number"] if self.outcome is not None else 0
        turn = self.client.next_turn(self._turn["clock"]) if self.mesh.rank == 0 else None
        self._turn = all_gather_object(turn, self.mesh.world, "the board's word")[0]
        self.outcome = self._turn["outcome"]
        self._is_new = self.outcome is not None and self.outcome["number"] > known
        self.sync.pull(self._turn["version"])

    def advance(self, batch: int) -> None:
        self._go_on()

    def _go_on(self) -> None:
        self.step, self.cursor = self._turn["version"], self._turn["cursor"]
        self.num_updates = self._turn["num_updates"]
        self.sync.begin(self._turn["clock"])

    def evaluation(self) -> Place | None:
        if not self._is_new or self.worker not in self.workers:
            return None
        dp, number = self.mesh.dp, self.workers.index(self.worker)
        return Place(0, number * dp.degree + dp.rank, len(self.workers) * dp.degree)

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        name, values = f"{what} of step {self.step}", None
        if self.mesh.rank == 0:
            values = self.client.add_up(name, self.workers, totals.tolist())
        values = all_gather_object(values, self.mesh.world, what)[0]
        return torch.tensor(values, dtype=totals.dtype, device=totals.device)

    def leave(self) -> None:
        self.client.leave()


class Served:
    """Gradients, updater and state of one worker (see seam.py), over its ranks' `mesh`.

    Raises:
        CommError: no server that holds a block is left, or one refuses this worker.
    """

    def __init__(
        self, model: nn.Module, path: GradientPath, mesh: Mesh, config: Config, env: Environment
    ) -> None:
        assert isinstance(path.sync, Pushing)
        assert env.worker is not None
        self.path, self.sync = path, path.sync
        self.lr = config.optimizer.lr
        self.moments: dict[str, list[torch.Tensor | None]] = {}
        self._flats: dict[tuple[int, str], torch.Tensor] = {}
        self.progress: dict[str, Any] | None = None
        self.client = Client(
            Who("worker", env.worker, env.incarnation, mesh.rank, mesh.world.degree),
            env.addresses,
            env.token,
            lease_seconds=config.server.lease_seconds,
            patience_seconds=max(config.parallel.timeout_seconds, config.server.join_seconds),
            chaos=Chaos(env.chaos, "worker", env.worker, env.incarnation),
        )
        self.sync.connect(self.client, mesh.rank)
        self.client.start(self.sync.specs(len(env.addresses), config.server.replicas))
        self.clock = ServedClock(self.client, self.sync, path, mesh)
        self.clock.fill_by(self._fill)
        self._moment_names: list[str] = next(iter(self.client.wanted.values()))["moments"]
        self._state = NativeState(model, path, self, mesh.dp)
        if not self.clock.has_begun:
            self._make_moments()  # a checkpoint may have them

    @property
    def num_updates(self) -> int:
        return self.clock.num_updates

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        self.clock.num_updates = number

    def _fill(self, about: dict[str, Any]) -> None:
        """Give servers what they begin with: parameters, and of a run that goes on moments."""
        values = {}
        for bucket in self.sync.buckets:
            key = self.sync.key(bucket)
            values[key, 0] = bytes_of(bucket.main_params)
            if about["num_updates"]:
                for part, name in enumerate(self._moment_names):
                    values[key, 1 + part] = bytes_of(self._flats[bucket.index, name])
        self.client.fill(values, about)
        self.saved()

    # -- gradients -----------------------------------------------------------------------------

    def rescale(self, scale: float) -> None:
        self.path.rescale(scale)

    def finish(self) -> None:
        self.path.finish()

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        if self.clock.outcome is None:
            return self.path.grad_norm(kernels)
        return torch.tensor(self.clock.outcome["norm"], dtype=torch.float32)

    def publish(self, bucket: Bucket | None = None) -> None:
        self.path.publish(bucket)

    def settle(self) -> None:
        self.path.settle()

    def abandon(self) -> None:
        self.path.abandon()
        self.path.publish()  # no update, but perhaps that of a round which went on without us

    def nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        return self.path.nonfinite_parameters(gradients=gradients)

    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
    ) -> None:
        """Servers have done it, by the same numbers."""

    # -- what a checkpoint holds ---------------------------------------------------------------

    def blocks(self) -> Iterator[NamedBlock]:
        return self._state.blocks()

    def consolidate(self) -> None:
        """Bring from servers what they alone have; they change nothing meanwhile."""
        self._make_moments()
        rooms = []
        for bucket in self.sync.buckets:
            key = self.sync.key(bucket)
            flats = [self._flats[bucket.index, name] for name in self._moment_names]
            rooms += [(key, 1 + part, flat) for part, flat in enumerate(flats)]
            if bucket.low_params is not None:
                rooms.append((key, 1 + len(flats), bucket.main_params))
        version = self.clock.step
        self.client.pull([(key, part, version, bytes_of(flat)) for key, part, flat in rooms])
        for key, part, _ in rooms:
            self.client.wait_pulled(key, part)
        self._state.consolidate()

    def errors(self) -> Iterator[NamedBlock]:
        return self._state.errors()

    def replicas(self) -> Iterator[NamedBlock]:
        return self._state.replicas()

    def saved(self) -> None:
        self._flats, self.moments = {}, {}

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        self._state.take_up(load, saved)

    def _make_moments(self) -> None:
        """Make room for moments: of each block one tensor, which the segments' are views of."""
        self._flats = {
            (bucket.index, name): torch.zeros(bucket.main_grads.numel())
            for bucket in self.sync.buckets
            for name in self._moment_names
        }
        self.moments = {
            name: [s.of(self._flats[s.bucket.index, name]) for s in self.path.segments()]
            for name in self._moment_names
        }
