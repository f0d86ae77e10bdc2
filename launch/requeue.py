"""What a Slurm job does at an end that is not the run's: it queues up again, where it may."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from bigtrain.errors import LaunchError

from .outcome import Ended
from .slurm_commands import Ask, ask_slurm, job_facts

T = TypeVar("T")

_PREEMPTED = "pre-empted"
_MOST_VAIN_RESTARTS = 3
_TRIES, _PAUSE_SECONDS = 4, 5.0
UNFINISHED = 75  # EX_TEMPFAIL: all is well, start it again


def queue_again(
    ended: Ended,
    env: Mapping[str, str],
    progressed: bool,
    say: Callable[[str], None],
    ask: Ask = ask_slurm,
    sleep: Callable[[float], None] = time.sleep,
) -> Ended:
    """Requeue the job if its time was up, it is pre-empted, or it lost a node; return the error.

    Time that was up without a new checkpoint would be up again; and who loses nodes again and again
    without one is given up, too. The error's exit code is UNFINISHED where somebody should start
    the run again.
    """
    job = job_number(env)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a requeue, begun, is not to be cut off
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)
    try:
        facts = _patiently(lambda: job_facts(job, ask), sleep)
        reason = _reason(ended, facts)
        if reason is None or facts.get("BatchFlag") == "0":  # of salloc, somebody is there to see
            return ended
        if not progressed and not _may_try_again(ended, reason, env):
            say(f"{reason}, but nothing new was saved: it is not queued again")
            return ended
        ended.exit_code = UNFINISHED
        if facts.get("Requeue") == "0":
            say(f"{reason}: it may not queue up again by itself (launch.slurm.requeue)")
        else:
            say(f"{reason}: job {job} queues up again, and goes on from its last checkpoint")
            _patiently(lambda: ask(["scontrol", "requeue", job]), sleep)
    except LaunchError as error:
        say(f"job {job} could not be requeued: {error}")
    return ended


def job_number(env: Mapping[str, str]) -> str:
    """Return how Slurm names this job alone: the number of an array means all of its jobs."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def _reason(ended: Ended, facts: Mapping[str, str]) -> str | None:
    if facts.get("JobState", "").startswith("CANCELLED"):
        return None  # somebody wants it to end, whatever happened besides
    if ended.asked == signal.SIGUSR1:
        return "time is nearly up"
    if ended.lost_nodes:
        return f"lost {', '.join(ended.lost_nodes)}"
    preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown", "(null)")
    return _PREEMPTED if ended.asked == signal.SIGTERM and preempted else None


def _may_try_again(ended: Ended, reason: str, env: Mapping[str, str]) -> bool:
    """Tell whether nothing new saved is no sign that it will always be so."""
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    few = restarts.isdecimal() and int(restarts) < _MOST_VAIN_RESTARTS
    return reason == _PREEMPTED or (bool(ended.lost_nodes) and few)


def _patiently(do: Callable[[], T], sleep: Callable[[float], None]) -> T:
    """Ask a busy Slurm a few times: many jobs may be at their limit at the same time."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(LaunchError):
            return do()
        sleep(_PAUSE_SECONDS)
    return do()
