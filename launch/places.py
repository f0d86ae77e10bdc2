"""Where servers and workers are started: on this machine, or on the nodes of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from bigtrain.config.launching import LaunchSection
from bigtrain.errors import LaunchError

from .fleet import Fleet, check_asked
from .job import Job
from .local import LocalTeam, listen
from .plan import Plan
from .remote import RemoteTeam
from .seats import Seats
from .watch import Team

_POLL_SECONDS = 0.03

Address = tuple[str, int]


class Place(Protocol):
    """What starts teams. A server listens before it is started, and also while it is gone."""

    def open(self, asked: Sequence[int]) -> list[Address]:
        """Return the addresses of servers, once all is ready; `asked` are signals that came."""

    def worker(self, index: int, job: Job) -> Team:
        """Return the ranks of a worker, which do not run yet."""

    def server(self, index: int, job: Job) -> Team:
        """Return a server that does not run yet."""

    def has(self, nodes: Sequence[str]) -> bool:
        """Tell whether something can be started on these nodes."""

    def update(self) -> None:
        """Note what has happened."""

    def close(self) -> None:
        """Leave nothing behind."""


class Here:
    """This machine."""

    def __init__(self, seats: Seats) -> None:
        self._sockets = [listen("127.0.0.1") for _ in seats.servers]

    def open(self, asked: Sequence[int]) -> list[Address]:
        return [sock.getsockname() for sock in self._sockets]

    def worker(self, index: int, job: Job) -> Team:
        return LocalTeam(job, plain=True)

    def server(self, index: int, job: Job) -> Team:
        return LocalTeam(job, listener=self._sockets[index], plain=True)

    def has(self, nodes: Sequence[str]) -> bool:
        return True

    def update(self) -> None:
        pass

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class There:
    """The nodes of a fleet, whose agents hold the sockets of the servers there."""

    def __init__(self, seats: Seats, fleet: Fleet) -> None:
        self._seats, self._fleet = seats, fleet

    def open(self, asked: Sequence[int]) -> list[Address]:
        """Start agents, and have them listen.

        Raises:
            LaunchError: a node did not join, or was lost again; a signal came.
        """
        self._fleet.start(asked)
        for index, node in enumerate(self._seats.servers):
            self._fleet.tell(node, listen=_name(index))
        while missing := self._silent():
            self._fleet.update()
            check_asked(asked)
            if not self.has(missing):
                raise LaunchError(
                    f"lost {', '.join(missing)} before anything was started",
                    why="all nodes have joined, and servers were to listen there",
                    mend="see whether those nodes are up, and start the run again",
                )
            time.sleep(_POLL_SECONDS)
        ports = [self._fleet.ports[_name(index)] for index in range(len(self._seats.servers))]
        hosts = [self._fleet.address(node) for node in self._seats.servers]
        return list(zip(hosts, ports, strict=True))

    def _silent(self) -> list[str]:
        """Return the nodes of servers that do not listen yet."""
        nodes = enumerate(self._seats.servers)
        return [node for index, node in nodes if _name(index) not in self._fleet.ports]

    def worker(self, index: int, job: Job) -> Team:
        return RemoteTeam(job, self._fleet, self._seats.workers[index], plain=True)

    def server(self, index: int, job: Job) -> Team:
        nodes = [self._seats.servers[index]]
        return RemoteTeam(job, self._fleet, nodes, listener=_name(index), plain=True)

    def has(self, nodes: Sequence[str]) -> bool:
        return all(self._fleet.lives(node) for node in nodes)

    def update(self) -> None:
        self._fleet.update()

    def close(self) -> None:
        self._fleet.close()


def place_of(
    plan: Plan, seats: Seats, launch: LaunchSection, log: Path, say: Callable[[str], None]
) -> Place:
    """Return where the parts of a run are started; `log` is of what agents and ssh say."""
    if plan.is_local(launch):
        return Here(seats)
    return There(seats, Fleet(plan, launch, log, say))


def _name(server: int) -> str:
    return f"server {server}"
