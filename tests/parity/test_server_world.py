"""Servers and workers that come, go, are cut off and are lied to: what comes of it is the same."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server_world import (
    PATIENCE,
    SIZES,
    TOKEN,
    Worker,
    World,
    alone,
    leaves_nothing,
    specs_of,
    wait_for,
    world,
)

from bigtrain.errors import CommError
from bigtrain.server import link as links
from bigtrain.server.client import Client
from bigtrain.server.protocol import (
    HEADER_BYTES,
    Header,
    Kind,
    Who,
    new_token,
    nonce,
    proof,
    text_frame,
)

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread, descriptor or socket of a world outlives it."""
    with leaves_nothing():
        yield


def assert_as_alone(some: World, workers: int | None = None) -> None:
    """All workers that are there have what one process would have computed, bit for bit."""
    expected = alone(some.steps, workers or some.rules.workers)
    for worker in some.workers.values():
        if not worker.gone:
            assert all(map(torch.equal, worker.params, expected)), f"{worker.name} differs"


def assert_copies_equal(some: World) -> None:
    """Servers that have seen the run to its end hold the same."""
    sums: dict[int, set[str]] = {}
    for server in some.servers:
        if server.version == some.steps:
            for key in server.table.keys:
                sums.setdefault(key, set()).add(server.table.checksum(key))
    assert len(sums) == len(SIZES)
    assert all(len(found) == 1 for found in sums.values())


def finish(some: World) -> None:
    """Wait for all workers, and see that rounds and shares are in order."""
    some.wait()
    some.rounds()
    some.shares()


def finish_at(some: World, version: int, workers: Iterable[Worker]) -> None:
    """Let workers leave at a version that is not here yet."""
    some.steps = version
    for worker in workers:
        worker.leave_at = version
    finish(some)


# -- nobody is disturbed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_all_workers_give_what_one_process_does(servers: int, replicas: int) -> None:
    for _ in range(2):
        with world(servers=servers, replicas=replicas, workers=3, steps=12) as some:
            some.start()
            finish(some)
            some.wait_servers()
            assert_as_alone(some)
            assert_copies_equal(some)
            assert not some.failures
            assert [closed.workers for closed in some.rounds()] == [(0, 1, 2)] * 12


def test_messages_that_come_twice_or_late_change_nothing() -> None:
    """Pushes and reports are repeated, in another order; old ones come again, and are wrong."""
    with world(servers=2, replicas=2, workers=3, steps=15) as some:
        some.start(again=True)
        finish(some)
        assert_as_alone(some)


def test_a_short_lease_is_no_trap_for_who_computes_for_long() -> None:
    """The shortest lease that a config may ask for."""
    with world(servers=2, replicas=2, steps=1, lease=0.5) as some:
        some.start(seconds=1.5)
        finish(some)
        assert_as_alone(some)
        assert not some.failures


# -- servers end, or are cut off -------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", [1, 9])
def test_a_server_is_killed(victim: int, at: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=30) as some:
        some.start(seconds=0.002)
        some.wait_version(at)
        some.kill_server(victim)
        finish(some)
        assert_as_alone(some)


def test_servers_are_killed_in_turn_and_started_again() -> None:
    """Each in the end was given all it holds by one that is dead by now."""
    with world(servers=2, replicas=2, workers=3, steps=70) as some:
        workers = some.start(seconds=0.01)
        for count, victim in enumerate((0, 1, 0)):
            some.wait_version(10 + 20 * count)
            some.kill_server(victim)
            if count < 2:
                guest = some.server(victim, incarnation=1)
                wait_for("the guest to be let in", lambda guest=guest: not guest.admission.waits)
                wait_for(
                    "workers to speak with it",
                    lambda v=victim: all(v in worker.client._links for worker in workers),
                )
        finish(some)
        assert_as_alone(some)
        assert_copies_equal(some)
        assert not some.failures


def test_a_server_is_started_again_before_its_end_was_noticed() -> None:
    with world(servers=2, replicas=2, workers=2, steps=40) as some:
        some.start(seconds=0.01)
        some.wait_version(5)
        some.kill_server(1)
        some.server(1, incarnation=1)
        some.wait_version(25)
        some.kill_server(1)
        some.server(1, incarnation=2)
        finish(some)
        some.wait_servers()
        assert_as_alone(some)
        assert_copies_equal(some)


def test_a_server_is_given_its_blocks_by_several_others() -> None:
    """Each of three holds what it shares with either of the others."""
    with world(servers=3, replicas=2, workers=2, steps=10**6) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(3)
        some.wait_whole()
        for incarnation in (1, 2):
            for victim in range(3):
                some.kill_server(victim)
                some.wait_version(some.version + 3)
                some.server(victim, incarnation)
                some.wait_whole()
        finish_at(some, some.version + 3, workers)
        some.wait_servers()
        assert_as_alone(some)
        assert_copies_equal(some)
        assert not some.failures


def test_a_server_that_holds_nothing_is_started_again() -> None:
    """Workers have nothing for it, and may have reported before they have a link with it."""
    with world(servers=4, workers=2, steps=40) as some:
        [idle] = set(range(4)) - {server for spec in specs_of(4, 1) for server in spec.servers}
        some.start(seconds=0.01)
        some.wait_version(3)
        some.kill_server(idle)
        some.wait_version(some.version + 3)
        some.server(idle, incarnation=1)
        some.wait_whole()
        finish(some)
        some.wait_servers()
        assert_as_alone(some)
        assert not some.failures


@pytest.mark.parametrize("servers", [2, 3])
def test_the_board_is_started_again_within_a_round(servers: int) -> None:
    """It comes back as the youngest before workers have anything to tell: another keeps it."""
    with world(servers=servers, replicas=2, workers=3, steps=5, lease=2.0) as some:
        some.start(seconds=0.5)
        some.wait_version(1)
        some.wait_whole()
        some.wait_version(2)
        some.cut("server", 1, 0.3)  # it notices both at once: the end, and who comes back
        some.kill_server(0)
        some.server(0, incarnation=1)
        finish(some)
        some.wait_servers()
        assert_as_alone(some)
        assert_copies_equal(some)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_is_cut_off_for_less_than_the_lease(victim: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=25, lease=2.0) as some:
        some.start(seconds=0.002)
        some.wait_version(8)
        some.cut("server", victim, 0.4)
        finish(some)
        some.wait_servers()
        assert_as_alone(some)
        assert_copies_equal(some)
        assert not some.failures


