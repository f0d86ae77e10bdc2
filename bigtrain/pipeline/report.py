"""What `bigtrain schedule` does: schedules by name or file, on a clock, as text and picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.closed_form import bubble_share
from bigtrain.pipeline.draw import MAX_CELLS, check_path, draw, table_text
from bigtrain.pipeline.schedule import SCHEDULES, Table, make_table
from bigtrain.pipeline.simulate import Costs, Timeline, simulate
from bigtrain.pipeline.table_file import read_csv, to_csv
from bigtrain.pipeline.validate import Report, validate

MAX_ACTIONS = 100_000
"""What the clock and the proof are through with in a few seconds."""


@dataclass(frozen=True)
class Wish:
    """What the user asked for; None where nothing was said.

    Times are of all layers of a rank, so that schedules with more and smaller stages compare.
    """

    schedule: str
    ranks: int | None = None
    microbatches: int | None = None
    virtual_stages: int | None = None
    forward: float = 1
    backward: float = 2
    weight: float = 1
    transfer: float = 0
    compare: str = ""


@dataclass(frozen=True)
class Result:
    """A schedule on the clock. `formula` is its bubble by the closed form, where one is known."""

    name: str
    timeline: Timeline
    report: Report
    formula: Fraction | None


def results_of(wish: Wish) -> list[Result]:
    """Return the schedule that was asked for, and those to compare it with.

    Raises:
        BigtrainError: a schedule cannot be made, read or run with these numbers.
    """
    _check_times(wish)
    names = [name.strip() for name in wish.compare.split(",") if name.strip()]
    first = _result(wish.schedule, wish)
    if _is_file(wish.schedule):  # compare with tables of the same size
        table = first.timeline.table
        wish = Wish(
            **{**vars(wish), "ranks": table.num_ranks, "microbatches": table.num_microbatches}
        )
    others = [name for name in dict.fromkeys(names) if name != wish.schedule]
    return [first, *(_result(name, wish, compared=True) for name in others)]


def lines_of(results: Sequence[Result], width: int | None = None) -> Iterator[str]:
    """Yield the lines to print: the first schedule's timeline, then a table of all of them."""
    yield table_text(results[0].timeline, width)
    yield ""
    head = ("schedule", "stages", "step time", "bubble", "by formula", "peak in flight, per rank")
    rows = [head, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
    tables = [result.timeline.table for result in results]
    if any(table.num_stages > table.num_ranks for table in tables):
        yield "(in flight counts per stage: with k stages on a rank, each is 1/k of its memory)"


def write_csv(result: Result, path: str) -> None:
    """Write the table of `result` as a file that can be edited and read back.

    Raises:
        BigtrainError: it cannot be written.
    """
    try:
        Path(path).write_text(to_csv(result.timeline.table), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BigtrainError(
            f"cannot write the schedule: {getattr(error, 'strerror', None) or error}",
            where=path,
            mend="give a path in a folder that exists and can be written to",
        ) from None


def draw_all(results: Sequence[Result], path: str | None) -> str:
    """Draw `results` into `path`, by default schedule-NAME.svg; return what was done, in words.

    Raises:
        BigtrainError: `path` was given and cannot be drawn into.
    """
    count = sum(len(row) for result in results for row in result.timeline.spans)
    if path is None and count > MAX_CELLS:
        return f"none: {count:,} actions are too many to see"
    path = path or f"schedule-{results[0].name}.svg"
    draw({result.name: result.timeline for result in results}, path)
    return path


def check_picture(path: str | None) -> None:
    """Raise a BigtrainError, before anything else is done, if `path` cannot be a picture."""
    if path is not None:
        check_path(path)


def _result(name: str, wish: Wish, compared: bool = False) -> Result:
    table = _table(name, wish, compared)
    count = sum(map(len, table.rows))
    if count > MAX_ACTIONS:
        raise BigtrainError(
            f"schedule {table.name} has {count:,} actions",
            why=f"more than {MAX_ACTIONS:,} take long to simulate, and nobody can look at them",
            mend="give fewer ranks, virtual stages or microbatches: the pattern repeats",
        )
    report = validate(table)
    share = Fraction(table.num_ranks, table.num_stages)
    forward, backward, weight = (
        Fraction(str(time)) * share for time in (wish.forward, wish.backward, wish.weight)
    )
    costs = Costs(forward, backward, weight, Fraction(str(wish.transfer)))
    timeline = simulate(table, costs, Fraction(1, 2))
    formula = None
    if not _is_file(name):
        stages = table.num_stages // table.num_ranks
        size = (table.num_ranks, table.num_microbatches, stages)
        formula = bubble_share(name, *size, costs)
    return Result(table.name, timeline, report, formula)


def _is_file(name: str) -> bool:
    return name not in SCHEDULES and (name.lower().endswith(".csv") or "/" in name)


def _table(name: str, wish: Wish, compared: bool) -> Table:
    """Return the table by name or from a file, within what can be shown."""
    if _is_file(name):
        given = (wish.ranks, wish.microbatches, wish.virtual_stages)
        if not compared and any(number is not None for number in given):
            raise BigtrainError(
                f"numbers of ranks, microbatches or virtual stages beside {name}",
                why="the table in the file says how many there are",
                mend="leave out --ranks, --microbatches and --virtual-stages",
            )
        return read_csv(name)
    ranks = 4 if wish.ranks is None else wish.ranks
    microbatches = 8 if wish.microbatches is None else wish.microbatches
    virtual_stages = wish.virtual_stages
    if virtual_stages is None or (compared and name != "interleaved"):
        virtual_stages = 2 if name == "interleaved" else 1
    if min(ranks, microbatches, virtual_stages) > 0:
        stages = ranks * max(virtual_stages, 1)
        if stages * microbatches > MAX_ACTIONS // 2:
            raise BigtrainError(
                f"{stages} stages and {microbatches} microbatches are too many to simulate",
                why=f"that is more than {MAX_ACTIONS:,} actions, and nobody can look at them",
                mend="give fewer ranks, virtual stages or microbatches: the pattern repeats",
            )
    return make_table(name, ranks, microbatches, virtual_stages)


def _check_times(wish: Wish) -> None:
    """Refuse times that are no times, by the names of the command line."""
    for name in ("forward", "backward", "weight", "transfer"):
        time = getattr(wish, name)
        if not math.isfinite(time) or time < 0:
            raise BigtrainError(f"--{name} is {time}", mend="give a time that is finite and >= 0")
    if wish.weight > wish.backward:
        raise BigtrainError(
            f"--weight {wish.weight:g} is more than --backward {wish.backward:g}",
            why="the whole backward counts both the input and the weight gradients",
            mend=f"give a --weight of at most {wish.backward:g}, or a longer --backward",
        )


def _row(result: Result) -> tuple[str, ...]:
    table, timeline = result.timeline.table, result.timeline
    return (
        result.name,
        str(table.num_stages),
        f"{float(timeline.step_time):g}",
        _percent(timeline.bubble),
        "-" if result.formula is None else _percent(result.formula),
        _peaks(result.report.peak_in_flight),
    )


def _peaks(peaks: tuple[int, ...]) -> str:
    shown = " ".join(map(str, peaks[:16]))
    return shown if len(peaks) <= 16 else f"{shown} ... (largest {max(peaks)})"


def _percent(share: Fraction | float) -> str:
    return f"{100 * float(share):.1f} %"
