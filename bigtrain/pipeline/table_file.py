"""Schedules in files: one line per rank, cells like 0F0 or 1RECV_F3 between commas."""

from __future__ import annotations

from pathlib import Path

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.columns import in_columns
from bigtrain.pipeline.schedule import MAX_ACTIONS
from bigtrain.pipeline.table import Action, Table
from bigtrain.pipeline.validate import Fault, examine

MAX_BYTES = 10 * MAX_ACTIONS


def to_csv(table: Table) -> str:
    """Return `table` as text that `read_csv` reads back."""
    return "".join(",".join(map(str, row)) + "\n" for row in table.rows)


def read_csv(path: str | Path) -> Table:
    """Return the table in the file at `path`, proven to run; its name is that of the file.

    One line per rank, in the order of ranks; empty cells and empty lines at the end are ignored.
    Where stages are placed and how many microbatches there are is found from the cells.

    Raises:
        BigtrainError: the file cannot be read or holds no table that can run.
    """
    path = Path(path)
    lines = _read(path).rstrip().split("\n")
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    rows = tuple(
        tuple(_parse(path, cells, rank, column) for column, cell in enumerate(row) if cell)
        for rank, row in enumerate(cells)
    )
    table = Table(path.stem, _placement(path, rows), _num_microbatches(path, rows), rows)
    found = examine(table)
    if isinstance(found, Fault):
        line = min((rank for rank, _ in found.marks), default=0) + 1
        raise found.error(table, where=f"{path}:{line}")
    return table


def _read(path: Path) -> str:
    """Return the text of the file."""
    mend = "give a text file with one line per rank, of cells like 0F0, 0B0 between commas"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BigtrainError(
            f"cannot read the schedule: {why}", where=str(path), mend=mend
        ) from None
    if len(raw) > MAX_BYTES:
        what = f"the schedule is larger than {MAX_BYTES // 10**6} MB"
        raise BigtrainError(what, where=str(path), mend=mend)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"the schedule is not text: byte {error.start} is not UTF-8"
        raise BigtrainError(what, where=str(path), mend=mend) from None
    if "\0" in text:
        raise BigtrainError("the schedule is not text: it holds NUL", where=str(path), mend=mend)
    if not text.strip(", \t\r\n"):
        raise BigtrainError("the schedule is empty", where=str(path), mend=mend)
    return text


def _parse(path: Path, cells: list[list[str]], rank: int, column: int) -> Action:
    try:
        return Action.parse(cells[rank][column])
    except BigtrainError as error:
        problem = error.problem
        raise BigtrainError(
            f"cell {column + 1}: {problem.what}\n{in_columns(cells, {(rank, column)})}",
            where=f"{path}:{rank + 1}",
            why=problem.why,
            mend=problem.mend,
        ) from None


def _placement(path: Path, rows: tuple[tuple[Action, ...], ...]) -> tuple[int, ...]:
    """Return the rank of each stage: that of the row with its first action."""
    owners: dict[int, tuple[int, int]] = {}
    for rank, row in enumerate(rows):
        if not row:
            raise BigtrainError(
                f"rank {rank} has nothing to do\n{in_columns(rows, {(rank, 0)})}",
                where=f"{path}:{rank + 1}",
                mend="give it a stage, or take its line away",
            )
        for place, action in enumerate(row):
            first = owners.setdefault(action.stage, (rank, place))
            if first[0] != rank:
                raise BigtrainError(
                    f"stage {action.stage} is on rank {first[0]} and on rank {rank}\n"
                    f"{in_columns(rows, {first, (rank, place)})}",
                    where=f"{path}:{rank + 1}",
                    why="a stage's parameters are on one rank",
                    mend=f"move all of stage {action.stage} into one line",
                )
    _refuse_gap(path, rows, "stage", set(owners))
    return tuple(owners[stage][0] for stage in range(len(owners)))


def _num_microbatches(path: Path, rows: tuple[tuple[Action, ...], ...]) -> int:
    numbers = {action.microbatch for row in rows for action in row}
    _refuse_gap(path, rows, "microbatch", numbers)
    return len(numbers)


def _refuse_gap(
    path: Path, rows: tuple[tuple[Action, ...], ...], what: str, numbers: set[int]
) -> None:
    """Raise if `numbers`, found in the table, are not 0, 1, 2 and so on."""
    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if missing == len(numbers):
        return
    places: dict[int, tuple[int, int]] = {}
    for rank, row in enumerate(rows):
        for place, action in enumerate(row):
            places.setdefault(getattr(action, what), (rank, place))
    above = min(number for number in numbers if number > missing)
    raise BigtrainError(
        f"there is {what} {above}, but no {what} {missing}\n{in_columns(rows, {places[above]})}",
        where=f"{path}:{places[above][0] + 1}",
        mend=f"number every {what} from 0 on, without gaps",
    )
