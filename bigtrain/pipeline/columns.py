"""A table drawn as text, one line a rank, with places marked: for messages about faults."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_BEFORE, _COLUMNS = 5, 12
_RANKS = 16
_WIDEST = 24

Place = tuple[int, int]
"""A cell: rank and position in its row. One past the end is where something is missing."""


def in_columns(rows: Sequence[Sequence[object]], marks: Collection[Place] = ()) -> str:
    """Return `rows` in columns, marked cells like `>1B0<`; of a large table the part around them.

    A mark past the end of a row is drawn as `>?<`.
    """
    first, last = _window(rows, marks)
    ranks = _ranks(len(rows), marks)
    cells = []
    for rank in ranks:
        row = [_cell(rows[rank], rank, place, marks) for place in range(first, last)]
        cut_left, cut_right = first > 0, len(rows[rank]) > last
        cells.append(["..."] * cut_left + row + ["..."] * cut_right)
    widths = [max(map(len, column)) for column in zip(*_filled(cells), strict=True)]
    label = len(f"rank {max(ranks, default=0)}")
    lines = []
    for rank, row in zip(ranks, _filled(cells), strict=True):
        drawn = "  ".join(text.center(width) for text, width in zip(row, widths, strict=True))
        lines.append(f"{f'rank {rank}'.ljust(label)} | {drawn}".rstrip())
    if len(ranks) < len(rows):
        lines.append(f"({len(rows) - len(ranks)} of {len(rows)} ranks are not shown)")
    return "\n".join(lines)


def _cell(row: Sequence[object], rank: int, place: int, marks: Collection[Place]) -> str:
    marked = (rank, place) in marks
    text = str(row[place]) if place < len(row) else "?" * marked
    if len(text) > _WIDEST:
        text = text[: _WIDEST - 3] + "..."
    return f">{text}<" if marked else text


def _window(rows: Sequence[Sequence[object]], marks: Collection[Place]) -> tuple[int, int]:
    longest = max([len(row) for row in rows] + [place + 1 for _, place in marks], default=0)
    first = max(0, min((place for _, place in marks), default=0) - _BEFORE)
    last = max([first + _COLUMNS] + [min(place + 2, first + 2 * _COLUMNS) for _, place in marks])
    return first, min(last, longest)


def _ranks(num_ranks: int, marks: Collection[Place]) -> list[int]:
    """Return the ranks to draw: all, or those with marks and the first ones."""
    marked = sorted({rank for rank, _ in marks})[:_RANKS]
    others = [rank for rank in range(num_ranks) if rank not in marked]
    return sorted(marked + others[: max(0, _RANKS - len(marked))])


def _filled(cells: list[list[str]]) -> list[list[str]]:
    width = max(map(len, cells), default=0)
    return [row + [""] * (width - len(row)) for row in cells]
