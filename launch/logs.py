"""The logs of all ranks as one: what several ranks say at the same place is shown once."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bigtrain.errors import LaunchError
from bigtrain.run_folder import RunFolder

from .outcome import in_rows

_POLL_SECONDS = 0.3
_OWN = re.compile(r"[\d,.]+ \S+/s|[\d:]+ left|^rank \d+")


def find_logs(run: str) -> dict[int, Path]:
    """Return the log of each rank of a run.

    Raises:
        LaunchError: there is none.
    """
    folder = RunFolder(Path(run)).logs
    found = {}
    for path in folder.glob("rank-*.log"):
        match = re.fullmatch(r"rank-(\d+)\.log", path.name)
        if match:
            found[int(match[1])] = path
    if not found:
        raise LaunchError(
            f"there are no logs in {folder}",
            why="each rank that bigtrain launch starts has one there, rank-N.log",
            mend="give the folder of a run, its run.dir",
        )
    return dict(sorted(found.items()))


def merged(lines: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Yield the lines of all ranks, each rank's in order; what several say, as the first of them.

    Lines that differ only by the speed of their rank are the same.
    """
    left = {rank: list(own) for rank, own in sorted(lines.items())}
    keys = {rank: [_key(line) for line in own] for rank, own in left.items()}
    at = dict.fromkeys(left, 0)
    while waiting := [rank for rank in left if at[rank] < len(left[rank])]:
        first = waiting[0]
        text, key = left[first][at[first]], keys[first][at[first]]
        saying = []
        for rank in waiting:
            # What others have to say before they come to that line goes first.
            with contextlib.suppress(ValueError):
                there = keys[rank].index(key, at[rank])
                for line in left[rank][at[rank] : there]:
                    yield f"{_named([rank])} | {line}"
                at[rank] = there + 1
                saying.append(rank)
        yield f"{_named(saying)} | {text}"


def _key(line: str) -> str:
    """Return what makes a line the same: not the speed of the rank, nor its number."""
    return _OWN.sub("#", line)


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + in_rows(ranks)


def show_logs(
    run: str,
    show: Callable[[str], None],
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show what is in the logs; with `follow`, go on with what comes, until Ctrl-C."""
    read: dict[int, int] = {}
    while True:
        fresh = {rank: _fresh(rank, path, read) for rank, path in find_logs(run).items()}
        for line in merged(fresh):
            show(line)
        if not follow:
            return
        sleep(_POLL_SECONDS)


def _fresh(rank: int, path: Path, read: dict[int, int]) -> list[str]:
    """Return the whole lines that were not read yet; a last one without end waits for the rest."""
    with open(path, "rb") as file:
        file.seek(read.get(rank, 0))
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    read[rank] = read.get(rank, 0) + len(whole)
    return whole.decode("utf-8", errors="replace").splitlines()
