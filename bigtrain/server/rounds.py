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
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bigtrain.server.shares import Share, Shares

Mode = Literal["sync", "ssp", "async"]


@dataclass(frozen=True)
class Rules:
    """How rounds close.

    workers: that are meant to be. quorum: how many make up a round at least, if so many are there.
    grace_seconds: what the others have from then on; None: a tenth of what it has taken.
    stall_seconds: after which nobody is waited for. join_seconds: how long the first round waits
    for all workers. staleness: of ssp. last: the round after which none closes.
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
    reports: dict[int, Report] = field(default_factory=dict)


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
        if self.rules.mode != "async" and report.clock <= self.passed:
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
        if self._is_over or self._waits_for_speaker(now):
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
            if not self._is_time(clock, chosen, now):
                return None
        if not chosen:
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
        self.holder, self._held_until, self._grace_until = None, None, None
        if self.rules.mode != "async":
            self._give_up_late()
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

    def _waits_for_speaker(self, now: float) -> bool:
        """Would the speaker of the last round not hear of it, or not have the time to save it?"""
        untold = self.members.get(self._untold) if self._untold is not None else None
        if untold is not None and now - self._untold_since < self.rules.stall_seconds:
            return True
        holder = self.members.get(self.holder) if self.holder is not None else None
        return holder is not None and not holder.wants_turn and holder.clock == self._held_until

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
        return max(self.passed + 1, min(clocks or [m.clock + 1 for m in members], default=0))

    def _is_time(self, clock: int, chosen: Collection[int], now: float) -> bool:
        if not chosen or (self.holder is not None and self._is_held(clock, chosen)):
            return False
        there = {w: m for w, m in self.members.items() if not m.stalled}
        busy = {w: m for w, m in there.items() if w not in chosen and m.counted < m.clock}
        owing = [w for w, m in busy.items() if m.clock == clock]
        behind = [w for w, m in busy.items() if m.clock < clock]
        if not owing and not behind:
            return True
        first = min(self.members[worker].began for worker in chosen)
        if now - first >= self.rules.stall_seconds:
            for member in busy.values():
                member.stalled = not member.reports
            return True
        if len(chosen) < min(self.rules.quorum, len(there)):
            self._grace_until = None  # it may have had one, and lost a worker since
            return False
        if self._grace_until is None:
            given = self.rules.grace_seconds
            self._grace_until = now + ((now - first) / 10 if given is None else given)
        return not owing or now >= self._grace_until

    def _servers_have(self, report: Report) -> bool:
        return self._servers is not None and report.servers >= self._servers

    def _is_held(self, clock: int, chosen: Collection[int]) -> bool:
        """Is the holder not among them, though it can be?"""
        assert self.holder is not None
        member = self.members.get(self.holder)
        if self.holder in chosen or member is None:
            return False
        return clock in member.reports or (member.counted < clock and member.clock <= clock)

    def turns(self, now: float) -> list[Turn]:
        """Return what workers are to do that have nothing to do, and may go on."""
        if not self.began:
            enough = len(self.members) >= self.rules.workers
            waited = now - self._first_ready if self._first_ready is not None else 0.0
            over = waited >= self.rules.join_seconds and self.members
            if not (enough or over):
                return []
            self.began = True
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
            share = self.shares.take(worker, clock, self.members, member.late)
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
                "round": member.clock,
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
        }

    def again_in(self, now: float) -> float | None:
        """Return after how many seconds `close` or `turns` may say something else by itself."""
        ends = []
        if not self.began and self._first_ready is not None:
            ends.append(self._first_ready + self.rules.join_seconds)
        if self._grace_until is not None:
            ends.append(self._grace_until)
        if self._untold is not None:
            ends.append(self._untold_since + self.rules.stall_seconds)
        reported = [m.began for m in self.members.values() if m.reports]
        if reported:
            ends.append(min(reported) + self.rules.stall_seconds)
        return min((end - now for end in ends if end > now), default=None)
