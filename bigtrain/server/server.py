"""One server: takes gradients from workers, updates what it holds, gives parameters back."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigtrain.server.board import Board, Policy
from bigtrain.server.chaos import Chaos
from bigtrain.server.coding import Coding
from bigtrain.server.fragments import Fragments, number_of
from bigtrain.server.guests import Admission, Guests
from bigtrain.server.link import Link, Loop
from bigtrain.server.orders import Orders, is_over_by
from bigtrain.server.peers import Peers
from bigtrain.server.protocol import PAGE, Header, Kind, Malformed, Who, nonce, number
from bigtrain.server.rounds import Closed, Rounds, Rules
from bigtrain.server.rows import RowTables
from bigtrain.server.shares import Shares
from bigtrain.server.standing import Standing
from bigtrain.server.status import write_status
from bigtrain.server.table import (
    MakeOptimizer,
    Source,
    Spec,
    Table,
    spec_from_message,
)
from bigtrain.server.traffic import Arrivals, Pull, Pulls, RowTraffic

log = logging.getLogger(__name__)

_STATUS_SECONDS = 0.5
_MOST_AHEAD = 64  # rounds; workers that were cut off may have begun some that nobody made
_FILLER = 0  # the worker that gives servers what they begin with: all must have it from the same
_FROM_SERVERS = frozenset(range(Kind.ROUND, Kind.ALIVE + 1))


@dataclass
class Setup:
    """What a server must know to be one.

    index: its number among `addresses`. token: the run's secret. lease_seconds: of silence after
    which a peer is gone. batch: samples of a step. status: file that tells how the run is.
    incarnation: how often it was started before; then others must give it what it is to hold.
    fragments: blocks that meet in a round.
    """

    index: int
    addresses: Sequence[tuple[str, int]]
    token: str
    rules: Rules
    batch: int
    lease_seconds: float = 5.0
    status: Path | None = None
    incarnation: int = 0
    fragments: Fragments = field(default_factory=Fragments)
    chaos: Chaos = field(default_factory=lambda: Chaos([], "server", 0, 0))


class Server:
    """Serves until all workers have left, or `stop` is called.

    What moves frames, and the board, run on the loop's thread; sums and updates on another.
    """

    def __init__(
        self,
        setup: Setup,
        make_optimizer: MakeOptimizer,
        policy: Policy,
        push: Coding | None = None,
        pull: Coding | None = None,
        rows: RowTables | None = None,
    ) -> None:
        self.setup, self.policy = setup, policy
        self.table = Table(
            make_optimizer, push=push, pull=pull, rows=rows, fragments=setup.fragments
        )
        self.loop = Loop(self, setup.token, setup.lease_seconds)
        self.identity = nonce()  # of this process: one that is started again is another
        self.failure: BaseException | None = None
        self.version = 0
        self._workers: dict[tuple[int, int], Link] = {}  # (worker, rank)
        self.peers = Peers(setup.index, setup.addresses, setup.incarnation)
        self.guests = Guests(self)
        self.admission = Admission(self, waits=setup.incarnation > 0)
        self.standing, self.orders = Standing(self), Orders(self)
        self.specs: dict[int, Spec] = {}  # all blocks, of which we hold some
        self.about: dict[str, Any] = {}
        self.board: Board | None = None
        self._declared: dict[int, set[int]] = {}  # worker -> ranks
        self._filled: set[int] = set()  # ranks of the worker that fills us which are done
        self._is_filled = False
        self._early: list[tuple[Link, Kind, dict[str, Any]]] = []  # for a board that is none yet
        self._arrivals = Arrivals(setup.fragments)
        self.pulls = Pulls(self.table)
        self._rows = RowTraffic(self.table.rows, self.orders.do)
        self._told: set[tuple[int, int]] = set()  # who knows whether we want its values
        self.someone_left = self._is_told_over = self._is_over = False
        self._status_at = self._left_at = 0.0
        self._begun = time.monotonic()
        self._rate: list[tuple[float, int]] = []

    # -- the outside ---------------------------------------------------------------------------

    def serve(self, listener: Any) -> None:
        """Serve on this thread, until all is over.

        Raises: what has failed.
        """
        self.loop.listen(listener)
        try:
            self.loop.run()
        finally:
            self.orders.close()
        failure = self.failure or self.loop.error
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """End soon; may be called from any thread, and from a signal's handler."""
        self._is_over = True
        self.loop.stop()

    # -- as the board sees it ------------------------------------------------------------------

    @property
    def alive(self) -> frozenset[int]:
        return self.peers.alive

    @property
    def seniority(self) -> list[int]:
        return self.peers.seniority

    @property
    def num_servers(self) -> int:
        return len(self.peers)

    @property
    def waiting_guests(self) -> list[int]:
        return self.guests.waiting

    @property
    def may_decide(self) -> bool:
        return self.standing.may_decide

    @property
    def num_updates(self) -> int:
        assert self.table.optimizer is not None
        return self.table.optimizer.num_updates

    @property
    def linked(self) -> frozenset[int]:
        return frozenset(worker for worker, _ in self._workers)

    @property
    def is_at_end(self) -> bool:
        """Does it matter no more who lives?"""
        return self._is_over or self._is_told_over

    def links_of_workers(self) -> list[Link]:
        return list(self._workers.values())

    def tell(self, worker: int, kind: Kind, content: dict[str, Any]) -> None:
        link = self._workers.get((worker, 0))
        if link is not None:
            link.say(kind, content)

    def refuse(self, worker: int, why: str) -> None:
        for link in [link for (index, _), link in self._workers.items() if index == worker]:
            link.refuse(why)

    def order(self, kind: Kind, content: dict[str, Any]) -> None:
        self.orders.give(kind, content)

    # -- links ---------------------------------------------------------------------------------

    def greet(self, who: Who) -> dict[str, Any]:
        if who.role == "worker" and who.index >= self.setup.rules.workers:
            raise Malformed(f"{who}, of {self.setup.rules.workers} (server.workers)")
        if who.role == "server":
            self.peers.greet(who)
        known = self._workers.get((who.index, who.rank)) if who.role == "worker" else None
        if known is not None and known.who is not None:
            if known.who.incarnation > who.incarnation:
                raise Malformed(f"{who} was started again since")
            known.close("it has come by another link")
        knows = not self.admission.waits and not self._is_over and self.standing.lost_block is None
        return {
            "identity": self.identity,
            "alive": self.seniority if knows else [],
            "guest": self.admission.waits,
            "asks": self.standing.may_be_cut_off,
        }

    def opened(self, link: Link, greeting: dict[str, Any]) -> None:
        who = link.who
        assert who is not None
        if who.role == "server" and link.calls is None and self.admission.waits:
            self.admission.called(link)
        elif who.role == "server" and self.peers.is_new(who):
            self.guests.take(link, who)
        elif who.role == "server":
            if link.calls is not None:
                self.admission.met(link, greeting)
            self.peers.links[who.index] = link
            self.see_who_keeps_the_board()
        else:
            self._workers[who.index, who.rank] = link
            self.standing.ended.discard(who.index)

    def closed(self, link: Link, why: str) -> None:
        who = link.who
        self.pulls.drop(link)
        self._rows.drop(link)
        self._early = [frame for frame in self._early if frame[0] is not link]
        self.admission.closed(link)
        if who is None:
            return
        if who.role == "server" and self.guests.closed(link, who):
            return
        if who.role == "server" and self.peers.links.get(who.index) is link:
            del self.peers.links[who.index]
            self.standing.lose_link(link, why)
        elif who.role == "worker" and self._workers.get((who.index, who.rank)) is link:
            del self._workers[who.index, who.rank]
            if not link.silent:
                self.standing.ended.add(who.index)
            self._lose_worker(who, why)

    def _lose_worker(self, who: Who, why: str) -> None:
        if who.index == _FILLER and not self._is_filled:
            self._filled = set()
        self._declared.get(who.index, set()).discard(who.rank)
        self._told.discard((who.index, who.rank))
        if self.board is not None:
            self.board.on_worker_lost(who.index, why)
            self.go_on(time.monotonic())
        first = self._workers.get((who.index, 0))
        if first is not None and self.board is not None and self.board.active:
            first.close("another rank of it is gone")  # it comes again, and says where it is
        self._end_if_over()

    def _end_if_over(self) -> None:
        """End when all workers have left, or all but those that stand still. Whether they have, the
        board knows: a server that was let in just now has not seen all of them."""
        board, now = self.board, time.monotonic()
        keeps = board is not None and board.active
        if not self.someone_left or self._is_over or not (self._is_told_over or keeps):
            return
        still = board.silent if board is not None and keeps else self.linked  # others know
        if not self.linked - still and (
            not self.linked or now - self._left_at > self.setup.rules.stall_seconds
        ):
            self.peers.say(Kind.BYE)
            self.stop()

    def see_who_keeps_the_board(self) -> None:
        """Keep the board, if it is our turn."""
        if self.admission.waits or self.standing.may_be_cut_off:
            return
        waits = self.board is not None and not self.board.active
        if self.board is not None and self.peers.leads and waits and not self.peers.missing:
            self.board.take_over(time.monotonic())

    # -- frames --------------------------------------------------------------------------------

    def room(self, link: Link, header: Header) -> memoryview:
        who = link.who
        assert who is not None
        if header.kind is Kind.VALUES and who.role == "server":
            if not self.admission.expects(who.index):
                raise Malformed("values that nobody has asked for")
            return self._room_for_values(link, header)
        if who.role != "worker" or header.kind is Kind.TENSOR:
            raise Malformed(f"{header.kind.name} from {who}")
        if header.kind is Kind.VALUES:
            if who.index != _FILLER or self._is_filled:
                raise Malformed("values that nobody has asked for")
            return self._room_for_values(link, header)
        if header.kind is Kind.LOOKUP:
            return self._rows.room(link, header)
        is_old = self._is_old(header.step)
        most = self.version + _MOST_AHEAD + self.setup.rules.staleness
        if not is_old and number_of(header.step) > most:
            raise Malformed(f"a gradient of round {header.step}, after round {self.version}")
        if header.key in self.table.rows.parts:
            return self._rows.room(link, header)
        if is_old or self.table.has(_source(who, header), header.key):
            # Its bytes must go somewhere, but not where they are: what a worker sends again may be
            # of the next round by now.
            return memoryview(bytearray(self.table.gradient_bytes(header.key)))
        return self.table.room_for_gradient(_source(who, header), header.key)

    def _room_for_values(self, link: Link, header: Header) -> memoryview:
        if header.part == PAGE:
            return self._rows.room(link, header)
        return self.table.room_for_values(header.key, header.part)

    def _is_old(self, clock: int) -> bool:
        return self.setup.rules.mode != "async" and number_of(clock) <= self.version

    def frame(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        who, rows = link.who, self._rows.came(link)
        assert who is not None
        both = header.kind in (Kind.BYE, Kind.VALUES, Kind.FILLED)
        if not both and (header.kind in _FROM_SERVERS) != (who.role == "server"):
            raise Malformed(f"{header.kind.name} from {who}")
        if header.kind is Kind.BYE and who.role == "server":
            self.peers.lose(who.index, silent=False)
            self.someone_left = self._is_told_over = True
            self._left_at = time.monotonic()
            self._end_if_over()
        elif header.kind is Kind.VALUES:
            if rows is not None:  # else they are in their place
                self.table.rows.parts[header.key].take(rows)
        elif header.kind is Kind.FILLED and who.role == "server":
            self.admission.on_filled(who.index)
        elif who.role == "server":
            self.orders.obey(header.kind, content, who.index)
        elif header.kind is Kind.PUSH:
            self._on_push(who, header, rows)
        elif header.kind is Kind.PULL:
            self._on_pull(link, header, content)
        elif header.kind is Kind.LOOKUP:
            assert rows is not None
            self._rows.on_lookup(link, header, rows)
            self._rows.look_up(self.version)
        elif header.kind is Kind.TURN_PAGE:
            self._rows.look_up(self.version)
            self._rows.on_turn_page(link, header, content)
        elif header.kind is Kind.DECLARE:
            self.on_declare(link, who, content)
        elif header.kind is Kind.FILLED:
            self._on_filled(who, content)
        elif header.kind is Kind.BYE:
            self.someone_left, self._left_at = True, time.monotonic()
            if self.board is not None:
                self.board.on_worker_left(who.index)
            link.close("it has left")
        elif header.kind is Kind.FOLLOWS and who.rank == 0:
            self.standing.on_follows(who.index, content)
        elif header.kind in (Kind.READY, Kind.REPORT, Kind.OFFER) and who.rank == 0:
            self._on_board_frame(link, header.kind, content)
        else:
            raise Malformed(f"{header.kind.name} from {who}")

    # -- at the beginning ----------------------------------------------------------------------

    def on_declare(self, link: Link, who: Who, content: dict[str, Any]) -> None:
        blocks = content.get("blocks")
        if not isinstance(blocks, list):
            raise Malformed("no blocks")
        specs = [spec_from_message(block) for block in blocks]
        mine = [spec for spec in specs if self.setup.index in spec.servers]
        if self.admission.waits:
            self.admission.postpone(link, who, content)
            return
        if any(self.specs.get(spec.key, spec) != spec for spec in specs):
            raise Malformed("a block that is another than other workers have: their layout differs")
        if self.table.optimizer is not None and not self.table.knows([s.key for s in mine]):
            raise Malformed("a block that other workers do not have: their layout differs")
        self.table.declare(mine)
        self.specs |= {spec.key: spec for spec in specs}
        for source in self._arrivals.expect(who, mine):
            self._say_have(who, 0, source[2])
        self.table.rows.expect(who.index, who.ranks)
        ranks = self._declared.setdefault(who.index, set())
        ranks.add(who.rank)
        if self.table.optimizer is None and len(ranks) == who.ranks:
            self.table.build()
        self._offer_to_be_filled()

    def _offer_to_be_filled(self) -> None:
        """Tell workers that have declared all blocks whether we want values: others, once we have
        them."""
        if self.table.optimizer is None:
            return
        for (worker, rank), link in sorted(self._workers.items()):
            assert link.who is not None
            if len(self._declared.get(worker, ())) < link.who.ranks or (worker, rank) in self._told:
                continue
            if self._is_filled or worker == _FILLER:
                self._told.add((worker, rank))
                link.say(
                    Kind.WANTED,
                    {
                        "fill": not self._is_filled,
                        "moments": self.table.moments,
                        "version": self.version,
                    },
                )

    def _on_filled(self, who: Who, content: dict[str, Any]) -> None:
        if who.index != _FILLER or self._is_filled or self.table.optimizer is None:
            raise Malformed("FILLED, which nobody has asked for")
        for name in ("step", "num_updates", "cursor"):
            number(content, name)
        self._filled.add(who.rank)
        if len(self._filled) < who.ranks:
            return
        self.begin(content)
        self.see_who_keeps_the_board()
        self._offer_to_be_filled()

    def begin(self, about: dict[str, Any]) -> None:
        """All that we hold is here."""
        assert self.table.optimizer is not None
        self.about = about
        self.policy.begin(about)
        self.table.rounded(fresh=not self.admission.waits)
        self.table.optimizer.num_updates = number(about, "num_updates")
        self.version = number(about, "step")
        self._is_filled = True
        shares = Shares(self.setup.rules.workers, self.setup.batch, number(about, "cursor"))
        rounds = Rounds(self.setup.rules, shares, self.version)
        self.board = Board(rounds, self.policy, self, self.setup.lease_seconds)

    # -- servers that come back (see guests.py) ------------------------------------------------

    def adopt(self, guest: int, content: dict[str, Any]) -> None:
        self.guests.adopt(guest, content)

    def let_in(self, guest: int) -> None:
        self.guests.let_in(guest)

    def turn_away(self, guest: int) -> None:
        self.guests.turn_away(guest)

    # -- gradients and parameters --------------------------------------------------------------

    def _on_push(self, who: Who, header: Header, rows: torch.Tensor | None) -> None:
        source, is_old = _source(who, header), self._is_old(header.step)
        if rows is None and header.key not in self.table.rows.parts:
            self.table.came(source, header.key)
        elif rows is not None and not is_old:
            self.table.rows.take(source, who.rank, header.key, rows)
        ranks = {0, who.rank} if is_old else self._arrivals.note(source, who.rank, header.key)
        for rank in ranks:
            self._say_have(who, rank, header.step)

    def _say_have(self, who: Who, rank: int, clock: int) -> None:
        """Tell a rank of that worker that gradients are here."""
        link = self._workers.get((who.index, rank))
        if link is not None and link.who is not None and link.who.incarnation == who.incarnation:
            link.say(Kind.HAVE, step=clock)

    def _on_pull(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        have = number(content, "have") if "have" in content else None
        self.pulls.add(header.key, Pull(link, header.part, header.step, have))
        if header.step <= self.version and not self.orders.is_updating:
            self.pulls.answer(header.key, self.version)

    # -- what workers tell the board -----------------------------------------------------------

    def _on_board_frame(self, link: Link, kind: Kind, content: dict[str, Any]) -> None:
        who, board, now = link.who, self.board, time.monotonic()
        assert who is not None
        if board is None or not board.is_open:  # it knows of a board's end before we do
            if kind is Kind.READY:  # and says anew where it is
                self._early = [frame for frame in self._early if frame[0] is not link]
            self._early.append((link, kind, content))
            return
        if kind is Kind.READY:
            board.on_ready(who.index, who.incarnation, content, now)
        elif kind is Kind.REPORT:
            board.on_report(who.index, content)
        else:
            board.on_offer(who.index, content)
        self.go_on(now)

    def take_early_frames(self) -> None:
        """The board is open: take what workers have said before."""
        early, self._early = self._early, []
        for link, frame, what in early:
            link.attempt(partial(self._on_board_frame, link, frame, what))

    def updated(self, version: int, outcome: Closed) -> None:
        """Parameters are of `version` now: answer who waits, drop what no update will want."""
        self.version = version
        is_over = is_over_by(outcome, self._is_old)
        self.table.forget(is_over)
        self._arrivals.forget(is_over)
        self.pulls.answer_all(version)
        self._rows.look_up(version)

    def fail(self, error: BaseException) -> None:
        """End, telling all workers why."""
        self.failure = self.failure or error
        for link in list(self._workers.values()):
            link.refuse(str(error), ends=True)
        self.stop()

    # -- from time to time ---------------------------------------------------------------------

    def go_on(self, now: float) -> None:
        """Have the board do what can be done now, and look again when it may do more."""
        assert self.board is not None
        self.board.go_on(now)
        later = self.board.rounds.again_in(now) if self.board.is_open else None
        if later is not None:
            self.loop.due = min(self.loop.due, now + max(later, 0.001))

    def tick(self, now: float) -> None:
        if self._is_over:
            return
        self._end_if_over()
        # Those before us listen, we call; a guest calls all.
        self.peers.call(self.loop, now, everybody=self.admission.waits)
        self.admission.tick(now)
        if now - self._begun > self.setup.rules.join_seconds and not self.admission.waits:
            for server in self.peers.missing:
                self.standing.lose(server, "it did not come")
        may = self.standing.tick(now)
        if may and self.board is not None and self.board.active:
            self.go_on(now)
            self._tell_status(now)

    def _tell_status(self, now: float) -> None:
        """Write how the run is, for `bigtrain status`."""
        board = self.board
        if self.setup.status is None or now - self._status_at < _STATUS_SECONDS or board is None:
            return
        self._status_at = now
        self._rate = [*self._rate[-20:], (now, board.rounds.version)]
        seconds, steps = now - self._rate[0][0], board.rounds.version - self._rate[0][1]
        status = {
            "board": self.setup.index,
            "rounds_per_second": steps / seconds if seconds > 0 else 0.0,
            "samples": self.setup.batch / self.setup.rules.workers,  # of a worker's part of a round
            "outcome": board.outcome,
            "servers": {str(server): server in self.alive for server in range(self.num_servers)},
            "held_bytes": self.table.num_bytes,
            **board.status(now),
        }
        try:
            write_status(self.setup.status, status)
        except OSError as error:
            log.warning("cannot write %s: %s", self.setup.status, error.strerror)
            self.setup.status = None


def _source(who: Who, header: Header) -> Source:
    return who.index, who.incarnation, header.step
