"""Asking Slurm: its commands, and what they print."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bigtrain.errors import LaunchError

from .slurm import COMMENT

T = TypeVar("T")
Ask = Callable[[Sequence[str]], str]
_PATIENCE_SECONDS = 60
_TRIES, _PAUSE_SECONDS = 4, 5.0
_FORMAT = "%i|%F|%T|%M|%l|%D|%r|%k"


def ask_slurm(command: Sequence[str], patience_seconds: float = _PATIENCE_SECONDS) -> str:
    """Return what a command of Slurm prints.

    Raises:
        LaunchError: it is not there, does not answer, or refuses.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience_seconds, check=False
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"there is no {command[0]} here",
            why="this is done by Slurm's own commands",
            mend="do it on a machine where Slurm's commands are in PATH; to train on this one, set "
            "launch.slurm=null",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} did not answer within {patience_seconds:.0f} s",
            why="Slurm's controller is down, or overloaded",
            mend="see what sinfo says, and try again",
        ) from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        raise LaunchError(
            f"{command[0]} refused: {said}",
            why=f"exit code {done.returncode} of: {' '.join(command)}",
            mend="correct what it names, most often a key of launch.slurm",
        )
    return done.stdout


def patiently(do: Callable[[], T], sleep: Callable[[float], None]) -> T:
    """Ask a busy Slurm a few times: many jobs may be at their limit at the same time."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(LaunchError):
            return do()
        sleep(_PAUSE_SECONDS)
    return do()


@dataclass(frozen=True)
class QueuedJob:
    """A job of bigtrain that waits or runs."""

    number: str  # as Slurm shows it: 17, 17_3, 17_[4-9]
    array: str  # 17 for all of these
    state: str
    elapsed: str
    limit: str
    nodes: str
    reason: str
    folder: str  # of the run


def queued_jobs(ask: Ask = ask_slurm) -> list[QueuedJob]:
    """Return the user's jobs of bigtrain, in the order of their numbers."""
    jobs = []
    for line in ask(["squeue", "--me", "--noheader", f"--format={_FORMAT}"]).splitlines():
        fields = line.split("|", 7)
        if len(fields) == 8 and fields[7].startswith(COMMENT):
            fields[0], _, component = fields[0].partition("+")
            if component.strip("0"):  # of a heterogeneous job, the first stands for all
                continue
            number, array, state, elapsed, limit, nodes, reason, comment = fields
            folder = comment.removeprefix(COMMENT)
            jobs.append(QueuedJob(number, array, state, elapsed, limit, nodes, reason, folder))
    return sorted(jobs, key=lambda job: [int(n) for n in re.findall(r"\d+", job.number)])


def job_facts(number: str, ask: Ask = ask_slurm) -> dict[str, str]:
    """Return what Slurm knows of a job: JobState, StdOut, Requeue, PreemptTime, ..."""
    first = ask(["scontrol", "show", "job", "-o", number]).strip().split("\n")[0]
    return dict(re.findall(r"(?:^| )([A-Z][A-Za-z/:]*)=(.*?)(?= [A-Z][A-Za-z/:]*=|$)", first))
