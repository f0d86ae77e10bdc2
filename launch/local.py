"""The ranks of this machine: start them, notice their end, stop them, leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from bigtrain.errors import LaunchError
from bigtrain.server.environment import LISTEN

from .job import Job, Meeting
from .outcome import Rank
from .output import ScreenAndFile

_KILLED_SECONDS = 10.0  # what the end of a process may take once it is killed
_HEARD_LATER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _Process:
    """A rank that runs here."""

    rank: Rank
    process: subprocess.Popen
    report_fd: int

    def end(self) -> None:
        """Kill the rank and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def take_up_end(self, code: int) -> None:
        """Note an ended rank's exit code and what it has told."""
        self.end()  # whatever it has started and left
        with contextlib.suppress(OSError, json.JSONDecodeError, UnicodeDecodeError):
            for line in os.read(self.report_fd, 1 << 16).splitlines():
                self.rank.report |= json.loads(line)
        os.close(self.report_fd)
        self.rank.code = code


class LocalTeam:
    """The ranks of one node of a job, on this machine.

    listener: a socket that ranks get, and are told the number of. plain: of the screen, rank 0 gets
    no terminal.
    """

    def __init__(
        self,
        job: Job,
        node: int = 0,
        name: str = "",
        *,
        listener: socket.socket | None = None,
        plain: bool = False,
    ) -> None:
        self.job, self.node = job, node
        self._listener, self._plain = listener, plain
        self.ranks = [Rank(rank, name) for rank in job.ranks_of(node)]
        self._processes: list[_Process] = []
        self._screen: ScreenAndFile | None = None

    def start(self, asked: Sequence[int] = (), meeting: Meeting | None = None) -> None:
        """Start all ranks; they meet each other on this machine, unless `meeting` says where.

        Rank 0 is handed the listening socket of the rendezvous: no fixed port.

        Raises:
            LaunchError: a rank cannot be started.
        """
        try:
            with contextlib.ExitStack() as stack:
                if meeting is None:
                    here = stack.enter_context(listen("127.0.0.1"))
                    meeting = Meeting("127.0.0.1", here.getsockname()[1], here.fileno())
                if self.node == 0:
                    self._screen = ScreenAndFile(self.job.log(0), plain=self._plain)
                for rank in self.ranks:
                    self._processes.append(self._start(rank, meeting))
        except OSError as error:
            raise LaunchError(
                f"could not start {self.ranks[len(self._processes)].who} of {self.job.num_ranks}",
                why=str(error),
                mend="all nodes must see the folder that ranks log to: a shared file system"
                if isinstance(error, FileNotFoundError)
                else "free processes and memory on this machine, or start fewer ranks",
            ) from error
        if self._screen is not None:
            self._screen.start()

    def _start(self, rank: Rank, meeting: Meeting) -> _Process:
        report_read, report_write = os.pipe()
        os.set_blocking(report_read, False)
        inherited = [report_write]
        if rank.rank == 0:
            inherited.append(meeting.store_fd)
        env = self.job.environment(rank.rank, meeting, report_write, os.environ)
        if self._listener is not None:
            inherited.append(self._listener.fileno())
            env[LISTEN] = str(self._listener.fileno())
        # A rank begins with these signals blocked, and hears them once it can tell what happened.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD_LATER)
        try:
            with open(self.job.log(rank.rank), "ab") as log:
                process = subprocess.Popen(
                    self.job.command(),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=self._output(rank, log),
                    stderr=subprocess.STDOUT,
                    pass_fds=inherited,
                    start_new_session=True,  # the terminal's Ctrl-C comes to us, we pass it on
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(report_write)
        return _Process(rank, process, report_read)

    def _output(self, rank: Rank, log: IO[bytes]) -> IO[bytes] | int:
        return self._screen.write_end if self._screen is not None and rank.rank == 0 else log

    def update(self) -> None:
        """Note which ranks have ended."""
        for one in self._processes:
            if one.rank.code is None and (code := one.process.poll()) is not None:
                one.take_up_end(code)

    def ask(self, number: int) -> None:
        """Send a signal to each rank alone: its helpers (data loaders) end when it does."""
        for one in self._processes:
            if one.rank.code is None:
                with contextlib.suppress(ProcessLookupError):
                    one.process.send_signal(number)

    def end(self) -> None:
        """Kill all ranks and what they have started, also what an ended rank has left."""
        for one in self._processes:
            one.end()

    def close(self) -> None:
        """Leave nothing behind."""
        self.end()
        for one in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                one.process.wait(_KILLED_SECONDS)
        if self._screen is not None:
            self._screen.close()


def listen(address: str) -> socket.socket:
    """Return a socket that listens at a port which is free."""
    return socket.create_server((address, 0), backlog=1024)
