"""Which workers' gradients make up an update, and when it is made. Pure: time is an argument.

A round is one update; the version of parameters is the number of rounds that are closed. A worker
begins a round, reports when all servers have its gradient, and begins the next. Rounds close in
order:

sync: when all workers have reported that have begun it; if there are `quorum` of them, those that
    have begun it are given `grace_seconds` more, and those that are still at an older round none.
ssp: the same, but a worker may be `staleness` rounds ahead of the one that is open (stale
    synchronous parallel, https://proceedings.neurips.cc/paper/2013/hash/
    b7bb35b9c6ca2aee2df08cf09d7016c2-Abstract.html). With 0 it is sync.
async: with each report, by that worker alone; it goes on once its own round is closed.

Of each round one worker speaks, and no other closes before that worker has been told of it.

What a worker had begun for a round that has closed without it is read by others at once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bigtrain.server.fragments import ANEW, number_of
from bigtrain.server.shares import Share, Shares

log = logging.getLogger(__name__)

Mode = Literal["sync", "ssp", "async"]


@dataclass(frozen=True)
class Rules:
    """How rounds close.

    workers: that are meant to be. quorum: how many make up a round at least, if so many are there.
    grace_seconds: what the others have from then on; None: a tenth of what it has taken.
    stall_seconds: after the first report of a round, nobody is waited for any more. join_seconds:
    how long the first round waits for all workers. staleness: of ssp. last: the round after which
    none closes.
    """

    mode: Mode
    workers: int
    quorum: int
    grace_seconds: float | None = None
    stall_seconds: float = 300.0
    join_seconds: float = 120.0
    staleness: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Report:
    """What a worker tells of its part of a round.

    base: the version of the parameters that it computed with. totals: numbers to be added up over
    workers. servers: those that have its gradient.
    """

    clock: int
    base: int
    totals: tuple[float, ...]
    servers: frozenset[int]


@dataclass
class Member:
    """A worker that takes part. clock: the last round that it has begun; 0: none yet."""

    incarnation: int
    clock: int = 0
    began: float = 0.0
    counted: int = 0  # the last of its rounds that is in an update, or was too late for one
    wants_turn: bool = True
    late: bool = False  # was the last of its rounds too late?
    stalled: bool = False  # is it not waited for, as long as it says nothing?
    overtaken: float | None = None  # async: since when one that began later is in an update
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def computes(self) -> bool:
        return self.counted < self.clock and self.clock not in self.reports


@dataclass(frozen=True)
class Part:
    """A gradient that is in a round: a worker's, of the round that it was computed for, with
    parameters of version `base`."""

    worker: int
    incarnation: int
    clock: int
    base: int


@dataclass(frozen=True)
class Closed:
    """A round that is closed.

    totals: the sum over its parts. speaker: the worker that shows, records and saves what came of
    it. staleness: by how many versions the oldest parameters of its parts were behind.
    """

    number: int
    parts: tuple[Part, ...]
    totals: tuple[float, ...]
    speaker: int
    staleness: int

    @property
    def workers(self) -> tuple[int, ...]:
        return tuple(part.worker for part in self.parts)

    def to_message(self) -> dict[str, Any]:
        """Return it as what JSON can carry."""
        parts = [[p.worker, p.incarnation, p.clock, p.base] for p in self.parts]
        return {
            "number": self.number,
            "parts": parts,
            "totals": list(self.totals),
            "speaker": self.speaker,
            "staleness": self.staleness,
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Closed:
        parts = tuple(Part(*part) for part in message["parts"])
        totals = tuple(message["totals"])
        return cls(message["number"], parts, totals, message["speaker"], message["staleness"])


@dataclass(frozen=True)
class Turn:
    """What a worker does next: round `clock`, with this share of the data."""

    worker: int
    clock: int
    share: Share


class Rounds:
    """The rounds of a run: told what happens, it says what follows.

    version: rounds that are closed, at first.
    """

    def __init__(self, rules: Rules, shares: Shares, version: int = 0) -> None:
        self.rules, self.shares, self.version = rules, shares, version
        self.passed = version  # the last clock that rounds are made of: see `_open`
        self.members: dict[int, Member] = {}
        self.began = False  # has the first round of this run begun?
        self.holder: int | None = None  # a worker that no round closes without
        self._untold: int | None = None  # who speaks for the last round, until it has a turn
        self._untold_since = 0.0
        self._held_until: int | None = None  # the holder's round before which none closes
        self.most_stale = 0
        self._last: dict[int, tuple[Report, Share]] = {}  # of the round that was closed last
        self._first_ready: float | None = None
        self._since: tuple[int, float] | None = None  # the open clock, and when it had a report
        self._grace_until: float | None = None  # once the open round has its quorum
        self._servers: frozenset[int] | None = None  # that lived when we last looked

    # -- what happens --------------------------------------------------------------------------

    def ready(self, worker: int, incarnation: int, now: float, after: int = 0) -> None:
        """A worker can begin: one that is new, or was started again; or that was thought to be gone
        while it had begun round `after`, of which nothing can come any more."""
        self.lost(worker)
        self.members[worker] = Member(incarnation, clock=after, counted=after)
        if self._first_ready is None:
            self._first_ready = now

    def adopt(self, worker: int, incarnation: int, clock: int, share: Share, now: float) -> None:
        """A worker is at work on a round, as somebody has told it who is gone."""
        member = Member(incarnation, clock, now, wants_turn=False)
        self.members[worker] = member
        self.shares.adopt(worker, clock, share)
        self.began = True

    def lost(self, worker: int) -> None:
        """A worker is gone, or has left."""
        self.members.pop(worker, None)
        self.shares.give_back(worker)
        if self.holder == worker:
            self.holder = self._held_until = None
        if self._untold == worker:
            self._untold = None

    def report(self, worker: int, report: Report) -> None:
        """A worker's part of a round is with servers; it may say so again, with more servers."""
        member = self.members.get(worker)
        if member is None or report.clock <= member.counted:
            return
        if report.clock in member.reports:
            member.reports[report.clock] = report
        if report.clock != member.clock:
            return  # of a turn that it has not: its link was cut, and it was given up
        member.wants_turn, member.stalled = True, False
        passed = self.rules.mode != "async" and report.clock <= self.passed
        if passed or (worker, report.clock) not in self.shares.out:  # others read that
            self.shares.give_back(worker, report.clock)
            member.counted, member.late = report.clock, True
        else:
            member.reports[report.clock] = report

    def hold(self, worker: int) -> None:
        """Close no round without this worker, while it is there: it saves the last one's result."""
        self.holder = worker

    # -- what follows --------------------------------------------------------------------------

    def close(self, now: float, servers: Collection[int]) -> Closed | None:
        """Close the open round, if it is time; `servers` are those that live.

        A report counts once all of them have what it tells of.
        """
        self._servers = living = frozenset(servers)
        if self._is_over or self._is_untold(now):
            return None
        number = clock = self.version + 1
        have = {
            worker: {c: r for c, r in member.reports.items() if r.servers >= living}
            for worker, member in sorted(self.members.items())
        }
        if self.rules.mode == "async":
            chosen = self._earliest(have)
        else:
            clock = self._open()
            chosen = {w: reports[clock] for w, reports in have.items() if clock in reports}
        self._note_since(clock, chosen, now)
        if not chosen or self._is_held(clock, chosen, now):
            return None
        if self.rules.mode != "async" and not self._is_time(clock, chosen, now):
            return None
        self._last = {}
        for worker, report in chosen.items():
            member = self.members[worker]
            share = self.shares.out.get((worker, report.clock))
            if share is not None:
                self._last[worker] = report, share
            del member.reports[report.clock]
            member.counted = report.clock
            self.shares.used(worker, report.clock)
        self.version, self.passed = number, clock
        self.holder, self._held_until, self._grace_until, self._since = None, None, None, None
        if self.rules.mode != "async":
            self._give_up_late()
        else:
            self._note_overtaken(next(iter(chosen)), now)
        parts = tuple(
            Part(worker, self.members[worker].incarnation, r.clock, r.base)
            for worker, r in chosen.items()
        )
        columns = zip(*(report.totals for report in chosen.values()), strict=True)
        stale = max(number - 1 - part.base for part in parts)
        self.most_stale = max(self.most_stale, stale)
        self._untold, self._untold_since = self._speaker(list(chosen)), now
        return Closed(number, parts, tuple(map(sum, columns)), self._untold, stale)

    def reopen(self, closed: Closed) -> None:
        """Undo the last `close`: of what it was made of, some is not there."""
        assert closed.number == self.version
        self._untold = None
        self.version, self.passed = self.version - 1, self.passed - 1
        for worker, (report, share) in self._last.items():
            self.shares.out[worker, report.clock] = share
            member = self.members.get(worker)
            if member is None or member.clock < report.clock:  # it was started again
                self.shares.give_back(worker, report.clock)
            else:
                member.reports[report.clock], member.counted = report, report.clock - 1

    @property
    def _is_over(self) -> bool:
        return self.rules.last is not None and self.version >= self.rules.last

    def _speaker(self, workers: Sequence[int]) -> int:
        """Return the first that can be told at once: others are at work on a later round."""
        return next((w for w in workers if self.members[w].wants_turn), workers[0])

    def _is_untold(self, now: float) -> bool:
        """Would the speaker of the last round not hear of it?"""
        untold = self.members.get(self._untold) if self._untold is not None else None
        return untold is not None and now - self._untold_since < self.rules.stall_seconds

    def _note_since(self, clock: int, chosen: Collection[int], now: float) -> None:
        """Note since when the open round has had a report that counts."""
        if not chosen:
            self._since = None
        elif self._since is None or self._since[0] != clock:
            self._since = clock, now

    def _stalls(self, now: float) -> bool:
        return self._since is not None and now - self._since[1] >= self.rules.stall_seconds

    def _note_overtaken(self, worker: int, now: float) -> None:
        """Note whom a worker was faster than that is in an update, and began no sooner."""
        began = self.members[worker].began
        for member in self.members.values():
            if member.computes and member.began <= began and member.overtaken is None:
                member.overtaken = now

    def _earliest(self, have: Mapping[int, Mapping[int, Report]]) -> dict[int, Report]:
        """Return the report of who has waited longest."""
        waiting = [
            (self.members[w].began, w, next(iter(reports.values())))
            for w, reports in have.items()
            if reports
        ]
        return {worker: report for _, worker, report in sorted(waiting, key=lambda w: w[:2])[:1]}

    def _give_up_late(self) -> None:
        """Give back what was reported of a round that is closed, and not all servers had."""
        for worker, member in self.members.items():
            for clock in [clock for clock in member.reports if clock <= self.passed]:
                del member.reports[clock]
                member.counted = max(member.counted, clock)
                self.shares.give_back(worker, clock)

    def _open(self) -> int:
        """Return the clock of the reports that end the open round: its number.

        Or a later one, if all who could report that are gone, and those that are left are further.
        """
        members = self.members.values()
        clocks = [clock for m in members for clock in m.reports]
        clocks += [m.clock for m in members if m.counted < m.clock]
        if self.rules.mode == "sync" or (self.rules.mode == "ssp" and not self.rules.staleness):
            return self._open_in_step(clocks)
        return max(self.passed + 1, min(clocks or [m.clock + 1 for m in members], default=0))

    def _open_in_step(self, begun: Collection[int]) -> int:
        """The same, where nobody is ahead: of the round's own number (see `number_of`), by which
        workers and servers know what meets in it."""
        number, clocks = self.version + 1, [m.clock for m in self.members.values()]
        open_ones = [c for c in begun if c > self.passed and number_of(c) == number]
        if open_ones:
            return max(open_ones)
        first = max([self.passed + 1, *(c - number_of(c) + number for c in clocks)])
        return first if not clocks or min(clocks) < first else first + ANEW

    def _is_time(self, clock: int, chosen: Collection[int], now: float) -> bool:
        there = {w: m for w, m in self.members.items() if not m.stalled}
        busy = {w: m for w, m in there.items() if w not in chosen and m.counted < m.clock}
        owing = [w for w, m in busy.items() if m.clock == clock]
        behind = [w for w, m in busy.items() if m.clock < clock]
        if not owing and not behind:
            return True
        if self._stalls(now):
            for member in busy.values():
                member.stalled = not member.reports
            log.warning(
                "round %d goes on without worker(s) %s: others have waited %g s for them",
                self.version + 1,
                ", ".join(map(str, busy)),
                self.rules.stall_seconds,
            )
            return True
        if len(chosen) < min(self.rules.quorum, len(there)):
            self._grace_until = None  # it may have had one, and lost a worker since
            return False
        if self._grace_until is None:
            given = self.rules.grace_seconds
            first = min(self.members[worker].began for worker in chosen)
            self._grace_until = now + ((now - first) / 10 if given is None else given)
        return not owing or now >= self._grace_until

    def _servers_have(self, report: Report) -> bool:
        return self._servers is not None and report.servers >= self._servers

    def _is_held(self, clock: int, chosen: Collection[int], now: float) -> bool:
        """Is there one that saves the last round's result, and has not stood still in that?"""
        member = self.members.get(self.holder) if self.holder is not None else None
        if member is None or not self._holds(member, clock, chosen):
            return False
        if not self._stalls(now):
            return True
        log.warning(
            "worker %d has not come back from its checkpoint after round %d: others have waited "
            "%g s, and go on without it",
            self.holder,
            self.version,
            self.rules.stall_seconds,
        )
        self.holder = self._held_until = None
        return False

    def _holds(self, holder: Member, clock: int, chosen: Collection[int]) -> bool:
        """Does it have its turn and no report yet; or is it not among them, though it can be?"""
        if not holder.wants_turn and holder.clock == self._held_until:
            return True
        if self.rules.mode == "async" or self.holder in chosen:
            return False
        return clock in holder.reports or (holder.counted < clock and holder.clock <= clock)

    def _give_back_passed(self, now: float) -> None:
        """Let others read what rounds have closed without, and will not have any more; else the
        cursor would stand still where a slow worker is, or one that hangs."""
        if self.rules.mode != "async":
            for worker, clock in [key for key in self.shares.out if key[1] <= self.passed]:
                self.shares.give_back(worker, clock)
            return
        for worker, member in self.members.items():
            since = member.overtaken
            waited = now - since if member.computes and since is not None else 0.0
            if waited >= self.rules.stall_seconds and not member.stalled:
                member.stalled = True
                self.shares.give_back(worker, member.clock)
                log.warning("others read what worker %d began %g s ago", worker, now - member.began)

    def _keeps_up(self, member: Member) -> bool:
        """Does it read its own share of the next steps?"""
        passed = self.rules.mode != "async" and member.clock <= self.passed
        return not member.stalled and not (passed and member.computes)

    def turns(self, now: float) -> list[Turn]:
        """Return what workers are to do that have nothing to do, and may go on."""
        if not self.began:
            enough = len(self.members) >= self.rules.workers
            waited = now - self._first_ready if self._first_ready is not None else 0.0
            over = waited >= self.rules.join_seconds and self.members
            if not (enough or over):
                return []
            self.began = True
        self._give_back_passed(now)
        first = self._open()
        furthest = first + (self.rules.staleness if self.rules.mode == "ssp" else 0)
        ended, alone = self._is_over, self.rules.mode == "async"
        given = []
        for worker, member in sorted(self.members.items()):
            clock = max(first, member.clock + 1)
            if not member.wants_turn or (clock > furthest and not ended):
                continue
            if not ended and alone and member.reports:
                continue  # what it would be told then is of another's round
            if not ended and not all(map(self._servers_have, member.reports.values())):
                continue  # it would forget what it has pushed
            if worker == self._untold:
                self._untold = None
                self._held_until = clock if worker == self.holder else None
            member.clock, member.began, member.wants_turn = clock, now, False
            member.overtaken = None
            there = [w for w, m in self.members.items() if self._keeps_up(m)]
            share = self.shares.take(worker, clock, there, member.late)
            member.late = False
            given.append(Turn(worker, clock, share))
        if given:
            self.passed = first - 1
        return given

    def to_message(self) -> dict[str, Any]:
        """Return what a server must know to go on in place of this one, as JSON can carry it."""
        members = [[w, m.incarnation, m.clock, m.counted] for w, m in sorted(self.members.items())]
        shares = self.shares.to_message()
        about = {"version": self.version, "passed": self.passed, "began": self.began}
        return {**about, "members": members, "shares": shares}

    def take_up(self, message: Mapping[str, Any]) -> set[int]:
        """Let it be what another server's was; return the workers that took part.

        Each is to say where it is (`ready` or `adopt`), or to be `lost`.
        """
        self.version, self.began = message["version"], message["began"]
        self.passed = message["passed"]
        self.shares.take_up(message["shares"])
        self.members = {}
        workers = {row[0] for row in message["members"]}
        for worker in workers:
            self.shares.give_back(worker)  # what it reads it is to say
        return workers

    def status(self, now: float) -> dict[str, Any]:
        """Return how workers are, for people."""
        workers = {
            str(worker): {
                "round": number_of(member.clock),
                "incarnation": member.incarnation,
                "computes": member.counted < member.clock and not member.reports,
                "seconds": round(now - member.began, 2),
            }
            for worker, member in sorted(self.members.items())
        }
        return {
            "mode": self.rules.mode,
            "version": self.version,
            "most_stale": self.most_stale,
            "num_returned": self.shares.num_returned,
            "num_workers": self.rules.workers,
            "workers": workers,
            "waits_for": {str(worker): what for worker, what in self.awaited().items()},
        }

    def awaited(self) -> dict[int, str]:
        """Return whom those wait for that have reported the open round, and for what of theirs."""
        if self._since is None:
            return {}
        clock, found = self._since[0], {}
        for worker, member in sorted(self.members.items()):
            report = member.reports.get(clock)
            here = member.computes if report is None else not self._servers_have(report)
            owes = self.rules.mode != "async" and member.clock <= clock and here
            if worker == self.holder and not member.wants_turn:
                found[worker] = "a checkpoint"
            elif owes and not member.stalled:
                found[worker] = f"round {self.version + 1}"
        return found

    def again_in(self, now: float) -> float | None:
        """Return after how many seconds `close` or `turns` may say something else by itself."""
        ends = []
        if not self.began and self._first_ready is not None:
            ends.append(self._first_ready + self.rules.join_seconds)
        if self._grace_until is not None:
            ends.append(self._grace_until)
        if self._untold is not None:
            ends.append(self._untold_since + self.rules.stall_seconds)
        if self._since is not None:
            ends.append(self._since[1] + self.rules.stall_seconds)
        return min((end - now for end in ends if end > now), default=None)
