"""A run with parameter servers: workers, servers and nodes may end, and the run goes on."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bigtrain.config.load import dump
from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.run_folder import RunFolder
from bigtrain.server.chaos import Event, left_over, parse
from bigtrain.server.environment import Environment
from bigtrain.server.protocol import LOSS, new_token

from .job import Job
from .outcome import Ended, outcome, stop_code
from .places import Place, place_of
from .plan import Plan, without
from .seats import Seats
from .watch import Asked, Team

_POLL_SECONDS = 0.03
_END_SECONDS = 3.0  # that the other ranks of a worker have when one has failed
_RESTART_SECONDS = 1.0  # before a worker is started again
_SERVERS_SECONDS = 10.0  # that servers have to end when all workers have
_ASKED_SECONDS = 0.5  # until they are told to, if workers were: these may not have begun


@dataclass
class _Part:
    """A server, or a worker with its ranks."""

    role: Literal["server", "worker"]
    index: int
    job: Job
    team: Team
    nodes: tuple[str, ...]
    incarnation: int = 0
    failing_since: float | None = None
    is_over: bool = False
    start_at: float | None = None  # when it is to be started again
    ended: Ended | None = None  # how it ended, unless well
    ended_at: float = 0.0

    @property
    def who(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def runs(self) -> bool:
        return not self.is_over

    @property
    def was_killed(self) -> bool:
        """Did it end by what need not happen to it again: a signal, or the loss of others?"""
        codes = [rank.code for rank in self.team.ranks]
        lost = any(rank.report.get("consequence") for rank in self.team.ranks)
        return lost or any(code is not None and code < 0 for code in codes)

    @property
    def tells_of_loss(self) -> bool:
        """Did it end since nobody has any more what servers are to hold?"""
        return any(LOSS in rank.report.get("text", "") for rank in self.team.ranks)


class ServedRun:
    """The servers and the workers of a run; ended parts do not end it, as long as others go on."""

    def __init__(
        self,
        config: Config,
        job: Job,
        seats: Seats,
        place: Place,
        folder: RunFolder,
        say: Callable[[str], None],
        chaos: Sequence[Event] = (),
        is_time_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.seats, self.place = config, seats, place
        self.folder, self.say = folder, say
        self.parts: list[_Part] = []
        self._job, self._chaos, self._is_time_up = job, tuple(chaos), is_time_up
        self._asked = Asked()
        self._passed_on = 0
        self._patient = job.patient
        self._deadline: float | None = None
        self._cannot_begin = False
        self._unserved_since: float | None = None  # since when no server runs, after the work
        folder.status.unlink(missing_ok=True)  # servers write it once the run has begun

    def _open(self) -> None:
        """See that everything can be started, and know where servers will be."""
        addresses = tuple(self.place.open(self._asked.numbers))
        ranks = self._job.num_ranks
        self._environment = Environment(addresses, new_token(), chaos=self._chaos, ranks=ranks)
        self.parts = [self._server(index) for index in range(len(self.seats.servers))]
        self.parts += [self._worker(index) for index in range(len(self.seats.workers))]

    def _server(self, index: int, incarnation: int = 0) -> _Part:
        nodes = (self.seats.servers[index],)
        env = replace(self._environment, server=index, incarnation=incarnation)
        job = self._job_of(f"server-{index}", env, nodes)
        job = replace(job, num_nodes=1, ranks_per_node=1)
        return _Part("server", index, job, self.place.server(index, job), nodes, incarnation)

    def _worker(self, index: int, incarnation: int = 0) -> _Part:
        nodes = self.seats.workers[index]
        env = replace(self._environment, worker=index, incarnation=incarnation)
        job = self._job_of(f"worker-{index}", env, nodes)
        job = replace(job, slot=self.seats.slot(index))
        return _Part("worker", index, job, self.place.worker(index, job), nodes, incarnation)

    def _job_of(self, name: str, env: Environment, nodes: Sequence[str]) -> Job:
        logs = self.folder.logs / name
        logs.mkdir(exist_ok=True)
        sharers = max(self.seats.processes(n, self._job.ranks_per_node) for n in nodes)
        told = replace(env, sharers=sharers).to_env()
        job = replace(self._job, logs=logs, env={**self._job.env, **told}, sharers=sharers)
        if env.incarnation and self.folder.config.exists():
            job = replace(job, config_path=self.folder.config)
        return job

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> int:
        """Run to the end, and return the exit code for the shell.

        SIGINT and SIGTERM have workers end the step and save; a second one, or
        `launch.stop_seconds`, ends all.

        Raises:
            LaunchError: all workers, or all servers, have ended before the run was complete.
        """
        with self._asked.listen():
            try:
                self._open()
                for part in self.parts:
                    part.team.start()
                while self._goes_on:
                    self._turn()
                    time.sleep(_POLL_SECONDS)
                self._end_servers()
            finally:
                for part in self.parts:
                    part.team.close()
                self.place.close()
        return self._outcome()

    @property
    def _goes_on(self) -> bool:
        """Does a worker run, and has it servers, or had them as long as it needed them?"""
        servers = self._of("server")
        lost = not any(part.runs for part in servers) and self.has_lost_servers
        runs = any(part.runs for part in self._of("worker"))
        return runs and not lost and not self._cannot_begin

    def _of(self, role: str) -> list[_Part]:
        return [part for part in self.parts if part.role == role]

    def _turn(self) -> None:
        now = time.monotonic()
        self.place.update()
        self._pass_on_signals(now)
        if self._is_done:
            self._end_returned(now)
        for part in self.parts:
            if part.start_at is not None and now >= part.start_at:
                self._start_again(part)
            elif part.runs and part.start_at is None:
                self._look_at(part, now)

    @property
    def _is_done(self) -> bool:
        """Has a worker seen the run to its end?"""
        return any(part.is_over and part.ended is None for part in self._of("worker"))

    def _end_returned(self, now: float) -> None:
        """End workers that came back when the work was done, and those that stand still: nobody is
        there any more whom they could join."""
        served = any(part.runs for part in self._of("server"))
        self._unserved_since = None if served else self._unserved_since or now
        seconds = now - self._unserved_since if self._unserved_since is not None else 0.0
        patience = max(_SERVERS_SECONDS, self.config.launch.stop_seconds)
        for part in self._of("worker"):
            if part.start_at is not None:
                part.start_at, part.is_over = None, True
                self.say(f"{part.who} is not started again: others have done the work")
            elif part.runs and seconds > (_SERVERS_SECONDS if part.incarnation else patience):
                if not part.incarnation:
                    self.say(f"{part.who} does not end, and is ended: others have done the work")
                for rank in part.team.ranks:
                    rank.ended_by_us = rank.code is None
                part.team.end()

    def _pass_on_signals(self, now: float) -> None:
        if self._asked.by_time(self._is_time_up, self.say):
            self._patient = True
        numbers = self._asked.for_ranks
        if len(numbers) > self._passed_on:
            self._passed_on += 1
            if self._passed_on == 1:
                once_more = "" if self._patient else "; once more stops at once"
                self.say(f"stopping: workers finish their step and save{once_more}")
                # Slurm, for whom a job is patient, kills it itself; saving may take long.
                seconds = math.inf if self._patient else self.config.launch.stop_seconds
                self._deadline = now + seconds
                for part in self._of("worker"):
                    part.start_at = None
                    part.team.ask(numbers[0])
            elif not self._patient:
                self._deadline = now
        if self._deadline is not None and now >= self._deadline:
            for part in self.parts:
                for rank in part.team.ranks:
                    rank.ended_by_us = rank.code is None
                part.team.end()

    def _look_at(self, part: _Part, now: float) -> None:
        """See whether it has ended, or must."""
        part.team.update()
        ranks = part.team.ranks
        asked = bool(self._asked.numbers)
        if part.failing_since is None and any(rank.has_failed(asked) for rank in ranks):
            part.failing_since = now
        if part.failing_since is not None and now - part.failing_since > _END_SECONDS:
            for rank in ranks:
                rank.ended_by_us = rank.ended_by_us or rank.code is None
            part.team.end()
        if all(rank.code is not None for rank in ranks):
            part.is_over = True
            self._on_end(part, now)

    def _on_end(self, part: _Part, now: float) -> None:
        part.team.close()
        self._note_drills(part)
        try:
            outcome(part.job, part.team.ranks, self._asked.numbers)
            return
        except Ended as ended:
            text = self._named(part, str(ended))
            part.ended = Ended(ended.exit_code, text, ended.asked, ended.lost_nodes)
            part.ended_at = now
        others = [other for other in self._of(part.role) if other.runs]
        if self._asked.numbers:
            return
        line = str(part.ended).partition("\n")[0]
        can_return = part.role == "worker" or (
            self.config.server.replicas > 1 and self.config.server.mode in ("sync", "local")
        )
        again = can_return and part.was_killed and others and self.place.has(part.nodes)
        if part.role == "worker" and self._is_done:
            again = False
        if again and part.incarnation < self.config.server.restarts:
            part.start_at, part.is_over = now + _RESTART_SECONDS, False
            self.say(f"{line}; it is started again")
        elif part.who == "worker 0" and not self.folder.status.exists():
            self._cannot_begin = True  # nobody else gives servers what they begin with
        elif others:
            count = f"{len(others)} of {len(self._of(part.role))}"
            self.say(f"{line}; the run goes on with {count}")
        elif any(other.is_over and other.ended is None for other in self._of(part.role)):
            self.say(f"{line}; others have done the work")

    def _note_drills(self, part: _Part) -> None:
        """Take note of the last drill that it has told of, which is no part of how it ended."""
        told = [rank.report.pop("drill", None) for rank in part.team.ranks]
        for drill in filter(None, told):
            left = left_over(self._environment.chaos, parse(drill))
            self._environment = replace(self._environment, chaos=left)

    def _named(self, part: _Part, text: str) -> str:
        """Say of a rank which server or worker it is (part of)."""
        if part.job.num_ranks == 1:
            return text.replace("rank 0", part.who, 1)
        return f"{part.who}, {text}"

    def _start_again(self, part: _Part) -> None:
        make = self._worker if part.role == "worker" else self._server
        fresh = make(part.index, part.incarnation + 1)
        fresh.team.start()
        self.parts[self.parts.index(part)] = fresh

    @property
    def has_lost_servers(self) -> bool:
        """Is there no server any more that has what workers need, before their work was done?

        Where others go on without it, the end of a server loses nothing.
        """
        servers = self._of("server")
        ended = any(part.ended is not None for part in servers)
        none_runs = not any(part.runs for part in servers)
        return (ended and none_runs) or any(part.tells_of_loss for part in servers if part.ended)

    def _end_servers(self) -> None:
        """Servers end when workers have said goodbye; else they are told to."""
        soon = self._asked.numbers or self._cannot_begin
        patience = _ASKED_SECONDS if soon else _SERVERS_SECONDS / 2
        asked_at = time.monotonic() + patience
        deadline, asked = asked_at + _SERVERS_SECONDS, False
        while time.monotonic() < deadline:
            self.place.update()
            for part in self._of("server"):
                part.team.update()
            ranks = [rank for part in self._of("server") for rank in part.team.ranks]
            if all(rank.code is not None for rank in ranks):
                return
            if not asked and time.monotonic() >= asked_at:
                asked = True
                for part in self._of("server"):
                    part.team.ask(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)

    def _outcome(self) -> int:
        """Return 0 if a worker has seen the run to its end.

        Raises:
            Ended: how the last of those ended that failed, since the run went on without those
                before; of servers, if what they held is lost, or nothing has begun.
        """
        if self._is_done:
            return 0
        asked = self._asked.numbers
        ended = [part for part in self.parts if part.ended is not None]
        ends = [part.ended for part in ended if part.ended is not None]
        if orderly := [e for e in ends if asked and e.exit_code == stop_code(asked[0])]:
            raise orderly[0]
        role = "server" if self.has_lost_servers or self._cannot_begin else "worker"

        def blame(part: _Part) -> tuple[bool, bool, float]:
            return part.role == role, not part.tells_of_loss, part.ended_at

        last = max(ended, key=blame).ended
        assert last is not None
        raise last


def lead_served(
    config: Config,
    plan: Plan,
    job: Job,
    folder: RunFolder,
    say: Callable[[str], None],
    chaos: Sequence[Event] = (),
    is_time_up: Callable[[], bool] = lambda: False,
) -> int:
    """Run servers and workers to the end, and return the exit code for the shell.

    `job` is what a worker is. Where all servers that held something are gone, and there is a
    checkpoint, the run goes on from there, on the nodes that are left, and says so.

    Raises:
        LaunchError: as `ServedRun.run`; there is no such server or worker.
    """
    assert plan.seats is not None
    _check_events(chaos, plan.seats)
    for restarts in itertools.count():
        say(str(plan))
        seats = plan.seats
        place = place_of(plan, seats, config.launch, folder.logs / "agents.log", say)
        run = ServedRun(config, job, seats, place, folder, say, chaos, is_time_up)
        try:
            return run.run()
        except Ended as ended:
            newest = folder.newest_step
            if ended.asked is not None or not run.has_lost_servers:
                raise
            if not newest:
                why = "there is no checkpoint to go on from: set checkpoint.every"
                more = "" if config.server.replicas > 1 else ", or server.replicas=2"
                text = f"{ended}\n  ({why}{more})"
                raise Ended(ended.exit_code, text, None, ended.lost_nodes) from None
            left = without(plan, config.server, [n for n in seats.nodes if not place.has([n])])
            if left is None or restarts >= config.server.restarts:
                raise
            say(
                f"{ended}\nwhat servers had since the checkpoint of step {newest} is lost: the run "
                "goes on from there"
            )
        plan, job, chaos = left, replace(job, resume=True), ()
        folder.next_config.write_text(dump(config), encoding="utf-8")
    raise AssertionError("it counts for ever")


def _check_events(chaos: Sequence[Event], seats: Seats) -> None:
    """See that drills are of servers and workers that there are.

    Raises:
        LaunchError: one is not.
    """
    for event in chaos:
        most = len(seats.workers if event.role == "worker" else seats.servers)
        if event.index >= most:
            raise LaunchError(
                f"--chaos {event}: there is no {event.role} {event.index}",
                why=f"the run has {most}, and the first is number 0",
                mend=f"name one below {most}",
            )
