"""Ranks on several nodes: agents start them, and tell this launcher how they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .fleet import Fleet
from .job import Job
from .outcome import Rank
from .wire import Message


class RemoteTeam:
    """The ranks of a job on some nodes of a fleet, which others start and look after.

    listener: the name of a socket that the agent has opened, and ranks inherit. plain: as of
    `LocalTeam`.
    """

    def __init__(
        self,
        job: Job,
        fleet: Fleet,
        nodes: Sequence[str],
        *,
        listener: str | None = None,
        plain: bool = False,
    ) -> None:
        self.job, self.fleet, self.nodes = job, fleet, tuple(nodes)
        self._how = {"listener": listener, "plain": plain}
        self.ranks = [
            Rank(rank, name) for node, name in enumerate(self.nodes) for rank in job.ranks_of(node)
        ]
        self._number = fleet.enroll(self)
        self._is_ordered = False
        self._later: list[Message] = []  # what is to be said once ranks are there

    @property
    def _meeting(self) -> str:
        return f"team {self._number}"

    def start(self, asked: Sequence[int] = ()) -> None:
        """Have agents start the ranks; on several nodes, once it is known where these can meet."""
        if len(self.nodes) == 1:
            self._order()
        else:
            self.fleet.tell(self.nodes[0], listen=self._meeting)
        for node in self.nodes:
            if how := self.fleet.how_lost(node):
                self.lose(node, how)

    def _order(self, **meeting: Any) -> None:
        self._is_ordered = True
        for node, name in enumerate(self.nodes):
            about = {"node": node, "name": name, "job": self.job.to_message(), **self._how}
            self._tell(name, start=about, meeting=meeting or None)
        for message in self._later:
            self._tell_all(**message)

    def update(self) -> None:
        """Go on where an agent has answered; `take_up` and `lose` have noted who has ended."""
        port = self.fleet.ports.get(self._meeting)
        if not self._is_ordered and port is not None:
            # Where there is a network at all, ranks come in by the address that a node is known by.
            self._order(
                address=self.fleet.address(self.nodes[0]), port=port, listener=self._meeting
            )

    def take_up(self, node: str, message: Message) -> None:
        if "ended" in message:
            rank = self.ranks[message["ended"]]
            rank.code, rank.report = message["code"], message["report"]
        elif "refused" in message:
            for rank in self._ranks_on(node):
                rank.code, rank.report = 1, {"text": message["refused"]}

    def lose(self, node: str, how: str) -> None:
        is_vain = not self._is_ordered and node == self.nodes[0]  # they will never meet
        for rank in self.ranks if is_vain else self._ranks_on(node):
            if rank.code is None:
                rank.code, rank.lost = 1, how

    def _ranks_on(self, node: str) -> list[Rank]:
        return [rank for rank in self.ranks if rank.node == node]

    def ask(self, number: int) -> None:
        self._tell_all(ask=number)

    def end(self) -> None:
        self._tell_all(end=True)

    def close(self) -> None:
        self._tell_all(close=True)

    def _tell_all(self, **message: Any) -> None:
        if not self._is_ordered:
            self._later.append(message)
            return
        for node in self.nodes:
            self._tell(node, **message)

    def _tell(self, node: str, **message: Any) -> None:
        self.fleet.tell(node, team=self._number, **message)


class LoneTeam(RemoteTeam):
    """All ranks of a job, on all nodes of a fleet that is there for them alone."""

    def __init__(self, job: Job, fleet: Fleet) -> None:
        super().__init__(job, fleet, fleet.plan.nodes)

    def start(self, asked: Sequence[int] = ()) -> None:
        """Start an agent on every node, and then the ranks.

        Raises:
            LaunchError: as `Fleet.start`.
        """
        self.fleet.start(asked)
        super().start(asked)

    def update(self) -> None:
        self.fleet.update(in_trouble=any(rank.has_failed(asked=False) for rank in self.ranks))
        super().update()

    def close(self) -> None:
        self.fleet.close()
