"""How ranks ended, and what of it to tell: the likeliest culprit first, what is the same once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigtrain.errors import LaunchError

from .job import Job


@dataclass
class Rank:
    """A rank that was started, and how it ended."""

    rank: int
    node: str = ""  # its name, where there are several
    code: int | None = None  # None while it runs; negative: by that signal
    ended_by_us: bool = False
    lost: str = ""  # why nothing is known of its end
    report: dict[str, Any] = field(default_factory=dict)  # what it told of its end itself

    @property
    def who(self) -> str:
        return f"rank {self.rank}" + (f" on {self.node}" if self.node else "")

    def has_failed(self, asked: bool) -> bool:
        """Has it ended otherwise than the others will?

        A rank that stops with all others because it was asked to has not failed; one that leaves
        alone has, even with exit code 0.
        """
        if self.code is None:
            return False
        orderly = self.report.get("orderly") and not self.report.get("at_once")
        return not (self.report.get("done") or (asked and orderly))


class Ended(LaunchError):
    """The ranks ended before the run was complete.

    asked: the first signal that we got. lost_nodes: those that cannot take part, for they are gone,
    never joined, or do not fit the others (how_lost).
    """

    def __init__(
        self,
        code: int,
        what: str,
        asked: int | None,
        lost_nodes: Sequence[str] = (),
        *,
        how_lost: Literal["gone", "absent", "unfit"] = "gone",
        why: str = "",
        mend: str = "",
    ) -> None:
        super().__init__(what, why=why, mend=mend)
        self.exit_code, self.asked = code, asked
        self.lost_nodes, self.how_lost = tuple(lost_nodes), how_lost


def stop_code(asked: int) -> int:
    """Return the exit code of a run that was stopped by a signal; SIGUSR1 counts as SIGTERM."""
    return 128 + (signal.SIGINT if asked == signal.SIGINT else signal.SIGTERM)


def outcome(job: Job, ranks: Sequence[Rank], asked: Sequence[int]) -> int:
    """Return 0 if all is done; `asked` are the signals that we got.

    Raises:
        Ended: with the error of the rank that failed first.
    """
    failed = [rank for rank in ranks if rank.code != 0 or not rank.report.get("done")]
    if not failed:
        return 0
    first = min(failed, key=_blame)
    assert first.code is not None
    signal_number = asked[0] if asked else None
    if first.report.get("orderly"):
        raise Ended(first.report["exit_code"], first.report["text"], signal_number)
    killed = first.code < 0 and not first.report and not first.lost
    if asked and (first.ended_by_us or killed):
        name = signal.Signals(asked[0]).name
        what = f"ended by {name} before it could finish a step and save"
        raise Ended(stop_code(asked[0]), what, signal_number)
    text = first.report.get("text") or first.lost
    same = [r for r in failed if text and text == (r.report.get("text") or r.lost)]
    others = [r for r in failed if r is not first and r not in same]
    also = f"\n  ({_named(others)} then ended too)" if others else ""
    code = first.code if first.code >= 0 else 128 - first.code
    what = _describe(job, first, same)
    lost = dict.fromkeys(rank.node for rank in failed if rank.lost)
    text = f"{what}{also}\n  log:  {job.log(first.rank)}"
    raise Ended(code or 1, text, signal_number, [*lost])


def _describe(job: Job, rank: Rank, same: Sequence[Rank]) -> str:
    """Say how a rank ended; `same` are the ranks that told the same."""
    if rank.lost:
        return f"{_named(same)} lost: {rank.lost}"
    if rank.report.get("text"):
        return f"{_named(same)} failed: {rank.report['text']}"
    assert rank.code is not None
    if rank.code >= 0:
        what = f"{rank.who} left with exit code {rank.code} before its work was done"
        return f"{what}; it printed last:\n{last_lines(job.log(rank.rank))}"
    name = signal.Signals(-rank.code).name
    why = {
        "SIGKILL": "somebody, or the system because memory ran out, killed it",
        "SIGSEGV": "native code crashed: look for the library in the log",
        "SIGBUS": "shared memory or disk ran out, or a mapped file was cut",
    }.get(name, "see its log")
    return f"{rank.who} was ended by {name}\n  why:  {why}"


def _named(ranks: Sequence[Rank]) -> str:
    """Return "rank 3 on n2", or "ranks 0-3, 6": what is in a row is shortened."""
    if len(ranks) == 1:
        return ranks[0].who
    return f"ranks {in_rows([rank.rank for rank in ranks])}"


def in_rows(numbers: Sequence[int]) -> str:
    """Return "0-3, 6" for 0, 1, 2, 3, 6."""
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    texts = [f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return ", ".join(texts)


def _blame(rank: Rank) -> tuple[int, float]:
    """Order failed ranks, the likeliest culprit first.

    Ranks of a node that is gone come first; then one that died without a word, before one that
    could tell its error, that before one that only lost its peers, and last those that we ended.
    """
    if rank.lost:
        order = 0
    elif rank.ended_by_us and (not rank.report or rank.report.get("orderly")):
        order = 4
    elif rank.report.get("consequence"):
        order = 3
    elif rank.report:
        order = 2
    else:
        order = 1
    return order, float(rank.report.get("time", 0.0))


def last_lines(log: Path, count: int = 12, start: int = 0) -> str:
    """Return the end of a log, of what follows `start`, to be shown in an error."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[start:].decode("utf-8", errors="replace")
        lines = text.splitlines()[-count:]
        return "\n".join(f"    {line}" for line in lines) or "    (it is empty)"
    return "    (its log cannot be read)"
