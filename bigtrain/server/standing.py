"""Whether a server may go on when it has lost others, or goes on alone while they do, too.

A link that is closed or silent says nothing certain of the server at its other end: the network may
be cut, or something between us has closed the link. Only one side may go on: that which more than
half of the workers follow. A worker follows one at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from bigtrain.errors import BigtrainError, CommError
from bigtrain.server.protocol import LOSS, Kind

if TYPE_CHECKING:
    from bigtrain.server.link import Link
    from bigtrain.server.server import Server

log = logging.getLogger(__name__)

_AT_ONCE = 0.25  # seconds


class Standing:
    """Sees whether the run goes on where this server is.

    ended: workers whose last link was closed by themselves.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._peers = server, server.peers
        self.ended: set[int] = set()
        self._stuck_since: float | None = None

    @property
    def may_decide(self) -> bool:
        """Is all here, and is it sure that the run does not go on without us?"""
        return not self.may_be_cut_off and self.lost_block is None

    @property
    def may_be_cut_off(self) -> bool:
        """May a server live, and others go on with it? If later as many workers say nothing as
        have followed us, the network is cut where we are."""
        peers, server = self._peers, self._server
        if not peers.silent or server.someone_left or not peers.leads:
            return False
        return not peers.followed or not self._is_more_than_half(server.linked | self.ended)

    @property
    def lost_block(self) -> int | None:
        """The first block that no server holds any more that lives."""
        server, alive = self._server, self._peers.alive
        if server.is_at_end or not self._peers.dead:
            return None
        return next((s.key for s in server.specs.values() if alive.isdisjoint(s.servers)), None)

    def _is_more_than_half(self, workers: Collection[int]) -> bool:
        return 2 * len(workers) > self._server.setup.rules.workers

    # -- servers that are lost -----------------------------------------------------------------

    def lose_link(self, link: Link, why: str) -> None:
        """The link with a server is closed. If that lives, it notices, too, and asks workers first
        if it is the elder: at once, or where nothing was heard, at another time than we do."""
        assert link.who is not None
        patience = self._server.setup.lease_seconds / 4
        self.lose(
            link.who.index,
            why,
            silent=True,
            patience=patience if link.silent else min(patience, _AT_ONCE),
        )

    def lose(self, lost: int, why: str, *, silent: bool = False, patience: float = 0.0) -> None:
        """A server is gone, as far as we can tell; silent: it may live. Then workers are asked whom
        they follow; if we have not led so far, others may ask first, for `patience` seconds."""
        server = self._server
        if server.is_at_end or lost in self._peers.dead:
            return
        if server.admission.waits:
            server.fail(CommError(f"server {lost}: {why}, while it was to let us in"))
            return
        self._peers.lose(lost, silent=silent, patience=patience)
        log.warning("server %d: %s; the run goes on without it", lost, why)
        self.ask(time.monotonic())
        self.go_on()

    def follow(self, board: int, alive: Collection[int]) -> None:
        """Do without servers that the board does without: they are to begin anew."""
        if self._peers.leads or board != self._peers.seniority[0]:
            return
        for other in sorted(self._peers.links.keys() & self._peers.alive - set(alive)):
            link, why = self._peers.links.pop(other), "the server that keeps the board has lost it"
            self.lose(other, why, silent=True)
            link.refuse(why)

    def go_on(self) -> None:
        """Go on, if it is sure that servers that were lost do not; else see `tick`."""
        server, now = self._server, time.monotonic()
        if not self.may_decide:
            return
        self.tell_who_lives()
        server.see_who_keeps_the_board()
        if server.board is not None:
            server.board.on_server_lost(now)
            server.go_on(now)

    def tell_who_lives(self) -> None:
        """Tell workers: whoever waits for a server that is gone, or at another board, must know."""
        if self.may_decide and self._peers.leads:
            for link in self._server.links_of_workers():
                link.say(Kind.ALIVE, {"alive": self._peers.seniority})

    def ask(self, now: float) -> None:
        """Ask workers whether they follow us and not servers that we have lost."""
        peers = self._peers
        if not peers.silent or peers.followed or not peers.leads or now < peers.ask_at:
            return
        for link in self._server.links_of_workers():
            if (
                link.who is not None
                and link.who.rank == 0
                and link.who.index not in peers.followers
            ):
                link.say(Kind.ALIVE, {"alive": peers.seniority, "asks": True})

    def on_follows(self, worker: int, content: dict[str, Any]) -> None:
        """A worker has given up its links with servers that we have lost."""
        peers = self._peers
        if content.get("alive") != peers.seniority or peers.followed:
            return
        peers.followers.add(worker)
        if self._is_more_than_half(peers.followers & self._server.linked):
            peers.followed = True
            self.go_on()

    # -- from time to time ---------------------------------------------------------------------

    def tick(self, now: float) -> bool:
        """Return whether we may go on."""
        self.ask(now)
        if not self.may_decide:
            self._stuck_since = self._stuck_since or now
            self._see_whether_it_is_over(now - self._stuck_since)
            return False
        if self._stuck_since is not None:
            self._stuck_since = None
            self.go_on()
        return True

    def _see_whether_it_is_over(self, seconds: float) -> None:
        """End, if nothing can go on here for so long. Who hears nothing of servers may be cut off
        itself: within the lease it hears nothing of workers either."""
        server, peers = self._server, self._peers
        lease, lost = server.setup.lease_seconds, self.lost_block
        if self.may_be_cut_off and seconds > 2 * lease:
            server.fail(
                CommError(
                    f"server {server.setup.index} hears nothing of "
                    f"{peers.named(peers.silent)}, and no more than half of the workers are here",
                    why="the network is cut, and the run may go on at the other side",
                    mend="resume from the last checkpoint, if it does not",
                )
            )
        elif not self.may_be_cut_off and (seconds > lease or not peers.silent):
            server.fail(
                BigtrainError(
                    f"all servers that held block {lost} are gone",
                    why=LOSS,
                    mend="--resume goes on from the last checkpoint; with more server.replicas the "
                    "run survives the end of more servers",
                )
            )