@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_is_cut_off_for_longer(victim: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=25) as some:
        some.start(seconds=0.002)
        some.wait_version(8)
        some.cut("server", victim, 3.0)
        finish(some)
        assert_as_alone(some)
        assert victim not in some.servers[1 - victim].alive
        some.wait_servers(1 - victim)
        assert 1 - victim not in some.failures


def test_a_server_that_was_cut_off_does_not_go_on_alone() -> None:
    """On the other side the run went on; its own state would be a second truth."""
    with world(servers=2, replicas=2, workers=3, steps=2000) as some:
        some.start(seconds=0.02)
        some.wait_version(5)
        some.cut("server", 0, 2.5)
        some.wait_servers(0)
        assert isinstance(some.failures[0], CommError)
        assert "hears nothing of server 1" in str(some.failures[0])
        assert some.servers[0].loop.error is None
        before = some.version
        some.wait_version(before + 5)


def test_a_server_that_was_cut_off_ends_in_order() -> None:
    """It holds only a part, so all is lost for it; nobody hears any more what it has to say."""
    with world(servers=3, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        some.cut("server", 2, 2.5)
        some.wait_servers(2)
        assert isinstance(some.failures[2], CommError)
        assert "hears nothing of server 0, server 1" in str(some.failures[2])
        assert some.servers[2].loop.error is None
        finish_at(some, some.version + 5, workers)


def test_a_server_that_has_all_workers_is_not_cut_off() -> None:
    """It hears nothing of the only other one, which held what it does not: that is lost."""
    with world(servers=2, replicas=1, workers=3, steps=10**6) as some:
        some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        some.cut("server", 1, 6.0)
        some.wait_servers(0)
        assert "all servers that held block" in str(some.failures[0])
        some.wait_servers(1)
        assert "hears nothing of server 0" in str(some.failures[1])


def stand_still(loop: links.Loop, seconds: float) -> None:
    loop.call(lambda: time.sleep(seconds))


def test_nobody_is_given_up_after_all_stood_still() -> None:
    """As when a machine is suspended: what was not heard, nobody could say."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        loops = [one.loop for one in some.servers] + [one.client._loop for one in workers]
        for loop in loops:
            stand_still(loop, 2.5 * some.lease)
        some.wait_version(some.version + 5)
        for server in some.servers:
            assert server.alive == {0, 1}
        finish_at(some, some.version + 5, workers)
        assert workers_of(some) == {(0, 1, 2)}
        assert not some.failures


@pytest.mark.parametrize("at", ["a call", "a wait"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_that_stood_still_sees_that_it_was_given_up(victim: int, at: str) -> None:
    """Its links are closed: not since all others have ended."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        loop = some.servers[victim].loop
        if at == "a call":
            stand_still(loop, 3.0 * some.lease)
        else:
            waits = Stopped(loop._selector, 3.0 * some.lease)
            loop.call(lambda: setattr(loop, "_selector", waits))
        some.wait_servers(victim)
        assert f"hears nothing of server {1 - victim}" in str(some.failures[victim])
        some.server(victim, incarnation=1)
        some.wait_whole()
        finish_at(some, some.version + 5, workers)


class Stopped:
    """A selector whose process is stopped once while it waits."""

    def __init__(self, selector: Any, seconds: float) -> None:
        self.selector, self.seconds = selector, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def select(self, patience: float) -> Any:
        seconds, self.seconds = self.seconds, 0.0
        time.sleep(seconds)
        return self.selector.select(patience)


# -- all that held something are gone --------------------------------------------------------------


def errors_of(some: World) -> list[BaseException]:
    """Return what each worker has ended by."""
    for worker in some.workers.values():
        wait_for(f"worker {worker.index} to end", lambda w=worker: not w.is_alive(), 8.0)
    return [worker.error or AssertionError("no error") for worker in some.workers.values()]


def test_the_only_server_ends() -> None:
    with world(workers=3, steps=1000) as some:
        some.start(seconds=0.01)
        some.wait_version(5)
        some.kill_server(0, port=True)
        for error in errors_of(some):
            assert isinstance(error, CommError)
            assert "no link with any server any more" in str(error)
            assert "they are gone" in str(error)


def test_one_of_two_servers_ends_without_replicas() -> None:
    with world(servers=2, replicas=1, workers=2, steps=1000) as some:
        some.start(seconds=0.01)
        some.wait_version(5)
        some.kill_server(1, port=True)
        for error in errors_of(some):
            assert isinstance(error, CommError)
            assert "all servers that held block" in str(error)
        some.wait_servers()
        assert "all servers that held block" in str(some.failures[0])


# -- workers come and go ---------------------------------------------------------------------------


def workers_of(some: World, since: int = 0) -> set[tuple[int, ...]]:
    """Return who took part in rounds after `since`."""
    return {closed.workers for closed in some.rounds() if closed.number > since}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_worker_is_killed(victim: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=1000) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(5)
        workers[victim].vanish()
        killed, others = some.version, [w for w in workers if w is not workers[victim]]
        some.wait_version(killed + 3, 2.0, *others)
        finish_at(some, some.version + 5, others)
        assert workers_of(some, killed + 2) == {tuple(sorted(w.index for w in others))}


def test_a_worker_joins_in_the_middle() -> None:
    with world(workers=3, steps=40, join_seconds=0.3) as some:
        first = [some.worker(index, seconds=0.01) for index in (0, 1)]
        some.wait_version(10)
        late = some.worker(2, seconds=0.01)
        some.wait_version(15, PATIENCE, late)
        finish(some)
        some.wait_servers()
        assert (0, 1, 2) in workers_of(some)
        assert workers_of(some) == {(0, 1), (0, 1, 2)}
        assert all(map(torch.equal, first[0].params, late.params))
        assert {n for _, n in some.shares()} == {0, 1, 2}


@pytest.mark.parametrize("leaver", [0, 2])
def test_a_worker_leaves(leaver: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=25) as some:
        workers = [
            some.worker(index, seconds=0.005, leave_at=10 if index == leaver else None)
            for index in range(3)
        ]
        some.wait(workers[leaver])
        finish(some)
        some.wait_servers()
        rest = tuple(index for index in range(3) if index != leaver)
        assert workers_of(some, 11) == {rest}
        assert all(map(torch.equal, workers[rest[0]].params, workers[rest[1]].params))
        assert_copies_equal(some)
        assert not some.failures


def test_the_first_worker_that_a_new_server_sees_leaves() -> None:
    """Others have yet to call that server: it is not over for it."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(3)
        workers[2].vanish()
        some.kill_server(1)
        some.wait_version(some.version + 3, PATIENCE, *workers[:2])
        for worker in workers[:2]:
            worker.client._called[1] = time.monotonic() + 2.0  # before that it does not call
        some.server(1, incarnation=1)
        some.wait_whole()
        some.wait(some.worker(2, 1, leave_at=0))
        known = some.version
        some.wait_version(known + 5)
        finish_at(some, some.version + 5, workers[:2])
        some.wait_servers()
        assert some.servers[1].version == some.steps
        assert_copies_equal(some)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_is_killed_and_started_again(victim: int) -> None:
    with world(servers=2, replicas=2, workers=3, steps=60) as some:
        some.start(seconds=0.01)
        for incarnation in (1, 2):
            some.wait_version(15 * incarnation)
            some.workers[victim].vanish()
            back = some.worker(victim, incarnation, seconds=0.01)
            wait_for("it to take part", lambda back=back: len(back.bases) > 2)
        finish(some)
        parts = {(p.worker, p.incarnation) for c in some.rounds() for p in c.parts}
        assert parts == {(w, 0) for w in range(3)} | {(victim, 1), (victim, 2)}
        assert workers_of(some, 55) == {(0, 1, 2)}


def test_an_old_incarnation_is_refused() -> None:
    with world(workers=2, steps=60) as some:
        some.start(seconds=0.01)
        some.wait_version(3)
        some.workers[1].vanish()
        young = some.worker(1, 1, seconds=0.01)
        wait_for("it to take part", lambda: young.bases)
        old = Client(Who("worker", 1, 0), some.addresses, TOKEN, patience_seconds=PATIENCE)
        try:
            with pytest.raises(CommError, match="was started again since"):
                old.start(specs_of(1, 1))
        finally:
            old._loop.stop()
        finish(some)
        assert workers_of(some, 50) == {(0, 1)}


def test_a_worker_is_cut_off_for_less_than_the_lease() -> None:
    with world(servers=2, replicas=2, workers=3, steps=25, lease=2.0) as some:
        some.start(seconds=0.002)
        some.wait_version(8)
        some.cut("worker", 1, 0.4)
        finish(some)
        assert_as_alone(some)
        assert not some.failures


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_is_cut_off_for_longer(victim: int) -> None:
    """Others go on without it; when the network heals, it is one of them again."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(8)
        some.cut("worker", victim, 2.5)
        others = [worker for worker in workers if worker.index != victim]
        some.wait_version(some.version + 15, PATIENCE, *others)
        known = len(workers[victim].bases)
        wait_for("it to take part again", lambda: len(workers[victim].bases) > known + 5)
        finish_at(some, some.version + 10, workers)
        assert {0, 1, 2} - {victim} in [set(found) for found in workers_of(some)]
        assert workers_of(some, some.steps - 3) == {(0, 1, 2)}
        assert not some.failures


def test_a_worker_that_was_cut_off_is_told_what_counted() -> None:
    """Also if what told it so was lost with the link."""
    with world(workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.2)
        workers[1].seconds = 0.0
        some.wait_version(2)
        wait_for("worker 1 to report", lambda: reported(some, 1))
        some.cut("worker", 1, 2.5)
        known = len(workers[1].bases)
        wait_for("it to take part again", lambda: len(workers[1].bases) > known + 2)
        finish_at(some, some.version + 2, workers)
        told = {(w.index, *used) for w in workers for turn in w.turns for used in turn["used"]}
        assert (1, workers[1].bases[known - 1][0], workers[1].bases[known - 1][0]) in told
        assert told == {(p.worker, p.clock, c.number) for c in some.rounds() for p in c.parts}


def test_a_worker_joins_while_a_server_is_cut_off() -> None:
    """It is told of a server that is about to be given up, and does not wait for it for ever."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(5)
        workers[1].vanish()
        some.cut("server", 1, 3.0)
        back = some.worker(1, 1, seconds=0.01)
        wait_for("it to take part", lambda: len(back.bases) > 2, 10.0)
        finish_at(some, some.version + 5, some.workers.values())


def test_a_worker_joins_while_a_server_waits_to_be_let_in() -> None:
    with world(servers=2, replicas=2, workers=3, steps=6) as some:
        workers = some.start(seconds=0.25)
        some.wait_version(1)
        workers[2].vanish()
        some.kill_server(1)
        some.server(1, incarnation=1)
        some.worker(2, 1, seconds=0.25)
        finish(some)
        some.wait_servers()
        assert (0, 1, 2) in workers_of(some, 3)
        assert_copies_equal(some)


def test_a_worker_joins_while_a_server_ends() -> None:
    """What that one says to all is no reason to do without the others."""
    with world(servers=3, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(3)
        some.wait_whole()
        ends = some.servers[2]

        def end(*_: Any) -> None:
            ends.fail(CommError("it hears nothing of the others"))

        ends.on_declare = end  # type: ignore[method-assign]
        workers[1].vanish()
        back = some.worker(1, 1, seconds=0.01)
        wait_for("it to take part", lambda: len(back.bases) > 2 or back.error)
        finish_at(some, some.version + 5, some.workers.values())


def test_the_only_server_ends_while_a_worker_joins() -> None:
    with world(workers=2, steps=10**6) as some:
        ends = some.servers[0]

        def end(*_: Any) -> None:
            ends.fail(CommError("it has no memory left"))

        ends.on_declare = end  # type: ignore[method-assign]
        worker = some.worker(0)
        wait_for("it to end", lambda: not worker.is_alive(), 8.0)
        assert isinstance(worker.error, CommError)
        assert "it has no memory left" in str(worker.error)


@pytest.mark.parametrize("servers", [2, 3])
def test_all_servers_are_started_again(servers: int) -> None:
    """Or gone for good. Nobody is left who could give them anything: they say so."""
    with world(servers=servers, replicas=2, workers=2, steps=10**6, lease=0.5) as some:
        some.start(seconds=0.01)
        some.wait_version(3)
        for index in range(servers):
            some.kill_server(index)
        for index in (0, 1):
            some.server(index, incarnation=1)
        some.wait_servers(0, 1)
        assert any("none is left" in str(failure) for failure in some.failures.values())
        for worker in some.workers.values():
            worker.gone = True


def test_a_worker_that_was_cut_off_finds_servers_that_came_back() -> None:
    """It knows that one is gone, not that it came back; the other was started again since."""
    with world(servers=2, replicas=2, workers=3, steps=10**6) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(3)
        some.wait_whole()
        some.kill_server(1)
        some.wait_version(some.version + 3)
        some.cut("worker", 2, 4.0)
        for victim, incarnation in ((1, 1), (0, 1)):
            some.server(victim, incarnation)
            some.wait_whole()
            if victim == 1:
                some.kill_server(0)
        known = len(workers[2].bases)
        wait_for("it to take part again", lambda: len(workers[2].bases) > known + 5, 15.0)
        finish_at(some, some.version + 5, workers)
        assert workers_of(some, some.steps - 3) == {(0, 1, 2)}


# -- rounds ----------------------------------------------------------------------------------------


def quorum_world(steps: int) -> contextlib.AbstractContextManager[World]:
    """Return a world of three workers, two of which are enough."""
    return world(workers=3, steps=steps, quorum=2, grace_seconds=0.01)


def start_beside(some: World, slow: float) -> list[Worker]:
    """Start two workers, and between them one that takes `slow` seconds for a round."""
    return [some.worker(i, seconds=slow if i == 1 else 0.05) for i in range(3)]


def seconds_of(steps: int, slow: float) -> float:
    """Return how long the rounds of a quorum take beside worker 1, which takes `slow` for each."""
    with quorum_world(steps) as some:
        workers = start_beside(some, slow)
        some.wait_version(1)
        begun = time.monotonic()
        some.wait(workers[0], workers[2])
        took = time.monotonic() - begun
        finish(some)
        return took


def test_a_slow_worker_does_not_slow_down_a_quorum() -> None:
    steps, ratios = 20, []
    for _ in range(3):  # others may take the cores meanwhile
        calm = seconds_of(steps, 0.05)
        ratios.append(calm / seconds_of(steps, 0.25))
        if ratios[-1] >= 0.8:
            return
    raise AssertionError(f"rounds beside a slow worker, of those without: {ratios}")


def test_what_a_slow_worker_had_is_read_by_others() -> None:
    """It is late in each round; if it were given the same again, nobody would ever read that."""
    with quorum_world(25) as some:
        workers = start_beside(some, 0.25)
        some.wait(workers[0], workers[2])
        finish(some)
        in_time = {p.clock for c in some.rounds() for p in c.parts if p.worker == 1}
        turns = [turn for turn in workers[1].turns[:-1] if turn["clock"] not in in_time]
        late = {tuple(turn["share"]) for turn in turns if turn["clock"] < 20}
        assert late, "it was never late"
        assert late <= set(some.shares())


def test_ssp_of_no_staleness_is_sync() -> None:
    with world(servers=2, replicas=2, workers=3, steps=15, mode="ssp", staleness=0) as some:
        some.start()
        finish(some)
        assert_as_alone(some)
        assert all(closed.staleness == 0 for closed in some.rounds())


@pytest.mark.parametrize("bound", [1, 2])
def test_ssp_keeps_its_bound(bound: int) -> None:
    """Workers of different speed run ahead, as far as they may."""
    with world(servers=2, replicas=2, workers=3, steps=25, mode="ssp", staleness=bound) as some:
        workers = [some.worker(index, seconds=0.01 * index) for index in range(3)]
        finish(some)
        for worker in workers:
            assert all(0 <= clock - 1 - base <= bound for clock, base in worker.bases)
        stale = [closed.staleness for closed in some.rounds()]
        assert max(stale) == bound
        assert {clock - 1 - base for clock, base in workers[0].bases} >= {bound}


def test_async_rounds_are_of_one_worker_each() -> None:
    with world(servers=2, replicas=2, workers=3, steps=40, mode="async") as some:
        workers = [some.worker(index, seconds=0.005 * (1 + index)) for index in range(3)]
        finish(some)
        assert all(len(closed.parts) == 1 for closed in some.rounds())
        assert workers_of(some) == {(0,), (1,), (2,)}
        assert all(p.isfinite().all() for worker in workers for p in worker.params)


@pytest.mark.parametrize("board_dies", [False, True])
def test_a_held_round_waits_for_its_speaker(board_dies: bool) -> None:
    """Two others would be enough, and are ready; what the speaker saves is not overtaken."""
    done = threading.Event()

    def busy(turn: dict[str, Any]) -> None:
        outcome = turn["outcome"]
        if turn["version"] == 5 and outcome["number"] == 5 and outcome["speaker"] == 0:
            assert done.wait(PATIENCE)

    try:
        rules = {"quorum": 1, "grace_seconds": 0.0}
        copies = {"servers": 2, "replicas": 2}
        with world(workers=3, steps=20, held=frozenset({5}), **rules, **copies) as some:
            # The others are slower, so that worker 0 is in round 5, and speaks.
            some.worker(0, busy=busy)
            others = [some.worker(index, seconds=0.03) for index in (1, 2)]
            some.wait_version(5)
            wait_for("the others", lambda: all(w.bases[-1:] >= [(6, 0)] for w in others))
            if board_dies:
                some.kill_server(0)
            time.sleep(0.4)  # more than any round takes
            assert some.version == 5
            done.set()
            finish(some)
    finally:
        done.set()


# -- who may speak, and what -----------------------------------------------------------------------

LONG = 60.0  # a lease that does not end before a link is closed for what it brings
_CLOSED = 8.0  # seconds within which it is


class Peer:
    """A socket that speaks the protocol with a server, well or badly."""

    def __init__(self, some: World, server: int = 0) -> None:
        self.sock = socket.create_connection(some.addresses[server], _CLOSED)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it has closed already
            self.sock.sendall(data)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def read(self) -> tuple[Header, bytes]:
        """Return the next frame."""
        header = Header.unpack(self._exactly(HEADER_BYTES), welcome=True)
        return header, self._exactly(header.length)

    def read_until(self, kind: Kind) -> dict[str, Any]:
        while True:
            header, body = self.read()
            assert header.kind is not Kind.REFUSE, body
            if header.kind is kind:
                return json.loads(body or b"{}")

    def hello(self, who: Who, token: str = TOKEN, **changes: Any) -> bytes:
        """Return the answer to the server's CHALLENGE; a change to None leaves a key out."""
        theirs, own = str(self.read_until(Kind.CHALLENGE)["nonce"]), nonce()
        content = {
            **who.__dict__,
            "nonce": own,
            "proof": proof(token, "client", theirs, own, who),
            **changes,
        }
        return text_frame(Kind.HELLO, {k: v for k, v in content.items() if v is not None})

    def enter(self, who: Who) -> None:
        """Come in, as who has the token."""
        self.send(self.hello(who))
        self.read_until(Kind.WELCOME)

    def declare(self) -> None:
        blocks = [spec.to_message() for spec in specs_of(1, 1)]
        self.send(text_frame(Kind.DECLARE, {"blocks": blocks}))

    def take_turn(self, index: int) -> dict[str, Any]:
        """Be worker `index`, and return the first turn."""
        self.enter(Who("worker", index))
        self.declare()
        self.read_until(Kind.WANTED)
        self.send(text_frame(Kind.READY, {}))
        return self.read_until(Kind.TURN)

    def push(self, clock: int) -> None:
        """Send gradients of zeros, and wait until they are there."""
        for spec in specs_of(1, 1):
            self.send(tensor_frame(Kind.PUSH, bytes(4 * spec.numel), key=spec.key, step=clock))
        self.read_until(Kind.HAVE)

    def wait_closed(self) -> None:
        """Return once the server has closed this link."""
        end = time.monotonic() + _CLOSED
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.read()
                assert time.monotonic() < end, "the link is not closed"


def tensor_frame(kind: Kind, data: bytes, length: int | None = None, **where: int) -> bytes:
    return Header(kind, len(data) if length is None else length, **where).pack() + data


WORKER_1 = Who("worker", 1)


def without_token(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, new_token()))


