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
from .local import LocalTeam, listening
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
    try:
        return _serve(line, call, signals)
    except Lost as lost:
        sys.stderr.write(f"bigtrain agent on {socket.gethostname()}: the launcher: {lost}\n")
        return 1
    finally:
        line.close()


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


def _serve(line: Line, call: dict[str, Any], signals: list[int]) -> int:
    """Start ranks when told to, pass on what comes from either side, until the launcher leaves."""
    with listening("0.0.0.0") as here:
        line.say(port=here.port)
        order, later = _wait_for_job(line, call["silence"])
        if order is None:
            return 0
        job = Job.from_message(order["job"])
        team = LocalTeam(job, order["node"], order["name"])
        meeting = Meeting(order["address"], order["port"], here.store_fd)
        try:
            team.start(meeting=meeting)
        except LaunchError as error:
            line.say(refused=str(error))
            team.close()
            return 1
    try:
        _follow(line, team, call["silence"], signals, later)
    finally:
        team.close()
    return 0


def _wait_for_job(line: Line, silence: float) -> tuple[Message | None, list[Message]]:
    """Return what is to be started, None if nothing is, and what was said after that."""
    while True:
        messages = line.hear()
        for number, message in enumerate(messages):
            if "job" in message or "over" in message:
                return message if "job" in message else None, messages[number + 1 :]
        if line.silence > silence:
            raise Lost(f"nothing was heard for {silence:.0f} s")
        line.wait(_POLL_SECONDS * 10)


def _follow(
    line: Line, team: LocalTeam, silence: float, signals: list[int], heard: list[Message]
) -> None:
    """Tell of ranks that end; do what the launcher says; return when it says that all is over."""
    told: set[int] = set()
    asked = by_signal = False
    while True:
        team.update()
        for rank in team.ranks:
            if rank.code is not None and rank.rank not in told:
                told.add(rank.rank)
                line.say(ended=rank.rank, code=rank.code, report=rank.report)
        for message in [*heard, *line.hear()]:
            if "over" in message:
                return
            if "end" in message:
                team.end()
            if "ask" in message:
                if not by_signal:
                    team.ask(message["ask"])
                asked, by_signal = True, False
        heard = []
        if signals and not asked:  # ranks that are asked twice end at once
            asked = by_signal = True
            line.say(signal=signals[0])
            team.ask(signal.SIGTERM)
        if line.silence > silence:
            raise Lost(f"nothing was heard for {silence:.0f} s")
        line.wait(_POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
