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
from typing import Any

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
    report_fd: int
    code: int | None = None
    ended_by_us: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    def ask(self, number: int) -> None:
        """Send a signal to the rank alone: its helpers (data loaders) end when it does."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """Kill the rank and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def read_report(self) -> None:
        """Read what an ended rank has told of its end."""
        with contextlib.suppress(OSError, json.JSONDecodeError, UnicodeDecodeError):
            self.report = json.loads(os.read(self.report_fd, 1 << 16))
        os.close(self.report_fd)


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
            rank.end()
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
                ranks.append(_start_rank(job, rank, listener, screen))
    except OSError as error:
        raise LaunchError(
            f"could not start rank {len(ranks)} of {job.num_ranks}",
            why=str(error),
            mend="free processes and memory on this machine, or start fewer ranks",
        ) from error
    screen.start()
    return screen


def _start_rank(job: Job, rank: int, listener: socket.socket, screen: ScreenAndFile) -> Rank:
    store_fd, port = listener.fileno(), listener.getsockname()[1]
    report_read, report_write = os.pipe()
    os.set_blocking(report_read, False)
    # A rank begins with these signals blocked, and hears them once it can tell what happened.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with open(job.log(rank), "ab") as log:
            process = subprocess.Popen(
                job.command(),
                env=job.environment(rank, port, store_fd, report_write, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=screen.write_end if rank == 0 else log,
                stderr=subprocess.STDOUT,
                pass_fds=(report_write, store_fd) if rank == 0 else (report_write,),
                start_new_session=True,  # the terminal's Ctrl-C comes to us, and we pass it on
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(report_write)
    return Rank(rank, process, report_read)


def _watch(
    ranks: list[Rank], asked: list[int], stop_seconds: float, say: Callable[[str], None]
) -> None:
    """Wait for all ranks; pass signals on; end all when one fails or time is up."""
    passed_on = 0
    deadline: float | None = None
    while any(rank.code is None for rank in ranks):
        failed = _collect(ranks, asked)
        running = [rank for rank in ranks if rank.code is None]
        now = time.monotonic()
        if len(asked) > passed_on:
            passed_on += 1
            if passed_on == 1:
                say("stopping: the ranks finish their step and save; once more stops at once")
                deadline = now + stop_seconds
                for rank in running:
                    rank.ask(asked[0])
            else:
                deadline = now
        if failed:
            for rank in running:
                rank.ended_by_us = True
                rank.ask(signal.SIGTERM)
            deadline = min(deadline or now + _END_SECONDS, now + _END_SECONDS)
        if deadline is not None and now >= deadline:
            for rank in running:
                rank.ended_by_us = True
                rank.end()
        time.sleep(_POLL_SECONDS)


def _collect(ranks: list[Rank], asked: list[int]) -> bool:
    """Note which ranks have ended; return whether one of them has failed.

    A rank that stops with all others because it was asked to has not failed; one that leaves alone
    has, even with exit code 0.
    """
    failed = False
    for rank in ranks:
        if rank.code is None:
            rank.code = rank.process.poll()
            if rank.code is not None:
                rank.end()  # whatever it has started and left
                rank.read_report()
                orderly = rank.report.get("orderly") and not rank.report.get("at_once")
                failed = failed or not (rank.report.get("done") or (asked and orderly))
    return failed


def _outcome(job: Job, ranks: list[Rank], asked: list[int]) -> int:
    """Return 0, or raise the error of the rank that failed first."""
    failed = [rank for rank in ranks if rank.code != 0 or not rank.report.get("done")]
    if not failed:
        return 0
    first = min(failed, key=_blame)
    assert first.code is not None
    if first.report.get("orderly"):
        raise _failure(first.report["exit_code"], first.report["text"])
    if asked and (first.ended_by_us or (first.code < 0 and not first.report)):
        name = signal.Signals(asked[0]).name
        raise _failure(128 + asked[0], f"ended by {name} before it could finish a step and save")
    text = first.report.get("text")
    same = [rank.rank for rank in failed if text and rank.report.get("text") == text]
    others = [rank.rank for rank in failed if rank is not first and rank.rank not in same]
    word = "rank" if len(others) == 1 else "ranks"
    also = f"\n  ({word} {', '.join(map(str, others))} then ended too)" if others else ""
    code = first.code if first.code >= 0 else 128 - first.code
    what = _describe(job, first, same)
    raise _failure(code or 1, f"{what}{also}\n  log:  {job.log(first.rank)}")


def _describe(job: Job, rank: Rank, same: list[int]) -> str:
    """Say how a rank ended; `same` are the ranks that told the same."""
    if len(same) > 1:
        return f"ranks {', '.join(map(str, same))} failed: {rank.report['text']}"
    if rank.report.get("text"):
        return f"rank {rank.rank} failed: {rank.report['text']}"
    assert rank.code is not None
    if rank.code >= 0:
        what = f"rank {rank.rank} left with exit code {rank.code} before its work was done"
        return f"{what}; it printed last:\n{_last_lines(job.log(rank.rank))}"
    name = signal.Signals(-rank.code).name
    why = {
        "SIGKILL": "somebody, or the system because memory ran out, killed it",
        "SIGSEGV": "native code crashed: look for the library in the log",
        "SIGBUS": "shared memory or disk ran out, or a mapped file was cut",
    }.get(name, "see its log")
    return f"rank {rank.rank} was ended by {name}\n  why:  {why}"


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
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
        return "\n".join(f"    {line}" for line in lines)
    return "    (its log cannot be read)"


def _failure(code: int, text: str) -> BigtrainError:
    error = LaunchError(text)
    error.exit_code = code
    return error


def stderr_line(text: str) -> None:
    """Write a line to standard error, if anybody is still there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
