"""Links and processes that fail at the worst moment: slow, half done, one rank of several."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from server_world import TOKEN, World, alone, initial, leaves_nothing, specs_of, wait_for, world

from bigtrain.server.client import Client, receivers_of
from bigtrain.server.link import Link
from bigtrain.server.protocol import Kind, Who
from bigtrain.server.table import bytes_of

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_nothing():
        yield


class SlowSocket:
    """Sends a few hundred bytes at a time."""

    def __init__(self, sock: Any) -> None:
        self._sock, self._at = sock, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, pieces: Any) -> int:
        if time.monotonic() < self._at:
            raise BlockingIOError
        self._at = time.monotonic() + 0.01
        return self._sock.send(bytes(pieces[0])[:400])


def test_bytes_of_a_round_that_is_over_go_nowhere() -> None:
    """A gradient of a slow link is half here when its round closes without it; the memory it is
    being written to is no other gradient's."""
    wrong: list[tuple[Any, int]] = []
    with world(workers=3, quorum=2, grace_seconds=0.05, steps=14) as some:
        workers = some.start(seconds=0.02)
        pushed: dict[tuple[int, int, int], bytes] = {}
        for worker in workers:
            spy_on(worker, pushed)
        slow = workers[1].client
        slow._loop.call(lambda: [slow_down(link) for link in slow._links.values()])
        table = some.servers[0].table
        add_up = table.add_up

        def checked(version: int, sources: Any) -> Any:
            for source in sources:
                for key, message in table._gradients.get(source, {}).items():
                    sent = pushed.get((source[0], source[2], key))
                    if sent is not None and bytes(message.numpy()) != sent:
                        wrong.append((source, key))
            return add_up(version, sources)

        table.add_up = checked  # type: ignore[method-assign]
        some.wait_version(14, 30.0, workers[0], workers[2])
    assert not wrong


def spy_on(worker: Any, pushed: dict[tuple[int, int, int], bytes]) -> None:
    push = worker.client.push

    def noted(clock: int, key: int, gradient: memoryview) -> None:
        pushed[worker.index, clock, key] = bytes(gradient)
        push(clock, key, gradient)

    worker.client.push = noted


def slow_down(link: Any) -> None:
    link.sock = SlowSocket(link.sock)


def test_a_rank_of_a_worker_loses_its_link_for_a_moment() -> None:
    """The worker takes part again, and the run ends when all have left."""
    with world(workers=2, quorum=2, steps=10**6) as some:
        some.worker(0, seconds=0.02)
        clients, over = two_ranks(some), threading.Event()
        turns: list[int] = []
        thread = threading.Thread(target=take_turns, args=(clients, turns, over), daemon=True)
        thread.start()
        wait_for("turns", lambda: len(turns) > 3)
        second = clients[1]
        second._loop.call(lambda: [link.close("reset") for link in list(second._links.values())])
        time.sleep(0.5)
        known = len(turns)
        wait_for("turns afterwards", lambda: len(turns) > known + 3)
        over.set()
        thread.join(30.0)
        leave(some, clients)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("server", [0, 1])
def test_a_rank_of_a_worker_loses_a_link_before_it_pushes(rank: int, server: int) -> None:
    """Once it is there again the server has all, and the worker's part of the round counts."""
    with world(servers=2, workers=2, quorum=2, steps=10**6, stall_seconds=60.0) as some:
        some.worker(0, seconds=0.02)
        clients, over, turns = two_ranks(some), threading.Event(), []
        lost: list[int] = []

        def lose(clock: int) -> None:
            if clock == 4 and not lost:
                lost.append(clock)
                loop = clients[rank]._loop
                loop.call(lambda: clients[rank]._links[server].close("reset"))

        args = (clients, turns, over, lose)
        thread = threading.Thread(target=take_turns, args=args, daemon=True)
        thread.start()
        wait_for("turns", lambda: len(turns) > 8, 20.0)
        sizes = [len(client._pushes) for client in clients]
        over.set()
        thread.join(30.0)
        leave(some, clients)
        assert lost
        assert max(sizes) <= 2, "pushes of rounds that are over are kept"


