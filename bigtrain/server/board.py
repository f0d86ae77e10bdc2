"""The board decides what an update is made of. Of the servers that live, the oldest keeps it.

A round has two halves. In the first all servers are told which gradients it has, and add them up;
so all know of the decision before anything follows from it. In the second they are told what to
divide by, and the rate; when all have updated, workers are told. If the board dies, the next server
asks all others how far they are, ends the round that is open, and goes on: nothing that a worker
was told is undone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bigtrain.server.fragments import number_of
from bigtrain.server.protocol import (
    THE_END,
    Kind,
    Malformed,
    number,
    numbers,
    section,
    whole_numbers,
)
from bigtrain.server.rounds import Closed, Report, Rounds, Turn
from bigtrain.server.shares import Share

log = logging.getLogger(__name__)

_MOST_TOTALS = 8  # that are kept for those who ask again


@dataclass(frozen=True)
class Update:
    """What is done with the sum of gradients of a round. skip: nothing. norm: to be told."""

    rate: float
    divisor: float
    skip: bool
    norm: float


class Policy(Protocol):
    """What a run wants."""

    def begin(self, about: Mapping[str, Any]) -> None:
        """Take note of what the first worker tells of the run."""

    def update(self, closed: Closed, squares: float) -> Update:
        """Return what is done in this round; `squares`: of the summed gradient, undivided."""

    def is_held(self, closed: Closed) -> bool:
        """Does the speaker have something to do after this round that needs it to stay?"""


class Voice(Protocol):
    """How a board speaks."""

    def tell(self, worker: int, kind: Kind, content: dict[str, Any]) -> None:
        """Send to a worker, if there is a link."""

    def refuse(self, worker: int, why: str) -> None:
        """Do without a worker."""

    def order(self, kind: Kind, content: dict[str, Any]) -> None:
        """Send to all servers that live, this one too."""

    def adopt(self, guest: int, content: dict[str, Any]) -> None:
        """Have a guest given all that it is to hold; `content` is what it must know of rounds."""

    def turn_away(self, guest: int) -> None:
        """Do without it."""

    def let_in(self, guest: int) -> None:
        """Have all servers know that it is one of them."""

    @property
    def alive(self) -> frozenset[int]:
        """Servers that live."""

    @property
    def seniority(self) -> list[int]:
        """Servers that live, in the order in which they are to keep the board."""

    @property
    def waiting_guests(self) -> list[int]:
        """Servers that were started again and would be let in."""

    @property
    def may_decide(self) -> bool:
        """Is it sure that there is no other board?"""

    @property
    def num_servers(self) -> int:
        """Servers that the run has begun with."""

    @property
    def num_updates(self) -> int:
        """Updates that were made here: rounds that were not skipped."""

    @property
    def linked(self) -> frozenset[int]:
        """Workers that have a link with this server."""


@dataclass
class _Sum:
    """Numbers that are added up over the workers of a round, before they go on to a later one.

    since: when the board had the first offer, as far as it has looked.
    """

    after: int
    workers: tuple[int, ...]
    since: float | None = None
    offers: dict[int, list[float]] = field(default_factory=dict)


class Board:
    """Keeps the rounds, on the server that has lived longest (at first, on number 0).

    All servers have one, and tell it what they are told to do (`note`), so that it can take over.
    """

    def __init__(self, rounds: Rounds, policy: Policy, voice: Voice, lease_seconds: float) -> None:
        self.rounds, self.policy, self.voice = rounds, policy, voice
        self.lease_seconds = lease_seconds
        self.active = False
        self.outcome: dict[str, Any] | None = None  # of the last round that is over
        self.round_message: dict[str, Any] | None = None  # the last ROUND, and the last APPLY
        self.apply_message: dict[str, Any] | None = None
        self._closed: Closed | None = None  # the round that is between its halves
        self._answers: dict[int, float] = {}
        self._waiting_for: set[int] = set()  # servers, in the second half
        self._turns: dict[int, dict[str, Any]] = {}  # the last that each worker was told
        # (worker, incarnation) -> its rounds that are in updates, until it knows: (its, the update)
        self._used: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._expected: set[int] = set()  # workers that took part when the board before died
        self._expected_until = 0.0
        self._states: dict[int, dict[str, Any]] = {}
        self._asked: set[int] = set()
        self._num_totals = 0
        self._sums: dict[str, _Sum] = {}
        self._ending: set[int] = set()  # workers at the end, which wait for each other alone
        self._silent: set[int] = set()  # workers that a sum was made without, until they speak
        self._totals: dict[str, list[float]] = {}  # the last ones
        self._waiting: set[int] = set()  # guests, which are let in between two rounds
        self._guest: int | None = None  # one that is being given what it is to hold

    @property
    def is_open(self) -> bool:
        """Does it keep the board, and know how far all are?"""
        return self.active and not self._asked

    @property
    def silent(self) -> frozenset[int]:
        """Workers that rounds or sums were made without, since they stand still."""
        stalled = {w for w, member in self.rounds.members.items() if member.stalled}
        return frozenset(self._silent | stalled)

    # -- taking over ---------------------------------------------------------------------------

    def note(self, kind: Kind, content: dict[str, Any]) -> None:
        """Remember what the board has ordered."""
        if kind is Kind.ROUND:
            self.round_message = content
        elif kind is Kind.APPLY:
            self.apply_message = content
            self.outcome = content["outcome"]

    def state(self) -> dict[str, Any]:
        """Return how far this server is, for one that takes over."""
        return {"round": self.round_message, "apply": self.apply_message}

    def take_over(self, now: float) -> None:
        """Become the board: of the whole run, or where another has died."""
        self.active = True
        self._expected_until = now + 2 * self.lease_seconds
        self._asked = set(self.voice.alive)
        self._states = {}
        self.voice.order(Kind.STATE, {})
        for guest in self.voice.waiting_guests:  # they came while another kept the board, or nobody
            self.on_guest(guest)

    def on_state(self, server: int, content: dict[str, Any], now: float) -> None:
        """A server has told how far it is."""
        if self.active and self._asked:
            self._states[server] = content
            self._end_old_round(now)

    def _end_old_round(self, now: float) -> None:
        """Once all have told: go on from the furthest."""
        if not self._asked or not self._asked & self.voice.alive <= self._states.keys():
            return
        self._asked = set()
        states = self._states.values()
        rounds = [s["round"] for s in states if s.get("round")]
        applies = [s["apply"] for s in states if s.get("apply")]
        last = max(rounds, key=lambda m: m["closed"]["number"], default=None)
        done = max(applies, key=lambda m: m["number"], default=None)
        if last is None:
            if len(self.voice.alive) < self.voice.num_servers:  # somebody may have begun
                self._expected = set(self.voice.linked) - self.rounds.members.keys()
            return
        log.warning("this server keeps the board now, from round %d on", last["closed"]["number"])
        self._expected = self.rounds.take_up(last["rounds"]) & self.voice.linked
        closed = Closed.from_message(last["closed"])
        if done is not None and done["number"] == closed.number:
            self._closed = closed
            self._begin_second_half(done)
        else:
            self._begin_first_half(closed, last["rounds"])

    # -- what happens --------------------------------------------------------------------------

    def on_ready(
        self, worker: int, incarnation: int, content: Mapping[str, Any], now: float
    ) -> None:
        """A worker can begin; or it tells a new board which round it is at work on."""
        turn = section(content, "turn")
        self._expected.discard(worker)
        if turn is not None:
            clock, share = number(turn, "clock"), Share(*whole_numbers(turn, "share", 2))
            member = self.rounds.members.get(worker)
            if member is not None and (member.clock, member.incarnation) == (clock, incarnation):
                return  # its link was cut for so short a time that nobody has noticed
            if number_of(clock) > self.rounds.version and self.rounds.shares.is_free(share):
                self.rounds.adopt(worker, incarnation, clock, share, now)
                return
            self.rounds.ready(worker, incarnation, now, after=clock)
            return
        if self.rounds.began:
            log.info("worker %d has joined at round %d", worker, self.rounds.version + 1)
        self.rounds.ready(worker, incarnation, now)

    def on_report(self, worker: int, content: Mapping[str, Any]) -> None:
        """A worker's gradient of a round is with servers."""
        report = Report(
            number(content, "clock"),
            number(content, "base"),
            tuple(numbers(content, "totals")),
            frozenset(whole_numbers(content, "servers")),
        )
        self._silent.discard(worker)
        self._num_totals = self._num_totals or len(report.totals)
        if len(report.totals) != self._num_totals:
            raise Malformed(f"{len(report.totals)} totals, where others have {self._num_totals}")
        member, told = self.rounds.members.get(worker), self._turns.get(worker)
        if member is None:
            return
        if told is not None and report.clock == told["clock"]:  # it has that turn
            used = self._used.get((worker, member.incarnation), [])
            self._used[worker, member.incarnation] = [u for u in used if u not in told["used"]]
        if report.clock < member.clock and report.clock not in member.reports and told is not None:
            self.voice.tell(worker, Kind.TURN, told)  # it was lost with a link
        self.rounds.report(worker, report)

    def on_worker_left(self, worker: int) -> None:
        """A worker has done what it was to do."""
        self._expected.discard(worker)
        self._ending.discard(worker)
        self._silent.discard(worker)
        self._turns.pop(worker, None)
        self.rounds.lost(worker)
        self._check_sums()

    def on_worker_lost(self, worker: int, why: str) -> None:
        """A worker is gone."""
        self._expected.discard(worker)
        self._ending.discard(worker)
        self._silent.discard(worker)
        if worker in self.rounds.members:
            self.rounds.lost(worker)
            self._turns.pop(worker, None)
            left, of = len(self.rounds.members.keys() | self._ending), self.rounds.rules.workers
            log.info("worker %d: %s; %d of %d go on", worker, why, left, of)
        self._check_sums()

    def on_server_lost(self, now: float) -> None:
        """A server is gone: whoever waits for it does not any more."""
        if not self.active:
            return
        if self._guest is not None:  # perhaps it was given something by the one that is gone
            guest, self._guest = self._guest, None
            self.voice.turn_away(guest)
        self._end_old_round(now)
        if self._closed is None:
            return
        if self._waiting_for:
            self._waiting_for &= self.voice.alive
            self._finish_if_all_did(now)
        else:  # others must answer for what it answered for
            self._begin_first_half(self._closed, self.rounds.to_message())

    def on_squares(self, server: int, content: Mapping[str, Any], now: float) -> None:
        """A server has added up what it has of a round."""
        closed = self._closed
        if closed is None or self._waiting_for or content["number"] != closed.number:
            return
        if content["alive"] != sorted(self.voice.alive):
            return  # to an order that holds no more
        if content["missing"]:
            self._reopen(closed, content["missing"], now)
            return
        self._answers[server] = float(content["squares"])
        if self._answers.keys() >= self.voice.alive:
            total = sum(self._answers[s] for s in sorted(self.voice.alive))
            update = self.policy.update(closed, total)
            self._begin_second_half(
                {
                    "number": closed.number,
                    "update": dataclasses.asdict(update),
                    "outcome": {
                        **closed.to_message(),
                        "norm": update.norm,
                        "skip": update.skip,
                    },
                }
            )

    def _reopen(self, closed: Closed, liars: Sequence[int], now: float) -> None:
        """Some of the round's workers have reported what servers do not have: without these."""
        self._closed, self._answers = None, {}
        self.rounds.reopen(closed)
        for worker in liars:
            self.voice.refuse(worker, "it has reported a gradient that it did not push")
        self.go_on(now)

    def on_applied(self, server: int, done: int, now: float) -> None:
        """A server has updated."""
        if self._closed is not None and done == self._closed.number:
            self._waiting_for.discard(server)
            self._finish_if_all_did(now)

    def on_offer(self, worker: int, content: Mapping[str, Any]) -> None:
        """A worker has numbers to be added up with those of the other workers of the last round."""
        name = content.get("name")
        if not isinstance(name, str):
            raise Malformed("an offer without a name")
        self._silent.discard(worker)
        workers, values = tuple(whole_numbers(content, "workers")), numbers(content, "values")
        after = number(content, "after")
        known = self._sums.get(name)
        for others in known.offers.values() if known is not None else ():
            if len(others) != len(values):
                raise Malformed(f"{len(values)} values, where others have {len(others)}")
        if name in self._totals:  # its link was lost before it was told
            self.voice.tell(worker, Kind.TOTAL, {"name": name, "values": self._totals[name]})
            return
        if name == THE_END:  # no round waits for it any more
            self.rounds.lost(worker)
            self._ending.add(worker)
        self._sums.setdefault(name, _Sum(after, workers)).offers[worker] = values
        self._check_sums()

    def _check_sums(self, now: float | None = None) -> None:
        """Add up what all have offered; or, as time goes on, all but those that stand still."""
        for name, one in list(self._sums.items()):
            missing = self._missing(name, one)
            if missing and now is not None and self._has_waited(one, now):
                log.warning(
                    "%s: goes on without worker(s) %s: others have waited %g s for them",
                    name,
                    ", ".join(map(str, missing)),
                    self.rounds.rules.stall_seconds,
                )
                self._silent |= set(missing)
                missing = []
            if not missing:
                self._end_sum(name, one)

    def _missing(self, name: str, one: _Sum) -> list[int]:
        """Return the workers whose offer is still to come."""
        there = {w for w, member in self.rounds.members.items() if not member.stalled}
        there |= self._expected | (self._ending if name == THE_END else set())
        there -= self._silent | one.offers.keys()
        return [w for w in one.workers if w in there and self._told(w) <= one.after]

    def _has_waited(self, one: _Sum, now: float) -> bool:
        one.since = now if one.since is None else one.since
        return now - one.since >= self.rounds.rules.stall_seconds

    def _end_sum(self, name: str, one: _Sum) -> None:
        del self._sums[name]
        while len(self._totals) >= _MOST_TOTALS:
            del self._totals[next(iter(self._totals))]
        values = [sum(column) for column in zip(*one.offers.values(), strict=True)]
        if name != THE_END:  # they may have to meet there again
            self._totals[name] = values
        for worker in one.offers:
            self.voice.tell(worker, Kind.TOTAL, {"name": name, "values": values})

    def _told(self, worker: int) -> int:
        """Return the last round that a worker was told the outcome of, as far as is known here."""
        return self._turns[worker]["version"] if worker in self._turns else 0

    # -- guests --------------------------------------------------------------------------------

    def on_guest(self, server: int) -> None:
        """A server was started again, and would take part."""
        if self.rounds.rules.mode == "sync":  # else gradients may be under way that it lacks
            self._waiting.add(server)

    def on_guest_lost(self, server: int, now: float) -> None:
        """It is gone again."""
        self._waiting.discard(server)
        if self._guest == server:
            self._guest = None
            self.go_on(now)

    def on_joined(self, server: int, now: float) -> None:
        """A guest has all that it is to hold, of this very version."""
        if self._guest == server:
            self._guest = None
            log.info("server %d has joined at round %d", server, self.rounds.version + 1)
            self.voice.let_in(server)
            self.go_on(now)

    def _adopt(self, guest: int) -> None:
        self._waiting.discard(guest)
        self._guest = guest
        state = {"round": self.round_message, "apply": self.apply_message}
        self.voice.adopt(guest, {"guest": guest, "rounds": self.rounds.to_message(), **state})

    # -- what follows --------------------------------------------------------------------------

    def go_on(self, now: float) -> None:
        """Do what can be done: give turns, close a round. Called whenever something has happened,
        and from time to time."""
        busy = self._closed is not None or self._guest is not None
        if not self.is_open or busy or not self.voice.may_decide:
            return
        if self._expected:
            if now < self._expected_until:
                return
            for worker in list(self._expected):
                self.on_worker_lost(worker, "it did not come to the new board")
        self._give_turns(now)
        closed = self.rounds.close(now, self.voice.alive)
        if closed is not None:
            self._begin_first_half(closed, self.rounds.to_message())

    def _give_turns(self, now: float) -> None:
        for turn in self.rounds.turns(now):
            self._turns[turn.worker] = self._turn_message(turn)
            self.voice.tell(turn.worker, Kind.TURN, self._turns[turn.worker])
        self._check_sums(now)

    def status(self, now: float) -> dict[str, Any]:
        """Return how rounds and workers are, and whom they wait for, for people."""
        status = self.rounds.status(now)
        for name, one in self._sums.items():
            status["waits_for"] |= {str(worker): name for worker in self._missing(name, one)}
        return status

    def _turn_message(self, turn: Turn) -> dict[str, Any]:
        incarnation = self.rounds.members[turn.worker].incarnation
        return {
            "clock": turn.clock,
            "share": [turn.share.cursor, turn.share.number],
            "version": self.rounds.version,
            "cursor": self.rounds.shares.cursor,
            "num_updates": self.voice.num_updates,
            "workers": self.rounds.rules.workers,
            "alive": self.voice.seniority,
            "outcome": self.outcome,
            "used": list(self._used.get((turn.worker, incarnation), [])),
        }

    def _begin_first_half(self, closed: Closed, rounds: dict[str, Any]) -> None:
        self._closed, self._answers = closed, {}
        alive = sorted(self.voice.alive)
        message = {"closed": closed.to_message(), "alive": alive, "rounds": rounds}
        self.voice.order(Kind.ROUND, message)

    def _begin_second_half(self, message: dict[str, Any]) -> None:
        self._waiting_for = set(self.voice.alive)
        self.voice.order(Kind.APPLY, message)

    def _finish_if_all_did(self, now: float) -> None:
        if self._closed is None or self._waiting_for:
            return
        closed, self._closed = self._closed, None
        for part in closed.parts:
            used = self._used.setdefault((part.worker, part.incarnation), [])
            used.append((part.clock, closed.number))
        if self.policy.is_held(closed):
            self.rounds.hold(closed.speaker)
        if self._waiting:  # nobody is at work on a round now
            self._adopt(min(self._waiting))
        self.go_on(now)