def wrong_proof(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, proof="00" * 32))


def proof_that_is_a_number(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, proof=5))


def proof_that_is_no_unicode(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, proof="\ud800"))


def no_proof(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, proof=None))


def another_than_it_proves(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, index=0))


def proof_of_a_server(peer: Peer) -> None:
    """As the server would say it: what one side says does not do for the other."""
    theirs = str(peer.read_until(Kind.CHALLENGE)["nonce"])
    own = nonce()
    told = proof(TOKEN, "server", theirs, own, WORKER_1)
    peer.send(text_frame(Kind.HELLO, {**WORKER_1.__dict__, "nonce": own, "proof": told}))


def nobody_at_all(peer: Peer) -> None:
    peer.send(peer.hello(WORKER_1, role=[], index={}, nonce=7))


def junk(peer: Peer) -> None:
    peer.send(bytes(range(256)) * 10)


def another_protocol(peer: Peer) -> None:
    peer.send(b"GET / HTTP/1.1\r\nHost: server\r\nAccept: text/html\r\n\r\n")


def another_version(peer: Peer) -> None:
    frame = bytearray(text_frame(Kind.HELLO, {}))
    frame[4] = 99
    peer.send(bytes(frame))


def huge_length(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 2**62).pack())


def huge_tensor(peer: Peer) -> None:
    peer.send(Header(Kind.PUSH, 2**62, step=1).pack())


