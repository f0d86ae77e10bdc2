"""The agents on the nodes of a plan: they are called, gathered, heard and told what to do."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config.launching import LaunchSection
from bigtrain.doctor.findings import differences
from bigtrain.errors import LaunchError

from .outcome import Ended, last_lines, stop_code
from .plan import Plan, shortened
from .starters import passed_on, starters
from .wire import PULSE_SECONDS, Line, Lost, Message, addresses_towards

_SUSPECT_SECONDS = 4 * PULSE_SECONDS  # of silence, once ranks have lost their peers


class Member(Protocol):
    """A team that has ranks on some of the nodes."""

    def take_up(self, node: str, message: Message) -> None:
        """Note what the agent on that node tells of the team's ranks."""

    def lose(self, node: str, how: str) -> None:
        """Note that nothing more will be known of the ranks on that node."""


@dataclass
class _Agent:
    """An agent that has connected: which node it is on."""

    line: Line
    node: str
    facts: Mapping[str, Any]  # what the node is, and when that was heard
    lost: str = ""  # how it was noticed that it is gone


class Fleet:
    """An agent on each node of a plan. Each starts ranks of any number of teams.

    may_differ: nodes are not compared before ranks are started.
    """

    def __init__(
        self,
        plan: Plan,
        launch: LaunchSection,
        log: Path,
        say: Callable[[str], None],
        may_differ: bool = False,
    ) -> None:
        self.plan, self.launch, self.say, self.may_differ = plan, launch, say, may_differ
        self.ports: dict[str, int] = {}  # what agents listen on, by the names that we gave
        self._members: list[Member] = []
        self._agents: dict[str, _Agent] = {}
        self._starters: list[subprocess.Popen[bytes]] = []
        self._secret = secrets.token_hex(16)
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0

    def enroll(self, member: Member) -> int:
        """Return the number by which agents know that team."""
        self._members.append(member)
        return len(self._members) - 1

    def lives(self, node: str) -> bool:
        return node in self._agents and not self._agents[node].lost

    def how_lost(self, node: str) -> str:
        """Return how it was noticed that a node is gone; nothing, if it is there."""
        return self._agents[node].lost

    # -- beginning -----------------------------------------------------------------------------

    def start(self, asked: Sequence[int] = ()) -> None:
        """Start an agent on every node, wait for all, and compare what the nodes are.

        Raises:
            LaunchError: a node did not join in time.
            Ended: also if a signal came before all had joined, or nodes do not run the same code.
        """
        with socket.socket() as listener:
            listener.bind(("0.0.0.0", 0))
            listener.listen(len(self.plan.nodes) + 16)
            self._call(listener.getsockname()[1])
            self._gather(listener, asked)
        if not self.may_differ:
            self._examine()

    def _examine(self) -> None:
        """Compare what the nodes are, before any rank is started.

        Raises:
            Ended: they do not run the same code.
        """
        agents = [self._agents[node] for node in self.plan.nodes]
        found = differences({**agent.facts, "name": agent.node} for agent in agents)
        serious = [one for one in found if one.forbids]
        for one in found:
            if one not in serious:
                self.say(f"warning: {one.render()}")
        if serious:
            text = "\n".join(one.render() for one in serious)
            odd = {node for one in serious for node in one.nodes}
            unfit = [node for node in self.plan.nodes if node in odd]
            raise Ended(1, text, None, unfit, how_lost="unfit")

    def address(self, node: str) -> str:
        """Return an address of a node, which means the same on all nodes.

        Its name may lead to loopback on itself (Debian has 127.0.1.1 for it), or nowhere.
        """
        peer = self._agents[node].line.peer
        if len(self.plan.nodes) == 1:
            return peer
        found = [peer]
        with contextlib.suppress(OSError):
            name = node.rpartition("@")[2]
            known = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
            found = [*(str(info[4][0]) for info in known), peer]
        return next((a for a in found if not a.startswith("127.")), peer)

    def _call(self, port: int) -> None:
        """Start what starts the agents, and tell them where we are."""
        call = {
            "addresses": addresses_towards([n.rpartition("@")[2] for n in self.plan.nodes]),
            "port": port,
            "secret": self._secret,
            "folder": os.getcwd(),
            "silence": self.launch.silence_seconds,
            "env": passed_on(self.plan, os.environ),
        }
        commands = starters(self.plan, self.launch, os.environ, os.getcwd())
        for number, command in enumerate(commands):
            # srun says it to each of its agents itself.
            by_srun = self.plan.start == "srun"
            mine: dict[str, Any] = call if by_srun else {**call, "name": self.plan.nodes[number]}
            try:
                with open(self._log, "ab") as log:
                    process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stderr=log, start_new_session=True
                    )
            except OSError as error:
                raise LaunchError(
                    f"could not start {command[0]} for {self.plan}",
                    why=str(error),
                    mend=f"see whether {command[0]} is installed here, and in PATH",
                ) from error
            self._starters.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code is told of
                process.stdin.write(json.dumps(mine).encode() + b"\n")
                process.stdin.close()

    def _gather(self, listener: socket.socket, asked: Sequence[int]) -> None:
        """Return when all nodes have joined."""
        end = time.monotonic() + self.launch.join_seconds
        listener.settimeout(0.1)
        strangers: list[Line] = []
        while len(self._agents) < len(self.plan.nodes):
            with contextlib.suppress(TimeoutError):
                strangers.append(Line(listener.accept()[0]))
            for line in list(strangers):
                self._introduce(line, strangers)
            self.update()
            check_asked(asked)
            ended = [p for p in self._starters if p.poll() not in (None, 0)]
            if ended or time.monotonic() > end or any(a.lost for a in self._agents.values()):
                raise self._incomplete(ended)
        for line in strangers:
            line.close()

    def _introduce(self, line: Line, strangers: list[Line]) -> None:
        """Take up who says the secret and a node of the plan; hang up on all others."""
        try:
            messages = line.hear()
        except Lost:
            messages = [{}]
        if not messages:
            return  # it has said nothing yet
        strangers.remove(line)
        first = messages[0]
        node = first.get("name")
        is_ours = secrets.compare_digest(
            str(first.get("secret", "")).encode(), self._secret.encode()
        )
        if not is_ours or node not in self.plan.nodes or node in self._agents:
            if is_ours:
                self.say(f"{node} joined, which is none of {shortened(self.plan.nodes)}")
            line.close()
            return
        facts = first.get("facts")
        known = facts if isinstance(facts, dict) else {}
        self._agents[node] = _Agent(line, node, {**known, "received": time.time()})

    def _incomplete(self, ended: Sequence[subprocess.Popen[bytes]]) -> Ended:
        missing = [node for node in self.plan.nodes if not self.lives(node)]
        count = len(self.plan.nodes)
        why = f"nothing came from them within {self.launch.join_seconds:.0f} s"
        if ended:
            why = f"{_name(ended[0])} ended with exit code {ended[0].returncode}"
        return Ended(
            1,
            f"{count - len(missing)} of {count} nodes joined; {shortened(missing)} did not",
            None,
            missing,
            how_lost="absent",
            why=f"{why}; it was said:\n{last_lines(self._log, start=self._log_start)}",
            mend="see whether those nodes are up, have this folder and this Python "
            f"({sys.executable}), and can open connections to this machine",
        )

    # -- while they run ------------------------------------------------------------------------

    def update(self, in_trouble: bool = False) -> None:
        """Take up what agents tell; notice nodes that are gone.

        in_trouble: ranks have failed, as if because others are gone.
        """
        for agent in self._agents.values():
            for message in self._hear(agent):
                self._take_up(agent, message)
            silence = _SUSPECT_SECONDS if in_trouble else self.launch.silence_seconds
            if not agent.lost and agent.line.silence > silence:
                self._lose(agent, f"nothing was heard for {agent.line.silence:.0f} s")

    def _take_up(self, agent: _Agent, message: Message) -> None:
        if "team" in message:
            self._members[message["team"]].take_up(agent.node, message)
        elif "port" in message:
            self.ports[message["name"]] = message["port"]
        elif "signal" in message:
            signal.raise_signal(message["signal"])  # to one of us is to all

    def tell(self, node: str, **message: Any) -> None:
        """Say something to the agent on a node, if it lives."""
        agent = self._agents.get(node)
        if agent is not None and not agent.lost:
            try:
                agent.line.say(**message)
            except Lost as lost:
                self._lose(agent, str(lost))

    def _hear(self, agent: _Agent) -> list[Message]:
        try:
            return [] if agent.lost else agent.line.hear()
        except Lost as lost:
            self._lose(agent, str(lost))
            return []

    def _lose(self, agent: _Agent, how: str) -> None:
        agent.lost = f"node {agent.node} is gone: {how}"
        for member in self._members:
            member.lose(agent.node, agent.lost)

    def close(self) -> None:
        """Let agents end, and see that they have."""
        for node in self._agents:
            self.tell(node, over=True)
        end = time.monotonic() + 5.0
        for process in self._starters:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()) if self._agents else 0.1)
        for process in self._starters:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for agent in self._agents.values():
            agent.line.close()


def check_asked(asked: Sequence[int]) -> None:
    """Give up if a signal came.

    Raises:
        Ended: it did.
    """
    if asked:
        text = f"stopped by {signal.Signals(asked[0]).name} before any rank was started"
        raise Ended(stop_code(asked[0]), text, asked[0])


def _name(process: subprocess.Popen[bytes]) -> str:
    arguments = process.args
    return str(arguments[0] if isinstance(arguments, list | tuple) else arguments)
