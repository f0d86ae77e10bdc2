"""Whatever happens to servers and workers, in any order: training goes on, and stays itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from server_world import World, alone, initial, leaves_nothing, objective, wait_for, world

from bigtrain.errors import BigtrainError

pytestmark = pytest.mark.parity

SERVERS, WORKERS = 3, 5
LEAST = 3  # workers that are there at any moment: more than half
LEASE = 1.5  # long enough for a machine that others use, too
SHORT, LENGTHY = 0.2, 2.1  # seconds of cuts and stops: the lease is between them
NEAR = 0.1  # of the objective of runs that nothing happens to


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread, descriptor or socket of a world outlives it."""
    with leaves_nothing():
        yield


# Cuts off, or stops, a server or worker for some seconds: as World.cut and World.stop.
Silence = Callable[[Literal["server", "worker"], int, float], None]


class Storm:
    """Random events. One server at a time is down: each block is on two.

    told: what has happened.
    """

    def __init__(self, some: World, seed: int) -> None:
        self.some, self.draw = some, random.Random(seed)
        self.told: list[str] = []
        self.down: int | None = None  # a server
        self.away: set[int] = set()  # workers that were killed, or have left
        self.silent: dict[int, tuple[float, int]] = {}  # worker -> (until when, rounds by then)
        self.silent_servers: set[int] = set()
        self._incarnations: dict[str, int] = {}

    def blow(self) -> None:
        """Let something happen, and training go on for a moment, or not."""
        self._see_who_is_back()
        can = [name for name, possible in self._possible().items() if possible]
        [name] = self.draw.choices(can, [1 if "long" in name else 2 for name in can])
        do: Callable[[], str] = getattr(self, f"_{name.replace(' ', '_')}")
        self.told.append(f"{name} {do()} at {self.some.version}")
        self.some.wait_version(self.some.version + self.draw.choice((0, 0, 1, 2)))

    def settle(self) -> None:
        """Let all come back."""
        if self.down is not None:
            self._restart_server()
        while self.away:
            self._join_worker()
        self.some.wait_whole()
        workers = self.some.workers.values()
        rounds = {worker: len(worker.bases) for worker in workers}
        wait_for("all workers", lambda: all(len(w.bases) > rounds[w] + 2 for w in workers))

    # -- what can happen -----------------------------------------------------------------------

    def _possible(self) -> dict[str, bool]:
        spare = len(self._up()) > LEAST
        return {
            "kill server": self.down is None,
            "cut server long": self.down is None,
            "cut server short": True,
            "stop server long": self.down is None,
            "stop server short": True,
            "restart server": self.down is not None,
            "kill worker": spare,
            "cut worker long": spare,
            "cut worker short": True,
            "stop worker long": spare,
            "stop worker short": True,
            "leave worker": spare,
            "join worker": bool(self.away),
        }

    def _up(self) -> list[int]:
        return [w for w in range(WORKERS) if w not in self.away and w not in self.silent]

    def _see_who_is_back(self) -> None:
        now = time.monotonic()
        for index, (until, rounds) in list(self.silent.items()):
            if now > until and len(self.some.workers[index].bases) > rounds + 2:
                del self.silent[index]

    def _next(self, who: str) -> int:
        self._incarnations[who] = self._incarnations.get(who, 0) + 1
        return self._incarnations[who]

    # -- servers -------------------------------------------------------------------------------

    def _kill_server(self) -> str:
        self.some.wait_whole()
        self.down = self.draw.randrange(SERVERS)
        self.some.kill_server(self.down)
        return str(self.down)

    def _cut_server_long(self) -> str:
        return self._silence_server(self.some.cut)

    def _cut_server_short(self) -> str:
        return self._hush_server(self.some.cut)

    def _stop_server_long(self) -> str:
        return self._silence_server(self.some.stop)

    def _stop_server_short(self) -> str:
        return self._hush_server(self.some.stop)

    def _silence_server(self, silence: Silence) -> str:
        self.some.wait_whole()
        self.down = self.draw.randrange(SERVERS)
        self.silent_servers.add(self.down)
        silence("server", self.down, LENGTHY)
        self.some.wait_version(self.some.version + 3)  # the others go on without it
        return str(self.down)

    def _hush_server(self, silence: Silence) -> str:
        index = self.draw.choice([s for s in range(SERVERS) if s != self.down])
        silence("server", index, SHORT)
        return str(index)

    def _restart_server(self) -> str:
        assert self.down is not None
        index, self.down = self.down, None
        self.some.kill_server(index)
        self.some.server(index, self._next(f"server {index}"))
        return str(index)

    # -- workers -------------------------------------------------------------------------------

    def _kill_worker(self) -> str:
        index = self.draw.choice(self._up())
        self.some.workers[index].vanish()
        self.away.add(index)
        return str(index)

    def _cut_worker_long(self) -> str:
        return self._silence_worker(self.some.cut)

    def _cut_worker_short(self) -> str:
        return self._hush_worker(self.some.cut)

    def _stop_worker_long(self) -> str:
        return self._silence_worker(self.some.stop)

    def _stop_worker_short(self) -> str:
        return self._hush_worker(self.some.stop)

    def _silence_worker(self, silence: Silence) -> str:
        index = self.draw.choice(self._up())
        silence("worker", index, LENGTHY)
        rounds = len(self.some.workers[index].bases)
        self.silent[index] = time.monotonic() + LENGTHY, rounds
        return str(index)

    def _hush_worker(self, silence: Silence) -> str:
        index = self.draw.choice(self._up())
        silence("worker", index, SHORT)
        return str(index)

    def _leave_worker(self) -> str:
        index = self.draw.choice(self._up())
        worker = self.some.workers[index]
        worker.leave_at = 0
        self.some.wait(worker)
        worker.gone = True
        self.away.add(index)
        return str(index)

    def _join_worker(self) -> str:
        index = self.draw.choice(sorted(self.away))
        self.away.discard(index)
        self.some.worker(index, self._next(f"worker {index}"), seconds=0.005)
        return str(index)


