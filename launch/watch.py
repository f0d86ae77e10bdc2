"""Watching over ranks, wherever they run: signals go on to them, and all end when one fails."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from .job import Job
from .outcome import Rank, outcome

_POLL_SECONDS = 0.03
_END_SECONDS = 3.0  # from SIGTERM to SIGKILL once a rank has failed
_KILLED_SECONDS = 30.0  # after which a rank that was killed is stuck in the kernel
# What we are sent, and what the ranks are sent for it.
_SIGNALS = {
    int(signal.SIGINT): signal.SIGINT,
    int(signal.SIGTERM): signal.SIGTERM,
    int(signal.SIGUSR1): signal.SIGTERM,
}


class Team(Protocol):
    """Ranks that were started, on this machine or on several."""

    ranks: list[Rank]

    def start(self, asked: Sequence[int] = ()) -> None:
        """Start all ranks, which `update` then follows.

        asked: the signals that came meanwhile; where starting waits for others, it gives up on one.
        """

    def update(self) -> None:
        """Note which ranks have ended, and how."""

    def ask(self, number: int) -> None:
        """Send a signal to the ranks that still run."""

    def end(self) -> None:
        """Kill all ranks."""

    def close(self) -> None:
        """Leave nothing behind."""


class Asked:
    """The signals that came since `listen`; the first one decides what is told and done."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        # A terminal that is closed asks as scancel does.
        numbers = (*_SIGNALS, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.numbers.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def by_time(self, is_time_up: Callable[[], bool], say: Callable[[str], None]) -> bool:
        """Tell whether the time of the job has just come near its end, which is as SIGUSR1."""
        if self.numbers or not is_time_up():
            return False
        say("the time of this job is nearly up, by what saving has taken")
        self.numbers.append(signal.SIGUSR1)
        return True

    @property
    def for_ranks(self) -> list[int]:
        return [_SIGNALS[number] for number in self.numbers]


def run_team(
    job: Job,
    team: Team,
    stop_seconds: float,
    say: Callable[[str], None],
    is_time_up: Callable[[], bool] = lambda: False,
) -> int:
    """Run the ranks to their end and return the exit code for the shell.

    SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks, which finish their step and save; a
    second one, or `stop_seconds`, ends them. When a rank fails, all others end within 5 seconds.
    Of a patient job more signals change nothing: who sends them (Slurm) kills it when time is up.
    `is_time_up`, once true, is as SIGUSR1.

    Raises:
        LaunchError: ranks could not be started, or one failed; its error comes first.
    """
    asked = Asked()
    with asked.listen():
        try:
            team.start(asked.numbers)
            watch(team, asked, stop_seconds, say, job.patient, is_time_up)
        finally:
            team.close()
        return outcome(job, team.ranks, asked.numbers)


def watch(
    team: Team,
    asked: Asked,
    stop_seconds: float,
    say: Callable[[str], None],
    patient: bool,
    is_time_up: Callable[[], bool],
) -> None:
    """Wait for all ranks; pass signals on; end all when one fails or time is up."""
    passed_on = 0
    failed = False
    deadline: float | None = None
    killed: float | None = None
    while True:
        team.update()
        running = [rank for rank in team.ranks if rank.code is None]
        if not running:
            return
        now = time.monotonic()
        if asked.by_time(is_time_up, say):
            patient = True  # the time that saving takes is what it is about
        if len(asked.numbers) > passed_on:
            passed_on += 1
            if passed_on == 1:
                once_more = "" if patient else "; once more stops at once"
                say(f"stopping: the ranks finish their step and save{once_more}")
                # Slurm, for whom a job is patient, kills it itself; saving may take long.
                deadline = None if patient else now + stop_seconds
                team.ask(asked.for_ranks[0])
            elif not patient:
                deadline = now
        if not failed and any(rank.has_failed(bool(asked.numbers)) for rank in team.ranks):
            failed = True
            for rank in running:
                rank.ended_by_us = True
            team.ask(signal.SIGTERM)
            deadline = min(deadline or now + _END_SECONDS, now + _END_SECONDS)
        if deadline is not None and now >= deadline:
            for rank in running:
                rank.ended_by_us = True
            team.end()
            killed = killed or now
        if killed is not None and now >= killed + _KILLED_SECONDS:
            for rank in running:
                say(f"{rank.who} does not end, though it was killed: see dmesg there")
                rank.code = -signal.SIGKILL
        time.sleep(_POLL_SECONDS)


def stderr_line(text: str) -> None:
    """Write a line to standard error, if anybody is still there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
