"""Proves that a schedule can run: everything once, in a possible order, with nobody stuck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.columns import Place, in_columns
from bigtrain.pipeline.play import Play, Wait
from bigtrain.pipeline.table import COMPUTE, WIRES, Action, Table
from bigtrain.pipeline.wire_faults import find_wire_fault
from bigtrain.pipeline.wires import with_communication


@dataclass(frozen=True)
class Report:
    """What is known of a table that was proven.

    `table` is it with its wires. `peak_in_flight` is, per rank, the largest number of (stage,
    microbatch) whose forward is done and whose B or W is not; 0 where there are only forwards.
    """

    table: Table = field(repr=False)
    peak_in_flight: tuple[int, ...]
    num_messages: int
    forward_only: bool


@dataclass(frozen=True)
class Fault:
    """Why a table cannot run, and which of its cells are guilty."""

    what: str
    mend: str
    marks: tuple[Place, ...]
    why: str = ""

    def error(self, table: Table, where: str = "") -> BigtrainError:
        """Return the error that shows the table with the guilty cells marked."""
        drawn = in_columns(table.rows, self.marks)
        what = f"schedule {table.name} cannot run: {self.what}\n{drawn}"
        return BigtrainError(what, where=where, why=self.why, mend=self.mend)


def validate(table: Table) -> Report:
    """Return what is known of `table` once it is proven that it runs to its end.

    Every stage has for every microbatch one F and one B, or one I and later one W (or all have
    only F), on the rank of the stage; F is before B or I; SENDs and RECVs agree, in the same order
    between each two ranks; no ranks wait for each other in a circle, neither if sends leave at once
    nor if each lasts until its receive is posted. A table without wires is given them first.

    Raises:
        BigtrainError: it cannot run; the message shows where and why, and how to mend it.
    """
    found = examine(table)
    if isinstance(found, Fault):
        raise found.error(table)
    return found


def examine(table: Table) -> Report | Fault:
    """Return what `validate` returns, or the first fault."""
    places: dict[Action, Place] = {}
    fault = _misplaced(table) or _repeated(table, places)
    if fault:
        return fault
    only_forward = not any(action.kind in "BIW" for action in places)
    fault = _unfinished(table, places, only_forward)
    if fault:
        return fault
    if table.has_wires:
        wrong = find_wire_fault(table, places)
        if wrong:
            return Fault(*wrong)
    wired = with_communication(table)
    for blocking in (False, True):
        play = Play(wired.rows, table.placement, blocking)
        if play.run():
            return _dead_lock(play.waits(), wired, places)
    peaks = tuple(0 if only_forward else _peak(row) for row in table.rows)
    sends = sum(action.kind in ("SEND_F", "SEND_B") for row in wired.rows for action in row)
    return Report(wired, peaks, sends, only_forward)


def _misplaced(table: Table) -> Fault | None:
    """Look for numbers out of range, unknown kinds, and actions on the wrong rank."""
    if not table.placement or not table.num_microbatches >= 1:
        return Fault("it has no stages or no microbatches", "give at least one of each", ())
    if set(table.placement) != set(range(table.num_ranks)):
        what = f"it has {table.num_ranks} rows, but stages on the ranks {set(table.placement)}"
        return Fault(what, "give one row per rank, and a stage to every rank", ())
    for rank, place, action in _cells(table):
        marks = ((rank, place),)
        if action.kind not in COMPUTE + WIRES:
            legal = ", ".join(COMPUTE + WIRES)
            return Fault(f"{action} is of no known kind", f"kinds are {legal}", marks)
        if not 0 <= action.stage < table.num_stages:
            what = f"{action} is at a stage that does not exist"
            return Fault(what, f"stages are 0 to {table.num_stages - 1}", marks)
        if not 0 <= action.microbatch < table.num_microbatches:
            what = f"{action} is for a microbatch that does not exist"
            return Fault(what, f"microbatches are 0 to {table.num_microbatches - 1}", marks)
        home = table.placement[action.stage]
        if home != rank:
            what = f"{action} is on rank {rank}, but stage {action.stage} is on rank {home}"
            return Fault(what, f"move {action} into the row of rank {home}", marks)
    return None


def _repeated(table: Table, places: dict[Action, Place]) -> Fault | None:
    """Look for actions that are there twice; note where each is."""
    for rank, place, action in _cells(table):
        if action in places:
            marks = (places[action], (rank, place))
            return Fault(f"{action} is there twice", f"take one {action} away", marks)
        places[action] = (rank, place)
    return None


def _unfinished(table: Table, places: dict[Action, Place], only_forward: bool) -> Fault | None:
    """Look for (stage, microbatch) that lack an action, have one too many or in the wrong order."""
    for stage, rank in enumerate(table.placement):
        for microbatch in range(table.num_microbatches):
            four = tuple(Action(kind, stage, microbatch) for kind in COMPUTE)
            found = [action for action in four if action in places]
            marks = tuple(places[action] for action in found)
            lacking = _lacking(four, found, only_forward)
            if lacking:
                end = ((rank, len(table.rows[rank])),)
                return Fault(f"{lacking} is missing", f"add it to rank {rank}", marks[-1:] or end)
            _, whole, part, weight = four
            if whole in found and len(found) > 2:
                what = f"stage {stage} goes back twice for microbatch {microbatch}"
                return Fault(what, f"keep {whole}, or {part} and {weight}", marks[1:])
            for earlier, later in pairwise(found):
                if places[earlier] > places[later]:
                    what = f"{later} comes before {earlier}, which makes what it needs"
                    mend = f"put {earlier} before {later}"
                    return Fault(what, mend, (places[later], places[earlier]))
    return None


def _lacking(four: Sequence[Action], found: list[Action], only_forward: bool) -> str:
    """Return what is missing of one stage's F, B, I and W for a microbatch, in words, or ""."""
    forward, whole, part, weight = four
    if forward not in found:
        return str(forward)
    if only_forward or whole in found or (part in found and weight in found):
        return ""
    if part in found:
        return str(weight)
    return str(part) if weight in found else f"{whole} (or {part} and {weight})"


