"""Workers whose training threads stand still, while their links live: nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from server_world import BATCH, Worker, World, leaves_nothing, wait_for, world

from bigtrain.server.protocol import THE_END
from bigtrain.server.status import status_lines

pytestmark = pytest.mark.parity

STALL = 0.8  # seconds, after which nobody is waited for


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def start(some: World, busy: Callable[[Worker, dict[str, Any]], None]) -> list[Worker]:
    """Start all workers, which do `busy` with each turn."""
    for index in range(some.rules.workers):
        some.worker(
            index, seconds=0.01, busy=lambda turn, index=index: busy(some.workers[index], turn)
        )
    return list(some.workers.values())


def hang(me: Worker) -> None:
    """Stand still until the world ends, as a thread does that a GPU does not answer."""
    me._over.wait(60.0)


def test_a_holder_that_hangs_is_gone_without(caplog: pytest.LogCaptureFixture) -> None:
    hung = []

    def busy(me: Worker, turn: dict[str, Any]) -> None:
        outcome = turn["outcome"]
        if turn["version"] == 3 and outcome["speaker"] == me.index and not hung:
            hung.append(me.index)
            hang(me)

    rules = {"quorum": 2, "grace_seconds": 0.05, "stall_seconds": STALL}
    with world(workers=3, steps=9, held=frozenset({3}), **rules) as some:
        workers = start(some, busy)
        some.wait_version(3)
        wait_for("all to wait for it", lambda: lines_of(some, "its part of a checkpoint"))
        some.wait(*(w for w in workers if w.index not in hung))
        late = [closed for closed in some.rounds() if closed.number > 3]
        assert late
        assert not any(hung[0] in closed.workers for closed in late)
        some.shares()
    text = f"worker {hung[0]} has not come back from its checkpoint after round 3"
    assert caplog.text.count(text) == 1


def lines_of(some: World, part: str) -> list[str]:
    """Return the lines of `bigtrain status` with `part` in them."""
    board = some.servers[0].board
    assert board is not None
    about = {
        "time": 0.0,
        "board": 0,
        "rounds_per_second": 0.0,
        "samples": BATCH,
        "servers": {},
        "held_bytes": 0,
        **board.status(time.monotonic()),
    }
    return [line for line in status_lines(about, 0.0) if part in line]


def add_up(me: Worker, turn: dict[str, Any], name: str) -> float:
    """Return how many workers of the last round have evaluated."""
    workers = [part[0] for part in turn["outcome"]["parts"]]
    return me.client.add_up(name, turn["version"], workers, [1.0])[0]


@pytest.mark.parametrize("wakes", [False, True])
def test_an_evaluation_does_not_wait_for_who_hangs(
    wakes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Who wakes later is told what the others have; and takes part again."""
    found: dict[int, float] = {}
    woke: list[bool] = []

    def busy(me: Worker, turn: dict[str, Any]) -> None:
        if turn["version"] != 3 or turn["clock"] != 4:
            return
        if me.index == 2 and wakes:
            wait_for("others to go on", lambda: some.version >= 5)
        elif me.index == 2:
            hang(me)
            return
        began = time.monotonic()
        found[me.index] = add_up(me, turn, "evaluation after round 3")
        woke.append(time.monotonic() - began < STALL)

    with world(workers=3, quorum=3, steps=40, stall_seconds=STALL) as some:
        workers = start(some, busy)
        some.wait_version(3)
        wait_for("2 to be named", lambda: lines_of(some, "its part of evaluation after round 3"))
        some.wait(*workers[: 3 if wakes else 2])
        some.shares()
        assert (2 in some.rounds()[-1].workers) == wakes
    assert found == ({0: 2.0, 1: 2.0, 2: 2.0} if wakes else {0: 2.0, 1: 2.0})
    assert woke == [False, False, True][: len(found)]
    name = "evaluation after round 3: goes on without worker(s) 2"
    assert caplog.text.count(name) == 1


def test_the_end_does_not_wait_for_who_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """Who was to save is one of them: another does it. Who wakes at last has the end to itself."""
    told: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
    sleeps = [True]

    def busy(me: Worker, turn: dict[str, Any]) -> None:
        if me.index == 0 and turn["version"] == 6:  # it speaks for the last round, and saves
            wait_for("the others to leave", lambda: not sleeps)
        if turn["version"] == 6:
            for saved in (0.0, 1.0):
                values = [float(w == me.index) for w in range(3)]
                offer = [*values, float(saved and me.index == 1) + float(me.index == 0)]
                got = me.client.add_up(THE_END, 6, range(3), offer)
                told[me.index].append(got)
                if got[-1]:
                    break

    with world(workers=3, steps=6, last=6, stall_seconds=STALL) as some:
        workers = start(some, busy)
        some.wait_version(6)
        wait_for("0 to be named", lambda: lines_of(some, "its part of the end"))
        some.wait(*workers[1:])
        assert some.threads[some.servers[0]].is_alive()
        sleeps.clear()
        some.wait(workers[0])
        some.wait_servers()
    assert told[1] == told[2] == [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    assert told[0] == [[1.0, 0.0, 0.0, 1.0]]
    assert caplog.text.count("the end: goes on without worker(s) 0") == 1


@pytest.mark.parametrize("servers", [1, 2])
def test_servers_do_not_wait_for_who_hangs(servers: int) -> None:
    """All others have left, long since."""

    def busy(me: Worker, turn: dict[str, Any]) -> None:
        if me.index == 2 and turn["version"] == 3:
            hang(me)
        if turn["version"] == 6:
            me.client.add_up(THE_END, 6, range(3), [1.0])

    rules = {"steps": 6, "last": 6, "stall_seconds": STALL, "replicas": servers}
    with world(workers=3, servers=servers, **rules) as some:
        workers = start(some, busy)
        some.wait(*workers[:2])
        some.wait_servers()
        assert workers[2].is_alive()
        assert not some.failures


def test_the_cursor_does_not_wait_for_who_hangs() -> None:
    """A run that goes on from a checkpoint reads at most a round of samples again."""

    def busy(me: Worker, turn: dict[str, Any]) -> None:
        if me.index == 2 and turn["version"] == 3:
            hang(me)

    rules = {"quorum": 2, "grace_seconds": 0.0, "stall_seconds": STALL}
    with world(workers=3, steps=40, **rules) as some:
        workers = start(some, busy)
        some.wait(*workers[:2])
        used = some.shares()
        cursor = max(turn["cursor"] for worker in workers for turn in worker.turns)
        assert sum(begin >= cursor for begin, _ in used) <= 3