def assert_all_is_well(some: World, storm: Storm) -> None:
    """The run is whole: its parameters, its rounds, its data."""
    some.wait_servers()
    first, *others = some.workers.values()
    # As near its aim as a run of that many rounds of all workers, or of the fewest that were there.
    calm, least = (objective(alone(some.steps, number)) for number in (WORKERS, LEAST))
    assert least < 0.9 * objective(initial()), "too few rounds to see whether it has learned"
    assert (1 - NEAR) * calm < objective(first.params) < (1 + NEAR) * least
    for worker in others:
        assert all(map(torch.equal, worker.params, first.params))
    sums: dict[int, set[str]] = {}
    for server in some.servers:
        assert server.version == some.steps
        for key in server.table.keys:
            sums.setdefault(key, set()).add(server.table.checksum(key))
    assert all(len(found) == 1 for found in sums.values()), f"copies differ: {sums}"
    assert len(some.rounds()) == some.steps
    assert len(some.shares()) >= some.steps
    assert set(some.failures) <= storm.silent_servers, some.failures
    assert all(isinstance(failure, BigtrainError) for failure in some.failures.values())


def go_through(events: int, seed: int) -> None:
    """Train through so many events, and a little further."""
    with world(
        servers=SERVERS, workers=WORKERS, replicas=2, steps=10**6, lease=LEASE, table=True
    ) as some:
        some.start(seconds=0.005)
        storm = Storm(some, seed)
        try:
            some.wait_version(3)
            some.wait_whole()
            for _ in range(events):
                storm.blow()
            storm.settle()
            finish_at(some, some.version + 5)
            assert_all_is_well(some, storm)
        except BaseException as error:
            raise AssertionError(f"{error!r}, with seed {seed}, after {storm.told}") from error


def finish_at(some: World, version: int) -> None:
    some.steps = version
    for worker in some.workers.values():
        worker.leave_at = version
    some.wait()


def test_a_few_things_go_wrong() -> None:
    go_through(15, seed=5)


def test_a_hundred_things_go_wrong() -> None:
    go_through(100, seed=11)
