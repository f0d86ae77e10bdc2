"""Servers that come back: a guest is given what it is to hold, and is let in between two rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bigtrain.errors import BigtrainError
from bigtrain.server.link import Link
from bigtrain.server.protocol import LOSS, PAGE, Kind, Who, number
from bigtrain.server.rows import RowSpec
from bigtrain.server.table import Spec, bytes_of, spec_from_message

if TYPE_CHECKING:
    from bigtrain.server.server import Server


_MISSING_LEASES = 6  # that a guest waits for servers that it cannot reach, beside other guests


class Guests:
    """The guests of a server: others that were started again, and are not among us yet."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._links: dict[int, Link] = {}
        self._incarnations: dict[int, int] = {}  # of those
        # Guests that we must give something, and that have not called us yet: their incarnations.
        self._owed: dict[int, int] = {}
        self._order: dict[str, Any] = {}  # what the last of them is told of the run

    def take(self, link: Link, who: Who) -> None:
        """A server was started again; its end may not have been noticed yet."""
        server = self._server
        old = server.peers.links.pop(who.index, None)
        if old is not None or (who.index not in server.peers.dead and not server.admission.waits):
            server.standing.lose(who.index, "it was started again")
        if old is not None:
            old.close("it was started again")
        server.peers.know(who)
        if server.peers.ended(who.index):
            server.standing.go_on()
        self._links[who.index] = link
        self._incarnations[who.index] = who.incarnation
        if self._owed.pop(who.index, -1) == who.incarnation:
            self._give_all(who.index)
        if server.board is not None and server.board.active:
            server.board.on_guest(who.index)

    @property
    def waiting(self) -> list[int]:
        """Those that have called us."""
        return sorted(self._links)

    def closed(self, link: Link, who: Who) -> bool:
        """Was this the link with a guest? Then it is forgotten."""
        if self._links.get(who.index) is not link:
            return False
        del self._links[who.index]
        board = self._server.board
        if board is not None and board.active:
            board.on_guest_lost(who.index, time.monotonic())
        return True

    # -- as the board orders -------------------------------------------------------------------

    def adopt(self, guest: int, content: dict[str, Any]) -> None:
        """Tell a guest what it will hold; once it has room for that, all will be told to give."""
        server = self._server
        about = {**server.about, "step": server.version, "num_updates": server.num_updates}
        sources = {self._source_for(s) for s in server.specs.values() if guest in s.servers}
        self._order = {
            **content,
            "about": about,
            "alive": server.seniority,
            "specs": [spec.to_message() for spec in server.specs.values()],
            "sources": sorted(sources),
            "incarnation": self._incarnations.get(guest, 0),
        }
        if guest in self._links:
            self._links[guest].say(Kind.ADOPT, self._order)

    def on_adopt(self, content: dict[str, Any], sender: int) -> None:
        """A guest has room for what it is to hold, or the board orders to give it that."""
        server, guest = self._server, number(content, "guest")
        if sender == guest:
            server.orders.give(Kind.ADOPT, self._order)
        elif server.setup.index not in content["sources"]:
            return
        elif guest not in self._links:
            self._owed[guest] = number(content, "incarnation")
        elif self._incarnations[guest] == content["incarnation"]:
            self._give_all(guest)  # else it was started again since

    def let_in(self, guest: int) -> None:
        """Have all know that it is one of us."""
        self._server.orders.give(Kind.ALIVE, {"server": guest})
        self.on_alive(guest)

    def turn_away(self, guest: int) -> None:
        """Do without it."""
        if guest in self._links:
            self._links[guest].refuse("a server that was to give you something is gone")

    def on_alive(self, guest: int) -> None:
        """It is one of us."""
        if guest in self._links:
            self._server.peers.take_back(guest, self._links.pop(guest))
            self._server.standing.tell_who_lives()

    # -- giving --------------------------------------------------------------------------------

    def _source_for(self, spec: Spec) -> int:
        return next(server for server in spec.servers if server in self._server.alive)

    def _give_all(self, guest: int) -> None:
        """Send a guest what it is to hold, of what we answer for."""
        table, link = self._server.table, self._links[guest]
        pages: list[tuple[int, Iterator[torch.Tensor]]] = []
        replica = len(table.moments) + 2
        for spec in self._server.specs.values():
            if guest not in spec.servers or self._source_for(spec) != self._server.setup.index:
                continue
            if isinstance(spec, RowSpec):
                pages.append((spec.key, table.rows.parts[spec.key].pages()))
                continue
            for part in (*range(len(table.moments) + 1), replica):
                data, sent = table.send(spec.key, part, main=True)
                link.send(Kind.VALUES, data, sent, key=spec.key, part=part)
        self._give_pages(link, pages)

    def _give_pages(self, link: Link, pages: list[tuple[int, Iterator[torch.Tensor]]]) -> None:
        """Send what is left of tables, each page when the one before is on its way."""
        if not link.open:
            return
        if not pages:
            link.say(Kind.FILLED, {})
            return
        key, some = pages[0]
        message = next(some, None)
        if message is None:
            self._give_pages(link, pages[1:])
            return

        def sent() -> None:
            self._server.loop.call(lambda: self._give_pages(link, pages))

        link.send(Kind.VALUES, bytes_of(message), sent, key=key, part=PAGE)


