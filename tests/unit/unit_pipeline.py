"""What the tests of schedules share: all combinations, and an executor that knows none of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

from bigtrain.pipeline.schedule import SCHEDULES, Action, Table, make_table


def combinations(sizes: Iterable[int], max_ranks: int = 9) -> Iterator[Table]:
    """Yield the table of every schedule for every number of ranks and of microbatches (`sizes`)."""
    for name in SCHEDULES:
        for ranks in range(1, max_ranks + 1):
            for microbatches in sizes:
                for stages in (2, 3, 4) if name == "interleaved" else (1,):
                    if name != "interleaved" or microbatches % ranks == 0:
                        yield make_table(name, ranks, microbatches, stages)


def changed(table: Table, rank: int, row: list[Action]) -> Table:
    """Return `table` with another row for `rank`."""
    rows = list(table.rows)
    rows[rank] = tuple(row)
    return replace(table, rows=tuple(rows))


def mutant(table: Table, random: Random) -> Table:
    """Return `table` with one thing changed: swapped, dropped, doubled, moved or misplaced."""
    rank = random.choice([rank for rank, row in enumerate(table.rows) if row])
    row = list(table.rows[rank])
    here, there = random.randrange(len(row)), random.randrange(len(row))
    match random.randrange(7):
        case 0:
            row[here], row[there] = row[there], row[here]
        case 1:
            del row[here]
        case 2:
            row.insert(there, row[here])
        case 3:
            row.insert(there, row.pop(here))
        case 4:
            row[here] = replace(row[here], stage=random.randrange(table.num_stages + 1))
        case 5:
            row[here] = replace(row[here], microbatch=random.randrange(-1, table.num_microbatches))
        case _:
            row[here] = replace(row[here], kind=random.choice("FBIW"))
    return changed(table, rank, row)


def runs(table: Table, blocking: bool, random: Random | None = None) -> bool:
    """Whether `table`, wires included, runs to its end with exactly the work of a step.

    Ranks are processes that take one step at a time, in any order. Between each two ranks there is
    one channel per direction, first in, first out. A RECV posts a buffer; a SEND fills the oldest
    unfilled one of the channel, and with `blocking` waits until it is posted.
    """
    places = [0] * table.num_ranks
    sent: dict[tuple[int, int], list[tuple]] = {}
    posted: dict[tuple[int, int], list[tuple]] = {}
    have: list[set[tuple]] = [set() for _ in table.rows]  # what a rank holds of data

    def arrive(pair: tuple[int, int]) -> bool:
        """Match messages with buffers; False if a message lands in a buffer for another."""
        while sent.get(pair) and posted.get(pair):
            message, buffer = sent[pair].pop(0), posted[pair].pop(0)
            if message != buffer:
                return False
            have[pair[1]].add(message)
        return True

    def step(rank: int) -> bool | None:
        """Do the next action of `rank`: True if done, False if it must wait, None if wrong."""
        action = table.rows[rank][places[rank]]
        kind, stage, batch = action.kind, action.stage, action.microbatch
        last = len(table.placement) - 1
        if kind.startswith(("SEND", "RECV")):
            up = kind in ("SEND_F", "RECV_B")
            other = stage + 1 if up else stage - 1
            if not 0 <= other <= last or table.placement[other] == rank:
                return None
            peer = table.placement[other]
            data = "out" if kind[-1] == "F" else "grad"
            if kind.startswith("RECV"):
                posted.setdefault((peer, rank), []).append((data, other, batch))
                return True if arrive((peer, rank)) else None
            pair = (rank, peer)
            if (data, stage, batch) not in have[rank]:
                return None
            if blocking and not posted.get(pair):
                return False
            sent.setdefault(pair, []).append((data, stage, batch))
            return True if arrive(pair) else None
        if not 0 <= stage <= last or table.placement[stage] != rank or batch < 0:
            return None
        if ("did", kind, stage, batch) in have[rank]:
            return None
        needs = {
            "F": [("out", stage - 1, batch)] * (stage > 0),
            "W": [("did", "I", stage, batch)],
        }.get(kind, [("did", "F", stage, batch)] + [("grad", stage + 1, batch)] * (stage < last))
        if kind in "BI" and {("did", k, stage, batch) for k in "BI"} & have[rank]:
            return None
        if not all(need in have[rank] for need in needs):
            return False
        have[rank].add(("did", kind, stage, batch))
        made = {"F": "out", "B": "grad", "I": "grad"}.get(kind)
        have[rank] |= {(made, stage, batch)} if made else set()
        return True

    going = True
    while going:
        going = False
        order = list(range(table.num_ranks))
        if random:
            random.shuffle(order)
        for rank in order:
            while places[rank] < len(table.rows[rank]):
                done = step(rank)
                if done is None:
                    return False
                if not done:
                    break
                going = True
                places[rank] += 1
    if any(place < len(row) for place, row in zip(places, table.rows, strict=True)):
        return False
    if any(sent.values()) or any(posted.values()):
        return False
    return _complete(table)


def _complete(table: Table) -> bool:
    """Whether every stage goes forward and backward once for every microbatch."""
    did: dict[tuple[int, int], str] = {
        (stage, batch): ""
        for stage in range(table.num_stages)
        for batch in range(table.num_microbatches)
    }
    for row in table.rows:
        for action in row:
            if action.is_compute:
                key = (action.stage, action.microbatch)
                if key not in did:
                    return False
                did[key] += action.kind
    kinds = {"".join(sorted(kinds)) for kinds in did.values()}
    return kinds <= {"BF", "FIW"} or kinds == {"F"}