def frame_before_hello(peer: Peer) -> None:
    peer.send(text_frame(Kind.READY, {}))


def no_json(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 5).pack() + b"\xff\xfe{]\x00")


def no_object(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 3).pack() + b"[1]")


def deep_json(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 4000).pack() + b"[" * 4000)


def long_number(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 4003).pack() + b'{"index": ' + b"9" * 3992 + b"}")


def half_a_header(peer: Peer) -> None:
    peer.send(Header(Kind.HELLO, 10).pack()[:20])
    peer.sock.shutdown(socket.SHUT_WR)


STRANGERS = (
    without_token,
    wrong_proof,
    proof_that_is_a_number,
    proof_that_is_no_unicode,
    no_proof,
    another_than_it_proves,
    proof_of_a_server,
    nobody_at_all,
    junk,
    another_protocol,
    another_version,
    huge_length,
    huge_tensor,
    frame_before_hello,
    no_json,
    no_object,
    deep_json,
    long_number,
    half_a_header,
)


def assert_run_goes_on(some: World) -> None:
    """Neither server nor workers have noticed anything."""
    wait_for(
        "workers to be done",
        lambda: some.failures or not any(w.is_alive() for w in some.workers.values()),
        10.0,
    )
    assert not some.failures
    finish(some)


@pytest.mark.parametrize("do", STRANGERS, ids=lambda do: do.__name__)
def test_a_stranger_loses_its_own_link(do: Callable[[Peer], None]) -> None:
    with world(workers=2, steps=8) as some:
        workers = some.start(seconds=0.005)
        some.wait_version(2)
        known = [worker.client._links[0] for worker in workers]
        with Peer(some) as peer:
            do(peer)
            peer.wait_closed()
        assert_run_goes_on(some)
        assert_as_alone(some)
        assert all(link.open or w.version == 8 for w, link in zip(workers, known, strict=True))
        assert workers_of(some) == {(0, 1)}


