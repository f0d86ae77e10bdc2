"""Servers and workers in one process, each with its own loop: real frames over loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bigtrain.config.schema import AdamwOptimizer
from bigtrain.optim import make_optimizer
from bigtrain.server.board import Update
from bigtrain.server.client import Client
from bigtrain.server.placement import place
from bigtrain.server.protocol import Who
from bigtrain.server.rounds import Closed, Rules
from bigtrain.server.server import Server, Setup
from bigtrain.server.table import BlockSpec, Stretch, bytes_of, key_of

TOKEN = "ab" * 32
SIZES = (40, 3000, 17)
BATCH = 8
PATIENCE = 6.0


class Policy:
    """A constant rate, no clipping; a version in `held` holds its speaker."""

    def __init__(self, held: frozenset[int] = frozenset()) -> None:
        self.held = held

    def begin(self, about: Mapping[str, Any]) -> None:
        pass

    def update(self, closed: Closed, squares: float) -> Update:
        return Update(0.01, 1.0, squares != squares, squares**0.5)

    def is_held(self, closed: Closed) -> bool:
        return closed.number in self.held


def gradient(params: torch.Tensor, cursor: int, number: int) -> torch.Tensor:
    """Return a gradient that depends on parameters and on the share of the data."""
    seed = 1000 * cursor + number
    noise = torch.randn(params.numel(), generator=torch.Generator().manual_seed(seed))
    return 0.1 * params + noise


def specs_of(servers: int, replicas: int) -> list[BlockSpec]:
    names = [f"0/{i}" for i in range(len(SIZES))]
    where = place(names, SIZES, servers, replicas)
    return [
        BlockSpec(key_of(0, i), n, "float32", w, (Stretch("decay", 1, 0, n),))
        for i, (n, w) in enumerate(zip(SIZES, where, strict=True))
    ]


def initial() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randn(n, generator=draw) for n in SIZES]


def make(segments: Any) -> Any:
    return make_optimizer(segments, AdamwOptimizer(), "off")


def alone(steps: int, workers: int) -> list[torch.Tensor]:
    """Return the parameters after `steps` rounds of all workers, computed in one place."""
    from bigtrain.server.table import Table

    table = Table(make, "off")
    table.declare(specs_of(1, 1))
    table.build()
    params = [torch.from_numpy(_view(table, s.key)) for s in specs_of(1, 1)]
    for mine, first in zip(params, initial(), strict=True):
        mine.copy_(first)
    for step in range(steps):
        for worker in range(workers):
            for spec, mine in zip(specs_of(1, 1), params, strict=True):
                room = table.room_for_gradient((worker, 0, step + 1), spec.key)
                torch.frombuffer(room, dtype=torch.float32).copy_(
                    gradient(mine, step * BATCH, worker)
                )
        assert table.add_up([(w, 0, step + 1) for w in range(workers)]) == []
        table.apply(0.01, 1.0, lambda key: None)
        table.forget(lambda source: True)
    return params


def _view(table: Any, key: int) -> Any:
    import numpy as np

    return np.frombuffer(table.room_for_values(key, 0), dtype=np.float32)


class Worker(threading.Thread):
    """A worker of one rank that trains until `steps` are done."""

    def __init__(
        self, world: World, index: int, incarnation: int = 0, seconds: float = 0.0
    ) -> None:
        super().__init__(daemon=True)
        self.world, self.index, self.seconds = world, index, seconds
        who = Who("worker", index, incarnation)
        self.client = Client(
            who,
            world.addresses,
            TOKEN,
            lease_seconds=world.lease,
            patience_seconds=PATIENCE,
        )
        self.params = initial()
        self.used: list[tuple[int, int]] = []  # shares that it has read
        self.turns: list[dict[str, Any]] = []
        self.bases: list[tuple[int, int]] = []  # (round, version that it was computed with)
        self.error: BaseException | None = None
        self.over = self.gone = False
        self.busy: Callable[[dict[str, Any]], None] = lambda turn: None

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = error

    def _train(self) -> None:
        client, specs = self.client, specs_of(len(self.world.servers), self.world.replicas)
        client.start(specs)
        if any(answer["fill"] for answer in client.wanted.values()):
            values = {(s.key, 0): bytes_of(p) for s, p in zip(specs, self.params, strict=True)}
            client.fill(values, {"step": 0, "num_updates": 0, "cursor": 0})
        client.ready()
        clock = 0
        while not self.over:
            turn = client.next_turn(clock)
            self.turns.append(turn)
            clock = turn["clock"]
            rooms = [
                (s.key, 0, turn["version"], bytes_of(p))
                for s, p in zip(specs, self.params, strict=True)
            ]
            client.pull(rooms)
            base = min(client.wait_pulled(s.key) for s in specs)
            self.busy(turn)
            if turn["version"] >= self.world.steps:
                break
            cursor, number = turn["share"]
            time.sleep(self.seconds)
            grads = [gradient(p, cursor, number) for p in self.params]
            for spec, grad in zip(specs, grads, strict=True):
                client.push(clock, spec.key, bytes_of(grad))
            have = client.wait_pushed(clock)
            self.bases.append((clock, base))
            client.report(clock, base, [float(cursor + number), 1.0], have)
        client.leave()

    def vanish(self) -> None:
        """End as a process does that is killed."""
        self.over = self.gone = True
        kill_loop(self.client._loop)


def kill_loop(loop: Any) -> None:
    """Close all sockets of a loop at once, and end its thread."""

    def die() -> None:
        loop._over_at, loop._over = 0.0, True
        for link in list(loop.links):
            link._out.clear()

    loop.call(die)


class World:
    """Servers that serve in threads, and their workers."""

    def __init__(
        self,
        servers: int = 1,
        workers: int = 2,
        replicas: int = 1,
        steps: int = 10,
        lease: float = 1.0,
        held: frozenset[int] = frozenset(),
        **rules: Any,
    ) -> None:
        self.steps, self.replicas, self.lease = steps, replicas, lease
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(servers)]
        self.addresses = [sock.getsockname() for sock in self._listeners]
        self._held = held
        self.rules = Rules(**{"mode": "sync", "workers": workers, "quorum": workers, **rules})
        self.servers: list[Server] = []
        self.threads: list[threading.Thread] = []
        self.failures: dict[int, BaseException] = {}
        self.workers: dict[int, Worker] = {}
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
        server = Server(setup, make, Policy(self._held))
        thread = threading.Thread(
            target=self._serve, args=(server, self._listeners[index].dup()), daemon=True
        )
        self.servers[index:], rest = [server], self.servers[index + 1 :]
        self.servers += rest
        self.threads.append(thread)
        thread.start()
        return server

    def _serve(self, server: Server, listener: socket.socket) -> None:
        try:
            server.serve(listener)
        except BaseException as error:
            self.failures[server.setup.index] = error

    def worker(self, index: int, incarnation: int = 0, seconds: float = 0.0) -> Worker:
        worker = Worker(self, index, incarnation, seconds)
        self.workers[index] = worker
        worker.start()
        return worker

    def start(self, seconds: float = 0.0) -> list[Worker]:
        """Start all workers."""
        return [self.worker(index, seconds=seconds) for index in range(self.rules.workers)]

    def kill_server(self, index: int) -> None:
        self.servers[index]._is_over = True
        kill_loop(self.servers[index].loop)
        end = time.monotonic() + PATIENCE
        while self.servers[index].loop.links:
            assert time.monotonic() < end
            time.sleep(0.002)

    def wait(self, *workers: Worker) -> None:
        """Wait until these (or all) are done, and raise what one has raised."""
        for worker in workers or [w for w in self.workers.values() if not w.gone]:
            worker.join(PATIENCE)
            if worker.error is not None:
                raise worker.error
            assert not worker.is_alive(), f"worker {worker.index} hangs"

    def wait_version(self, version: int) -> None:
        end = time.monotonic() + PATIENCE
        while not any(
            turn["version"] >= version for w in self.workers.values() for turn in w.turns
        ):
            assert time.monotonic() < end, f"version {version} does not come"
            time.sleep(0.002)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.vanish()
        for server in self.servers:
            server.stop()
        for thread in (*self.threads, *self.workers.values()):
            thread.join(PATIENCE)
        for sock in self._listeners:
            sock.close()
