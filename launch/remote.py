"""Ranks on several nodes: an agent on each starts them, and tells this launcher how they end."""

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
from typing import Any

from bigtrain.config.launching import LaunchSection
from bigtrain.doctor.findings import differences
from bigtrain.errors import LaunchError

from .job import Job
from .outcome import Ended, Rank, last_lines, stop_code
from .plan import Plan, shortened
from .starters import passed_on, starters
from .wire import PULSE_SECONDS, Line, Lost, addresses_towards

_SUSPECT_SECONDS = 4 * PULSE_SECONDS  # of silence, once other ranks have lost their peers


@dataclass
class _Agent:
    """An agent that has connected: which node it is on, and the ranks there."""

    line: Line
    node: int
    facts: Mapping[str, Any]  # what the node is, and when that was heard
    port: int | None = None  # that it listens on, for the rendezvous
    gone: bool = False


class RemoteTeam:
    """All ranks of a job on the nodes of a plan."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        launch: LaunchSection,
        say: Callable[[str], None],
        may_differ: bool = False,
    ) -> None:
        self.job, self.plan, self.launch, self.say = job, plan, launch, say
        self.may_differ = may_differ  # nodes are not compared before ranks are started
        self.ranks = [
            Rank(rank, name) for node, name in enumerate(plan.nodes) for rank in job.ranks_of(node)
        ]
        self._agents: dict[int, _Agent] = {}
        self._starters: list[subprocess.Popen[bytes]] = []
        self._secret = secrets.token_hex(16)
        self._log = job.logs / "agents.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0

    # -- beginning -----------------------------------------------------------------------------

    def start(self, asked: Sequence[int] = ()) -> None:
        """Start an agent on every node, wait for all, and have them start their ranks.

        Raises:
            LaunchError: a node did not join in time, or its agent could not start a rank.
            Ended: also if a signal came before all had joined.
        """
        with socket.socket() as listener:
            listener.bind(("0.0.0.0", 0))
            listener.listen(len(self.plan.nodes) + 16)
            self._call(listener.getsockname()[1])
            self._gather(listener, asked)
        if not self.may_differ:
            self._examine()
        head = self._agents[0]
        assert head.port is not None
        # Where there is a network at all, ranks come in by the address that node 0 is known by.
        order = {"address": self._head_address(), "port": head.port, "job": self.job.to_message()}
        for agent in self._agents.values():
            self._say(agent, **order, node=agent.node, name=self.plan.nodes[agent.node])

    def _examine(self) -> None:
        """Compare what the nodes are, before any rank is started.

        Raises:
            Ended: they do not run the same code.
        """
        agents = [self._agents[node] for node in sorted(self._agents)]
        found = differences({**a.facts, "name": self.plan.nodes[a.node]} for a in agents)
        serious = [one for one in found if one.forbids]
        for one in found:
            if one not in serious:
                self.say(f"warning: {one.render()}")
        if serious:
            text = "\n".join(one.render() for one in serious)
            odd = {node for one in serious for node in one.nodes}
            unfit = [node for node in self.plan.nodes if node in odd]
            raise Ended(1, text, None, unfit, how_lost="unfit")

    def _head_address(self) -> str:
        """Return an address of the first node, which means the same on all nodes.

        Its name may lead to loopback on itself (Debian has 127.0.1.1 for it), or nowhere.
        """
        peer = self._agents[0].line.peer
        if len(self.plan.nodes) == 1:
            return peer
        found = [peer]
        with contextlib.suppress(OSError):
            name = self.plan.nodes[0].rpartition("@")[2]
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
        """Return when all nodes have joined and say on what port ranks can meet."""
        end = time.monotonic() + self.launch.join_seconds
        listener.settimeout(0.1)
        strangers: list[Line] = []
        while len([a for a in self._agents.values() if a.port]) < len(self.plan.nodes):
            with contextlib.suppress(TimeoutError):
                strangers.append(Line(listener.accept()[0]))
            for line in list(strangers):
                self._introduce(line, strangers)
            for agent in self._agents.values():
                for message in self._hear(agent):
                    agent.port = message.get("port", agent.port)
            if asked:
                text = f"stopped by {signal.Signals(asked[0]).name} before any rank was started"
                raise Ended(stop_code(asked[0]), text, asked[0])
            ended = [p for p in self._starters if p.poll() not in (None, 0)]
            if ended or time.monotonic() > end or any(a.gone for a in self._agents.values()):
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
        node = self.plan.nodes.index(first["name"]) if first.get("name") in self.plan.nodes else -1
        is_ours = secrets.compare_digest(
            str(first.get("secret", "")).encode(), self._secret.encode()
        )
        wanted = set(range(len(self.plan.nodes))) - self._agents.keys()
        if not is_ours or node not in wanted:
            if is_ours:
                nodes = shortened(self.plan.nodes)
                self.say(f"{first.get('name')} joined, which is none of {nodes}")
            line.close()
            return
        facts = first.get("facts")
        known = facts if isinstance(facts, dict) else {}
        self._agents[node] = _Agent(line, node, {**known, "received": time.time()})
        for message in messages[1:]:
            self._agents[node].port = message.get("port")

    def _incomplete(self, ended: Sequence[subprocess.Popen[bytes]]) -> Ended:
        missing = [n for i, n in enumerate(self.plan.nodes) if i not in self._agents]
        missing += [self.plan.nodes[a.node] for a in self._agents.values() if a.gone]
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

    def update(self) -> None:
        """Take up what agents tell; notice nodes that are gone."""
        in_trouble = any(rank.has_failed(asked=False) for rank in self.ranks)
        for agent in self._agents.values():
            if agent.gone:
                continue
            for message in self._hear(agent):
                self._take_up(agent, message)
            silence = _SUSPECT_SECONDS if in_trouble else self.launch.silence_seconds
            if agent.line.silence > silence:
                self._lose(agent, f"nothing was heard for {agent.line.silence:.0f} s")

    def _take_up(self, agent: _Agent, message: Mapping[str, Any]) -> None:
        if "ended" in message:
            rank = self.ranks[message["ended"]]
            rank.code, rank.report = message["code"], message["report"]
        elif "refused" in message:
            for number in self.job.ranks_of(agent.node):
                self.ranks[number].code, self.ranks[number].report = 1, {"text": message["refused"]}
        elif "signal" in message:
            signal.raise_signal(message["signal"])  # to one of us is to all

    def ask(self, number: int) -> None:
        for agent in self._agents.values():
            self._say(agent, ask=number)

    def end(self) -> None:
        for agent in self._agents.values():
            self._say(agent, end=True)

    def close(self) -> None:
        """Let agents end, and see that they have."""
        for agent in self._agents.values():
            self._say(agent, over=True)
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

    # -- lines ---------------------------------------------------------------------------------

    def _hear(self, agent: _Agent) -> list[dict[str, Any]]:
        try:
            return [] if agent.gone else agent.line.hear()
        except Lost as lost:
            self._lose(agent, str(lost))
            return []

    def _say(self, agent: _Agent, **message: Any) -> None:
        if not agent.gone:
            try:
                agent.line.say(**message)
            except Lost as lost:
                self._lose(agent, str(lost))

    def _lose(self, agent: _Agent, how: str) -> None:
        """A node is gone: of its ranks nothing more will be known."""
        agent.gone = True
        for number in self.job.ranks_of(agent.node):
            rank = self.ranks[number]
            if rank.code is None:
                rank.code = 1
                rank.lost = f"node {self.plan.nodes[agent.node]} is gone: {how}"


def _name(process: subprocess.Popen[bytes]) -> str:
    arguments = process.args
    return str(arguments[0] if isinstance(arguments, list | tuple) else arguments)