def test_a_hello_that_was_overheard_is_worth_nothing() -> None:
    with world(workers=2, steps=8) as some:
        some.start(seconds=0.01)
        some.wait_version(2)
        with Peer(some) as first, Peer(some) as second:
            overheard = first.hello(WORKER_1)  # never sent, so it would be the first to be seen
            second.send(overheard)
            second.wait_closed()
        assert_run_goes_on(some)
        assert_as_alone(some)


def test_strangers_that_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are let wait at once."""
    monkeypatch.setattr(links, "_GREET_SECONDS", 0.5)
    with world(workers=2, steps=60) as some, contextlib.ExitStack() as stack:
        some.start(seconds=0.02)
        some.wait_version(2)
        peers = [stack.enter_context(Peer(some)) for _ in range(links._MOST_STRANGERS + 16)]
        for peer in peers:
            peer.wait_closed()
        assert_run_goes_on(some)


def test_strangers_keep_nobody_out() -> None:
    """As many wait as are let, and others come after them, while workers call."""
    with world(workers=2, steps=20) as some, contextlib.ExitStack() as stack:
        for number in range(2 * links._MOST_STRANGERS):
            stack.enter_context(Peer(some))
            if number == links._MOST_STRANGERS:
                some.start(seconds=0.01)
        assert_run_goes_on(some)
        assert_as_alone(some)


class Trap:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.READY, Kind.PUSH])
def test_nothing_is_unpickled(kind: Kind, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    with world(workers=2, steps=3, lease=LONG) as some:
        real = some.worker(0)
        with Peer(some) as peer:
            if kind is not Kind.HELLO:
                peer.take_turn(1)
            peer.send(Header(kind, len(trap), step=1).pack() + trap)
            peer.wait_closed()
        if kind is Kind.HELLO:
            some.worker(1)
        assert_run_goes_on(some)
        assert real.version == 3
    assert not (tmp_path / "sprung").exists()


# -- peers with the token that make no sense -------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
BLOCK = specs_of(1, 1)[0].to_message()
KEY, NUMEL = BLOCK["key"], BLOCK["numel"]
REPORT = {"clock": 1, "base": 0, "totals": [1.0, 1.0], "servers": [0]}
OFFER = {"name": "evaluation", "after": 0, "workers": [0, 1], "values": [1.0]}
TOO_LARGE = 10**400  # for a float


def text(kind: Kind, **content: Any) -> bytes:
    return text_frame(kind, content)


def raw(kind: Kind, body: bytes) -> bytes:
    return Header(kind, len(body)).pack() + body


def but(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `content` with changes; a change to None leaves a key out."""
    return {k: v for k, v in {**content, **changes}.items() if v is not None}


