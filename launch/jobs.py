"""The jobs of bigtrain in the queue: list them, follow one, cancel some."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bigtrain.errors import LaunchError

from .slurm_commands import Ask, QueuedJob, ask_slurm, job_facts, patiently, queued_jobs

_ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "NODE_FAIL"),
    *("PREEMPTED", "BOOT_FAIL", "REVOKED"),
)
_SHORTEST_POLL, _LONGEST_POLL = 0.5, 5.0


def job_lines(jobs: Sequence[QueuedJob]) -> Iterator[str]:
    """Yield a table of the jobs."""
    if not jobs:
        yield "no job of bigtrain waits or runs"
        return
    head = ("job", "state", "time", "limit", "nodes", "reason", "run")
    rows = [head] + [
        (j.number, j.state.lower(), j.elapsed, j.limit, j.nodes, j.reason, _near(j.folder))
        for j in jobs
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def chosen(wish: str, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """Return the jobs that a number or a run folder means.

    Raises:
        LaunchError: it means none.
    """
    folder = str(Path(wish).absolute())
    found = [job for job in jobs if wish in (job.number, job.array) or job.folder == folder]
    if not found:
        there = ", ".join(f"{job.number} ({_near(job.folder)})" for job in jobs) or "none"
        raise LaunchError(
            f"no job of bigtrain that waits or runs is {wish}",
            why=f"there are: {there}",
            mend="give the number of a job, or its run folder; what has ended is in the run "
            "folder's slurm/*.out",
        )
    return found


def cancel(wishes: Sequence[str], ask: Ask = ask_slurm) -> Iterator[str]:
    """Cancel jobs by their numbers or run folders, and yield a line for each.

    A run that trains saves first: Slurm gives it KillWait seconds (30, unless the site says other).

    Raises:
        LaunchError: one of them is no job that waits or runs; all others are cancelled.
    """
    jobs = queued_jobs(ask)
    numbers: dict[str, QueuedJob] = {}
    missing: LaunchError | None = None
    for wish in wishes:
        try:
            for job in chosen(wish, jobs):
                numbers[wish if wish == job.number else job.array] = job
        except LaunchError as error:
            missing = missing or error
    if numbers:
        ask(["scancel", *numbers])
    for number in numbers:
        yield f"cancelled {number}"
    arrays, folders = ({getattr(j, n) for j in numbers.values()} for n in ("array", "folder"))
    for job in jobs:  # of a chain, the next one goes on where one ends unfinished
        if job.folder in folders and job.array not in arrays and job.reason == "Dependency":
            yield f"job {job.number} of the same run waits for its turn, and is not cancelled"
    if missing is not None:
        raise missing


def number_to_follow(wish: str, ask: Ask = ask_slurm) -> str:
    """Return the job that a number or a run folder means; also one that has ended lately."""
    jobs = queued_jobs(ask)
    numbers = [job.number for job in jobs if job.number == wish]
    if not numbers and wish.isdecimal() and wish not in [job.array for job in jobs]:
        return wish  # it may have ended: Slurm remembers that for some minutes
    found = chosen(wish, jobs) if not numbers else []
    if len(found) > 1:
        raise LaunchError(
            f"{wish} is several jobs: {', '.join(job.number for job in found)}",
            why="each has a log of its own",
            mend=f"follow one of them: bigtrain jobs follow {found[0].number}",
        )
    return (numbers or [job.number for job in found])[0]


def follow(
    number: str,
    show: Callable[[str], None],
    say: Callable[[str], None],
    ask: Ask = ask_slurm,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show the log of a job as it grows, through requeues, until the job has ended.

    Returns:
        0 if it completed, else 1.
    """
    shown, before, wait = 0, "", _SHORTEST_POLL
    while True:
        facts = patiently(lambda: job_facts(number, ask), sleep)
        state = facts.get("JobState", "UNKNOWN")
        if state != before:
            reason = facts.get("Reason", "None")
            say(f"job {number}: {state.lower()}" + (f" ({reason})" if reason != "None" else ""))
            before = state
        text, shown = _more(Path(facts.get("StdOut", "")), shown)
        if text:
            show(text)
        if state.startswith(_ENDED):
            text, _ = _more(Path(facts.get("StdOut", "")), shown)
            show(text)
            return 0 if state == "COMPLETED" else 1
        wait = _SHORTEST_POLL if text else min(_LONGEST_POLL, 1.3 * wait)
        sleep(wait)


def _more(log: Path, start: int) -> tuple[str, int]:
    """Return what a log has from `start` on, and where it ends now."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(start)
        new = file.read()
        return new.decode("utf-8", errors="replace"), start + len(new)
    return "", start


def _near(folder: str) -> str:
    """Return a folder as it is seen from here, where it is below."""
    with contextlib.suppress(ValueError):
        return str(Path(folder).relative_to(Path.cwd()))
    return folder
