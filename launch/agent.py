"""What the launcher starts on each node: it starts the node's ranks and tells how they end.

    python -m bigtrain.launch.agent < call

A call is one line of JSON: where the launcher listens, a secret, and whose turn on which node it
is. The agent connects, says what it is, and does what it is told; without a launcher it ends, and
its ranks with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.doctor.facts import facts_of
from bigtrain.errors import LaunchError

from .job import Job, Meeting
from .local import LocalTeam, listen
from .wire import Line, Lost, Message

_POLL_SECONDS = 0.03


def main() -> int:
    """Serve one launcher to the end, and return the exit code."""
    call = json.loads(sys.stdin.readline())
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    os.environ.update(call["env"])
    try:
        os.chdir(call["folder"])
        line = _connect(call)
    except OSError as error:
        sys.stderr.write(f"bigtrain agent on {socket.gethostname()}: {error}\n")
        return 1
    agent = Agent(line, call["silence"], signals)
    try:
        agent.serve()
    except Lost as lost:
        sys.stderr.write(f"bigtrain agent on {socket.gethostname()}: the launcher: {lost}\n")
        return 1
    finally:
        agent.close()
        line.close()
    return 0


def _connect(call: dict[str, Any]) -> Line:
    """Return the line to the launcher, by the first of its addresses that works."""
    tried = []
    for address in dict.fromkeys([*call["addresses"], *_callers(os.environ)]):
        try:
            line = Line(socket.create_connection((address, call["port"]), timeout=10))
        except OSError as error:
            tried.append(f"{address}:{call['port']} {error.strerror or error}")
            continue
        try:
            name = call.get("name") or os.environ.get("SLURMD_NODENAME", socket.gethostname())
            line.say(secret=call["secret"], name=name, facts=facts_of(Path(call["folder"])))
        except Lost as lost:
            tried.append(f"{address}:{call['port']} {lost}")
            continue
        return line
    raise OSError(f"cannot reach the launcher: {'; '.join(tried)}")


def _callers(env: Mapping[str, str]) -> list[str]:
    """Return where ssh or srun says that it was called: names may mean nothing on this node."""
    by_ssh = env.get("SSH_CONNECTION", "").split()[:1]
    return [*by_ssh, *filter(None, [env.get("SLURM_LAUNCH_NODE_IPADDR")])]


class Agent:
    """Does what the launcher says: opens sockets, starts teams of ranks, tells how they end."""

    def __init__(self, line: Line, silence: float, signals: list[int]) -> None:
        self._line, self._silence, self._signals = line, silence, signals
        self._teams: dict[int, LocalTeam] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._told: set[tuple[int, int]] = set()  # of these teams and ranks the end
        self._is_asked = False

    def serve(self) -> None:
        """Return when the launcher says that all is over.

        Raises:
            Lost: the launcher is gone.
        """
        while True:
            for number, team in self._teams.items():
                self._tell_ends(number, team)
            for message in self._line.hear():
                if "over" in message:
                    return
                self._do(message)
            if self._signals and not self._is_asked:  # the launcher passes it on to all ranks
                self._is_asked = True  # more signals may be the same, that others have got too
                self._line.say(signal=self._signals[0])
            if self._line.silence > self._silence:
                raise Lost(f"nothing was heard for {self._silence:.0f} s")
            self._line.wait(_POLL_SECONDS if self._teams else 10 * _POLL_SECONDS)

    def _tell_ends(self, number: int, team: LocalTeam) -> None:
        team.update()
        for rank in team.ranks:
            if rank.code is not None and (number, rank.rank) not in self._told:
                self._told.add((number, rank.rank))
                self._line.say(team=number, ended=rank.rank, code=rank.code, report=rank.report)

    def _do(self, message: Message) -> None:
        if "listen" in message:
            self._listen(message["listen"])
        elif "start" in message:
            self._start(message["team"], message["start"], message["meeting"])
        elif (team := self._teams.get(message["team"])) is not None:
            if "ask" in message:
                self._is_asked = True
                team.ask(message["ask"])
            elif "end" in message:
                team.end()
            elif "close" in message:
                team.close()
                del self._teams[message["team"]]

    def _listen(self, name: str) -> None:
        self._sockets[name] = listen("0.0.0.0")
        self._line.say(name=name, port=self._sockets[name].getsockname()[1])

    def _start(self, number: int, about: Message, meeting: Message | None) -> None:
        """Start a team's ranks of this node; the first node has the socket where they meet."""
        store = None if meeting is None else self._sockets.pop(meeting["listener"], None)
        where = None
        if meeting is not None:
            where = Meeting(meeting["address"], meeting["port"], store.fileno() if store else -1)
        inherited = self._sockets[about["listener"]] if about["listener"] else None
        team = LocalTeam(
            Job.from_message(about["job"]),
            about["node"],
            about["name"],
            listener=inherited,
            plain=about["plain"],
        )
        try:
            team.start(meeting=where)
            self._teams[number] = team
        except LaunchError as error:
            self._line.say(team=number, refused=str(error))
            team.close()
        finally:
            if store is not None:
                store.close()

    def close(self) -> None:
        """Leave nothing behind."""
        for team in self._teams.values():
            team.close()
        for one in self._sockets.values():
            one.close()


if __name__ == "__main__":
    sys.exit(main())
