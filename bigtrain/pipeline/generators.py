"""Schedules as pure functions: (num_ranks, num_microbatches, virtual_stages) -> Table.

They make compute actions only; wires are added afterwards. Each names its source. Arguments are
taken as they come: `make_table` checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.table import Action, Table


def looped(num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the placement that goes round: stage s on rank s mod num_ranks."""
    return tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages))


def vee(num_ranks: int) -> tuple[int, ...]:
    """Return the placement there and back: the first and the last stage are both on rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def gpipe(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Table:
    """All forwards, then all backwards (GPipe, https://arxiv.org/abs/1811.06965)."""
    every = range(num_microbatches)
    rows = [
        [Action(kind, rank, microbatch) for kind in "FB" for microbatch in every]
        for rank in range(num_ranks)
    ]
    return _table("gpipe", looped(num_ranks, 1), num_microbatches, rows)


def one_f_one_b(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Table:
    """One forward, one backward (PipeDream-Flush, https://arxiv.org/abs/2006.09503).

    Rank r runs ahead by the forwards that fit in until its first gradient can be back, so it
    never holds more than num_ranks - r microbatches.
    """
    rows = []
    for rank in range(num_ranks):
        forwards = [Action("F", rank, microbatch) for microbatch in range(num_microbatches)]
        backwards = [Action("B", rank, microbatch) for microbatch in range(num_microbatches)]
        rows.append(_one_by_one(forwards, backwards, num_ranks - 1 - rank))
    return _table("1f1b", looped(num_ranks, 1), num_microbatches, rows)


def interleaved(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Table:
    """1F1B over several stages a rank (Megatron-LM, https://arxiv.org/abs/2104.04473).

    Microbatches go in groups of num_ranks through a rank's stages in turn. Rank r runs ahead by
    all groups but one and twice its distance from the last rank.

    Raises:
        BigtrainError: the number of microbatches is no multiple of the number of ranks.
    """
    if num_microbatches % num_ranks:
        _refuse_uneven(num_ranks, num_microbatches)
    chunks = range(virtual_stages)
    rows = []
    for rank in range(num_ranks):
        forwards, backwards = [], []
        for first in range(0, num_microbatches, num_ranks):
            group = range(first, first + num_ranks)
            for chunk in chunks:
                stage = chunk * num_ranks + rank
                forwards += [Action("F", stage, microbatch) for microbatch in group]
            for chunk in reversed(chunks):
                stage = chunk * num_ranks + rank
                backwards += [Action("B", stage, microbatch) for microbatch in group]
        ahead = (virtual_stages - 1) * num_ranks + 2 * (num_ranks - 1 - rank)
        rows.append(_one_by_one(forwards, backwards, ahead))
    return _table("interleaved", looped(num_ranks, virtual_stages), num_microbatches, rows)


def _refuse_uneven(num_ranks: int, num_microbatches: int) -> None:
    below = num_microbatches // num_ranks * num_ranks
    near = [str(number) for number in (below, below + num_ranks) if number]
    raise BigtrainError(
        f"interleaved cannot share {num_microbatches} microbatches among {num_ranks} ranks",
        why="microbatches go in groups of as many as there are ranks",
        mend=f"give {' or '.join(near)} microbatches, or take a schedule that runs any number: "
        "gpipe, 1f1b, zb_h1, zb_v, dualpipe_v",
    )


def zb_h1(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Table:
    """Zero-bubble H1: 1F1B with split backwards (https://arxiv.org/abs/2401.10241, section 2.1).

    The input gradient goes on its way at once; rank r does weight gradients r microbatches later,
    so that all ranks hold up to num_ranks microbatches, and weight gradients that are left fill
    what 1F1B idles at the end.
    """
    rows = []
    for rank in range(num_ranks):
        forwards = [Action("F", rank, microbatch) for microbatch in range(num_microbatches)]
        backwards = []
        for microbatch in range(num_microbatches + rank):
            pair = []
            if microbatch < num_microbatches:
                pair.append(Action("I", rank, microbatch))
            if microbatch >= rank:
                pair.append(Action("W", rank, microbatch - rank))
            backwards.append(pair)
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        row: list[Action] = forwards[:ahead]
        for index, pair in enumerate(backwards):
            row += forwards[ahead + index : ahead + index + 1] + pair
        rows.append(row)
    return _table("zb_h1", looped(num_ranks, 1), num_microbatches, rows)


def zb_v(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Table:
    """Zero-bubble V (https://arxiv.org/abs/2401.10241, section 6), no bubble where F = I = W.

    Every rank holds an early and a late stage. It fills the wait for the first microbatch to
    return with forwards, up to the memory of 1F1B's first rank (2 num_ranks of half a size); from
    then on each microbatch's six actions make one period.
    """
    enough = max(num_microbatches, 2 * num_ranks)
    rows = []
    for rank in range(num_ranks):
        row = _Row(rank, 2 * num_ranks - 1 - rank)
        left = num_ranks - rank
        row.repeat(2 * left - 1, "F0")
        row.repeat(rank, "F1 F0")
        row.repeat(left, "F1 I1 W1")
        row.repeat(enough - num_ranks - left + 1, "F0 I0 W0 F1 I1 W1")
        row.repeat(left - 1, "I0 W0 F1 I1 W1")
        row.repeat(rank, "I0 I1")
        row.repeat(left, "I0 W0")
        row.repeat(rank, "W0 W1")
        rows.append(row.actions)
    return _table("zb_v", vee(num_ranks), num_microbatches, rows)


def dualpipe_v(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Table:
    """DualPipe cut in half (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.2.1).

    DualPipe feeds microbatches in from both ends of two copies of the model; its one half with the
    V placement needs one copy (the cut: https://hackmd.io/@ufotalent/r1lVXsa9Jg). In the steady
    state each forward stands beside the backward of the rank's other stage, so that the one may
    compute while the other communicates.
    """
    enough = max(num_microbatches, 2 * num_ranks)
    rows = []
    for rank in range(num_ranks):
        row = _Row(rank, 2 * num_ranks - 1 - rank)
        left = num_ranks - rank - 1
        row.repeat(2 * left, "F0")
        row.repeat(rank + 1, "F0 F1")
        row.repeat(left, "I1 W1 F1")
        row.repeat(enough - 2 * num_ranks + rank + 1, "F0 B1 F1 B0")
        row.repeat(left, "B1 F1 B0")
        half, odd = divmod(rank + 1, 2)  # of the backwards left, the later half is split
        row.repeat(half, "B1 B0")
        row.repeat(odd, "B1 I0")
        row.repeat(half, "I1 I0")
        row.repeat(left, "W I0")
        row.repeat(rank + 1, "W")
        rows.append(row.actions)
    return _table("dualpipe_v", vee(num_ranks), num_microbatches, rows)


class _Row:
    """Writes the row of a rank with two stages: "F1" is the next forward of its later stage.

    "W" alone is the oldest weight gradient that is due.
    """

    def __init__(self, early: int, late: int) -> None:
        self.actions: list[Action] = []
        self._stages = (early, late)
        self._next: dict[str, int] = {}
        self._due: list[Action] = []

    def repeat(self, times: int, words: str) -> None:
        for word in words.split() * times:
            self._put(word)

    def _put(self, word: str) -> None:
        if word == "W":
            self.actions.append(self._due.pop(0))
            return
        kind, stage = word[0], self._stages[int(word[1])]
        if kind == "W":
            action = next(due for due in self._due if due.stage == stage)
            self._due.remove(action)
        else:
            counter = word if kind == "F" else "B" + word[1]
            action = Action(kind, stage, self._next.get(counter, 0))
            self._next[counter] = action.microbatch + 1
        if kind == "I":
            self._due.append(Action("W", stage, action.microbatch))
        self.actions.append(action)


def _one_by_one(forwards: list[Action], backwards: list[Action], ahead: int) -> list[Action]:
    """Return `ahead` forwards, then a forward and a backward in turn, then what is left."""
    ahead = min(ahead, len(forwards))
    row = forwards[:ahead]
    for index, backward in enumerate(backwards):
        row += [*forwards[ahead + index : ahead + index + 1], backward]
    return row


def _table(
    name: str, placement: tuple[int, ...], num_microbatches: int, rows: Iterable[Iterable[Action]]
) -> Table:
    """Return the table of what `rows` do for the microbatches that exist.

    Microbatches do not depend on one another, so what is left after dropping some is still legal.
    """
    kept = tuple(tuple(_existing(row, num_microbatches)) for row in rows)
    return Table(name, placement, num_microbatches, kept)


def _existing(row: Iterable[Action], num_microbatches: int) -> Iterator[Action]:
    return (action for action in row if action.microbatch < num_microbatches)