def two_ranks(some: World) -> list[Client]:
    servers = len(some.servers)
    specs = specs_of(servers, 1)
    clients = [
        Client(Who("worker", 1, 0, rank, 2), some.addresses, TOKEN, lease_seconds=1.0)
        for rank in (0, 1)
    ]
    others = (receivers_of(specs), ())
    starts = [
        threading.Thread(target=client.start, args=(mine, more))
        for client, mine, more in zip(clients, (specs[:2], specs[2:]), others, strict=True)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join(30.0)
    clients[0].ready()
    return clients


def leave(some: World, clients: list[Client]) -> None:
    """End the run, whose other worker is number 0."""
    for client in clients:
        client.leave()
    some.workers[0].leave_at = 0
    some.wait()
    some.wait_servers()


def take_turns(
    clients: list[Client],
    turns: list[int],
    over: threading.Event,
    before: Callable[[int], None] = lambda clock: None,
) -> None:
    params = initial()
    specs = specs_of(len(clients[0].addresses), 1)
    clock = 0
    while not over.is_set():
        turn = clients[0].next_turn(clock)
        clock = turn["clock"]
        turns.append(clock)
        clients[1].begin(clock)
        before(clock)
        for spec, values in zip(specs, params, strict=True):
            clients[int(spec is specs[2])].push(clock, spec.key, bytes_of(values))
        clients[1].wait_pushed(clock)
        have = clients[0].wait_pushed(clock)
        clients[0].report(clock, turn["version"], [1.0, 1.0], have)


def test_a_sum_that_was_told_is_told_again() -> None:
    """A worker was cut off while it was told."""
    sums: list[list[float]] = []
    with world(workers=2, quorum=2, steps=12, stall_seconds=60.0) as some:

        def late(turn: dict[str, Any]) -> None:
            if turn["version"] == 3:
                time.sleep(0.7)
                sums.append(some.workers[0].client.add_up("loss", 3, [0, 1], [1.0]))

        def cut(turn: dict[str, Any]) -> None:
            if turn["version"] == 3:
                threading.Timer(0.2, lambda: some.cut("worker", 1, 2.5)).start()
                sums.append(some.workers[1].client.add_up("loss", 3, [0, 1], [2.0]))

        some.worker(0, busy=late, seconds=0.3)
        some.worker(1, busy=cut)
        some.wait()
    assert sums[0] in ([1.0], [3.0])
    assert len(sums) == 2


def test_a_sum_does_not_wait_for_who_has_gone_on() -> None:
    """Rounds were closed without who waits for it, and another has never heard of its round."""
    sums: list[tuple[list[float], int]] = []
    with world(workers=2, quorum=1, steps=20, grace_seconds=0.02) as some:

        def add_up(turn: dict[str, Any]) -> None:
            if turn["version"] == 3:
                found = some.workers[0].client.add_up("loss", 3, [0, 1], [1.0])
                sums.append((found, some.workers[1].version))

        some.worker(0, busy=add_up)
        some.worker(1, seconds=0.1)
        some.wait()
    [(found, version)] = sums
    assert found == [1.0]
    assert version < 10, "it was told when the other had left"


# -- servers that lose each other ------------------------------------------------------------------


def test_the_board_dies_while_another_updates() -> None:
    """The next board orders the update again; it is made once."""
    with world(servers=3, replicas=2, workers=2, steps=8) as some:
        slow, fast = some.servers[1].table, some.servers[0].table
        apply, apply_fast = slow.apply, fast.apply

        def late(version: int, *rest: Any) -> None:
            if version == 4:
                time.sleep(0.5)
            apply(version, *rest)

        def fatal(version: int, *rest: Any) -> None:
            apply_fast(version, *rest)
            if version == 4:
                threading.Thread(target=some.kill_server, args=(0,)).start()

        slow.apply, fast.apply = late, fatal  # type: ignore[method-assign]
        some.start()
        some.wait()
        some.wait_servers()
        assert [server.num_updates for server in some.servers[1:]] == [8, 8]
        for worker in some.workers.values():
            assert all(map(torch.equal, worker.params, alone(8, 2)))


@pytest.mark.parametrize(("servers", "other"), [(2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("how", ["closed", "deaf"])
def test_two_servers_that_live_lose_their_link(servers: int, other: int, how: str) -> None:
    """All workers reach both, and follow one; the other ends."""
    with world(servers=servers, replicas=2, workers=4, steps=10**6, lease=1.0) as some:
        workers = some.start(seconds=0.01)
        some.wait_version(10)
        some.wait_whole()
        first, second = some.servers[0], some.servers[other]
        ends = first.peers.links[other], second.peers.links[0]
        first.loop.call(lambda: do_to(ends[0], how))
        second.loop.call(lambda: do_to(ends[1], how))
        wait_for("one of them to end", lambda: other in some.failures)
        some.wait_version(some.version + 10)
        some.steps = some.version + 5
        for worker in workers:
            worker.leave_at = some.steps
        some.wait()
        some.shares()
        assert "the run may go on at the other side" in str(some.failures.pop(other))
        assert not some.failures
        assert [r.workers for r in some.rounds()] == [(0, 1, 2, 3)] * some.steps


def do_to(link: Link, how: str) -> None:
    if how == "closed":
        with contextlib.suppress(OSError):  # it is closed by the other's
            link.sock.shutdown(socket.SHUT_RDWR)
        return

    def swallow(events: int) -> None:
        with contextlib.suppress(OSError):
            link.sock.recv(1 << 20)

    link.on_event = swallow  # type: ignore[method-assign]
    link._queue = lambda data, sent=None: sent() if sent else None  # type: ignore[method-assign]


def test_a_worker_ends_long_after_a_server_was_lost() -> None:
    """Nothing was heard of that server; it is no cut network if the worker was seen to end."""
    with world(servers=2, replicas=2, workers=2, steps=10**6, lease=0.5) as some:
        some.start(seconds=0.01)
        some.wait_version(5)
        some.cut("server", 1, 1000.0)
        wait_for("the run to go on", lambda: some.servers[0].peers.followed and some.version > 5)
        some.wait_version(some.version + 20)
        some.workers[1].vanish()
        time.sleep(1.5)  # three leases
        some.wait_version(some.version + 5)
        some.workers[0].leave_at = 0
        some.wait()
        assert 0 not in some.failures


def test_what_is_sent_again_changes_nothing() -> None:
    """It may be of the next round by then: the link was cut while the worker waited."""
    with world(servers=2, replicas=2, workers=2, steps=10, lease=3.0) as some:

        def send_again() -> None:
            for spec, values in zip(specs_of(2, 2), initial(), strict=True):
                for server in spec.servers:
                    wrong = bytes_of(values.fill_(1e6))
                    client._links[server].send(Kind.PUSH, wrong, key=spec.key, step=5)

        client = some.worker(0).client
        some.worker(1, seconds=0.2)
        wait_for("its report", lambda: (client._report or {}).get("clock") == 5)
        client._loop.call(send_again)
        some.wait()
        assert all(map(torch.equal, some.workers[0].params, alone(10, 2)))


def test_what_makes_no_sense_costs_the_link_that_it_came_by() -> None:
    """It was kept for the time when its server keeps the board; no server's link is lost."""
    with world(servers=3, replicas=2, workers=2, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(5)
        some.wait_whole()
        client = workers[1].client
        client._loop.call(lambda: client._links[1].say(Kind.REPORT, {"clock": "x"}))
        wait_for("it to be there", lambda: some.servers[1]._early)
        some.kill_server(0)
        some.wait_version(some.version + 10)
        assert some.servers[1].alive == {1, 2}
        for worker in workers:
            worker.leave_at = some.version + 5
        some.wait()
        assert not some.failures


def test_gradients_that_come_too_late_leave_nothing() -> None:
    with world(servers=1, workers=3, steps=60, quorum=2, grace_seconds=0.0, lease=3.0) as some:
        some.worker(0, seconds=0.004)
        some.worker(1, seconds=0.004)
        some.worker(2, seconds=0.02)
        some.wait_version(59)
        table = some.servers[0].table
        sizes = len(table._here), len(table._filling), len(table._gradients)
        some.wait()
    assert max(sizes) <= 3 * 3 * 2, sizes


# -- servers that come back ------------------------------------------------------------------------


def test_a_server_comes_back_before_the_run_begins() -> None:
    with world(servers=3, replicas=2, workers=2, steps=10**6) as some:
        wait_for("servers", lambda: all(len(s.peers.links) == 2 for s in some.servers))
        some.kill_server(1)
        some.server(1, incarnation=1)
        wait_for("its call", lambda: 1 in some.servers[0].guests.waiting)
        some.start(seconds=0.02)
        some.wait_whole()


def test_the_board_dies_while_a_guest_waits() -> None:
    with world(servers=3, replicas=3, workers=2, steps=10**6) as some:
        some.start(seconds=0.6)
        some.wait_version(1)
        some.kill_server(2)
        some.server(2, incarnation=1)
        wait_for("its calls", lambda: all(2 in s.guests.waiting for s in some.servers[:2]))
        some.kill_server(0)
        some.wait_servers(2)  # it begins anew
        some.server(2, incarnation=2)
        two = some.servers[1:]
        wait_for("it to be let in", lambda: all(s.alive == {1, 2} for s in two))


def test_a_guest_ends_while_the_board_asks_how_far_all_are() -> None:
    """It is not waited for, or all would for ever."""
    found: list[set[int]] = []
    with world(servers=2, replicas=2, workers=2, steps=10**6) as some:
        some.start(seconds=0.5)
        some.wait_version(1)
        some.kill_server(1)
        some.server(1, incarnation=1)
        first, board = some.servers[0], some.servers[0].board
        assert board is not None
        wait_for("its call", lambda: 1 in board._waiting)

        def end() -> None:
            board._asked = {0}
            first.guests._links[1].close("it is gone")
            found.append(set(board._waiting))
            board._asked = set()

        first.loop.call(end)
        wait_for("its end", lambda: found)
    assert found == [set()]


def test_two_servers_come_back_together() -> None:
    """They meet as guests; who is let in first is no guest for the other then."""
    with world(servers=3, replicas=3, workers=2, steps=10**6) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        for index in (0, 1):
            some.kill_server(index)
            some.wait_version(some.version + 2)
        for worker in workers:
            worker.seconds = 0.5  # guests are let in between two rounds
        some.wait_version(some.version + 1)
        for index in (0, 1):
            some.server(index, incarnation=1)
        wait_for("their calls", lambda: some.servers[0].peers.links and some.servers[1].peers.links)
        for worker in workers:
            worker.seconds = 0.02
        some.wait_whole()
        some.wait_version(some.version + 10)
        assert not some.failures
        assert all(len(server.alive) == 3 for server in some.servers)
        for worker in workers:
            worker.leave_at = some.version + 5
        some.wait()


def test_a_worker_makes_up_the_majority_again() -> None:
    """One server says nothing, and one of two workers is killed: with it back, all goes on."""
    with world(servers=2, replicas=2, workers=2, steps=10**6) as some:
        some.start(seconds=0.02)
        some.wait_version(3)
        some.servers[1].loop.call(lambda: time.sleep(4.0))
        wait_for("the lease's end", lambda: 1 in some.servers[0].peers.silent)
        some.wait_version(some.version + 3)
        some.workers[1].vanish()
        time.sleep(0.2)
        back = some.worker(1, 1, seconds=0.02)
        wait_for("it to take part", lambda: len(back.bases) > 2)
        assert 0 not in some.failures


def test_servers_that_take_long_to_start_have_one_link() -> None:
    with world(servers=2, replicas=2, workers=1, steps=10**6) as some:
        wait_for("links", lambda: all(s.peers.links for s in some.servers))
        late = some.servers[0]
        late.loop.call(lambda: time.sleep(1.5))
        some.servers[1].loop.call(lambda: some.servers[1].peers.links[0].close("for a test"))
        time.sleep(2.0)
        from_servers = [k for k in late.loop.links if k.who is None or k.who.role == "server"]
        assert len(from_servers) <= 1


def test_an_order_that_makes_no_sense_costs_a_link() -> None:
    """As ever, with nobody who could be asked again: but the server does not break."""
    with world(servers=3, replicas=2, workers=1, steps=10**6) as some:
        some.start(seconds=0.02)
        some.wait_version(3)
        some.wait_whole()
        first = some.servers[0]
        first.loop.call(lambda: first.peers.links[1].say(Kind.ROUND, {}))
        some.wait_version(some.version + 5)
        assert some.servers[1].loop.error is None
