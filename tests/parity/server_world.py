"""Servers and workers in one process, each with its own loop: real frames over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from bigtrain.config.schema import AdamwOptimizer
from bigtrain.config.serving import RowsSection
from bigtrain.optim import make_optimizer
from bigtrain.optim.rows import make_row_optimizer
from bigtrain.server.board import Update
from bigtrain.server.chaos import Event
from bigtrain.server.client import Client
from bigtrain.server.embedding import ServerEmbedding, Tables
from bigtrain.server.placement import place
from bigtrain.server.protocol import Who
from bigtrain.server.rounds import Closed, Rules
from bigtrain.server.rows import RowTables
from bigtrain.server.server import Server, Setup
from bigtrain.server.table import BlockSpec, Stretch, Table, bytes_of, key_of

TOKEN = "ab" * 32
SIZES = (40, 3000, 17)
BATCH = 8
RATE = 0.01
ROWS, ROW = 60, 3  # of the table of worlds that have one
PATIENCE = 30.0  # seconds that any wait may take before the test fails


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Return once `condition()` is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for: {what}"
        time.sleep(0.002)


# -- what is computed ------------------------------------------------------------------------------


class Policy:
    """A constant rate, no clipping; a version in `held` holds its speaker.

    rounds: those that this server has closed as the board, by number.
    """

    def __init__(self, held: frozenset[int] = frozenset()) -> None:
        self.held = held
        self.rounds: dict[int, Closed] = {}

    def begin(self, about: Mapping[str, Any]) -> None:
        pass

    def update(self, closed: Closed, squares: float) -> Update:
        assert closed.number >= max(self.rounds, default=0), "rounds close in order"
        assert self.rounds.setdefault(closed.number, closed) == closed, "a round was undone"
        return Update(RATE, 1.0, squares != squares, squares**0.5)

    def is_held(self, closed: Closed) -> bool:
        return closed.number in self.held


def gradient(params: torch.Tensor, cursor: int, number: int) -> torch.Tensor:
    """Return a gradient that depends on parameters and on the share of the data."""
    seed = 1000 * cursor + number
    noise = torch.randn(params.numel(), generator=torch.Generator().manual_seed(seed))
    return 0.1 * params + noise


def objective(params: list[torch.Tensor]) -> float:
    """Return what the gradients lower, but for their noise."""
    return sum(0.05 * float((p**2).sum()) for p in params)


def specs_of(servers: int, replicas: int) -> list[BlockSpec]:
    names = [f"0/{i}" for i in range(len(SIZES))]
    where = place(names, SIZES, ["here"] * servers, replicas)
    return [
        BlockSpec(key_of(0, i), n, "float32", w, (Stretch("decay", 1, 0, n),))
        for i, (n, w) in enumerate(zip(SIZES, where, strict=True))
    ]


def initial() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randn(n, generator=draw) for n in SIZES]


def ids_of(cursor: int, number: int) -> torch.Tensor:
    """Return the rows that a share of the data touches; some twice."""
    draw = torch.Generator().manual_seed(1000 * cursor + number)
    return torch.randint(ROWS, (6,), generator=draw)


def row_loss(values: torch.Tensor, cursor: int, number: int) -> torch.Tensor:
    """Return a loss of values [6, ROW], whose gradient depends on them."""
    draw = torch.Generator().manual_seed(2000 * cursor + number)
    return (values * torch.randn(6, ROW, generator=draw)).sum() + 0.05 * (values**2).sum()


def row_tables() -> RowTables:
    optimizer = make_row_optimizer(RowsSection(optimizer="adam", lr=RATE), RATE, "off")
    return RowTables(optimizer, kernels="off")


def make(segments: Any) -> Any:
    return make_optimizer(segments, AdamwOptimizer(), "off")


def alone(steps: int, workers: int) -> list[torch.Tensor]:
    """Return the parameters after `steps` rounds of all workers, computed in one place."""
    table = Table(make, "off")
    table.declare(specs_of(1, 1))
    table.build()
    assert table.optimizer is not None
    buckets = [segment.bucket for segment in table.optimizer.segments]
    for bucket, first in zip(buckets, initial(), strict=True):
        bucket.main_params.copy_(first)
    for step in range(steps):
        for bucket in buckets:
            grads = [gradient(bucket.main_params, step * BATCH, w) for w in range(workers)]
            total = bucket.main_grads.copy_(grads[0])
            for grad in grads[1:]:
                total += grad
        table.optimizer.step(RATE)
    return [bucket.main_params for bucket in buckets]


# -- workers ---------------------------------------------------------------------------------------


class Vanished(Exception):
    """What a killed worker's thread ends by."""


