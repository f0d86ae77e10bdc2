"""Gradients that have come to a server, and parameters and rows that workers wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bigtrain.server.link import Link
from bigtrain.server.protocol import STEPS, Kind, Malformed
from bigtrain.server.table import Source, Table


class Arrivals:
    """Which gradients of a worker's rank are here, of those that it pushes."""

    def __init__(self) -> None:
        self._due: dict[tuple[int, int], int] = {}  # (worker, rank) -> blocks that it pushes
        self._here: dict[tuple[Source, int], set[int]] = {}  # by source and rank

    def expect(self, worker: int, rank: int, blocks: int) -> None:
        self._due[worker, rank] = blocks

    def note(self, source: Source, rank: int, key: int) -> bool:
        """A gradient is here; return whether it was the last of that rank."""
        here = self._here.setdefault((source, rank), set())
        here.add(key)
        return len(here) >= self._due.get((source[0], rank), 0)

    def forget(self, is_over: Callable[[Source], bool]) -> None:
        for key in [key for key in self._here if is_over(key[0])]:
            del self._here[key]


@dataclass(frozen=True)
class Pull:
    """A worker's wish for a tensor of `version` or later; `have` is the version that it has."""

    link: Link
    part: int
    version: int
    have: int | None


class Pulls:
    """Wishes that wait until an update is made."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._waiting: dict[int, list[Pull]] = {}  # by block

    def add(self, key: int, pull: Pull) -> None:
        self._waiting.setdefault(key, []).append(pull)

    def drop(self, link: Link) -> None:
        """Its peer is gone."""
        for waiting in self._waiting.values():
            waiting[:] = [pull for pull in waiting if pull.link is not link]

    def answer_all(self, version: int) -> None:
        for key in list(self._waiting):
            self.answer(key, version)

    def answer(self, key: int, version: int) -> None:
        """Send a block, which has that version now, to those who wait for that or an older one."""
        waiting = self._waiting.pop(key, [])
        later = [pull for pull in waiting if pull.version > version]
        if later:
            self._waiting[key] = later
        for pull in waiting:
            if pull.version <= version:
                try:
                    self._send(key, version, pull)
                except Malformed as error:
                    pull.link.refuse(str(error))

    def _send(self, key: int, version: int, pull: Pull) -> None:
        """Send what the worker's lacks, if that is known, or else all of it."""
        if pull.have is not None and pull.part == 0:
            steps = self.table.steps_since(key, pull.have, version)
            if steps is not None:
                pull.link.send(Kind.TENSOR, steps, key=key, step=version, part=STEPS)
                return
        data, sent = self.table.send(key, pull.part)
        pull.link.send(Kind.TENSOR, data, sent, key=key, step=version, part=pull.part)


@dataclass(frozen=True)
class Lookup:
    """A worker's wish for rows of a table, of `version` or later."""

    link: Link
    key: int
    version: int
    rows: torch.Tensor


class Lookups:
    """Wishes for rows that wait until an update is made."""

    def __init__(self) -> None:
        self._waiting: list[Lookup] = []

    def add(self, lookup: Lookup) -> None:
        self._waiting.append(lookup)

    def drop(self, link: Link) -> None:
        """Its peer is gone."""
        self._waiting = [lookup for lookup in self._waiting if lookup.link is not link]

    def due(self, version: int) -> list[Lookup]:
        """Return, and forget, those that wait for `version` or an older one."""
        due = [lookup for lookup in self._waiting if lookup.version <= version]
        self._waiting = [lookup for lookup in self._waiting if lookup.version > version]
        return due