def bad_blocks() -> dict[str, Any]:
    """Return what a worker may not declare."""
    stretch = ["decay", 1, 0, NUMEL]
    return {
        "no blocks": None,
        "blocks that are a number": 5,
        "block that is a number": [5],
        "empty block": [{}],
        "no key": [but(BLOCK, key=None)],
        "key that is a word": [but(BLOCK, key="0")],
        "key that is negative": [but(BLOCK, key=-1)],
        "no numel": [but(BLOCK, numel=None)],
        "numel that is a fraction": [but(BLOCK, numel=2.5)],
        "no dtype": [but(BLOCK, dtype=None)],
        "dtype that is not known": [but(BLOCK, dtype="float64")],
        "dtype that is a list": [but(BLOCK, dtype=[])],
        "no servers": [but(BLOCK, servers=None)],
        "servers that are empty": [but(BLOCK, servers=[])],
        "servers that are words": [but(BLOCK, servers=["a"])],
        "servers without end": [but(BLOCK, servers=[INFINITY])],
        "servers that are no numbers": [but(BLOCK, servers=[NAN])],
        "servers that are a number": [but(BLOCK, servers=0)],
        "no stretches": [but(BLOCK, stretches=None)],
        "stretches that are numbers": [but(BLOCK, stretches=[1])],
        "stretch that is short": [but(BLOCK, stretches=[stretch[:3]])],
        "stretch of no kind": [but(BLOCK, stretches=[[5, *stretch[1:]]])],
        "stretch with a fraction": [but(BLOCK, stretches=[["decay", 1, 0, 10.5]])],
        "stretch with floats": [but(BLOCK, stretches=[["decay", 1, 0.0, float(NUMEL)]])],
        "stretch backwards": [but(BLOCK, stretches=[["decay", 1, 20, 10]])],
        "stretch that is too long": [but(BLOCK, stretches=[["decay", 1, 0, NUMEL + 1]])],
        "stretch of half a replica": [but(BLOCK, stretches=[["decay", 1.5, 0, NUMEL]])],
        "stretch of no replica": [but(BLOCK, stretches=[["decay", 0, 0, NUMEL]])],
    }


