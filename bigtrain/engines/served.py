"""A worker whose every step is one of the servers': what the trainer asks of an engine.

Forward, backward and the ranks' own sums are bigtrain's. Gradients go to servers as they become
ready, servers update, and parameters come back; what a step is, the board says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import Config, ServerSection, ZeroSection
from bigtrain.config.serving import RowsSection
from bigtrain.engines.coding import coding_of
from bigtrain.engines.native import NativeState
from bigtrain.engines.seam import Place
from bigtrain.engines.seat import Seat
from bigtrain.engines.table_files import TableFiles
from bigtrain.errors import BigtrainError, Overtaken
from bigtrain.ops.op import Kernels
from bigtrain.optim.rows import make_row_optimizer
from bigtrain.server.embedding import Tables, tables_of
from bigtrain.server.environment import Environment
from bigtrain.server.table import bytes_of
from bigtrain.server.worker import Blocks, Pushing

log = logging.getLogger(__name__)


def zero_of_worker(zero: ZeroSection, mesh: Mesh, mode: str) -> ZeroSection:
    """Return how the ranks of a worker share what servers update: each pushes a block of its own;
    where no rank updates anything itself, from CPU memory."""
    stage = max(zero.stage, 1) if mesh.dp.degree > 1 else zero.stage
    offload = zero.offload if mode == "local" else "cpu"
    return zero.model_copy(update={"stage": stage, "offload": offload})


def check_tables(model: nn.Module, mesh: Mesh, server: ServerSection) -> None:
    """Raise BigtrainError if the model has tables that servers are to keep, and this run has no
    place for them."""
    tables = ", ".join(tables_of(model))
    if not tables:
        return
    if not server.servers or server.mode == "local":
        raise BigtrainError(
            f"the model has tables that servers keep ({tables}), and "
            + (f"server.mode = {server.mode}" if server.servers else "server.servers = 0"),
            why="there is nobody who keeps them: in local mode workers have all parameters",
            mend="set server.servers=1 (or more), and server.mode=sync, ssp or async",
        )
    if mesh.world.degree > mesh.dp.degree:
        raise BigtrainError(
            f"the model has tables that servers keep ({tables}), and is split over ranks",
            why="ranks that compute the same rows would push them twice",
            mend="set parallel.tp, pp and cp to 1; a worker may have several dp ranks",
        )


def _warn_of_rows(rows: RowsSection) -> None:
    """Say so if the config speaks of tables, and the model has none."""
    if rows != RowsSection():
        log.warning(
            "server.rows has no effect: the model has no bigtrain.ServerEmbedding, and its "
            "nn.Embedding are trained as all else is (optimizer)"
        )


def make_blocks(path: GradientPath, seat: Seat) -> Blocks:
    """Return what a rank sends and gets, as the config says."""
    server = seat.server
    push, pull = (coding_of(server.coding(way), server.density) for way in ("push", "pull"))
    return Blocks(path.buckets, seat.client, seat.mesh.rank, push, pull)


class ServedClock:
    """The clock of such a worker: a step is a round."""

    fellows = 1  # the board's totals are of all workers

    def __init__(self, seat: Seat, sync: Pushing, path: GradientPath, tables: Tables) -> None:
        self.seat, self.sync, self.path, self.tables = seat, sync, path, tables
        self.step = self.cursor = self.num_updates = 0
        self.has_begun = not seat.fills
        self.fill: Callable[[dict[str, Any]], None] = lambda about: None

    @property
    def place(self) -> Place:
        return self.seat.place()

    @property
    def speaks(self) -> bool:
        return self.seat.inherits or (self.seat.is_new and self.seat.leads)

    def go_to(self, step: int, cursor: int) -> None:
        self.step, self.cursor = step, cursor

    def begin(self, items_per_sample: int) -> None:
        if not self.has_begun:
            self.fill(
                {
                    "step": self.step,
                    "cursor": self.cursor,
                    "num_updates": self.num_updates,
                    "items_per_sample": items_per_sample,
                }
            )
        self.seat.begin()
        self.sync.pull(self.seat.turn["version"])
        self._go_on()
        self.path.publish()

    def read(self, samples: list[int]) -> None:
        self.seat.read(samples)

    def counted(self) -> list[tuple[int, list[int]]]:
        return [(number, samples) for number, [samples] in self.seat.counted()]

    def agree(self, totals: torch.Tensor) -> torch.Tensor:
        self.seat.report(self.sync.version, totals)
        self.sync.pull(self.seat.turn["version"])
        return totals if self.seat.outcome is None else self.seat.totals(totals)

    def advance(self, batch: int, votes: list[float]) -> list[float]:
        self._go_on()
        return votes

    def _go_on(self) -> None:
        turn = self.seat.turn
        self.step, self.cursor = turn["version"], turn["cursor"]
        self.num_updates = turn["num_updates"]
        self.sync.begin(turn["clock"])
        self.tables.begin(turn["version"])

    def evaluation(self) -> Place | None:
        return self.seat.evaluation()

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        return self.seat.add_up(totals, what)

    def must_save(self, saved: bool) -> bool:
        return self.seat.must_save(saved)

    def leave(self) -> None:
        self.seat.client.leave()


class Served:
    """Gradients, updater and state of such a worker (see seam.py)."""

    def __init__(
        self, model: nn.Module, path: GradientPath, mesh: Mesh, config: Config, env: Environment
    ) -> None:
        assert isinstance(path.sync, Pushing)
        self.path, self.sync = path, path.sync
        self.lr = config.optimizer.lr
        self.moments: dict[str, list[torch.Tensor | None]] = {}
        self._flats: dict[tuple[int, str], torch.Tensor] = {}
        self.progress: dict[str, Any] | None = None
        self.seat = Seat(mesh, config, env)
        self.blocks_ = make_blocks(path, self.seat)
        self.sync.connect(self.blocks_)
        dtype = self.sync.pulled_into(self.sync.buckets[0]).dtype
        hosts, replicas = self.seat.hosts, config.server.replicas
        self.tables = Tables(
            tables_of(model),
            self.seat.client,
            hosts=hosts,
            replicas=replicas,
            seed=config.run.seed,
        )
        self.seat.start([*self.blocks_.specs(hosts, replicas, dtype), *self.tables.specs])
        if self.seat.fills and mesh.rank == 0 and not self.tables.names:  # one of all ranks
            _warn_of_rows(config.server.rows)
        self.clock = ServedClock(self.seat, self.sync, path, self.tables)
        optimizer = make_row_optimizer(config.server.rows, config.optimizer.lr)
        self.table_files = TableFiles(self.tables, optimizer) if self.tables.names else None
        self.clock.fill = self._fill
        self._state = NativeState(model, path, self, mesh.dp)
        if self.seat.fills:
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
            key = self.blocks_.key(bucket)
            values[key, 0] = bytes_of(bucket.main_params)
            if about["num_updates"]:
                for part, name in enumerate(self.seat.moments):
                    values[key, 1 + part] = bytes_of(self._flats[bucket.index, name])
        if self.table_files is not None and self.seat.mesh.rank == 0:
            self.table_files.give()
        self.seat.client.fill(values, about)
        self.saved()

    # -- gradients -----------------------------------------------------------------------------

    def rescale(self, scale: float) -> None:
        self.path.rescale(scale)

    def finish(self) -> None:
        self.path.finish()
        self.tables.push(self.seat.turn["clock"])

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        if self.seat.outcome is None:
            return self.path.grad_norm(kernels)
        return torch.tensor(self.seat.outcome["norm"], dtype=torch.float32)

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
            key = self.blocks_.key(bucket)
            flats = [self._flats[bucket.index, name] for name in self.seat.moments]
            rooms += [(key, 1 + part, flat) for part, flat in enumerate(flats)]
            if not self.blocks_.exact or bucket.low_params is not None:
                rooms.append((key, 1 + len(flats), bucket.main_params))
        bring(self.seat, self.blocks_.newest, rooms)
        self._state.consolidate()

    def saved(self) -> None:
        self._flats, self.moments = {}, {}

    def errors(self) -> Iterator[NamedBlock]:
        return self._state.errors()

    def replicas(self) -> Iterator[NamedBlock]:
        return self._state.replicas()

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        self._state.take_up(load, saved)

    def _make_moments(self) -> None:
        self._flats = flats_of(self.sync.buckets, self.seat.moments)
        self.moments = {
            name: [s.of(self._flats[s.bucket.index, name]) for s in self.path.segments()]
            for name in self.seat.moments
        }


def flats_of(
    buckets: Iterable[Bucket], moments: Iterable[str]
) -> dict[tuple[int, str], torch.Tensor]:
    """Return zeros for each moment of each block: in one piece, as they travel."""
    return {
        (bucket.index, name): torch.zeros(bucket.main_grads.numel())
        for bucket in buckets
        for name in moments
    }


def bring(seat: Seat, newest: int, rooms: list[tuple[int, int, torch.Tensor]]) -> None:
    """Fetch tensors of the version at hand: (key, part, where it goes). newest: the version of what
    is here.

    Raises:
        Overtaken: on all ranks of the worker, if some of this is of a later version.
    """
    version = seat.turn["version"]
    seat.client.pull([(key, part, version, bytes_of(flat)) for key, part, flat in rooms])
    for key, part, _ in rooms:
        newest = max(newest, seat.client.wait_pulled(key, part)[0])
    newest = max(all_gather_object(newest, seat.mesh.world, "versions of what is to be saved"))
    if newest > version:
        raise Overtaken(f"parts of it are of round {newest}, not {version}")