class Worker(threading.Thread):
    """A worker of one rank that trains until the world's steps are done.

    seconds: that a gradient takes. busy: called with each turn once its parameters are here. again:
    repeat messages, and send old ones that are wrong. leave_at: the version to leave at.
    """

    def __init__(
        self,
        world: World,
        index: int,
        incarnation: int = 0,
        seconds: float = 0.0,
        busy: Callable[[dict[str, Any]], None] = lambda turn: None,
        again: bool = False,
        leave_at: int | None = None,
    ) -> None:
        super().__init__(name=f"worker {index}.{incarnation}", daemon=True)
        self.world, self.index, self.incarnation = world, index, incarnation
        self.seconds, self.busy, self.again = seconds, busy, again
        self.leave_at = world.steps if leave_at is None else leave_at
        self.client = Client(
            Who("worker", index, incarnation),
            world.addresses,
            TOKEN,
            lease_seconds=world.lease,
            patience_seconds=world.patience,
        )
        self.specs = specs_of(len(world.servers), world.replicas)
        self.layer = ServerEmbedding(ROWS, ROW)
        self.tables = Tables(
            {"table": self.layer} if world.has_table else {},
            self.client,
            hosts=["here"] * len(world.servers),
            replicas=world.replicas,
            seed=1,
        )
        self.params = initial()
        self.turns: list[dict[str, Any]] = []
        self.bases: list[tuple[int, int]] = []  # (round, version that it was computed with)
        self.error: BaseException | None = None
        self.gone = False
        self._over = threading.Event()
        self._stalled_until = 0.0
        self._old: list[torch.Tensor] = []

    @property
    def version(self) -> int:
        """The version of the last turn."""
        return self.turns[-1]["version"] if self.turns else 0

    def run(self) -> None:
        try:
            self._train()
        except Vanished:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.client._loop.stop(0.0)

    def _train(self) -> None:
        self._begin()
        clock = 0
        while not self._over.is_set():
            turn = self.client.next_turn(clock)
            self.turns.append(turn)
            clock = turn["clock"]
            base = self._pull(turn["version"])
            self.busy(turn)
            if turn["version"] >= self.leave_at:
                break
            self._work(turn, base)
        self.client.leave()

    def _begin(self) -> None:
        client = self.client
        client.start([*self.specs, *self.tables.specs])
        if any(answer["fill"] for answer in client.wanted.values()):
            values = {(s.key, 0): bytes_of(p) for s, p in zip(self.specs, self.params, strict=True)}
            client.fill(values, {"step": 0, "num_updates": 0, "cursor": 0})
        client.ready()

    def _pull(self, version: int) -> int:
        """Return the oldest version of what has come."""
        pairs = zip(self.specs, self.params, strict=True)
        self.client.pull([(s.key, 0, version, bytes_of(p)) for s, p in pairs])
        return min(self.client.wait_pulled(s.key)[0] for s in self.specs)

    def _work(self, turn: dict[str, Any], base: int) -> None:
        clock, (cursor, number) = turn["clock"], turn["share"]
        self._over.wait(max(self.seconds, self._stalled_until - time.monotonic()))
        grads = [gradient(p, cursor, number) for p in self.params]
        self.tables.begin(turn["version"])
        if self.world.has_table:
            row_loss(self.layer(ids_of(cursor, number)), cursor, number).backward()
        self.tables.push(clock)
        self._push(clock, grads)
        have = self.client.wait_pushed(clock)
        self.bases.append((clock, base))
        self._report(clock, base, [float(cursor + number), 1.0], have)
        self._old = grads  # in use until the next turn

    def _push(self, clock: int, grads: list[torch.Tensor]) -> None:
        pairs = list(zip(self.specs, grads, strict=True))
        for spec, grad in pairs:
            self.client.push(clock, spec.key, bytes_of(grad))
        if self.again:
            for spec, grad in reversed(pairs):
                self.client.push(clock, spec.key, bytes_of(grad))
            for spec, grad in zip(self.specs, self._old, strict=False):
                self.client.push(clock - 1, spec.key, bytes_of(grad.fill_(1e6)))

    def _report(self, clock: int, base: int, totals: list[float], have: list[int]) -> None:
        self.client.report(clock, base, totals, have)
        if self.again:
            self.client.report(clock - 1, base, [1e6, 1.0], have)
            self.client.report(clock, base, totals, have)
            self.client.report(clock, base, totals, have)

    def stall(self, seconds: float) -> None:
        """Do nothing for that long, as a process that is stopped."""
        self._stalled_until = time.monotonic() + seconds
        self.client._loop.call(lambda: time.sleep(seconds))

    def vanish(self) -> None:
        """End as a process does that is killed."""
        self.gone = True
        self._over.set()
        kill_loop(self.client._loop)
        self.client._failure = Vanished()
        self.client._notify()


