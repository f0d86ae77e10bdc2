"""One link, and the loop that it is on: what a peer's end does to them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bigtrain.server.link import Link, Loop
from bigtrain.server.protocol import Header, Kind, Who

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
