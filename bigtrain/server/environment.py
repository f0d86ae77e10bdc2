"""What a launcher tells the processes of a run with servers. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.errors import BigtrainError, PlanError
from bigtrain.server.chaos import Event, parse

_SERVERS, _TOKEN, _CHAOS = "BIGTRAIN_SERVERS", "BIGTRAIN_TOKEN", "BIGTRAIN_CHAOS"
_SERVER, _WORKER = "BIGTRAIN_SERVER", "BIGTRAIN_WORKER"
_INCARNATION, LISTEN = "BIGTRAIN_INCARNATION", "BIGTRAIN_LISTEN_FD"
_SHARERS, _RANKS = "BIGTRAIN_SHARERS", "BIGTRAIN_WORKER_RANKS"
_MEND = "start the run with bigtrain launch, which sets it"


@dataclass(frozen=True)
class Environment:
    """Where servers are, and which of the processes this is.

    addresses: (host, port) of each server. server: the number of this one, or None; worker: that of
    the worker that this rank is part of, or None. incarnation: how often it was started before.
    listen_fd: a server's socket, if it is open already. sharers: processes of the run on this
    machine, and ranks: of each worker, if that is known.
    """

    addresses: tuple[tuple[str, int], ...]
    token: str
    server: int | None = None
    worker: int | None = None
    incarnation: int = 0
    chaos: tuple[Event, ...] = ()
    listen_fd: int | None = None
    sharers: int | None = None
    ranks: int | None = None

    def to_env(self) -> dict[str, str]:
        """Return it as environment variables."""
        env = {
            _SERVERS: ",".join(f"{host}:{port}" for host, port in self.addresses),
            _TOKEN: self.token,
            _INCARNATION: str(self.incarnation),
        }
        optional = {
            _SERVER: self.server,
            _WORKER: self.worker,
            LISTEN: self.listen_fd,
            _SHARERS: self.sharers,
            _RANKS: self.ranks,
        }
        env |= {name: str(value) for name, value in optional.items() if value is not None}
        return env | ({_CHAOS: " ".join(map(str, self.chaos))} if self.chaos else {})

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Environment:
        """Return what the environment says.

        Raises:
            PlanError: a variable is missing, or makes no sense.
        """
        for name in (_SERVERS, _TOKEN):
            if not env.get(name):
                raise PlanError(
                    f"{name} is not set, and the config has server.servers",
                    where="environment",
                    why="servers and workers must know each other",
                    mend=_MEND,
                )
        return cls(
            addresses=tuple(_address(text) for text in env[_SERVERS].split(",")),
            token=env[_TOKEN],
            server=_number(env, _SERVER),
            worker=_number(env, _WORKER),
            incarnation=_number(env, _INCARNATION) or 0,
            chaos=_events(env.get(_CHAOS, "")),
            listen_fd=_number(env, LISTEN),
            sharers=_number(env, _SHARERS),
            ranks=_number(env, _RANKS),
        )


def is_server(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process was started as a server."""
    return _SERVER in env


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise PlanError(
            f"{_SERVERS} has {text!r}",
            where="environment",
            why="it is a list of host:port with commas between",
            mend=_MEND,
        )
    return host.strip("[]"), int(port)


def _events(text: str) -> tuple[Event, ...]:
    try:
        return tuple(map(parse, text.split()))
    except BigtrainError as error:
        it = error.problem
        raise PlanError(
            f"{_CHAOS} is {text!r}: {it.what}", where="environment", why=it.why, mend=_MEND
        ) from None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise PlanError(
            f"{name} is {text!r}", where="environment", why="it is a number", mend=_MEND
        )
    return int(text)
