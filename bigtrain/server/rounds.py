"""Which workers' gradients make up an update, and when it is made. Pure: time is an argument.

A round is one update; the version of parameters is the number of rounds that are closed. A worker
begins a round, reports when all servers have its gradient, and begins the next. Rounds close in
order:

sync: when all workers have reported that have begun it; if there are `quorum` of them, those that
    have begun it are given `grace_seconds` more, and those that are still at an older round none.
ssp: the same, but a worker may be `staleness` rounds ahead of the one that is open (stale
    synchronous parallel, https://proceedings.neurips.cc/paper/2013/hash/
    b7bb35b9c6ca2aee2df08cf09d7016c2-Abstract.html). With 0 it is sync.
async: with each report, by that worker alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    for all workers. staleness: of ssp.
    """

    mode: Mode
    workers: int
    quorum: int
    grace_seconds: float | None = None
    stall_seconds: float = 300.0
    join_seconds: float = 120.0
    staleness: int = 0


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
        self.members: dict[int, Member] = {}
        self.began = False  # has the first round of this run begun?
        self.holder: int | None = None  # a worker that no round closes without
        self.most_stale = 0
        self._first_ready: float | None = None
        self._grace_until: float | None = None  # once the open round has its quorum

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
            self.holder = None

    def report(self, worker: int, report: Report) -> None:
        """A worker's part of a round is with servers; it may say so again, with more servers."""
        member = self.members.get(worker)
        if member is None or report.clock <= member.counted:
            return
        if report.clock in member.reports:
            member.reports[report.clock] = report
        if report.clock != member.clock:
            return  # of a turn that it has not: its link was cut, and it was given up
        member.wants_turn = True
        if self.rules.mode != "async" and report.clock <= self.version:
            self.shares.give_back(worker, report.clock)  # too late
            member.counted = report.clock
        else:
            member.reports[report.clock] = report

    def hold(self, worker: int) -> None:
        """Close no round without this worker: it saves what the last one has made."""
        if worker in self.members:
            self.holder = worker

    # -- what follows --------------------------------------------------------------------------

    def close(self, now: float, servers: Collection[int]) -> Closed | None:
        """Close the open round, if it is time; `servers` are those that live.

        A report counts once all of them have what it tells of.
        """
        number = self.version + 1
        have = {
            worker: member.reports
            for worker, member in sorted(self.members.items())
            if any(report.servers >= set(servers) for report in member.reports.values())
        }
        if self.rules.mode == "async":
            chosen = self._earliest(have)
        else:
            chosen = {w: reports[number] for w, reports in have.items() if number in reports}
            if not self._is_time(number, chosen, now):
                return None
        if not chosen:
            return None
        for worker, report in chosen.items():
            member = self.members[worker]
            del member.reports[report.clock]
            member.counted = report.clock
            self.shares.used(worker, report.clock)
        self.version, self.holder, self._grace_until = number, None, None
        parts = tuple(
            Part(worker, self.members[worker].incarnation, r.clock, r.base)
            for worker, r in chosen.items()
        )
        columns = zip(*(report.totals for report in chosen.values()), strict=True)
        stale = max(number - 1 - part.base for part in parts)
        self.most_stale = max(self.most_stale, stale)
        return Closed(number, parts, tuple(map(sum, columns)), parts[0].worker, stale)

    def _earliest(self, have: Mapping[int, Mapping[int, Report]]) -> dict[int, Report]:
        """Return the report of who has waited longest."""
        waiting = [(self.members[w].began, w, next(iter(r.values()))) for w, r in have.items()]
        return {worker: report for _, worker, report in sorted(waiting, key=lambda w: w[:2])[:1]}

    def _is_time(self, number: int, chosen: Collection[int], now: float) -> bool:
        if not chosen or (self.holder is not None and self.holder not in chosen):
            return False
        busy = {w: m for w, m in self.members.items() if w not in chosen and m.counted < m.clock}
        owing = [w for w, m in busy.items() if m.clock == number]
        behind = [w for w, m in busy.items() if m.clock < number]
        if not owing and not behind:
            return True
        if self._grace_until is None:
            first = min(self.members[worker].began for worker in chosen)
            if now - first >= self.rules.stall_seconds:
                return True
            if len(chosen) < min(self.rules.quorum, len(self.members)):
                return False
            given = self.rules.grace_seconds
            self._grace_until = now + ((now - first) / 10 if given is None else given)
        return not owing or now >= self._grace_until

    def turns(self, now: float) -> list[Turn]:
        """Return what workers are to do that have nothing to do, and may go on."""
        if not self.began:
            enough = len(self.members) >= self.rules.workers
            waited = now - self._first_ready if self._first_ready is not None else 0.0
            over = waited >= self.rules.join_seconds and self.members
            if not (enough or over):
                return []
            self.began = True
        furthest = self.version + 1 + (self.rules.staleness if self.rules.mode == "ssp" else 0)
        given = []
        for worker, member in sorted(self.members.items()):
            clock = max(self.version, member.clock) + 1
            if not member.wants_turn or clock > furthest:
                continue
            member.clock, member.began, member.wants_turn = clock, now, False
            given.append(Turn(worker, clock, self.shares.take(worker, clock, self.members)))
        return given

    def to_message(self) -> dict[str, Any]:
        """Return what a server must know to go on in place of this one, as JSON can carry it."""
        members = [[w, m.incarnation, m.clock, m.counted] for w, m in sorted(self.members.items())]
        shares = self.shares.to_message()
        return {"version": self.version, "members": members, "shares": shares, "began": self.began}

    def take_up(self, message: Mapping[str, Any]) -> set[int]:
        """Let it be what another server's was; return the workers that took part.

        Each is to say where it is (`ready` or `adopt`), or to be `lost`.
        """
        self.version, self.began = message["version"], message["began"]
        self.shares.take_up(message["shares"])
        self.members = {}
        return {row[0] for row in message["members"]}

    def again_in(self, now: float) -> float | None:
        """Return after how many seconds `close` or `turns` may say something else by itself."""
        ends = []
        if not self.began and self._first_ready is not None:
            ends.append(self._first_ready + self.rules.join_seconds)
        if self._grace_until is not None:
            ends.append(self._grace_until)
        reported = [m.began for m in self.members.values() if m.reports]
        if reported:
            ends.append(min(reported) + self.rules.stall_seconds)
        return max(0.0, min(ends) - now) if ends else None