class Admission:
    """What a server that was started again waits for, before it is one of them.

    waits: is it a guest still?
    """

    def __init__(self, server: Server, *, waits: bool) -> None:
        self._server, self.waits = server, waits
        self._order: dict[str, Any] | None = None
        self._sources: set[int] = set()  # servers that have yet to give us what we are to hold
        self._late: list[tuple[Link, Who, dict[str, Any]]] = []  # what workers declare meanwhile
        self._callers: list[Link] = []  # servers that have called us meanwhile
        self._strangers: dict[int, Link] = {}  # servers that are no part of the run (yet), as we
        self._alone_since: float | None = None

    def closed(self, link: Link) -> None:
        self._late = [declared for declared in self._late if declared[0] is not link]
        self._callers = [caller for caller in self._callers if caller is not link]

    def called(self, link: Link) -> None:
        """Another guest has called us; once we are in, it is ours to let in."""
        self._callers.append(link)

    def postpone(self, link: Link, who: Who, content: dict[str, Any]) -> None:
        """Take what a worker declares once we are in."""
        self._late.append((link, who, content))

    def expects(self, source: int) -> bool:
        """Is that server to give us something?"""
        return source in self._sources

    def met(self, link: Link, greeting: dict[str, Any]) -> None:
        """We have called a server, and it says whether it is a guest, too."""
        assert link.who is not None
        if greeting.get("guest"):
            self._strangers[link.who.index] = link
        else:
            self._strangers.pop(link.who.index, None)

    def on_adopt(self, content: dict[str, Any], sender: int) -> None:
        """The board says what we are to hold: say when there is room for it."""
        server = self._server
        specs = [spec_from_message(block) for block in content["specs"]]
        server.specs = {spec.key: spec for spec in specs}
        server.table.declare(spec for spec in specs if server.setup.index in spec.servers)
        server.table.build()
        self._sources = set(content["sources"])
        self._order = content
        server.orders.answer(sender, Kind.ADOPT, {"guest": server.setup.index})
        self._see_whether_all_is_here()

    def on_filled(self, source: int) -> None:
        """A server has given us all that it had to."""
        self._sources.discard(source)
        self._see_whether_all_is_here()

    def _see_whether_all_is_here(self) -> None:
        """Tell the board when it is."""
        server, content = self._server, self._order
        if self._sources or content is None or not self.waits:
            return
        self._order = None
        server.begin(content["about"])
        assert server.board is not None
        for kind, name in ((Kind.ROUND, "round"), (Kind.APPLY, "apply")):
            if content[name] is not None:
                server.board.note(kind, content[name])
        server.peers.join(content["alive"])
        self.waits = False
        late, self._late = self._late, []
        for declared in late:
            server.on_declare(*declared)
        server.peers.links[content["alive"][0]].say(Kind.JOINED, {})
        callers, self._callers = self._callers, []
        for link in callers:
            self._know(link, content["alive"])

    def _know(self, link: Link, alive: Sequence[int]) -> None:
        """Another that was a guest with us: it still is one, or was let in before us."""
        server, who = self._server, link.who
        assert who is not None
        if who.index in alive:
            server.peers.know(who)
            server.peers.links.setdefault(who.index, link)
        else:
            server.opened(link, {})

    def tick(self, now: float) -> None:
        """Give up if there is nobody who could let us in: all others have come back as we have, or
        are gone."""
        if not self.waits:
            return
        server = self._server
        strangers = {index for index, link in self._strangers.items() if link.open}
        members = server.peers.links.keys() - strangers
        self._alone_since = (self._alone_since or now) if strangers and not members else None
        everybody = len(strangers) == server.num_servers - 1  # else one may be cut off for a while
        patience = server.setup.lease_seconds * (1 if everybody else _MISSING_LEASES)
        if self._alone_since is not None and now - self._alone_since > patience:
            server.fail(
                BigtrainError(
                    f"server {server.setup.index} and all that it can reach were started again: "
                    "none is left that held anything",
                    why=LOSS,
                    mend="--resume goes on from the last checkpoint",
                )
            )