BAD_TURNS: dict[str, Any] = {
    "turn that is a number": 5,
    "turn that is a list": [1],
    "turn that is empty but there": [[]],
    "turn without a share": {"clock": 1},
    "turn without a clock": {"share": [0, 1]},
    "turn whose clock is a word": {"clock": "1", "share": [0, 1]},
    "turn with half a share": {"clock": 1, "share": [0]},
    "turn whose share is words": {"clock": 1, "share": ["a", "b"]},
    "turn whose share is no number": {"clock": 1, "share": [NAN, 0]},
    "turn whose share has no end": {"clock": 1, "share": [INFINITY, 0]},
    "turn whose share is a number": {"clock": 1, "share": 0},
}
BAD_REPORTS: dict[str, Any] = {
    **{f"report without {key}": but(REPORT, **{key: None}) for key in REPORT},
    "clock that is a word": but(REPORT, clock="1"),
    "clock that is a fraction": but(REPORT, clock=1.0),
    "base that is negative": but(REPORT, base=-1),
    "totals that are a word": but(REPORT, totals="11"),
    "totals that are words": but(REPORT, totals=["a", "b"]),
    "totals too large": but(REPORT, totals=[TOO_LARGE, 1.0]),
    "servers that are a number": but(REPORT, servers=0),
    "servers that are words": but(REPORT, servers=["a"]),
    "servers that are no numbers": but(REPORT, servers=[NAN]),
    "servers without end": but(REPORT, servers=[INFINITY]),
}
BAD_OFFERS: dict[str, Any] = {
    **{f"offer without {key}": but(OFFER, **{key: None}) for key in OFFER},
    "workers that are words": but(OFFER, workers=["a"]),
    "workers that are no numbers": but(OFFER, workers=[NAN]),
    "workers without end": but(OFFER, workers=[INFINITY]),
    "values that are words": but(OFFER, values=["a"]),
    "values that are a number": but(OFFER, values=1.0),
    "values too large": but(OFFER, values=[TOO_LARGE]),
    "a round that is a word": but(OFFER, after="a"),
    "a round that is no number": but(OFFER, after=NAN),
}
BAD_BODIES = {
    "no JSON": b"{]",
    "no object": b"[1]",
    "no text": b"\xff\xfe\xfd",
    "deep": b"[" * 10**5,
}
NOT_A_WORKERS = (
    *(Kind.CHALLENGE, Kind.HELLO, Kind.WELCOME, Kind.WANTED, Kind.HAVE, Kind.TURN, Kind.TOTAL),
    *(Kind.ROUND, Kind.SQUARES, Kind.APPLY, Kind.APPLIED, Kind.STATE, Kind.ADOPT),
    *(Kind.JOINED, Kind.ALIVE),
)


def of_a_worker() -> dict[str, bytes]:
    """Return frames that make no sense of a worker that has its first turn."""
    size = 4 * NUMEL
    found = {f"READY: {n}": text(Kind.READY, turn=turn) for n, turn in BAD_TURNS.items()}
    found |= {f"REPORT: {n}": text_frame(Kind.REPORT, c) for n, c in BAD_REPORTS.items()}
    found |= {f"OFFER: {n}": text_frame(Kind.OFFER, c) for n, c in BAD_OFFERS.items()}
    for kind in (Kind.DECLARE, Kind.READY, Kind.REPORT, Kind.OFFER, Kind.BYE, Kind.PULL):
        found |= {f"{kind.name}: {n}": raw(kind, body) for n, body in BAD_BODIES.items()}
    found |= {f"{kind.name} from a worker": text(kind, number=1) for kind in NOT_A_WORKERS}
    found |= {
        "kind 99": bytes(bytearray(Header(Kind.READY).pack()[:5]) + b"\x63" + bytes(26)),
        "FILLED that nobody asked for": text(Kind.FILLED, step=0, num_updates=0, cursor=0),
        "VALUES that nobody asked for": tensor_frame(Kind.VALUES, bytes(size), key=KEY),
        "TENSOR from a worker": tensor_frame(Kind.TENSOR, bytes(size), key=KEY),
        "text that is too long": Header(Kind.REPORT, 2**40).pack(),
        "PULL of an unknown block": text_frame(Kind.PULL, key=77),
        "PULL of an unknown part": text_frame(Kind.PULL, key=KEY, part=50),
        "PULL that has a word": text_frame(Kind.PULL, {"have": "x"}, key=KEY),
        "PULL that has a list": text_frame(Kind.PULL, {"have": [0]}, key=KEY),
        "PUSH that is short": tensor_frame(Kind.PUSH, bytes(size - 4), key=KEY, step=1),
        "PUSH that is long": tensor_frame(Kind.PUSH, bytes(size + 4), key=KEY, step=1),
        "PUSH of nothing": tensor_frame(Kind.PUSH, b"", key=KEY, step=1),
        "PUSH that is huge": tensor_frame(Kind.PUSH, b"", 2**62, key=KEY, step=1),
        "PUSH of an unknown block": tensor_frame(Kind.PUSH, bytes(size), key=77, step=1),
        "PUSH of a round to come": tensor_frame(Kind.PUSH, bytes(size), key=KEY, step=5000),
        "PUSH of a round without end": tensor_frame(
            Kind.PUSH, bytes(size), key=KEY, step=2**64 - 1
        ),
        "old PUSH that is huge": tensor_frame(Kind.PUSH, b"", 2**62, key=KEY, step=0),
        "old PUSH beyond all": tensor_frame(Kind.PUSH, b"", 2**64 - 1, key=KEY, step=0),
        "another block than before": text(
            Kind.DECLARE, blocks=[but(BLOCK, numel=41, stretches=[["decay", 1, 0, 41]])]
        ),
        "a block that comes late": text(Kind.DECLARE, blocks=[but(BLOCK, key=9)]),
    }
    return found


def of_a_filler() -> dict[str, bytes]:
    """Return frames that make no sense of who gives the server what it begins with."""
    about = {"step": 0, "num_updates": 0, "cursor": 0}
    size = 4 * NUMEL
    found = {f"FILLED without {k}": text_frame(Kind.FILLED, but(about, **{k: None})) for k in about}
    found |= {f"FILLED, {k} a word": text_frame(Kind.FILLED, but(about, **{k: "0"})) for k in about}
    return found | {
        "VALUES of an unknown block": tensor_frame(Kind.VALUES, bytes(size), key=77),
        "VALUES of an unknown part": tensor_frame(Kind.VALUES, bytes(size), key=KEY, part=50),
        "VALUES that are short": tensor_frame(Kind.VALUES, bytes(size - 4), key=KEY),
        "VALUES that are huge": tensor_frame(Kind.VALUES, b"", 2**62, key=KEY),
    }


def send_and_be_closed(some: World, peer: Peer, what: str, frame: bytes) -> None:
    """See that a frame costs its link, and that the server goes on."""
    peer.send(frame)
    try:
        peer.wait_closed()
    except (AssertionError, TimeoutError):
        raise AssertionError(f"the link is not closed for: {what}") from None
    turned = threading.Event()
    some.servers[0].loop.call(turned.set)
    lives = turned.wait(5.0) and not some.failures
    assert lives, f"the server has ended for: {what}, by {some.failures or some.servers[0].failure}"


SORTS = sorted({name.split(":")[0].split()[0] for name in of_a_worker()})


