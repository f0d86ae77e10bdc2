"""The links of one rank of a worker with all servers."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bigtrain.errors import CommError
from bigtrain.server.chaos import Chaos
from bigtrain.server.fragments import Fragments, number_of
from bigtrain.server.link import Link, Loop
from bigtrain.server.protocol import LOSS, PAGE, STEPS, Header, Kind, Malformed, Who
from bigtrain.server.rows import PAGE_BYTES
from bigtrain.server.table import Spec

log = logging.getLogger(__name__)

_CALL_SECONDS = 0.3  # between two tries to reach a server
_MOST_STEPS = 8  # times the size of parameters that it may take to tell how they have moved


def receivers_of(specs: Iterable[Spec]) -> set[tuple[int, tuple[int, ...]]]:
    """Return the fragments and servers of blocks: which servers gradients go to in a round."""
    return {(spec.fragment, spec.servers) for spec in specs}


@dataclass
class _Pull:
    """A tensor that is to come: a version from `version` on, into `room`; or how it has moved since
    the version that is there (`have`), into `steps`. rows: those of a table that are wanted; after:
    the row from which on a page of a table is wanted, which goes into `steps`."""

    version: int
    room: memoryview
    have: int | None = None
    rows: memoryview | None = None
    after: int | None = None
    steps: bytearray | None = None
    asked: Link | None = None
    came: int | None = None  # the version that has


class Client:
    """Speaks with all servers, on a thread of its own; the training thread calls it and waits.

    who: this rank. addresses: of the servers, by number. lease_seconds: of silence after which a
    server counts as gone. patience_seconds: how long any wait may take.
    """

    def __init__(
        self,
        who: Who,
        addresses: Sequence[tuple[str, int]],
        token: str,
        *,
        lease_seconds: float = 5.0,
        patience_seconds: float = 300.0,
        chaos: Chaos | None = None,
        fragments: Fragments | None = None,
    ) -> None:
        self.fragments = fragments or Fragments()
        self.who, self.addresses = who, list(addresses)
        self.lease_seconds, self.patience_seconds = lease_seconds, patience_seconds
        self.chaos = chaos or Chaos([], "worker", who.index, who.incarnation)
        self.wanted: dict[int, dict[str, Any]] = {}  # server -> what it said to what we declared
        self._specs: dict[int, Spec] = {}
        self._receivers: frozenset[tuple[int, tuple[int, ...]]] = frozenset()  # of our gradients
        self._links: dict[int, Link] = {}
        self._identities: dict[int, str] = {}
        self._dead: set[int] = set()
        self._follows: int | None = None  # a server that has asked whether we follow it alone
        self._left: set[int] = set()  # servers that we have no links with for its sake
        self._order = list(range(len(self.addresses)))  # who keeps the board while it lives
        self._called: dict[int, float] = {}
        self._pushes: dict[int, dict[int, memoryview]] = {}  # round -> key -> gradient
        self._have: dict[int, set[int]] = {}  # round -> servers that have all of ours
        self._pulls: dict[tuple[int, int], _Pull] = {}
        self._ready: dict[str, Any] | None = None
        self._turn: dict[str, Any] | None = None  # the last one that the board gave
        self._report: dict[str, Any] | None = None
        self._reported_to: Link | None = None
        self._totals: dict[str, list[float]] = {}
        self._offer: dict[str, Any] | None = None
        self._failure: BaseException | None = None
        self._refusal = ""
        self._alone_since: float | None = None
        self._nobody: set[int] = set()  # servers at whose address nobody listens
        self._changed = threading.Condition()
        self._loop = Loop(self, token, lease_seconds)

    # -- from the training thread --------------------------------------------------------------

    def start(
        self, specs: Sequence[Spec], others: Iterable[tuple[int, tuple[int, ...]]] = ()
    ) -> None:
        """Declare our blocks to their servers, and return once all have answered (`wanted`).

        others: on rank 0, of each block that other ranks of this worker push, its fragment and
        servers: it reports for them, too.

        Raises:
            CommError: a server cannot be reached, or refuses us.
        """
        self._specs = {spec.key: spec for spec in specs}
        self._receivers = frozenset({*receivers_of(specs), *others})
        self._loop.start()
        everybody = range(len(self.addresses))
        self._wait(
            "all servers to answer",
            lambda: all(s in self._dead or s in self.wanted for s in everybody),
        )

    def fill(self, values: Mapping[tuple[int, int], memoryview], about: dict[str, Any]) -> None:
        """Give values to servers that want them: of (key, part), and what all is `about`."""

        def go() -> None:
            for server, link in self._links.items():
                if not self.wanted[server]["fill"]:
                    continue
                for (key, part), data in values.items():
                    if server in self._specs[key].servers:
                        link.send(Kind.VALUES, data, key=key, part=part)
                link.say(Kind.FILLED, about)

        self._on_loop(go)

    def give_page(self, key: int, page: memoryview) -> None:
        """Give rows of a table to servers that want values, and return once they are sent."""
        sending: set[int] = set()
        asked = threading.Event()

        def go() -> None:
            for server, link in self._links.items():
                if self.wanted[server]["fill"] and server in self._specs[key].servers:
                    sending.add(server)
                    gone = partial(self._sent, sending, server)
                    link.send(Kind.VALUES, page, gone, key=key, part=PAGE)
            asked.set()
            self._notify()

        self._on_loop(go)
        self._wait("servers to take rows", lambda: asked.is_set() and not sending)

    def _sent(self, sending: set[int], server: int) -> None:
        sending.discard(server)
        self._notify()

    def ready(self) -> None:
        """Tell the board that this worker can begin (rank 0 only)."""

        def go() -> None:
            self._ready = {}
            self._say_ready()

        self._on_loop(go)

    def next_turn(self, after: int) -> dict[str, Any]:
        """Return the board's word on what to do, once it is about a later round than `after`.

        Raises:
            CommError: no server is left, or nothing comes.
        """
        self._wait(
            "the next round",
            lambda: self._turn is not None and self._turn["clock"] > after,
            None,  # others may be slow; who is gone is noticed
        )
        assert self._turn is not None
        return self._turn

    def push(self, clock: int, key: int, gradient: memoryview) -> None:
        """Send a block's gradient to its servers; it must stay as it is until the next turn."""

        def go() -> None:
            self._pushes.setdefault(clock, {})[key] = gradient
            for server in self._specs[key].servers:
                if server in self._links:
                    self._links[server].send(Kind.PUSH, gradient, key=key, step=clock)

        self._on_loop(go)

    def begin(self, clock: int) -> None:
        """Take note that the board has told rank 0 to begin a round: the one before is over."""
        self._on_loop(lambda: self._forget_before(clock))

    def wait_pushed(self, clock: int) -> list[int]:
        """Return the servers that have all our gradients of a round: all that we have links with.
        On rank 0, all of this worker's. If the board has gone on without us meanwhile, it does not
        matter who has.

        Raises:
            CommError: no server is left.
        """
        for event in self.chaos.due(number_of(clock)) if self.who.rank == 0 else ():
            self._loop.suffer(event)
        self._wait("servers to have our gradients", lambda: self._has_arrived(clock))
        return sorted(self._complete(clock))

    def report(self, clock: int, base: int, totals: Sequence[float], servers: list[int]) -> None:
        """Tell the board that our part of a round is with `servers` (rank 0 only)."""

        def go() -> None:
            self._report = {
                "clock": clock,
                "base": base,
                "totals": list(totals),
                "servers": servers,
            }
            self._say_report()

        self._on_loop(go)

    def pull(
        self,
        wanted: Sequence[tuple[int, int, int, memoryview]],
        have: Mapping[int, int] | None = None,
    ) -> None:
        """Ask for tensors, in this order: (key, part, version, where it is to go).

        have: by key, versions that are there, where it will do to know how they have moved.
        """

        def go() -> None:
            for key, part, version, room in wanted:
                pull = self._pulls[key, part] = _Pull(version, room, (have or {}).get(key))
                self._ask(key, part, pull)

        self._on_loop(go)

    def lookup(self, wanted: Sequence[tuple[int, int, memoryview, memoryview]]) -> None:
        """Ask for rows of tables: (key, version, the rows, where they are to go)."""

        def go() -> None:
            for key, version, rows, room in wanted:
                pull = self._pulls[key, 0] = _Pull(version, room, rows=rows)
                self._ask(key, 0, pull)

        self._on_loop(go)

    def page(self, key: int, after: int, version: int | None = None) -> tuple[bytearray, int]:
        """Return the next rows of a table that were updated, from row `after` on: a message, and
        where to go on; 0, if the table is not of that `version` any more.

        Raises:
            CommError: no server that holds it is left.
        """

        def go() -> None:
            pull = self._pulls[key, PAGE] = _Pull(version or 0, memoryview(b""), after=after)
            self._ask(key, PAGE, pull)

        self._on_loop(go)
        following, message = self.wait_pulled(key, PAGE)
        assert message is not None
        return message, following

    def wait_pulled(self, key: int, part: int = 0) -> tuple[int, bytearray | None]:
        """Return the version of a tensor that was asked for, once it is here, and how it has moved,
        if that has come in its place.

        Raises:
            CommError: no server that holds it is left.
        """

        def there() -> bool:
            pull = self._pulls.get((key, part))
            return pull is not None and pull.came is not None

        self._wait(f"block {key}", there)
        pull = self._pulls.pop((key, part))
        assert pull.came is not None
        return pull.came, pull.steps

    def add_up(
        self, name: str, after: int, workers: Sequence[int], values: Sequence[float]
    ) -> list[float]:
        """Return the sum of `values` over those of `workers` that live, and were not told of a
        later round than `after` without having told theirs (rank 0 only)."""
        offer = {"name": name, "after": after, "workers": list(workers), "values": list(values)}

        def go() -> None:
            self._offer = offer
            board = self._board()
            if board is not None:
                board.say(Kind.OFFER, offer)

        self._on_loop(go)
        self._wait(name, lambda: name in self._totals, None)
        return self._totals.pop(name)

    def leave(self) -> None:
        """Say goodbye and end."""

        def go() -> None:
            for link in self._links.values():
                link.say(Kind.BYE)

        self._loop.call(go)
        self._loop.stop()

    @property
    def alive(self) -> set[int]:
        """Servers that are not known to be gone."""
        return set(range(len(self.addresses))) - self._dead

    # -- waiting -------------------------------------------------------------------------------

    def _on_loop(self, function: Callable[[], None]) -> None:
        self._raise_failure()
        self._loop.call(function)

    def _wait(self, what: str, there: Callable[[], bool], patience: float | None = -1.0) -> None:
        """Wait until `there()`; a patience of None has no end as long as a server lives."""
        if patience == -1.0:
            patience = self.patience_seconds
        end = None if patience is None else time.monotonic() + patience
        with self._changed:
            while not there():
                self._raise_failure()
                self._changed.wait(0.5)
                if end is not None and time.monotonic() > end:
                    raise CommError(
                        f"worker {self.who.index} has waited {patience:g} s for {what}",
                        why=f"it has links with server(s) {sorted(self._links)}",
                        mend="look at the servers' logs; parallel.timeout_seconds bounds the wait",
                    )

    def _raise_failure(self) -> None:
        failure = self._failure or self._loop.error
        if failure is not None:
            raise failure

    def _fail(self, what: str, why: str = "", mend: str = "") -> None:
        if self._failure is None:
            self._failure = CommError(what, why=why, mend=mend or "see the servers' logs")

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- links (on the loop's thread, as all that follows) -------------------------------------

    def tick(self, now: float) -> None:
        for server, address in enumerate(self.addresses):
            idle = now - self._called.get(server, 0.0) >= _CALL_SECONDS
            lives = server not in self._dead | self._left
            if idle and server not in self._links and lives:
                self._called[server] = now
                if not any(link.target == server for link in self._loop.links):
                    self._loop.connect(address, self.who, server)
        self._see_whether_alone(now)
        for (key, part), pull in self._pulls.items():
            if pull.came is None and (pull.asked is None or not pull.asked.open):
                self._ask(key, part, pull)
        self._notify()

    def _see_whether_alone(self, now: float) -> None:
        """Give up if servers are gone for good; where the network is cut, it may heal."""
        self._alone_since = None if self._links else self._alone_since or now
        if self._alone_since is None or not (self.wanted or self._refusal):
            return
        gone = bool(self._refusal) or self._nobody >= self.alive
        patience = 2 * self.lease_seconds if gone else self.patience_seconds
        if now - self._alone_since > patience:
            self._fail(
                f"worker {self.who.index} has no link with any server any more",
                why=self._refusal or ("they are gone" if gone else "the network is cut"),
                mend="--resume goes on from the last checkpoint",
            )

    def greet(self, who: Who) -> dict[str, Any]:
        raise Malformed("a worker takes no links")

    def opened(self, link: Link, greeting: dict[str, Any]) -> None:
        server, identity = link.target, str(greeting.get("identity"))
        alive = greeting.get("alive") or []  # none: it is not part of the run itself (yet)
        asks = bool(greeting.get("asks"))  # whether we follow it, and not those that it has lost
        torn = asks and not self._links.keys() <= set(alive)
        if server in self._dead | self._left or not alive or torn:
            link.close("it was given up, or started again, and does not hold what it should")
            return
        if self._identities.get(server, identity) != identity:  # it was let in meanwhile
            for servers in self._have.values():
                servers.discard(server)
        self._identities[server] = identity
        self._links[server] = link
        if asks:
            self._follow(link, alive)
        else:
            self._take_alive(alive)
        self._nobody.discard(server)
        self._refusal = ""
        link.say(Kind.DECLARE, {"blocks": [spec.to_message() for spec in self._specs.values()]})
        for clock, pushes in self._pushes.items():
            for key, gradient in pushes.items():
                if server in self._specs[key].servers:
                    link.send(Kind.PUSH, gradient, key=key, step=clock)
        self._check_in()
        self._notify()

    def closed(self, link: Link, why: str) -> None:
        server = link.target
        if self._links.get(server) is link:
            del self._links[server]
            if self._follows == server:  # it goes on without us, or not at all
                self._follows, self._left = None, set()
        if link.connecting and why == os.strerror(errno.ECONNREFUSED):
            self._nobody.add(server)
        if link.refused and (link.ends or server in self.wanted):
            self._refusal = why  # others may go on, and have us
        elif link.refused:
            self._fail(
                f"server {server} has refused worker {self.who.index}",
                why=why,
                mend="start all processes of a run by one `bigtrain launch`, with one config",
            )
        for pull in self._pulls.values():
            if pull.asked is link and pull.came is None:
                pull.asked = None
        self._check_in()
        self._notify()

    def _board(self) -> Link | None:
        """Return the link with the server that keeps the board, as far as we can tell."""
        return next((self._links[s] for s in self._order if s in self._links), None)

    def _check_in(self) -> None:
        """Tell the board where we are, if it is another than before, or our link with it is new."""
        board = self._board()
        if board is None or board is self._reported_to:
            return
        self._reported_to = board
        self._say_ready()
        self._say_report()
        if self._offer is not None and self._offer["name"] not in self._totals:
            board.say(Kind.OFFER, self._offer)

    def _say_ready(self) -> None:
        board = self._board()
        if board is not None and self._ready is not None:
            turn = self._turn and {"clock": self._turn["clock"], "share": self._turn["share"]}
            board.say(Kind.READY, {"turn": turn} if turn else {})

    def _say_report(self) -> None:
        board = self._board()
        if board is not None and self._report is not None:
            board.say(Kind.REPORT, self._report)

    # -- frames --------------------------------------------------------------------------------

    def room(self, link: Link, header: Header) -> memoryview:
        pull = self._pulls.get((header.key, 0 if header.part == STEPS else header.part))
        if header.kind is not Kind.TENSOR or pull is None or pull.asked is not link:
            raise Malformed(f"{header.kind.name} that nobody has asked for")
        if header.part in (STEPS, PAGE):
            whole = pull.room.nbytes if header.part == STEPS else PAGE_BYTES
            pull.steps = bytearray(min(header.length, _MOST_STEPS * whole))
            return memoryview(pull.steps)
        pull.have, pull.steps = None, None  # what was there is being overwritten
        return pull.room

    def frame(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        kind = header.kind
        if kind is Kind.TENSOR:
            pull = self._pulls.get((header.key, 0 if header.part == STEPS else header.part))
            if pull is not None and pull.asked is link:
                pull.came = header.step
        elif kind is Kind.HAVE:
            self._have.setdefault(header.step, set()).add(link.target)
            self._report_again(header.step)
        elif kind is Kind.WANTED:
            self.wanted[link.target] = content
        elif kind is Kind.TURN:
            self._on_turn(content)
        elif kind is Kind.ALIVE and content.get("asks"):
            self._follow(link, content["alive"])
        elif kind is Kind.ALIVE:
            self._take_alive(content["alive"])
        elif kind is Kind.TOTAL:
            self._totals[str(content["name"])] = content["values"]
            self._offer = None
        else:
            raise Malformed(f"{kind.name} from a server")
        self._notify()

    def _on_turn(self, turn: dict[str, Any]) -> None:
        if self._turn is not None and turn["clock"] <= self._turn["clock"]:
            return
        self._turn, self._report = turn, None
        self._forget_before(turn["clock"])
        self._take_alive(turn["alive"])

    def _forget_before(self, clock: int) -> None:
        self._pushes = {c: pushes for c, pushes in self._pushes.items() if c >= clock}
        self._have = {c: servers for c, servers in self._have.items() if c >= clock}

    def _follow(self, link: Link, alive: list[int]) -> None:
        """A server hears nothing of others, which may live and hear nothing of it: follow it alone,
        as long as there is a link with it."""
        self._follows = link.target
        self._left = set(range(len(self.addresses))) - set(alive)
        for other in [other for other in self._loop.links if other.target in self._left]:
            other.close("another server does without it")
        link.say(Kind.FOLLOWS, {"alive": alive})

    def _take_alive(self, alive: Sequence[int]) -> None:
        """Servers that live have changed, or are told again, in the order in which they are to keep
        the board."""
        self._follows, self._left = None, set()
        self._order = [int(server) for server in alive]
        self._dead -= set(self._order)  # it was started again, and was let in
        self._give_up(set(range(len(self.addresses))) - set(self._order))
        self._check_in()

    def _give_up(self, servers: set[int]) -> None:
        """Do without servers that the others do without."""
        for server in servers - self._dead:
            self._dead.add(server)
            log.info("worker %d goes on without server %d", self.who.index, server)
            for link in [link for link in self._loop.links if link.target == server]:
                link.close("the board has given it up")

    def _report_again(self, clock: int) -> None:
        """A server has our gradients that had not when we reported: then it counts."""
        report = self._report
        if report is not None and report["clock"] == clock:
            servers = sorted(self._complete(clock))
            if servers != report["servers"]:
                self._report = {**report, "servers": servers}
                self._say_report()

    def _num_pushes(self, clock: int) -> int:
        """Return how many blocks this rank pushes for that round."""
        meets = self.fragments.meets
        return sum(meets(spec.fragment, clock) for spec in self._specs.values())

    def _complete(self, clock: int) -> set[int]:
        """Return the servers that have all that we push to them, or that we push nothing to."""
        meets = self.fragments.meets
        receive = {s for fragment, to in self._receivers if meets(fragment, clock) for s in to}
        idle = set(range(len(self.addresses))) - receive  # one may come only after the report
        return self._have.get(clock, set()) | idle

    def _has_arrived(self, clock: int) -> bool:
        if self._turn is not None and self._turn["clock"] > clock:
            return True
        if not self._links:
            return False
        complete = len(self._pushes.get(clock, ())) == self._num_pushes(clock)
        return complete and self._links.keys() <= self._complete(clock)

    def _ask(self, key: int, part: int, pull: _Pull) -> None:
        """Ask the first server that holds the block and that we have a link with."""
        holders = self._specs[key].servers
        link = next((self._links[s] for s in holders if s in self._links), None)
        if link is not None:
            pull.asked = link
            self._say_wish(link, key, part, pull)
        elif set(holders) <= self._dead:
            self._fail(
                f"all servers that hold block {key} are gone",
                why=LOSS,
                mend="--resume goes on from the last checkpoint; more server.replicas survive the "
                "end of more servers",
            )

    @staticmethod
    def _say_wish(link: Link, key: int, part: int, pull: _Pull) -> None:
        if pull.rows is not None:
            link.send(Kind.LOOKUP, pull.rows, key=key, step=pull.version)
        elif pull.after is not None:
            wish = {"after": pull.after, "version": pull.version}
            link.say(Kind.TURN_PAGE, wish, key=key)
        else:
            content = None if pull.have is None else {"have": pull.have}
            link.say(Kind.PULL, content, key=key, step=pull.version, part=part)
