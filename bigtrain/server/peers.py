"""The servers of a run, as one of them sees them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from bigtrain.server.link import Link, Loop
from bigtrain.server.protocol import Kind, Malformed, Who

_CALL_SECONDS = 0.5  # between two tries to reach another server


class Peers:
    """The other servers: who lives, who is to keep the board, and the links with them.

    index: of this server among `addresses`; incarnation: how often it was started before.
    """

    def __init__(self, index: int, addresses: Sequence[tuple[str, int]], incarnation: int) -> None:
        self.index, self.addresses, self.incarnation = index, addresses, incarnation
        self.links: dict[int, Link] = {}
        self.dead: set[int] = set()
        self.silent: set[int] = set()  # of these, those that may live nevertheless
        self.followers: set[int] = set()  # workers that follow us, and not those
        self.followed = True  # do, or did, more than half of all workers?
        self.ask_at = 0.0  # when workers are asked
        self._order = list(range(len(addresses)))
        self._incarnations: dict[int, int] = {}
        self._called: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def alive(self) -> frozenset[int]:
        """Servers that live, this one too."""
        return frozenset(range(len(self))) - self.dead

    @property
    def seniority(self) -> list[int]:
        """Servers that live, those first that have lived longest: the first keeps the board."""
        return [server for server in self._order if server not in self.dead]

    @property
    def missing(self) -> frozenset[int]:
        """Servers that live, as far as is known, and have no link with this one."""
        return self.alive - self.links.keys() - {self.index}

    def say(self, kind: Kind, content: dict[str, Any] | None = None) -> None:
        """Tell all others that live."""
        for server in sorted(self.links.keys() & self.alive):
            self.links[server].say(kind, content)

    def greet(self, who: Who) -> None:
        """Raise Malformed if that server is not welcome."""
        if who.index >= len(self):
            raise Malformed(f"{who}, of {len(self)}")
        if who.index in self.dead and not self.is_new(who):
            raise Malformed(f"{who} was given up; the run goes on without it")

    def is_new(self, who: Who) -> bool:
        """Was it started again, since we knew it?"""
        return who.incarnation > self._incarnations.get(who.index, 0)

    def know(self, who: Who) -> None:
        self._incarnations[who.index] = who.incarnation

    @property
    def leads(self) -> bool:
        """Is this server the one that has lived longest?"""
        return self.seniority[0] == self.index

    def lose(self, server: int, *, silent: bool, patience: float = 0.0) -> None:
        """It is gone; silent: it may live, for all we know. Then workers are asked whom they
        follow; who has not led so far lets its elders ask first, each for `patience` seconds."""
        led = self.leads
        self.dead.add(server)
        if silent:
            self.silent.add(server)
            self.followers, self.followed = set(), False
            turn = 0 if led else self._order.index(self.index)
            self.ask_at = time.monotonic() + turn * patience

    def ended(self, server: int) -> bool:
        """A server that we have lost is gone in truth; return whether we had waited for that."""
        waited = bool(self.silent) and not self.followed
        self.silent.discard(server)
        self.followed |= not self.silent
        return waited and self.followed

    def take_back(self, server: int, link: Link) -> None:
        """It is one of those that live again, and the youngest."""
        self.links[server] = link
        self.dead.discard(server)
        self.silent.discard(server)
        self._order = [s for s in self._order if s != server and s in self.alive] + [server]

    def join(self, alive: Iterable[int]) -> None:
        """This server is one of those that live again, as the youngest."""
        self._order = [*alive, self.index]
        self.dead = set(range(len(self))) - set(self._order)

    def call(self, loop: Loop, now: float, *, everybody: bool) -> None:
        """Call those that have no link with us yet: those before us in number, or everybody."""
        for server in sorted(self.missing):
            idle = now - self._called.get(server, 0.0) >= _CALL_SECONDS
            calls = any(link.target == server for link in loop.links)  # it has yet to answer
            if idle and not calls and (everybody or server < self.index):
                self._called[server] = now
                me = Who("server", self.index, self.incarnation)
                loop.connect(self.addresses[server], me, server)

    @staticmethod
    def named(servers: Iterable[int]) -> str:
        return ", ".join(f"server {server}" for server in sorted(servers))