@pytest.mark.parametrize("sort", SORTS)
def test_a_worker_that_makes_no_sense_loses_its_own_link(sort: str) -> None:
    """The other waits in its first round, and then goes on alone."""
    begin = threading.Event()
    try:
        with world(workers=2, steps=3, lease=LONG) as some:
            real = some.worker(0, busy=lambda turn: begin.wait(PATIENCE))
            known = None
            for what, frame in of_a_worker().items():
                if what.split(":")[0].split()[0] == sort:
                    with Peer(some) as peer:
                        assert peer.take_turn(1)["clock"] == 1
                        known = known or real.client._links[0]
                        send_and_be_closed(some, peer, what, frame)
            assert real.client._links[0] is known
            begin.set()
            assert_run_goes_on(some)
            assert real.version == 3
            assert workers_of(some) == {(0,)}
    finally:
        begin.set()


def test_blocks_that_make_no_sense() -> None:
    """Of a worker that comes before all others; nothing of them is left."""
    with world(workers=2, steps=5, lease=LONG) as some:
        for what, blocks in bad_blocks().items():
            with Peer(some) as peer:
                peer.enter(WORKER_1)
                frame = text_frame(Kind.DECLARE, but({"blocks": blocks}))
                send_and_be_closed(some, peer, what, frame)
        some.start()
        assert_run_goes_on(some)
        assert_as_alone(some)


@pytest.mark.parametrize("declared", [True, False])
def test_beginnings_that_make_no_sense(declared: bool) -> None:
    """Who comes after them gives the server what it begins with."""
    with world(workers=1, steps=3, lease=LONG) as some:
        for what, frame in of_a_filler().items():
            with Peer(some) as peer:
                peer.enter(Who("worker", 0))
                if declared:
                    peer.declare()
                    assert peer.read_until(Kind.WANTED)["fill"]
                send_and_be_closed(some, peer, what, frame)
        some.worker(0)
        assert_run_goes_on(some)
        assert_as_alone(some)


def test_a_beginning_before_any_block_is_declared() -> None:
    with world(workers=1, steps=3, lease=LONG) as some:
        with Peer(some) as peer:
            peer.enter(Who("worker", 0))
            peer.send(text(Kind.FILLED, step=0, num_updates=0, cursor=0))
            peer.wait_closed()
        some.worker(0)
        assert_run_goes_on(some)
        assert_as_alone(some)


def reported(some: World, worker: int) -> bool:
    board = some.servers[0].board
    member = board.rounds.members.get(worker) if board is not None else None
    return member is not None and bool(member.reports)


def test_a_report_of_what_was_not_pushed() -> None:
    """Who tells of a gradient that no server has is not believed; the others go on."""
    with world(workers=2, steps=3, lease=LONG) as some:
        real = some.worker(0)
        with Peer(some) as peer:
            peer.take_turn(1)
            wait_for("the other's report", lambda: reported(some, 0))
            peer.send(text_frame(Kind.REPORT, REPORT))
            peer.wait_closed()
        assert_run_goes_on(some)
        assert real.version == 3


def test_a_report_with_other_totals_than_all_have() -> None:
    with world(workers=2, steps=3, lease=LONG) as some:
        real = some.worker(0)
        with Peer(some) as peer:
            peer.take_turn(1)
            wait_for("the other's report", lambda: reported(some, 0))
            peer.push(1)
            peer.send(text_frame(Kind.REPORT, but(REPORT, totals=[1.0])))
            peer.wait_closed()
        assert_run_goes_on(some)
        assert real.version == 3


def test_an_offer_with_other_values_than_all_have() -> None:
    found: list[list[float]] = []

    def add_up(turn: dict[str, Any]) -> None:
        if turn["clock"] == 1:
            found.append(some.workers[0].client.add_up("evaluation", 0, [0, 1], [1.0, 2.0]))

    with world(workers=2, steps=3, lease=LONG) as some:
        some.worker(0, busy=add_up)
        with Peer(some) as peer:
            peer.take_turn(1)
            board = some.servers[0].board
            assert board is not None
            wait_for("the other's offer", lambda: board._sums)
            peer.send(text_frame(Kind.OFFER, OFFER))
            peer.wait_closed()
        assert_run_goes_on(some)
        assert found == [[1.0, 2.0]]


def test_a_worker_that_is_not_meant_to_be() -> None:
    with world(workers=2, steps=5) as some:
        some.start(seconds=0.01)
        for who in (Who("worker", 2), Who("server", 1), Who("worker", 0, 0, 3, 2)):
            with Peer(some) as peer:
                peer.send(peer.hello(who))
                peer.wait_closed()
        assert_run_goes_on(some)
        assert_as_alone(some)


def test_a_worker_that_stops_in_the_middle_of_a_gradient() -> None:
    """Half a tensor, then nothing: its lease ends, and the others go on."""
    with world(workers=2, steps=3) as some:
        real = some.worker(0)
        with Peer(some) as peer:
            peer.take_turn(1)
            frame = tensor_frame(Kind.PUSH, bytes(4 * SIZES[1]), key=specs_of(1, 1)[1].key, step=1)
            peer.send(frame[: len(frame) // 2])
            peer.wait_closed()
        assert_run_goes_on(some)
        assert real.version == 3


def test_a_gradient_in_pieces_is_one_gradient() -> None:
    """A peer that speaks well, byte by byte or all at once, is a worker as any other."""
    with world(workers=2, steps=1) as some:
        real = some.worker(0)
        with Peer(some) as peer:
            peer.take_turn(1)
            frames = b"".join(
                tensor_frame(Kind.PUSH, struct.pack("<f", 1.0) * s.numel, key=s.key, step=1)
                for s in specs_of(1, 1)
            ) + text_frame(Kind.REPORT, REPORT)
            for begin in range(0, len(frames), 777):
                peer.send(frames[begin : begin + 777])
            peer.read_until(Kind.TURN)
            peer.send(text_frame(Kind.BYE))
            some.wait(real)
            assert not some.failures
            assert real.turns[-1]["outcome"]["totals"] == [1.0, 2.0]
            assert workers_of(some) == {(0, 1)}
