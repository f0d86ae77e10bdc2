"""Gradients that have come to a server, and parameters and rows that workers wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bigtrain.server.fragments import Fragments
from bigtrain.server.link import Link
from bigtrain.server.protocol import PAGE, STEPS, Header, Kind, Malformed, Who, number
from bigtrain.server.rows import RowTables, unpack_rows
from bigtrain.server.table import Source, Spec, Table, bytes_of


class Arrivals:
    """Which gradients of a worker's ranks are here, of those that they push."""

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self._due: dict[tuple[int, int], Counter[int]] = {}  # (worker, rank) -> fragment -> blocks
        self._ranks: dict[int, int] = {}  # of each worker
        self._here: dict[tuple[Source, int], set[int]] = {}  # by source and rank

    def expect(self, who: Who, blocks: Iterable[Spec]) -> list[Source]:
        """Take note of what a rank pushes; return of what rounds all of its worker's are here."""
        self._due[who.index, who.rank] = Counter(block.fragment for block in blocks)
        self._ranks[who.index] = who.ranks
        its = {s for s, _ in self._here if s[:2] == (who.index, who.incarnation)}
        return sorted(filter(self._are_all_here, its))

    def note(self, source: Source, rank: int, key: int) -> set[int]:
        """A gradient is here; return the ranks that are to know: the one that has pushed it, if it
        was its last, and rank 0, if it was the last of the worker."""
        self._here.setdefault((source, rank), set()).add(key)
        found = {rank} if rank and self._is_here(source, rank) else set()
        return found | {0} if self._are_all_here(source) else found

    def _is_here(self, source: Source, rank: int) -> bool:
        due = self._due.get((source[0], rank))
        if due is None:
            return False
        meets = self._fragments.meets
        number = sum(n for fragment, n in due.items() if meets(fragment, source[2]))
        return len(self._here.get((source, rank), ())) >= number

    def _are_all_here(self, source: Source) -> bool:
        ranks = self._ranks.get(source[0], 0)
        return ranks > 0 and all(self._is_here(source, rank) for rank in range(ranks))

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


class RowTraffic:
    """Rows of tables that come to a server and go from it.

    do(work, done): have `work` done on the thread of updates, so that no update is seen half done,
    and `done` with what it returns on the loop's.
    """

    def __init__(
        self, rows: RowTables, do: Callable[[Callable[[], Any], Callable[[Any], None]], None]
    ) -> None:
        self.rows, self._do = rows, do
        self._coming: dict[Link, torch.Tensor] = {}
        self._waiting: list[Lookup] = []
        self._version = 0

    def room(self, link: Link, header: Header) -> memoryview:
        """Return where a message of rows goes that a frame brings.

        Raises:
            Malformed: there is no such part of a table, or it has not so many rows.
        """
        page, columns = header.part == PAGE, header.kind is not Kind.LOOKUP
        message = self.rows.message(header.key, header.length, columns=columns, page=page)
        self._coming[link] = message
        return bytes_of(message)

    def came(self, link: Link) -> torch.Tensor | None:
        """Return the message that a frame has brought; None if it was none of rows."""
        return self._coming.pop(link, None)

    def drop(self, link: Link) -> None:
        """Its peer is gone."""
        self._coming.pop(link, None)
        self._waiting = [lookup for lookup in self._waiting if lookup.link is not link]

    def on_lookup(self, link: Link, header: Header, message: torch.Tensor) -> None:
        """A worker wishes for rows.

        Raises:
            Malformed: the part of the table has not these.
        """
        (rows,) = unpack_rows(message, [])
        self.rows.parts[header.key].check(rows, increase=False)
        self._waiting.append(Lookup(link, header.key, header.step, rows))

    def look_up(self, version: int) -> None:
        """Fetch rows for those who wait for `version` or an older one. An update that is being made
        comes first: then they get what it has made."""
        self._version = version
        due = [lookup for lookup in self._waiting if lookup.version <= version]
        self._waiting = [lookup for lookup in self._waiting if lookup.version > version]
        for one in due:

            def done(found: torch.Tensor, one: Lookup = one) -> None:
                one.link.send(Kind.TENSOR, bytes_of(found), key=one.key, step=self._version)

            self._do(partial(self.rows.parts[one.key].lookup, one.rows), done)

    def on_turn_page(self, link: Link, header: Header, content: Mapping[str, Any]) -> None:
        """A worker wishes for a page of a table, perhaps of one version alone: then "0" as where to
        go on says that this is not there any more.

        Raises:
            Malformed: there is no such table.
        """
        part = self.rows.parts.get(header.key)
        if part is None:
            raise Malformed(f"a page of table {header.key}, which nobody has declared")
        after = number(content, "after")
        wanted = number(content, "version") if "version" in content else 0

        def done(page: tuple[torch.Tensor, int]) -> None:
            data, following = bytes_of(page[0]), page[1]
            if wanted and self._version != wanted:
                following = 0
            link.send(Kind.TENSOR, data, key=header.key, step=following, part=PAGE)

        self._do(partial(part.page, after), done)
