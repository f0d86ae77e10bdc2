"""One server: takes gradients from workers, updates what it holds, gives parameters back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigtrain.errors import BigtrainError, CommError
from bigtrain.server.board import Board, Policy
from bigtrain.server.chaos import Chaos
from bigtrain.server.coding import Coding
from bigtrain.server.link import Link, Loop
from bigtrain.server.peers import Peers
from bigtrain.server.protocol import PAGE, Header, Kind, Malformed, Who, nonce, number
from bigtrain.server.rounds import Closed, Rounds, Rules
from bigtrain.server.rows import RowSpec, RowTables, unpack_rows
from bigtrain.server.shares import Shares
from bigtrain.server.status import write_status
from bigtrain.server.table import (
    MakeOptimizer,
    Source,
    Spec,
    Table,
    bytes_of,
    spec_from_message,
)
from bigtrain.server.traffic import Arrivals, Lookup, Lookups, Pull, Pulls

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
    """

    index: int
    addresses: Sequence[tuple[str, int]]
    token: str
    rules: Rules
    batch: int
    lease_seconds: float = 5.0
    status: Path | None = None
    incarnation: int = 0
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
        self.table = Table(make_optimizer, push=push, pull=pull, rows=rows)
        self.loop = Loop(self, setup.token, setup.lease_seconds)
        self.identity = nonce()  # of this process: one that is started again is another
        self.failure: BaseException | None = None
        self.version = 0
        self._workers: dict[tuple[int, int], Link] = {}  # (worker, rank)
        self.peers = Peers(setup.index, setup.addresses, setup.incarnation)
        self._is_guest = setup.incarnation > 0
        self._guests: dict[int, Link] = {}
        self._owed: set[int] = set()  # guests that we must give something
        self._sources: set[int] = set()  # servers that have yet to give us what we are to hold
        self._adopted: dict[str, Any] = {}
        self._adopting: dict[str, Any] = {}
        self._late: list[tuple[Link, Who, dict[str, Any]]] = []  # what workers declare to a guest
        self._specs: dict[int, Spec] = {}  # all blocks, of which we hold some
        self._about: dict[str, Any] = {}
        self._stuck_since: float | None = None  # since when we may not decide
        self._board: Board | None = None
        self._declared: dict[int, set[int]] = {}  # worker -> ranks
        self._filled: set[int] = set()  # ranks of the worker that fills us which are done
        self._is_filled = False
        self._early: list[tuple[Link, Kind, dict[str, Any]]] = []  # for a board that is none yet
        self._arrivals = Arrivals()
        self._pulls = Pulls(self.table)
        self._lookups = Lookups()
        self._coming: dict[Link, torch.Tensor] = {}  # rows of tables
        self._updating = False
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="bigtrain updates")
        self._told: set[tuple[int, int]] = set()  # who knows whether we want its values
        self._someone_left = self._is_told_over = self._is_over = False
        self._status_at = 0.0
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
            self._jobs.shutdown(wait=True, cancel_futures=True)
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
    def may_decide(self) -> bool:
        """Is all here, and is it sure that the run does not go on without us?"""
        return not self._may_be_cut_off and self._lost_block is None

    @property
    def _may_be_cut_off(self) -> bool:
        """A server that says nothing may live, on the other side of a cut; only the side with more
        than half of the workers may go on."""
        few = 2 * len(self.linked) <= self.setup.rules.workers
        return bool(self.peers.silent) and few and not self._someone_left

    @property
    def num_updates(self) -> int:
        assert self.table.optimizer is not None
        return self.table.optimizer.num_updates

    @property
    def linked(self) -> frozenset[int]:
        return frozenset(worker for worker, _ in self._workers)

    def tell(self, worker: int, kind: Kind, content: dict[str, Any]) -> None:
        link = self._workers.get((worker, 0))
        if link is not None:
            link.say(kind, content)

    def refuse(self, worker: int, why: str) -> None:
        for link in [link for (index, _), link in self._workers.items() if index == worker]:
            link.refuse(why)

    def order(self, kind: Kind, content: dict[str, Any]) -> None:
        self.peers.say(kind, content)
        # Not before what we do now is done: an order follows from another.
        self.loop.call(lambda: self._obey(kind, content, self.setup.index))

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
        knows = not self._is_guest and self.may_decide and not self._is_over
        return {"identity": self.identity, "alive": self.seniority if knows else []}

    def opened(self, link: Link, greeting: dict[str, Any]) -> None:
        who = link.who
        assert who is not None
        if who.role == "server" and self.peers.is_new(who):
            self._take_guest(link, who)
        elif who.role == "server":
            self.peers.links[who.index] = link
            self._see_who_keeps_the_board()
        else:
            self._workers[who.index, who.rank] = link

    def closed(self, link: Link, why: str) -> None:
        who = link.who
        self._pulls.drop(link)
        self._lookups.drop(link)
        self._coming.pop(link, None)
        self._early = [frame for frame in self._early if frame[0] is not link]
        self._late = [declared for declared in self._late if declared[0] is not link]
        if who is None:
            return
        if who.role == "server" and self._guests.get(who.index) is link:
            del self._guests[who.index]
            if self._board is not None and self._board.is_open:
                self._board.on_guest_lost(who.index, time.monotonic())
        elif who.role == "server" and self.peers.links.get(who.index) is link:
            del self.peers.links[who.index]
            self._lose_server(who.index, why, silent=link.silent)
        elif who.role == "worker" and self._workers.get((who.index, who.rank)) is link:
            del self._workers[who.index, who.rank]
            self._lose_worker(who, why)

    def _lose_server(self, server: int, why: str, *, silent: bool = False) -> None:
        at_end = self._is_over or self._is_told_over
        if at_end or server in self.peers.dead:
            return
        if self._is_guest:
            self._fail(CommError(f"server {server}: {why}, while it was to let us in"))
            return
        self.peers.lose(server, silent=silent)
        log.warning("server %d: %s; the run goes on without it", server, why)
        if self._lost_block is not None:
            return  # nothing can go on here: see `tick`
        self._tell_who_lives()
        self._see_who_keeps_the_board()
        if self._board is not None:
            self._board.on_server_lost(time.monotonic())
            self._go_on(time.monotonic())

    @property
    def _lost_block(self) -> int | None:
        """The first block that no server holds any more that lives."""
        if self._is_over or self._is_told_over or not self.peers.dead:
            return None
        alive = self.alive
        return next((s.key for s in self._specs.values() if alive.isdisjoint(s.servers)), None)

    def _tell_who_lives(self) -> None:
        """Tell workers: whoever waits for a server that is gone, or at another board, must know."""
        if self.may_decide:
            for link in list(self._workers.values()):
                link.say(Kind.ALIVE, {"alive": self.seniority})

    def _lose_worker(self, who: Who, why: str) -> None:
        if who.index == _FILLER and not self._is_filled:
            self._filled = set()
        self._declared.get(who.index, set()).discard(who.rank)
        self._told.discard((who.index, who.rank))
        if self._board is not None:
            self._board.on_worker_lost(who.index, why)
            self._go_on(time.monotonic())
        self._end_if_over()

    def _end_if_over(self) -> None:
        """End when all workers have left. Whether they have, the board knows: a server that was let
        in just now has not seen all of them."""
        knows = self._is_told_over or (self._board is not None and self._board.active)
        if self._someone_left and knows and not self._workers and not self._is_over:
            self.peers.say(Kind.BYE)
            self.stop()

    def _see_who_keeps_the_board(self) -> None:
        """Keep the board, if it is our turn."""
        if self._is_guest:
            return
        mine = self.setup.index == self.seniority[0]
        waits = self._board is not None and not self._board.active
        if self._board is not None and mine and waits and not self.peers.missing:
            self._board.take_over(time.monotonic())

    # -- frames --------------------------------------------------------------------------------

    def room(self, link: Link, header: Header) -> memoryview:
        who = link.who
        assert who is not None
        if header.kind is Kind.VALUES and who.role == "server":
            if who.index not in self._sources:
                raise Malformed("values that nobody has asked for")
            return self._room_for_values(link, header)
        if who.role != "worker" or header.kind is Kind.TENSOR:
            raise Malformed(f"{header.kind.name} from {who}")
        if header.kind is Kind.VALUES:
            if who.index != _FILLER or self._is_filled:
                raise Malformed("values that nobody has asked for")
            return self._room_for_values(link, header)
        if header.kind is Kind.LOOKUP:
            return self._room_for_rows(link, header, columns=False)
        if header.key in self.table.rows.parts:
            self._room_for_rows(link, header, columns=True)
        if self._is_old(header.step):  # its bytes must go somewhere
            if link in self._coming:
                return bytes_of(self._coming[link])
            return memoryview(bytearray(self.table.gradient_bytes(header.key)))
        if header.step > self.version + _MOST_AHEAD + self.setup.rules.staleness:
            raise Malformed(f"a gradient of round {header.step}, after round {self.version}")
        if link in self._coming:
            return bytes_of(self._coming[link])
        return self.table.room_for_gradient(_source(who, header), header.key)

    def _room_for_values(self, link: Link, header: Header) -> memoryview:
        if header.part == PAGE:
            return self._room_for_rows(link, header, columns=True, page=True)
        return self.table.room_for_values(header.key, header.part)

    def _room_for_rows(
        self, link: Link, header: Header, *, columns: bool, page: bool = False
    ) -> memoryview:
        message = self.table.rows.message(header.key, header.length, columns=columns, page=page)
        self._coming[link] = message
        return bytes_of(message)

    def _is_old(self, clock: int) -> bool:
        return self.setup.rules.mode != "async" and clock <= self.version

    def frame(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        who, rows = link.who, self._coming.pop(link, None)
        assert who is not None
        both = header.kind in (Kind.BYE, Kind.VALUES, Kind.FILLED)
        if not both and (header.kind in _FROM_SERVERS) != (who.role == "server"):
            raise Malformed(f"{header.kind.name} from {who}")
        if header.kind is Kind.BYE and who.role == "server":
            self.peers.lose(who.index, silent=False)
            self._someone_left = self._is_told_over = True
            self._end_if_over()
        elif header.kind is Kind.VALUES:
            if rows is not None:  # else they are in their place
                self.table.rows.parts[header.key].take(rows)
        elif header.kind is Kind.FILLED and who.role == "server":
            self._sources.discard(who.index)
            self._see_whether_all_is_here()
        elif who.role == "server":
            self._obey(header.kind, content, who.index)
        elif header.kind is Kind.PUSH:
            self._on_push(link, who, header, rows)
        elif header.kind is Kind.PULL:
            self._on_pull(link, header, content)
        elif header.kind is Kind.LOOKUP:
            assert rows is not None
            self._on_lookup(link, header, rows)
        elif header.kind is Kind.TURN_PAGE:
            self._on_turn_page(link, header, number(content, "after"))
        elif header.kind is Kind.DECLARE:
            self._on_declare(link, who, content)
        elif header.kind is Kind.FILLED:
            self._on_filled(who, content)
        elif header.kind is Kind.BYE:
            self._someone_left = True
            if self._board is not None:
                self._board.on_worker_left(who.index)
            link.close("it has left")
        elif header.kind in (Kind.READY, Kind.REPORT, Kind.OFFER) and who.rank == 0:
            self._on_board_frame(link, header.kind, content)
        else:
            raise Malformed(f"{header.kind.name} from {who}")

    # -- at the beginning ----------------------------------------------------------------------

    def _on_declare(self, link: Link, who: Who, content: dict[str, Any]) -> None:
        blocks = content.get("blocks")
        if not isinstance(blocks, list):
            raise Malformed("no blocks")
        specs = [spec_from_message(block) for block in blocks]
        mine = [spec for spec in specs if self.setup.index in spec.servers]
        if self._is_guest:
            self._late.append((link, who, content))
            return
        self._specs |= {spec.key: spec for spec in specs}
        if self.table.optimizer is not None and not self.table.knows([s.key for s in mine]):
            raise Malformed("a block that other workers do not have: their layout differs")
        self.table.declare(mine)
        self._arrivals.expect(who.index, who.rank, len(mine))
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
        self._begin(content)
        self._see_who_keeps_the_board()
        self._offer_to_be_filled()

    def _begin(self, about: dict[str, Any]) -> None:
        """All that we hold is here."""
        assert self.table.optimizer is not None
        self._about = about
        self.policy.begin(about)
        self.table.rounded(fresh=not self._is_guest)
        self.table.optimizer.num_updates = number(about, "num_updates")
        self.version = number(about, "step")
        self._is_filled = True
        shares = Shares(self.setup.rules.workers, self.setup.batch, number(about, "cursor"))
        rounds = Rounds(self.setup.rules, shares, self.version)
        self._board = Board(rounds, self.policy, self, self.setup.lease_seconds)

    # -- servers that come back ----------------------------------------------------------------

    def _take_guest(self, link: Link, who: Who) -> None:
        """A server was started again; its end may not have been noticed yet."""
        old = self.peers.links.get(who.index)
        if old is not None:
            old.close("it was started again")
        elif who.index not in self.peers.dead and not self._is_guest:
            self._lose_server(who.index, "it was started again")
        self.peers.know(who)
        self._guests[who.index] = link
        if who.index in self._owed:
            self._owed.discard(who.index)
            self._give_all(who.index)
        if self._board is not None and self._board.active:
            self._board.on_guest(who.index)

    def adopt(self, guest: int, content: dict[str, Any]) -> None:
        about = {**self._about, "step": self.version, "num_updates": self.num_updates}
        sources = {self._source_for(s) for s in self._specs.values() if guest in s.servers}
        content = {
            **content,
            "about": about,
            "alive": self.seniority,
            "specs": [spec.to_message() for spec in self._specs.values()],
            "sources": sorted(sources),
        }
        self._adopting = content
        if guest in self._guests:
            self._guests[guest].say(Kind.ADOPT, content)

    def _source_for(self, spec: Spec) -> int:
        return next(server for server in spec.servers if server in self.alive)

    def _on_adopt(self, content: dict[str, Any], sender: int) -> None:
        guest = number(content, "guest")
        if guest == self.setup.index:
            specs = [spec_from_message(block) for block in content["specs"]]
            self._specs = {spec.key: spec for spec in specs}
            self.table.declare(spec for spec in specs if guest in spec.servers)
            self.table.build()
            self._sources = set(content["sources"])
            self._adopted = content
            self._answer(sender, Kind.ADOPT, {"guest": guest})  # there is room for it now
            self._see_whether_all_is_here()
        elif sender == guest:
            self.order(Kind.ADOPT, self._adopting)
        elif self.setup.index in content["sources"] and guest not in self._guests:
            self._owed.add(guest)  # it has not called us yet
        elif self.setup.index in content["sources"]:
            self._give_all(guest)

    def _give_all(self, guest: int) -> None:
        """Send a guest what it is to hold, of what we answer for."""
        link = self._guests[guest]
        pages: list[tuple[int, Iterator[torch.Tensor]]] = []
        for spec in self._specs.values():
            if guest not in spec.servers or self._source_for(spec) != self.setup.index:
                continue
            if isinstance(spec, RowSpec):
                pages.append((spec.key, self.table.rows.parts[spec.key].pages()))
            else:
                replica = len(self.table.moments) + 2
                for part in (*range(len(self.table.moments) + 1), replica):
                    data, sent = self.table.send(spec.key, part, main=True)
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
            self.loop.call(lambda: self._give_pages(link, pages))

        link.send(Kind.VALUES, bytes_of(message), sent, key=key, part=PAGE)

    def _see_whether_all_is_here(self) -> None:
        """A guest that has got all tells the board."""
        if self._sources or not self._adopted or not self._is_guest:
            return
        content, self._adopted = self._adopted, {}
        self._begin(content["about"])
        assert self._board is not None
        for kind, name in ((Kind.ROUND, "round"), (Kind.APPLY, "apply")):
            if content[name] is not None:
                self._board.note(kind, content[name])
        self.peers.join(content["alive"])
        self._is_guest = False
        late, self._late = self._late, []
        for declared in late:
            self._on_declare(*declared)
        self.peers.links[content["alive"][0]].say(Kind.JOINED, {})

    def let_in(self, guest: int) -> None:
        self.order(Kind.ALIVE, {"server": guest})
        self._on_alive(guest)

    def turn_away(self, guest: int) -> None:
        if guest in self._guests:
            self._guests[guest].refuse("a server that was to give you something is gone")

    def _on_alive(self, server: int) -> None:
        if server in self._guests:
            self.peers.take_back(server, self._guests.pop(server))
            self._tell_who_lives()

    # -- gradients and parameters --------------------------------------------------------------

    def _on_push(self, link: Link, who: Who, header: Header, rows: torch.Tensor | None) -> None:
        source = _source(who, header)
        if rows is not None and not self._is_old(header.step):
            self.table.rows.take(source, who.rank, header.key, rows)
        if self._is_old(header.step) or self._arrivals.note(source, who.rank, header.key):
            link.say(Kind.HAVE, step=header.step)

    def _on_pull(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        have = number(content, "have") if "have" in content else None
        self._pulls.add(header.key, Pull(link, header.part, header.step, have))
        if header.step <= self.version and not self._updating:
            self._pulls.answer(header.key, self.version)

    def _on_lookup(self, link: Link, header: Header, message: torch.Tensor) -> None:
        (rows,) = unpack_rows(message, [])
        self.table.rows.parts[header.key].check(rows, increase=False)
        self._lookups.add(Lookup(link, header.key, header.step, rows))
        self._look_up()

    def _look_up(self) -> None:
        """Fetch rows for those whose version is here, after an update that is being made."""
        for due in self._lookups.due(self.version):

            def done(found: torch.Tensor, due: Lookup = due) -> None:
                due.link.send(Kind.TENSOR, bytes_of(found), key=due.key, step=self.version)

            self._do(partial(self.table.rows.parts[due.key].lookup, due.rows), done)

    def _on_turn_page(self, link: Link, header: Header, after: int) -> None:
        part = self.table.rows.parts.get(header.key)
        if part is None:
            raise Malformed(f"a page of table {header.key}, which nobody has declared")

        def done(page: tuple[torch.Tensor, int]) -> None:
            message, following = page
            data = bytes_of(message)
            link.send(Kind.TENSOR, data, key=header.key, step=following, part=PAGE)

        self._do(partial(part.page, after), done)

    # -- orders of the board, and answers ------------------------------------------------------

    def _on_board_frame(self, link: Link, kind: Kind, content: dict[str, Any]) -> None:
        who, board, now = link.who, self._board, time.monotonic()
        assert who is not None
        if board is None or not board.is_open:
            self._early.append((link, kind, content))  # it knows of a board's end before we do
            return
        if kind is Kind.READY:
            board.on_ready(who.index, who.incarnation, content, now)
        elif kind is Kind.REPORT:
            board.on_report(who.index, content)
        else:
            board.on_offer(who.index, content)
        self._go_on(now)

    def _obey(self, kind: Kind, content: dict[str, Any], sender: int) -> None:
        """Do what a board orders, or take what a server answers."""
        board, now = self._board, time.monotonic()
        if kind is Kind.STATE and not content:
            state = board.state() if board is not None else {}
            self._answer(sender, Kind.STATE, {"server": self.setup.index, **state})
            return
        if kind is Kind.ADOPT:
            self._on_adopt(content, sender)
        if kind is Kind.ALIVE:
            self._on_alive(number(content, "server"))
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
            early, self._early = self._early, []
            for frame in early:
                self._on_board_frame(*frame)
            self._go_on(now)

    def _answer(self, server: int, kind: Kind, content: dict[str, Any]) -> None:
        if server == self.setup.index:
            self.loop.call(lambda: self._obey(kind, content, server))
        elif server in self.peers.links:
            self.peers.links[server].say(kind, content)

    def _on_round(self, content: Mapping[str, Any], sender: int) -> None:
        closed, alive = Closed.from_message(content["closed"]), content["alive"]
        if closed.number <= self.version:
            return  # it is done already: the board will see by APPLY
        sources = [(part.worker, part.incarnation, part.clock) for part in closed.parts]
        mine = [
            key
            for key in self.table.keys
            if next(s for s in self.table.servers_of(key) if s in alive) == self.setup.index
        ]

        def work() -> dict[str, Any]:
            missing = self.table.add_up(sources)
            liars = sorted({source[0] for source, _ in missing})
            return {"missing": liars, "squares": 0.0 if liars else self.table.squares(mine)}

        def done(found: dict[str, Any]) -> None:
            answer = {"number": closed.number, "alive": alive, **found}
            self._answer(sender, Kind.SQUARES, answer)

        self._do(work, done)

    def _on_apply(self, content: dict[str, Any], sender: int) -> None:
        assert self._board is not None
        done_number = number(content, "number")
        if done_number <= self.version:
            self._answer(sender, Kind.APPLIED, {"number": done_number})
            return
        self._board.note(Kind.APPLY, content)
        update, outcome = content["update"], Closed.from_message(content["outcome"])
        self.table.detach_sent()
        self._updating = True

        def answer(key: int) -> None:
            self.loop.call(lambda: self._pulls.answer(key, done_number))

        def work() -> None:
            if not update["skip"]:
                self.table.apply(done_number, update["rate"], update["divisor"], answer)

        def done(_: None) -> None:
            self._updating, self.version = False, done_number
            self._forget(outcome)
            self._pulls.answer_all(done_number)
            self._look_up()
            self._answer(sender, Kind.APPLIED, {"number": done_number})
            for event in self.setup.chaos.due(done_number):
                self.loop.suffer(event)

        self._do(work, done)

    def _forget(self, closed: Closed) -> None:
        """Drop what no later update will want."""
        used = {part.worker: (part.incarnation, part.clock) for part in closed.parts}

        def is_over(source: Source) -> bool:
            worker, incarnation, clock = source
            return self._is_old(clock) or (incarnation, clock) <= used.get(worker, (-1, -1))

        self.table.forget(is_over)
        self._arrivals.forget(is_over)

    def _do(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Have `work` done on the other thread, one after the other, and `done` here."""

        def ended(future: Future) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is not None:
                self.loop.call(lambda: self._fail(error))
            else:
                self.loop.call(lambda: done(future.result()))

        self._jobs.submit(work).add_done_callback(ended)

    def _fail(self, error: BaseException) -> None:
        """End, telling all workers why."""
        self.failure = self.failure or error
        for link in list(self._workers.values()):
            link.refuse(str(error), ends=True)
        self.stop()

    # -- from time to time ---------------------------------------------------------------------

    def _go_on(self, now: float) -> None:
        """Have the board do what can be done now, and look again when it may do more."""
        assert self._board is not None
        self._board.go_on(now)
        later = self._board.rounds.again_in(now) if self._board.is_open else None
        if later is not None:
            self.loop.due = min(self.loop.due, now + max(later, 0.001))

    def tick(self, now: float) -> None:
        if self._is_over:
            return
        self._end_if_over()
        # Those before us listen, we call; a guest calls all.
        self.peers.call(self.loop, now, everybody=self._is_guest)
        if now - self._begun > self.setup.rules.join_seconds and not self._is_guest:
            for server in self.peers.missing:
                self._lose_server(server, "it did not come")
        if not self.may_decide:
            self._stuck_since = self._stuck_since or now
            self._see_whether_it_is_over(now - self._stuck_since)
            return
        self._stuck_since = None
        if self._board is not None and self._board.active:
            self._go_on(now)
            self._tell_status(now)

    def _see_whether_it_is_over(self, seconds: float) -> None:
        """End, if nothing can go on here for so long. Who hears nothing of servers may be cut off
        itself: within the lease it hears nothing of workers either."""
        lease, lost = self.setup.lease_seconds, self._lost_block
        if self._may_be_cut_off and seconds > 2 * lease:
            self._fail(
                CommError(
                    f"server {self.setup.index} hears nothing of "
                    f"{self.peers.named(self.peers.silent)}, and "
                    "no more than half of the workers are here",
                    why="the network is cut, and the run may go on at the other side",
                    mend="resume from the last checkpoint, if it does not",
                )
            )
        elif not self._may_be_cut_off and (seconds > lease or not self.peers.silent):
            self._fail(
                BigtrainError(
                    f"all servers that held block {lost} are gone",
                    why="what they had since the last checkpoint is lost with them",
                    mend="--resume goes on from the last checkpoint; with more server.replicas the "
                    "run survives the end of more servers",
                )
            )

    def _tell_status(self, now: float) -> None:
        """Write how the run is, for `bigtrain status`."""
        board = self._board
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
            **board.rounds.status(now),
        }
        try:
            write_status(self.setup.status, status)
        except OSError as error:
            log.warning("cannot write %s: %s", self.setup.status, error.strerror)
            self.setup.status = None


def _source(who: Who, header: Header) -> Source:
    return who.index, who.incarnation, header.step
