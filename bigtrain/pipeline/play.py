"""Runs the rows of a table in thought, without a clock, until all is done or all ranks wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from bigtrain.pipeline.table import Action, matching_receive, need_of


@dataclass(frozen=True)
class Wait:
    """`rank` has come to its action number `place` and waits until `awaited` is done."""

    rank: int
    place: int
    action: Action
    awaited: Action


class Play:
    """The state of a run: how far each rank has come.

    With `blocking`, a SEND lasts until its RECV is posted; without, it leaves at once. A compute
    action waits for its messages, and for what its own rank makes of neighbouring stages. Rows may
    be changed, between calls of `run`, beyond the places that are reached.
    """

    def __init__(
        self, rows: Sequence[Sequence[Action]], placement: Sequence[int], blocking: bool
    ) -> None:
        self.rows = rows
        self.places = [0] * len(rows)
        self._placement = placement
        self._blocking = blocking
        self._done: set[Action] = set()
        self._waits: dict[Action, list[int]] = {}

    def run(self, ranks: Iterable[int] | None = None) -> Collection[Action]:
        """Go on as far as possible; return what is awaited, nothing where all ranks are through.

        Called again after rows were changed, it looks anew at those `ranks` only.
        """
        todo = deque(range(len(self.rows)) if ranks is None else ranks)
        while todo:
            rank = todo.popleft()
            while self.places[rank] < len(self.rows[rank]):
                action = self.rows[rank][self.places[rank]]
                awaited = self._awaited(rank, action)
                if awaited is not None:
                    waiting = self._waits.setdefault(awaited, [])
                    if rank not in waiting:
                        waiting.append(rank)
                    break
                self.places[rank] += 1
                event = _event(action)
                self._done.add(event)
                todo.extend(self._waits.pop(event, ()))
        return self._waits.keys()

    def waits(self) -> list[Wait]:
        """Return what each rank that is not through waits for."""
        stuck = [(rank, awaited) for awaited, ranks in self._waits.items() for rank in ranks]
        return [
            Wait(rank, self.places[rank], self.rows[rank][self.places[rank]], awaited)
            for rank, awaited in sorted(stuck, key=lambda pair: pair[0])
        ]

    def _awaited(self, rank: int, action: Action) -> Action | None:
        """Return what has to happen before `action` is over, if it did not yet."""
        awaited = None
        if action.kind in ("SEND_F", "SEND_B"):
            awaited = matching_receive(action) if self._blocking else None
        elif action.is_compute:
            need = need_of(action, len(self._placement))
            if need is not None:
                here = self._placement[need[1]] == rank
                kind = need[0] if here else f"SEND_{need[0]}"
                awaited = Action(kind, need[1], action.microbatch)
        return None if awaited in self._done else awaited


def _event(action: Action) -> Action:
    """Return `action`; an I as the B whose input gradient it makes."""
    return Action("B", action.stage, action.microbatch) if action.kind == "I" else action
