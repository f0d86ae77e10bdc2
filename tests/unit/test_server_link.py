"""One link, and the loop that it is on: what a peer's end does to them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bigtrain.errors import CommError
from bigtrain.server.client import Client
from bigtrain.server.link import Link, Loop
from bigtrain.server.protocol import Header, Kind, Who, text_frame

LEASE = 1.0


class Closed:
    """What has become of links: (link, why)."""

    def __init__(self) -> None:
        self.links: list[tuple[Link, str]] = []

    def greet(self, who: Who) -> dict[str, Any]:
        return {}

    def opened(self, link: Link, greeting: dict[str, Any]) -> None:
        pass

    def room(self, link: Link, header: Header) -> memoryview:
        return memoryview(bytearray(header.length))

    def frame(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        pass

    def closed(self, link: Link, why: str) -> None:
        self.links.append((link, why))

    def tick(self, now: float) -> None:
        pass


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop(Closed(), "ab" * 32, LEASE)
    yield made
    made._close()


def linked(loop: Loop) -> tuple[Link, socket.socket]:
    """Return a link, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname(), 5.0)
        here, _ = listener.accept()
    here.setblocking(False)
    return loop._add(here, None), there


def test_a_peer_that_is_gone_may_be_refused(loop: Loop) -> None:
    """Nobody hears why, and nothing else happens."""
    link, there = linked(loop)
    there.close()
    with contextlib.suppress(OSError):  # the second write finds the pipe broken
        link.sock.sendall(b"x")
        time.sleep(0.05)
    link.refuse("it makes no sense")
    assert loop.handler.links == [(link, "it makes no sense")]
    assert not loop.links


def test_what_waited_for_who_is_refused_is_free_again(loop: Loop) -> None:
    link, there = linked(loop)
    sent: list[str] = []
    link.send(Kind.TENSOR, memoryview(bytes(8)), lambda: sent.append("all"))
    link.refuse("it makes no sense")
    assert sent == ["all"]
    there.close()


def test_who_is_silent_for_the_lease_is_given_up(loop: Loop) -> None:
    link, there = linked(loop)
    link.who = Who("worker", 0)
    loop._check(link.heard + 0.9 * LEASE)
    assert link.open
    loop._check(link.heard + 1.1 * LEASE)
    assert not link.open
    assert link.silent
    there.close()


@pytest.mark.parametrize("late", [0.1, 0.5, 5.0])
def test_a_lease_is_longer_by_what_this_process_stood_still(loop: Loop, late: float) -> None:
    link, there = linked(loop)
    link.who = Who("worker", 0)
    link.heard = loop._seen = time.monotonic() - late * LEASE
    loop._check(loop._see_whether_it_stood_still())
    assert link.open
    assert link.heard <= time.monotonic()
    loop._check(time.monotonic() + 1.1 * LEASE)
    assert not link.open
    there.close()


def test_frames_stay_in_order_when_a_delay_ends() -> None:
    """What was said in it waits still; what comes after waits behind it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop = Loop(Closed(), "t", 5.0)
    link = Link(loop, ours, None)
    loop.links.append(link)
    loop._selector.register(ours, selectors.EVENT_READ, link)
    loop.delay, loop.delay_until = 0.2, time.monotonic() + 0.15
    link._queue(memoryview(b"1" * 8))
    time.sleep(0.13)
    link._queue(memoryview(b"2" * 8))
    time.sleep(0.03)
    link._queue(memoryview(b"3" * 8))
    time.sleep(0.06)
    link._write()
    time.sleep(0.3)
    link._write()
    assert theirs.recv(100) == b"1" * 8 + b"2" * 8 + b"3" * 8
    loop._close()
    theirs.close()


def test_a_stranger_who_begins_with_the_last_word() -> None:
    """It loses its link; we try again until we have waited long enough."""
    listener = socket.create_server(("127.0.0.1", 0))

    def welcome() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(text_frame(Kind.WELCOME, {"proof": "x"}))
            time.sleep(0.5)

    thread = threading.Thread(target=welcome, daemon=True)
    thread.start()
    client = Client(Who("worker", 0), [listener.getsockname()], "ab" * 32, patience_seconds=1.5)
    with pytest.raises(CommError, match="has waited"):
        client.start([])
    client._loop.stop(0.0)
    thread.join(5.0)
    listener.close()
