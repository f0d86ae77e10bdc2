"""Ranks on this machine: start them, watch them, stop them together, leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.errors import BigtrainError, LaunchError

from .job import Job
from .output import ScreenAndFile

_POLL_SECONDS = 0.03
_END_SECONDS = 3.0  # from SIGTERM to SIGKILL once a rank has failed
# What we are sent, and what the ranks are sent for it.
_SIGNALS = {
    int(signal.SIGINT): signal.SIGINT,
    int(signal.SIGTERM): signal.SIGTERM,
    int(signal.SIGHUP): signal.SIGTERM,
}


@dataclass
class Rank:
    """A started rank, and how it ended."""

    rank: int
    process: subprocess.Popen
    code: int | None = None
    ended_by_us: bool = False
    report: dict = field(default_factory=dict)

    def send(self, number: int) -> None:
        """Send a signal to the rank and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_local(job: Job, stop_seconds: float, say: Callable[[str], None]) -> int:
    """Run the job to its end and return the exit code for the shell.

    SIGINT and SIGTERM are passed on to the ranks, which finish their step and save; a second one,
    or `stop_seconds`, ends them. When a rank fails, all others end within 5 seconds.

    Raises:
        LaunchError: ranks could not be started, or one failed; its error comes first.
    """
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(_SIGNALS[number]))
        for number in _SIGNALS
    }
    ranks: list[Rank] = []
    try:
        screen = _start(job, ranks)
        _watch(ranks, asked, stop_seconds, say)
        screen.close()
        return _outcome(job, ranks, asked)
    finally:
        for rank in ranks:  # also what a rank has started and left
            rank.send(signal.SIGKILL)
            rank.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(job: Job, ranks: list[Rank]) -> ScreenAndFile:
    """Start all ranks. Rank 0 is handed the listening socket of the rendezvous: no fixed port."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1024)
            screen = ScreenAndFile(job.log(0))
            for rank in range(job.num_ranks):
                _start_rank(job, rank, listener, screen, ranks)
    except OSError as error:
        raise LaunchError(
            f"could not start rank {len(ranks)} of {job.num_ranks}",
            why=str(error),
            mend="free processes and memory on this machine, or start fewer ranks",
        ) from error
    screen.start()
    return screen


def _start_rank(
    job: Job, rank: int, listener: socket.socket, screen: ScreenAndFile, ranks: list[Rank]
) -> None:
    job.error(rank).unlink(missing_ok=True)
    descriptor = listener.fileno()
    port = listener.getsockname()[1]
    with open(job.log(rank), "ab") as log:
        output = screen.write_end if rank == 0 else log
        process = subprocess.Popen(
            job.command(),
            env=job.environment(rank, port, descriptor, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,) if rank == 0 else (),
            start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and we pass it on
        )
    ranks.append(Rank(rank, process))


def _watch(
    ranks: list[Rank], asked: list[int], stop_seconds: float, say: Callable[[str], None]
) -> None:
    """Wait for all ranks; pass signals on; end all when one fails or time is up."""
    passed_on = 0
    deadline: float | None = None
    while any(rank.code is None for rank in ranks):
        failed = False
        for rank in ranks:
            if rank.code is None:
                rank.code = rank.process.poll()
                failed = failed or rank.code not in (None, 0)
        running = [rank for rank in ranks if rank.code is None]
        now = time.monotonic()
        if len(asked) > passed_on:
            passed_on += 1
            if passed_on == 1:
                say("stopping: the ranks finish their step and save; once more stops at once")
                deadline = now + stop_seconds
                for rank in running:
                    rank.send(asked[0])
            else:
                deadline = now
        if failed:
            for rank in running:
                rank.ended_by_us = True
                rank.send(signal.SIGTERM)
            deadline = min(deadline or now + _END_SECONDS, now + _END_SECONDS)
        if deadline is not None and now >= deadline:
            for rank in running:
                rank.ended_by_us = True
                rank.send(signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _outcome(job: Job, ranks: list[Rank], asked: list[int]) -> int:
    """Return 0, or raise the error of the rank that failed first."""
    for rank in ranks:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            rank.report = json.loads(job.error(rank.rank).read_text(encoding="utf-8"))
    failed = [rank for rank in ranks if rank.code != 0]
    if not failed:
        return 0
    first = min(failed, key=_blame)
    if asked and first.ended_by_us:
        raise _failure(
            128 + asked[0], f"ended by {signal.Signals(asked[0]).name} before it could save"
        )
    if first.report.get("orderly"):
        raise _failure(first.report["exit_code"], first.report["text"])
    log = job.log(first.rank)
    assert first.code is not None
    if first.code < 0 and not first.report:
        name = signal.Signals(-first.code).name
        why = {
            "SIGKILL": "somebody, or the system because memory ran out, killed it",
            "SIGSEGV": "native code crashed: look for the library in the log",
            "SIGBUS": "shared memory or disk ran out, or a mapped file was cut",
        }.get(name, "see its log")
        text = f"rank {first.rank} was ended by {name}\n  why:  {why}"
        code = 128 - first.code
    else:
        text = f"rank {first.rank} failed: " + (first.report.get("text") or _last_lines(log))
        code = first.code if first.code > 0 else 1
    others = [rank.rank for rank in failed if rank is not first]
    also = f"\n  (ranks {', '.join(map(str, others))} then ended too)" if others else ""
    raise _failure(code, f"{text}{also}\n  log:  {log}")


def _blame(rank: Rank) -> tuple[int, float]:
    """Order failed ranks, the likeliest culprit first.

    A rank that died without a word comes before one that could tell its error, that before one
    that only lost its peers, and last come those that we ended ourselves.
    """
    if rank.ended_by_us and (not rank.report or rank.report.get("orderly")):
        order = 3
    elif rank.report.get("consequence"):
        order = 2
    elif rank.report:
        order = 1
    else:
        order = 0
    return order, float(rank.report.get("time", 0.0))


def _last_lines(log: Path, count: int = 12) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "it printed last:\n" + "\n".join(f"    {line}" for line in lines)


def _failure(code: int, text: str) -> BigtrainError:
    error = LaunchError(text)
    error.exit_code = code
    return error


def stderr_line(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