def kill_loop(loop: Any) -> None:
    """Close all sockets of a loop at once, and end its thread."""

    def die() -> None:
        loop._over_at, loop._over = 0.0, True
        loop.cut_until = 0.0
        for link in list(loop.links):
            link._out.clear()

    loop.call(die)


# -- the world -------------------------------------------------------------------------------------


class World:
    """Servers that serve in threads, and their workers."""

    def __init__(
        self,
        servers: int = 1,
        workers: int = 2,
        replicas: int = 1,
        steps: int = 10,
        lease: float = 1.0,
        patience: float = PATIENCE,
        held: frozenset[int] = frozenset(),
        table: bool = False,
        **rules: Any,
    ) -> None:
        self.steps, self.replicas = steps, replicas
        self.lease, self.patience = lease, patience
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(servers)]
        self.addresses = [sock.getsockname() for sock in self._listeners]
        self._held, self.has_table = held, table
        self.rules = Rules(**{"mode": "sync", "workers": workers, "quorum": workers, **rules})
        self.servers: list[Server] = []
        self.policies: list[Policy] = []
        self.threads: dict[Server, threading.Thread] = {}
        self.failures: dict[int, BaseException] = {}
        self.workers: dict[int, Worker] = {}
        self.all_workers: list[Worker] = []
        for index in range(servers):
            self.server(index)

    def server(self, index: int, incarnation: int = 0) -> Server:
        """Start a server; one that was killed, again."""
        setup = Setup(
            index,
            self.addresses,
            TOKEN,
            self.rules,
            BATCH,
            self.lease,
            incarnation=incarnation,
        )
        self.policies.append(Policy(self._held))
        server = Server(setup, make, self.policies[-1], rows=row_tables())
        self.threads[server] = threading.Thread(
            target=self._serve,
            args=(server, self._listeners[index].dup()),
            name=f"server {index}.{incarnation}",
            daemon=True,
        )
        self.servers[index : index + 1] = [server]
        self.threads[server].start()
        return server

    def _serve(self, server: Server, listener: socket.socket) -> None:
        try:
            server.serve(listener)
        except BaseException as error:
            self.failures[server.setup.index] = error

    def worker(self, index: int, incarnation: int = 0, **options: Any) -> Worker:
        """Start a worker, as `Worker` says."""
        worker = Worker(self, index, incarnation, **options)
        self.workers[index] = worker
        self.all_workers.append(worker)
        worker.start()
        return worker

    def start(self, seconds: float = 0.0, **options: Any) -> list[Worker]:
        """Start all workers."""
        count = self.rules.workers
        return [self.worker(index, seconds=seconds, **options) for index in range(count)]

    # -- what goes wrong -----------------------------------------------------------------------

    def kill_server(self, index: int, *, port: bool = False) -> None:
        """End a server as a process does that is killed. port: nobody listens there any more."""
        server = self.servers[index]
        if port:
            self._listeners[index].close()
        server._is_over = True
        kill_loop(server.loop)
        self.threads[server].join(PATIENCE)
        assert not self.threads[server].is_alive(), f"server {index} does not end"

    def cut(self, role: Literal["server", "worker"], index: int, seconds: float) -> None:
        """Let nothing pass on any link of a server or of a worker."""
        loop = self.servers[index].loop if role == "server" else self.workers[index].client._loop
        loop.suffer(Event("cut", role, index, 0, seconds))

    def stop(self, role: Literal["server", "worker"], index: int, seconds: float) -> None:
        """Let a server or a worker stand still: its links are open, and it does nothing."""
        if role == "worker":
            self.workers[index].stall(seconds)
        else:
            self.servers[index].loop.call(lambda: time.sleep(seconds))

    # -- waiting -------------------------------------------------------------------------------

    def wait(self, *workers: Worker) -> None:
        """Wait until these (or all) are done, and raise what one has raised."""
        end = time.monotonic() + PATIENCE
        for worker in workers or [w for w in self.workers.values() if not w.gone]:
            while worker.is_alive() and time.monotonic() < end:
                worker.join(0.05)
                self._raise(worker)
            self._raise(worker)
            assert not worker.is_alive(), f"worker {worker.index} hangs"

    @staticmethod
    def _raise(worker: Worker) -> None:
        if worker.error is not None:
            raise worker.error

    def wait_servers(self, *indices: int) -> None:
        """Wait until these servers have ended by themselves."""
        for index in indices or range(len(self.servers)):
            thread = self.threads[self.servers[index]]
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"server {index} does not end"

    def wait_whole(self) -> None:
        """Wait until all servers are there, and know it."""
        everybody = set(range(len(self.servers)))

        def is_whole(server: Server) -> bool:
            links = server.peers.links.keys() | {server.setup.index}
            return not server.admission.waits and server.alive == links == everybody

        wait_for("all servers to be there", lambda: all(map(is_whole, self.servers)))

    def wait_version(self, version: int, seconds: float = PATIENCE, *workers: Worker) -> None:
        """Wait until one of `workers` (or any) is told of it."""

        def there() -> bool:
            some = workers or self.all_workers
            for worker in some:
                self._raise(worker)
            return any(worker.version >= version for worker in some)

        wait_for(f"version {version}", there, seconds)

    # -- what came of it -----------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest version that a worker was told of."""
        return max((worker.version for worker in self.all_workers), default=0)

    def rounds(self) -> list[Closed]:
        """Return all rounds, in order; each was closed once, whoever kept the board."""
        found: dict[int, Closed] = {}
        for policy in self.policies:
            for number, closed in policy.rounds.items():
                assert found.setdefault(number, closed) == closed, f"round {number} was undone"
        assert sorted(found) == list(range(1, len(found) + 1))
        return [found[number] for number in sorted(found)]

    def shares(self) -> list[tuple[int, int]]:
        """Return the shares that are in updates, in order: each once, and none was left out."""
        given = {
            (worker.index, worker.incarnation, turn["clock"]): tuple(turn["share"])
            for worker in self.all_workers
            for turn in worker.turns
        }
        parts = [part for closed in self.rounds() for part in closed.parts]
        used = [given[part.worker, part.incarnation, part.clock] for part in parts]
        assert len(used) == len(set(used)), "a share was used twice"
        last = max((t for w in self.all_workers for t in w.turns), key=lambda t: t["version"])
        due = {(c, n) for c in range(0, last["cursor"], BATCH) for n in range(self.rules.workers)}
        assert due <= set(used), f"shares were lost: {sorted(due - set(used))[:5]}"
        return used

    def state(self) -> str:
        """Return how all are, for whoever looks at a test that has failed."""
        lines = []
        for server in self.servers:
            about = _of(server, "version", "alive", "_is_filled")
            links = {"servers": list(server.peers.links), "workers": list(server._workers)}
            thread = "runs" if self.threads[server].is_alive() else "has ended"
            lines.append(f"server {server.setup.index} {thread}: {about} {links}")
            if server.board is not None:
                names = ("active", "_asked", "_expected", "_closed", "_answers", "_waiting_for")
                lines.append(f"  board: {_of(server.board, *names, '_guest', '_waiting')}")
                names = ("version", "members", "holder")
                lines.append(f"  rounds: {_of(server.board.rounds, *names)}")
        for worker in self.all_workers:
            names = ("_links", "_dead", "_order", "_turn", "_report", "_have", "_pulls", "_failure")
            runs = "runs" if worker.is_alive() else "has ended"
            about = f"error {worker.error!r}, {_of(worker.client, *names)}"
            lines.append(f"{worker.name} {runs}: {about}")
        lines.append(f"failures: {self.failures}")
        return "\n".join(lines)

    def close(self) -> None:
        for worker in self.all_workers:
            worker.vanish()
        for server in self.threads:
            server.loop.cut_until = 0.0
            server.stop()
        for thread in (*self.threads.values(), *self.all_workers):
            thread.join(PATIENCE)
        for sock in self._listeners:
            sock.close()


def _of(thing: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name, "?") for name in names}


@contextlib.contextmanager
def world(**options: Any) -> Iterator[World]:
    """A world that ends with the block; if that fails, it shows how all were."""
    made = World(**options)
    try:
        yield made
    except BaseException as error:
        raise AssertionError(f"{error!r}; the world was:\n{made.state()}") from error
    finally:
        made.close()


# -- what is left ----------------------------------------------------------------------------------


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


@contextlib.contextmanager
def leaves_nothing() -> Iterator[None]:
    """Fail if threads, descriptors or sockets are left after the block."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield

    def left() -> str:
        more = {thread.name for thread in set(threading.enumerate()) - threads}
        return ", ".join([*sorted(more), *sorted(map(str, _descriptors() - descriptors))])

    end = time.monotonic() + PATIENCE
    while left() and time.monotonic() < end:
        time.sleep(0.005)
    assert not left(), f"left behind: {left()}"