def _dead_lock(waits: list[Wait], wired: Table, places: dict[Action, Place]) -> Fault:
    """Describe a circle of ranks that wait for one another, told by compute actions if it can be.

    A rank may stand at a wire that the table as given does not show; then at what comes after it.
    """
    by_rank = {wait.rank: wait for wait in waits}
    circle = _circle(by_rank, wired)
    marks, lines = [], []
    for wait in circle:
        shown = next(a for a in wired.rows[wait.rank][wait.place :] if a in places)
        marks.append(places[shown])
        other = wired.placement[wait.awaited.stage]
        maker = _maker(wait.awaited, places, wired.num_stages)
        behind = by_rank[other].action if other in by_rank else None
        stands = f", which stands at {behind}" if other != wait.rank else ", later in its own row"
        lines.append(f"rank {wait.rank} waits at {wait.action} for {maker} of rank {other}{stands}")
    first = circle[0]
    needed = _maker(first.awaited, places, wired.num_stages)
    owner = wired.placement[first.awaited.stage]
    before = by_rank[owner].action
    return Fault(
        "ranks wait for each other in a circle",
        f"move {needed} of rank {owner} before {before}, or break the circle at another place",
        tuple(marks),
        why="\n        ".join(lines),
    )


def _circle(by_rank: dict[int, Wait], table: Table) -> list[Wait]:
    """Return the waits along a circle: from any rank that waits, on to the rank it waits for."""
    rank = min(by_rank)
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        rank = table.placement[by_rank[rank].awaited.stage]
    return [by_rank[member] for member in seen[seen.index(rank) :]]


def _maker(awaited: Action, places: dict[Action, Place], num_stages: int) -> Action:
    """Return what makes the message if `awaited` is its SEND and the table shows no wires."""
    if awaited in places:
        return awaited
    for kind in {"SEND_F": "F", "SEND_B": "BI", "B": "I"}.get(awaited.kind, ""):
        maker = Action(kind, awaited.stage, awaited.microbatch)
        if maker in places:
            return maker
    return awaited


def _peak(row: tuple[Action, ...]) -> int:
    held = peak = 0
    for action in row:
        held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak


def _cells(table: Table) -> Iterator[tuple[int, int, Action]]:
    for rank, row in enumerate(table.rows):
        for place, action in enumerate(row):
            yield rank, place, action
