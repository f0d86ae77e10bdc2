"""What a server does as the board orders: sums, updates, and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from bigtrain.server.protocol import Kind, number
from bigtrain.server.rounds import Closed
from bigtrain.server.table import Source

if TYPE_CHECKING:
    from bigtrain.server.server import Server


class Orders:
    """Takes what the board orders, of another server or this one, and does it: what computes on a
    thread of its own, one after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._update: tuple[int, set[int]] | None = None  # at hand: its number, who is to be told
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="bigtrain updates")

    @property
    def is_updating(self) -> bool:
        """Are parameters between two versions?"""
        return self._update is not None

    def close(self) -> None:
        """End, once what is being computed is done."""
        self._jobs.shutdown(wait=True, cancel_futures=True)

    # -- between servers -----------------------------------------------------------------------

    def give(self, kind: Kind, content: dict[str, Any]) -> None:
        """Order all servers that live, this one too."""
        server = self._server
        server.peers.say(kind, content)
        # Not before what we do now is done: an order follows from another.
        server.loop.call(lambda: self.obey(kind, content, server.setup.index))

    def answer(self, asker: int, kind: Kind, content: dict[str, Any]) -> None:
        """Answer the server that has ordered something."""
        server = self._server
        if asker == server.setup.index:
            server.loop.call(lambda: self.obey(kind, content, asker))
        elif asker in server.peers.links:
            server.peers.links[asker].say(kind, content)

    def obey(self, kind: Kind, content: dict[str, Any], sender: int) -> None:
        """Do what a board orders, or take what a server answers."""
        server, now = self._server, time.monotonic()
        board = server.board
        if kind is Kind.STATE and not content:
            state = board.state() if board is not None else {}
            self.answer(sender, Kind.STATE, {"server": server.setup.index, **state})
            return
        if kind is Kind.ADOPT:
            if content.get("guest") == server.setup.index:
                server.admission.on_adopt(content, sender)
            else:
                server.guests.on_adopt(content, sender)
        if kind is Kind.ALIVE:
            server.guests.on_alive(number(content, "server"))
        if board is None:
            return
        if kind is Kind.JOINED:
            board.on_joined(sender, now)
        elif kind is Kind.STATE:
            board.on_state(sender, content, now)
        elif kind is Kind.ROUND:
            board.note(kind, content)
            self._on_round(content, sender)
        elif kind is Kind.APPLY:
            self._on_apply(content, sender)
        elif kind is Kind.SQUARES:
            board.on_squares(sender, content, now)
        elif kind is Kind.APPLIED:
            board.on_applied(sender, number(content, "number"), now)
        if board.is_open:
            server.take_early_frames()
            server.go_on(now)

    # -- sums and updates ----------------------------------------------------------------------

    def _on_round(self, content: Mapping[str, Any], sender: int) -> None:
        table, index = self._server.table, self._server.setup.index
        closed, alive = Closed.from_message(content["closed"]), content["alive"]
        self._server.standing.follow(sender, alive)
        if closed.number <= (self._update[0] if self._update is not None else self._server.version):
            return  # it is done already, or at hand: the board will see by APPLY
        sources = [(part.worker, part.incarnation, part.clock) for part in closed.parts]
        mine = [
            key
            for key in table.keys
            if next(s for s in table.servers_of(key) if s in alive) == index
        ]

        def work() -> dict[str, Any]:
            missing = table.add_up(closed.number, sources)
            liars = sorted({source[0] for source, _ in missing})
            return {"missing": liars, "squares": 0.0 if liars else table.squares(mine)}

        def done(found: dict[str, Any]) -> None:
            answer = {"number": closed.number, "alive": alive, **found}
            self.answer(sender, Kind.SQUARES, answer)

        self.do(work, done)

    def _on_apply(self, content: dict[str, Any], sender: int) -> None:
        server = self._server
        assert server.board is not None
        done_number = number(content, "number")
        if done_number <= server.version:
            self.answer(sender, Kind.APPLIED, {"number": done_number})
            return
        if self._update is not None and self._update[0] == done_number:
            self._update[1].add(sender)  # a new board, while we do what the one before has ordered
            return
        self._update = done_number, {sender}
        server.board.note(Kind.APPLY, content)
        update, outcome = content["update"], Closed.from_message(content["outcome"])
        server.table.detach_sent()

        def answer(key: int) -> None:
            server.loop.call(lambda: server.pulls.answer(key, done_number))

        def work() -> None:
            if not update["skip"]:
                server.table.apply(done_number, update["rate"], update["divisor"], answer)

        def done(_: None) -> None:
            assert self._update is not None
            askers, self._update = self._update[1], None
            server.updated(done_number, outcome)
            for asker in sorted(askers):
                self.answer(asker, Kind.APPLIED, {"number": done_number})
            for event in server.setup.chaos.due(done_number):
                server.loop.suffer(event)

        self.do(work, done)

    def do(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Have `work` done on the other thread, one after the other, and `done` on the loop's."""
        server = self._server

        def ended(future: Future) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is not None:
                server.loop.call(lambda: server.fail(error))
            else:
                server.loop.call(lambda: done(future.result()))

        self._jobs.submit(work).add_done_callback(ended)


def is_over_by(closed: Closed, is_old: Callable[[int], bool]) -> Callable[[Source], bool]:
    """Return what tells of which gradients no update after `closed` will want."""
    used = {part.worker: (part.incarnation, part.clock) for part in closed.parts}

    def is_over(source: Source) -> bool:
        worker, incarnation, clock = source
        return is_old(clock) or (incarnation, clock) <= used.get(worker, (-1, -1))

    return is_over
